"""Trackers that break, hang or go away: what is tried again, what is said, what is lost, and how long training waits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_audit.errors import without_secrets
from align_audit.record.log import RunLog
from align_audit.writers.few_scalars import STATUS_VALUES
from align_audit.writers.trackers import sender, writer
from align_audit.writers.trackers.entry import Entry, Notice, Tracker
from align_audit.writers.trackers.mlflow_run import MlflowRun
from align_audit.writers.trackers.trackio_run import _silent
from tests.helpers.alert_cases import on_set
from tests.helpers.paper_tracker import RECORDS, Paper, a_writer, open_papers, tell, until
from tests.helpers.web import hang, serving

STEPS = [record.step for record in RECORDS]
SECONDS = 0.5
SLACK = 1.0
"""What a test allows a busy machine beyond a time, in seconds."""


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Tracker | None]:
    return open_papers(monkeypatch)


def timed(call: Callable[..., object], *args: Any) -> float:
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def at(kind: type, *steps: int, times: int = 10**6, error: BaseException | None = None) -> Callable[[Any], Any]:
    """Breaks at what is of this kind and these steps, so many times."""
    left = [times]

    def breaks(given: Any) -> BaseException | None:
        if isinstance(given, kind) and (not steps or given.step in steps) and left[0] > 0:
            left[0] -= 1
            return error or OSError("no network")
        return None

    return breaks


def words(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# --- what breaks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Entry, Notice, str])
def test_a_hiccup_costs_nothing_and_is_not_said(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type
) -> None:
    paper = Paper(at(kind, times=2))
    opened.append(paper)
    told = a_writer(tmp_path)
    tell(told, *range(len(RECORDS)))
    until(lambda: paper.steps == STEPS)
    told.close()
    assert [notice.event for notice in paper.notices] == ["opened"] * len(paper.notices) != []
    assert len(paper.pages) == 2
    assert words(caplog) == []


@pytest.mark.parametrize("error", [OSError("no network"), SystemExit(1), KeyError("api_key")])
def test_what_breaks_is_said_once_holds_nothing_up_and_is_counted(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    paper = Paper(at(Entry, 5, 10, error=error))
    opened.append(paper)
    told = a_writer(tmp_path)
    tell(told, *range(len(RECORDS)))
    told.close()
    assert paper.steps == [0, 20, 40]
    said, counted = words(caplog)
    assert "could not write step 5 to MLflow" in said and "said once" in said
    assert "2 audits (steps 5, 10) did not get through" in counted and str(tmp_path) in counted


def test_an_alert_of_an_audit_that_is_lost_is_told(opened: list[Tracker | None], tmp_path: Path) -> None:
    paper = Paper(at(Entry, 20))
    opened.append(paper)
    told = a_writer(tmp_path)
    tell(told, *range(len(RECORDS)))
    told.close()
    assert paper.steps == [0, 5, 10, 40]
    assert {notice.step for notice in paper.notices} == {20}


def test_a_notice_that_does_not_get_through_goes_with_the_next_audit(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = [True]
    paper = Paper(lambda given: OSError("no network") if gone[0] and isinstance(given, Notice) else None)
    opened.append(paper)
    told = a_writer(tmp_path)
    tell(told, 0, 1, 2, 3)
    until(lambda: len(paper.pages) == 1)
    assert paper.notices == []
    gone[0] = False
    tell(told, 4)
    until(lambda: paper.steps == STEPS and paper.notices != [])
    told.close()
    assert {notice.step for notice in paper.notices} == {20}
    (said,) = words(caplog)
    assert "could not send an alert to MLflow" in said


def test_an_error_is_said_again_after_an_audit_got_through(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened.append(Paper(at(Entry, 0, 10, 20)))
    told = a_writer(tmp_path)
    tell(told, *range(len(RECORDS)))
    told.close()
    assert ["write step 0" in each or "write step 10" in each for each in words(caplog)] == [True, True, False]


def test_the_report_is_tried_whatever_broke_before_it(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paper = Paper(lambda given: None if isinstance(given, str) else OSError("no network"))
    opened.append(paper)
    told = a_writer(tmp_path)
    tell(told, *range(len(RECORDS)))
    told.close()
    assert len(paper.pages) == 2
    assert "5 audits (steps 0, 5, 10, 20, 40)" in caplog.text and "of alerts did not get through" in caplog.text
    assert "the report" not in caplog.text


def test_an_audit_that_cannot_be_read_costs_no_other(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper, standing_at = Paper(), writer.standing_at

    def breaks(record: Any, *rest: Any) -> Any:
        if record.step == 5:
            raise ValueError("damaged")
        return standing_at(record, *rest)

    monkeypatch.setattr(writer, "standing_at", breaks)
    opened += [None, None, None, paper]
    told = a_writer(tmp_path)
    tell(told, *range(len(RECORDS)))
    told.close()
    assert paper.steps == [0, 10, 20, 40]
    assert "1 audit (step 5) did not get through" in caplog.text


# --- what hangs -------------------------------------------------------------------------------------------------------


def test_training_waits_for_a_tracker_that_hangs_at_the_end_alone_and_there_briefly(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CLOSING_SECONDS", SECONDS)
    answers = threading.Event()
    opened.append(Paper(hangs=answers))
    told = a_writer(tmp_path)
    try:
        for place in range(len(RECORDS)):
            assert timed(tell, told, place) < SLACK
        assert SECONDS * 0.9 < timed(told.close) < SECONDS + SLACK
        assert timed(told.close) < 0.1, "there is nothing left to wait for"
    finally:
        answers.set()
    (said,) = words(caplog)
    assert "5 audits (steps 0, 5, 10, 20, 40)" in said
    assert "of alerts" in said and "the report" in said


def test_what_there_is_no_room_for_waits_and_arrives_in_order(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "MOST_WAITING", 1)
    answers = threading.Event()
    paper = Paper(hangs=answers)
    opened.append(paper)
    told = a_writer(tmp_path)
    tell(told, *range(len(RECORDS)))
    assert len(told._waiting) >= 3, "as keys, with no picture"
    threading.Timer(0.1, answers.set).start()
    told.close()
    assert paper.steps == STEPS
    assert len(paper.pages) == 1
    assert [each for each in words(caplog) if "has not answered for" not in each] == []


def test_what_is_sent_at_the_end_alone_comes_with_one_report(opened: list[Tracker | None], tmp_path: Path) -> None:
    paper = Paper()
    opened += [*[None] * (len(RECORDS) + 1), paper]  # it opens as the run ends
    told = a_writer(tmp_path)
    tell(told, *range(len(RECORDS)))
    told.close()
    assert paper.steps == STEPS
    assert [notice.event for notice in paper.notices].count("opened") > 0, "which would call for a report of its own"
    assert len(paper.pages) == 1


def test_many_audits_that_waited_are_drawn_in_parts_and_at_the_end_while_there_is_time(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MOST_WAITING", 2)
    monkeypatch.setattr(writer, "CLOSING_SECONDS", 0.0)
    paper = Paper()
    opened += [None, None, None, None, paper]  # it opens at the fourth audit
    told = a_writer(tmp_path)
    tell(told, 0, 1, 2, 3)
    until(lambda: paper.steps == [0, 5])
    told.close()
    assert paper.steps == [0, 5]
    assert "2 audits (steps 10, 20)" in caplog.text


def test_a_server_of_mlflow_that_hangs_holds_up_no_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real client, whose requests are synchronous."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'align-audit[trackers]'")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(writer, "CLOSING_SECONDS", SECONDS)
    with serving(hang) as server:
        client = mlflow.MlflowClient(f"http://127.0.0.1:{server.server_address[1]}")
        run = SimpleNamespace(info=SimpleNamespace(run_id="0" * 32, run_name="hangs"))
        monkeypatch.setattr(writer, "OPENERS", {"mlflow": lambda: MlflowRun(client, run)})
        told = a_writer(tmp_path)
        for place in range(3):
            assert timed(tell, told, place) < SLACK
        until(lambda: len(server.bodies) == 1)
        assert timed(told.close) < SECONDS + SLACK
    assert "3 audits (steps 0, 5, 10), the report as it is now did not get through" in caplog.text


def test_a_training_that_breaks_has_sent_its_alerts_and_its_report(tmp_path: Path) -> None:
    """Nothing closes the writers then; the process waits for what is under way, and sends the report."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from align_audit.writers.trackers import writer\n"
        "from tests.helpers.paper_tracker import Paper, a_writer, tell\n"
        "class Slow(Paper):\n"
        "    def _answer(self, given):\n"
        "        time.sleep(0.2)\n"
        "        with open(sys.argv[1] + '/sent', 'a') as file: print(type(given).__name__, file=file)\n"
        "slow, opens = Slow(), [None, None]\n"
        "writer.OPENERS = {'mlflow': lambda: opens.pop() if opens else slow}\n"
        "told = a_writer(Path(sys.argv[1])); tell(told, 0, 3)\n"
        "raise SystemExit(3)\n"
    )
    root = Path(__file__).resolve().parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 3
    sent = (tmp_path / "sent").read_text().split()
    assert sent[:2] == ["Entry", "Entry"] and sent[-1] == "str" and "Notice" in sent
    assert "could not" not in ended.stderr


# --- audits that break ------------------------------------------------------------------------------------------------


def test_a_run_whose_audits_break_is_blind_until_one_comes_through(
    opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paper = Paper()
    opened.append(paper)
    log = RunLog(tmp_path)
    told = a_writer(tmp_path)
    tell(told, 0, 1)
    for step in (6, 7):
        log.append_failure(step, "Traceback\nRuntimeError: no memory")
        told.failure()
    until(lambda: paper.steps == [0, 5, 6, 7] and len(paper.pages) == 1)
    assert [entry.scalars["align_audit health/status"] for entry in paper.entries] == [
        STATUS_VALUES[word] for word in ("HEALTHY", "HEALTHY", "BLIND", "BLIND")
    ]
    assert paper.entries[-1].status["status"] == "BLIND" and "no memory" in paper.entries[-1].status["status_reason"]
    (notice,) = paper.notices
    assert (notice.level, notice.step) == ("error", 6) and "no memory" in notice.text
    tell(told, 2)
    told.close()
    assert [each.event for each in paper.notices] == ["opened", "resolved"]
    assert paper.notices[0].key == paper.notices[1].key
    assert paper.entries[-1].status["status"] == "HEALTHY"
    assert words(caplog) == []


def test_an_audit_that_breaks_first_of_all_is_told_of_each_probe_set(
    opened: list[Tracker | None], tmp_path: Path
) -> None:
    paper = Paper()
    opened.append(paper)
    told = a_writer(tmp_path, probe_names=("harmless", "helpful"))
    RunLog(tmp_path).append_failure(0, "OSError: no reference")
    told.failure()
    record = on_set(RECORDS[1], "helpful")
    told.record(record, [record])
    told.close()
    tags = [(entry.step, *entry.scalars) for entry in paper.entries[:2]]
    assert tags == [(0, f"align_audit health/{name}/status") for name in ("harmless", "helpful")]
    assert [(each.key, each.event) for each in paper.notices] == [
        ("harmless.audits", "opened"),
        ("helpful.audits", "opened"),
        ("helpful.audits", "resolved"),
    ]


# --- secrets, and the process's output --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("https://me:hidden@host:1/api?key=hidden&a=1 now\n\x1b[2J", "https://…@host:1/api?… now\\n\\x1b[2J"),
        ("https://me:hid@den/hidden@host now", "https://…@host now"),
        ("Authorization: Bearer hidden and", "Authorization: Bearer … and"),
        ("{'authorization': 'basic hidden'}", "{'authorization': 'basic …'}"),
        ("api_key=hidden, API-KEY: 'hidden'", "api_key=…, API-KEY: '…'"),
        ("{'token': 'hidden'} token=hidden&x", "{'token': '…'} token=…&x"),
        ("WANDB_API_KEY=hidden password=hidden", "WANDB_API_KEY=… password=…"),
        ("no such file: /tmp/a@b", "no such file: /tmp/a@b"),
    ],
)
def test_no_secret_of_a_client_is_said(
    said: str, shown: str, opened: list[Tracker | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert without_secrets(said) == shown
    opened.append(Paper(at(Entry, error=OSError(said))))
    told = a_writer(tmp_path)
    tell(told, 0)
    told.close()
    assert shown in caplog.text
    assert "hidden" not in caplog.text and "\x1b" not in caplog.text


def test_a_method_that_prints_is_silent_and_others_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    class Run:
        def alert(self, title: str, *, other_thread: Callable[[str], object]) -> str:
            print(title)
            other_thread("of another thread\n")
            return title

    assert _silent(Run().alert)("an alert", other_thread=sys.stdout.write) == "an alert"
    assert capsys.readouterr().out == "of another thread\n"
