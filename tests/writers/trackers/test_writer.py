"""The writer to a tracker: what it waits for, what it does when a tracker breaks, and which trackers are chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditConfig, AuditRun
from align_audit.errors import ConfigurationError
from align_audit.options.rules import CAUSES
from align_audit.options.trackers import TRACKER_NAMES
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import FOLDER
from align_audit.writers.terminal import Terminal
from align_audit.writers.trackers import writer as module
from align_audit.writers.trackers.entry import Notice, Tracker
from align_audit.writers.trackers.writer import TrackerWriter, chosen_trackers, destinations, maker
from align_audit.writers.writer import Surroundings
from tests.helpers.pages import data_in, texts_run
from tests.helpers.paper_tracker import RECORDS, Paper, a_writer, open_papers, tell, until


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Tracker | None]:
    """What the openers of all trackers give, one after the other; the last again and again."""
    return open_papers(monkeypatch)


def test_audits_from_before_a_run_is_open_are_sent_when_it_is(opened: list[Tracker | None], tmp_path: Path) -> None:
    paper = Paper()
    opened += [None, None, None, paper]
    writer = a_writer(tmp_path)
    tell(writer, 0, 1)
    assert paper.steps == []
    assert writer._waiting == [record.key for record in RECORDS[:2]]  # no record is held for it
    tell(writer, 2)
    writer.close()
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


@pytest.mark.parametrize("run", [[], RECORDS])
def test_where_nothing_was_audited_nothing_is_sent_or_said(
    opened: list[Tracker | None], run: list[AuditRecord], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paper = Paper()
    opened.append(paper)
    a_writer(tmp_path, run).close()
    assert (paper.steps, paper.notices, paper.pages) == ([], [], [])
    assert not caplog.records


def test_a_keyboard_interrupt_passes(opened: list[Tracker | None], tmp_path: Path, monkeypatch: Any) -> None:
    opened.append(Paper())
    writer = a_writer(tmp_path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "standing_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tell(writer, 0)


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_is_sent_where_an_alert_opens_or_gets_worse_and_at_the_end(
    opened: list[Tracker | None], tmp_path: Path
) -> None:
    paper = Paper()
    opened.append(paper)
    writer = a_writer(tmp_path)
    news = [
        any(alert.event in ("opened", "worse") and alert.level != "info" for alert in each.alerts) for each in RECORDS
    ]
    assert 0 < sum(news) < len(news)
    tell(writer, *range(len(RECORDS)))
    until(lambda: paper.steps == [record.step for record in RECORDS])
    writer.close()
    shown = [data_in(page)["sets"][0]["panels"][0]["steps"][-1] for page in paper.pages]
    assert shown == [*(record.step for record, new in zip(RECORDS, news, strict=True) if new), RECORDS[-1].step]


def test_a_page_of_an_earlier_process_is_not_sent(opened: list[Tracker | None], tmp_path: Path) -> None:
    paper = Paper()
    opened.append(paper)
    writer = a_writer(tmp_path, report=False)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "report.html").write_text("of an earlier process")
    tell(writer, *range(len(RECORDS)))
    writer.close()
    assert paper.steps and paper.pages == []


@pytest.mark.parametrize("texts", [False, True])
def test_texts_of_the_data_are_sent_where_they_are_asked_for(
    opened: list[Tracker | None], texts: bool, tmp_path: Path
) -> None:
    run = texts_run(tmp_path, " confidential")
    paper = Paper()
    opened.append(paper)
    config = AuditConfig() if not texts else AuditConfig(trackers_texts=True)
    writer = maker("mlflow")(config, Surroundings(tmp_path, trackers=("mlflow",)))
    assert writer is not None
    writer.start(replace(run, records=run.records[:-1]))
    writer.record(run.records[-1], run.records)
    writer.close()
    (page,) = paper.pages
    assert ("confidential" in page) is texts


# --- what people read -------------------------------------------------------------------------------------------------


def test_a_notice_is_short_and_of_printable_characters() -> None:
    alert = next(alert for record in RECORDS for alert in record.alerts)
    texts = {"rule": "a\x1b[2J\n" * 40, "cause": "b\x1b[2J\n" * 40, "message": "<script>\x07\n</script>"}
    notice = Notice.of(alert.model_copy(update=texts))
    assert len(notice.title) < 64 and notice.title.isprintable()
    assert notice.text.replace("\n", "").isprintable()


def test_notices_of_an_alert_are_of_its_cause_whichever_rule_leads() -> None:
    alert = next(alert for record in RECORDS for alert in record.alerts if alert.cause)
    worse = alert.model_copy(update={"rule": "the_rule_that_leads_now", "event": "worse"})
    first, second = Notice.of(alert), Notice.of(worse)
    assert first.key == second.key == alert.cause
    assert CAUSES[alert.cause] in second.title and "the_rule_that_leads_now" not in second.title
    assert "the_rule_that_leads_now" in second.text
    elsewhere = Notice.of(worse.model_copy(update={"probe_name": "harmless"}))
    assert elsewhere.key == alert.cause, "one alert is of all probe sets, and may be led by another at each audit"
    assert Notice.of(worse.model_copy(update={"cause": ""})).key == "the_rule_that_leads_now"  # of old records


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("event", ["open", "worse", "resolved"])
def test_the_title_of_a_notice_says_its_cause_to_the_end(cause: str, event: str) -> None:
    alert = next(alert for record in RECORDS for alert in record.alerts if alert.cause)
    for level in ("warning", "error"):
        notice = Notice.of(alert.model_copy(update={"cause": cause, "event": event, "level": level}))
        assert notice.title.endswith(f": {CAUSES[cause]}")


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
    places, contents = line.split("; ")
    assert places == "align_audit writes to runs/dpo/align_audit, a paper, MLflow (once its run is open)"
    assert contents == "trackers get curves, pictures, alerts and the report, without texts of the data"
    assert "with texts of probe pairs" in destinations(AuditConfig(trackers_texts=True), around("wandb"))
    assert "the report" not in destinations(AuditConfig(report=False), around("wandb"))
    assert destinations(AuditConfig(), around()) == "align_audit writes to runs/dpo/align_audit"


def test_saying_where_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def broken() -> None:
        raise OSError("no such run of token=hidden")

    monkeypatch.setattr(module, "OPENERS", {"wandb": broken})
    Terminal.of(AuditConfig(), around("wandb")).start(AuditRun(tmp_path, [], [], []))
    assert "could not print where it writes: OSError: no such run" in caplog.text
    assert "hidden" not in caplog.text
    TrackerWriter("wandb", tmp_path).start(AuditRun(tmp_path, [], [], []))
    assert "could not find the run of W&B: OSError: no such run" in caplog.text
