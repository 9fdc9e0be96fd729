"""The writer to a tracker: what it waits for, what it does when a tracker breaks, and which trackers are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditConfig, AuditRun
from align_audit.errors import ConfigurationError
from align_audit.options.trackers import TRACKER_NAMES
from align_audit.writers.terminal import Terminal
from align_audit.writers.trackers import writer as module
from align_audit.writers.trackers.entry import Entry, Notice, Tracker
from align_audit.writers.trackers.writer import TrackerWriter, chosen_trackers, destinations, maker
from align_audit.writers.writer import Surroundings
from tests.helpers.screens import a_run, quick_look

RECORDS = [quick_look(record) for record in a_run("ruined")]


class Paper:
    """A tracker that keeps the steps it is given, and breaks at some of them."""

    place = "a paper"

    def __init__(self, breaks: Callable[[int], BaseException | None] = lambda step: None) -> None:
        self.steps: list[int] = []
        self.reports: list[str] = []
        self._breaks = breaks

    def add(self, entry: Entry) -> None:
        if (error := self._breaks(entry.step)) is not None:
            raise error
        self.steps.append(entry.step)

    def add_report(self, path: Path, step: int) -> None:
        self.reports.append(path.read_text())


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Tracker | None]:
    """What the openers of all trackers give, one after the other; the last again and again."""
    papers: list[Tracker | None] = []

    def opener() -> Tracker | None:
        return papers.pop(0) if len(papers) > 1 else papers[0]

    monkeypatch.setattr(module, "OPENERS", dict.fromkeys(TRACKER_NAMES, opener))
    return papers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    yield now
    monkeypatch.undo()


def tell(paper: TrackerWriter, *places: int) -> None:
    for place in places:
        paper.record(RECORDS[place], RECORDS[: place + 1])


def a_writer(folder: Path) -> TrackerWriter:
    writer = TrackerWriter("mlflow", folder)
    writer.start(AuditRun(folder, [], [], []))
    return writer


def test_audits_from_before_a_run_is_open_are_sent_when_it_is(opened: list[Tracker | None], tmp_path: Path) -> None:
    paper = Paper()
    opened += [None, None, None, paper]
    writer = a_writer(tmp_path)
    tell(writer, 0, 1)
    assert paper.steps == []
    tell(writer, 2)
    assert paper.steps == [0, 5, 10]


def test_a_run_that_never_opens_is_said_at_the_end(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened.append(None)
    writer = a_writer(tmp_path)
    tell(writer, 0, 1)
    assert not caplog.records
    writer.close()
    assert "the end of the run to MLflow" in caplog.text and "no run of it was open" in caplog.text


def test_no_run_and_no_audit_is_nothing_to_say(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened.append(None)
    a_writer(tmp_path).close()
    assert not caplog.records


@pytest.mark.parametrize("error", [OSError("no network"), SystemExit(1), KeyError("api_key")])
def test_what_breaks_is_said_once_and_holds_nothing_up(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    paper = Paper(lambda step: error if step in (5, 10) else None)
    opened.append(paper)
    writer = a_writer(tmp_path)
    for place in range(len(RECORDS)):
        writer._rests_until = 0.0
        tell(writer, place)
    writer.close()
    assert paper.steps == [0, 20, 40]
    (said,) = caplog.records
    assert "could not write step 5 to MLflow" in said.getMessage() and "said once" in said.getMessage()


def test_a_keyboard_interrupt_passes(opened: list[Tracker | None], tmp_path: Path) -> None:
    opened.append(Paper(lambda step: KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        tell(a_writer(tmp_path), 0)


def test_a_server_that_is_gone_costs_training_a_tenth_of_its_time(
    opened: list[Tracker | None], tmp_path: Path, clock: list[float]
) -> None:
    tries: list[int] = []

    def slow(step: int) -> BaseException | None:
        tries.append(step)
        clock[0] += 60.0 if step == 0 else 0.0
        return TimeoutError("no answer") if step == 0 else None

    paper = Paper(slow)
    opened.append(paper)
    writer = a_writer(tmp_path)
    tell(writer, 0)
    clock[0] += 590.0
    tell(writer, 1)
    assert tries == [0]
    clock[0] += 20.0
    tell(writer, 2)
    assert paper.steps == [5, 10]  # what came meanwhile, too


def test_no_secret_of_an_address_is_said(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened.append(Paper(lambda step: OSError("cannot reach https://me:hidden@host:1/api?key=hidden&a=1 now\n\x1b[2J")))
    tell(a_writer(tmp_path), 0)
    assert "https://…@host:1/api?… now" in caplog.text
    assert "hidden" not in caplog.text and "\x1b" not in caplog.text


def test_the_report_is_sent_where_something_is_new_and_once_a_version(
    opened: list[Tracker | None], tmp_path: Path
) -> None:
    paper = Paper()
    opened.append(paper)
    writer = a_writer(tmp_path)
    report = tmp_path / "align_audit" / "report.html"
    report.parent.mkdir()
    report.write_text("first")
    tell(writer, 0, 1, 2)  # health audits, and no alert
    assert paper.reports == []
    tell(writer, 3)
    assert paper.reports == ["first"]
    writer.close()
    assert paper.reports == ["first"]
    report.write_text("longer than before")
    writer.close()
    assert paper.reports == ["first", "longer than before"]


def test_a_notice_is_short_and_of_printable_characters() -> None:
    alert = next(alert for record in RECORDS for alert in record.alerts)
    hostile = alert.model_copy(update={"rule": "a\x1b[2J\n" * 40, "message": "<script>\x07\n</script>"})
    notice = Notice.of(hostile)
    assert len(notice.title) < 64 and notice.title.isprintable()
    assert notice.text.replace("\n", "").isprintable()


# --- which trackers ---------------------------------------------------------------------------------------------------


def around(*names: Any) -> Surroundings:
    return Surroundings(Path("runs/dpo"), trackers=names)


@pytest.mark.parametrize(
    ("option", "chosen"),
    [("auto", ["wandb", "mlflow"]), ("off", []), (False, []), ("mlflow", ["mlflow"]), (["wandb"], ["wandb"]), ([], [])],
)
def test_trackers_are_chosen_of_those_that_the_trainer_reports_to(option: Any, chosen: list[str]) -> None:
    config = AuditConfig.from_dict({"trackers": option})
    assert AuditConfig.from_dict(config.to_dict()) == config
    reported = around("wandb", "mlflow")
    assert chosen_trackers(config, reported) == chosen
    assert [name for name in TRACKER_NAMES if maker(name)(config, reported) is not None] == chosen


def test_a_tracker_beyond_these_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="asks for trackio, and the trainer reports to wandb"):
        chosen_trackers(AuditConfig(trackers=("trackio",)), around("wandb"))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("wandbb", "did you mean 'wandb'"),
        (["mlflow", "trakio"], "'trakio' is none of them (did you mean 'trackio'?)"),
        ("of", "did you mean 'off'"),
        (7, "expected auto, off, or some of wandb, mlflow, trackio"),
        ([{"wandb": 1}], "expected auto, off, or some of wandb, mlflow, trackio"),
        (True, "expected auto, off, or some of"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(option: Any, words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        AuditConfig.from_dict({"trackers": option})
    assert words in str(refused.value)
    assert str(refused.value).startswith("invalid audit configuration:\n  trackers")


def test_trackers_change_no_measurement() -> None:
    assert AuditConfig(trackers="off").measures_as(AuditConfig().to_dict())
    assert AuditConfig(trackers="off").measures_as(
        {name: value for name, value in AuditConfig().to_dict().items() if name != "trackers"}
    )


def test_where_a_run_is_written_is_a_line(opened: list[Tracker | None]) -> None:
    opened += [Paper(), None]
    line = destinations(AuditConfig(), around("wandb", "mlflow"))
    assert line == "align_audit writes to runs/dpo/align_audit, a paper, MLflow (once its run is open)"


def test_saying_where_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def broken() -> None:
        raise OSError("no such run")

    monkeypatch.setattr(module, "OPENERS", {"wandb": broken})
    Terminal.of(AuditConfig(), around("wandb")).start(AuditRun(tmp_path, [], [], []))
    assert "could not print where it writes: OSError: no such run" in caplog.text
    TrackerWriter("wandb", tmp_path).start(AuditRun(tmp_path, [], [], []))
    assert "could not find the run of W&B: OSError: no such run" in caplog.text
