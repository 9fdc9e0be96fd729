"""An alert that was stored, and of which a kill left the channels untold, is told at the next start, once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditConfig
from align_audit.errors import ConfigurationError
from align_audit.monitoring.monitor import Monitor
from align_audit.monitoring.resumed_writers import start_writers
from align_audit.options.trackers import TRACKER_NAMES, TrackerName
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import TOLD, RunLog
from align_audit.record.run import AuditRun
from align_audit.writers.messages import LogLines, Told, alert_logger
from align_audit.writers.trackers.writer import maker
from align_audit.writers.webhook import UNSENT, Webhook
from align_audit.writers.writer import Surroundings, Writers
from tests.helpers.make_record import make_record
from tests.helpers.paper_tracker import Paper, open_papers


def at(step: int, event: Any = "opened") -> AuditRecord:
    if event is None:
        return make_record(step, layers=2, alerts=[])
    alert = Alert(
        rule="kl_out_of_bounds", cause="drift", level="error", event=event, step=step, value=2.0, message=f"Step {step}.",
        suggestion="Go back",
    )  # fmt: skip
    return make_record(step, layers=2, alerts=[alert])


class Heard:
    """Processes of one run, one after the other, and what a function is told in each."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.steps: list[int] = []

    def start(self, config: AuditConfig | None = None) -> Monitor:
        channel = Told.of(
            AuditConfig(), Surroundings(self.output, on_alert=lambda alert, record: self.steps.append(alert.step))
        )
        assert channel is not None
        log = RunLog(self.output)
        return Monitor({}, AuditConfig(), log, writers=start_writers(Writers([channel]), log))

    def audited(self, monitor: Monitor, record: AuditRecord, killed: bool = False) -> None:
        assert monitor.log is not None
        monitor.log.append(record)
        if not killed:
            monitor.tell(record)


@pytest.mark.parametrize("earlier", [[], [at(10)], [at(10), at(20, "worse")], [at(10, None)]])
def test_a_kill_between_log_and_channels_costs_no_alert(earlier: list[AuditRecord], tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    first = heard.start()
    for record in earlier:
        heard.audited(first, record)
    heard.audited(first, at(30), killed=True)
    first.close()
    told = [record.step for record in earlier if record.alerts]
    assert heard.steps == told
    for _ in range(3):
        heard.start().close()
        assert heard.steps == [*told, 30], "once, however often it is started"
    last = heard.start()
    heard.audited(last, at(40))
    last.tell(at(30))  # a stored audit is shown again
    assert heard.steps == [*told, 30, 40]


def test_what_only_stays_open_is_no_news(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    heard.audited(heard.start(), at(30, "open"), killed=True)
    heard.start()
    assert heard.steps == []


def test_logs_that_do_not_say_what_was_told_are_not_told_again(tmp_path: Path) -> None:
    """Of earlier versions, or where somebody deleted the file."""
    heard = Heard(tmp_path)
    log = RunLog(tmp_path)
    for step in (10, 20, 30):
        log.append(at(step))
    log.close()
    heard.start()
    assert heard.steps == []


def test_what_was_told_is_noted_again_where_the_log_was_deleted(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    monitor = heard.start()
    for step in (10, 20):
        heard.audited(monitor, at(step))
    for path in (tmp_path / "align_audit").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="was deleted or replaced"):
        heard.audited(monitor, at(30, None))
    monitor.close()
    assert len((tmp_path / "align_audit" / TOLD).read_text().splitlines()) == 2
    heard.start()
    assert heard.steps == [10, 20]


def test_a_run_that_is_set_aside_is_told_no_more(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    log = RunLog(tmp_path)
    log.append(at(10))
    log.set_aside()
    assert list(log.untold) == []
    log.append(at(5))
    log.close()
    heard.start()
    assert heard.steps == [5]


def test_a_torn_line_of_what_was_told_costs_a_second_telling_at_most(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    monitor = heard.start()
    for step in (10, 20):
        heard.audited(monitor, at(step))
    monitor.close()
    path = tmp_path / "align_audit" / TOLD
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="in the middle of a line"):
        heard.start()
    assert heard.steps == [10, 20, 20]


def test_every_channel_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One walk over the channels; the webhook's address refuses, and its message is kept as unsent."""
    run = AuditRun(tmp_path, [at(30)], [], [], untold=[at(30)])
    heard: list[int] = []
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda entry: lines.append(entry.getMessage()))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    around = Surroundings(tmp_path, on_alert=lambda alert, record: heard.append(alert.step))
    config = AuditConfig.from_dict({"alerts": {"webhook": {"url": "http://127.0.0.1:9/x", "timeout_seconds": 0.5}}})
    channels = [Told.of(config, around), LogLines.of(config, around), Webhook.of(config, around)]
    alert_logger.addHandler(handler)
    try:
        for channel in channels:
            assert channel is not None
            channel.start(run)
            channel.alert(at(30).alerts[0], at(30))
            channel.close()
    finally:
        alert_logger.removeHandler(handler)
    assert heard == [30]
    assert [line.count("Step 30.") for line in lines] == [1]
    (unsent,) = (tmp_path / UNSENT).read_text().splitlines()
    assert json.loads(unsent)["posted"]["message"] == "Step 30."


@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_every_tracker_is_sent_it(name: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit too: of a record whose alerts nobody was told of, no tracker has got anything."""
    papers = open_papers(monkeypatch)
    log = RunLog(tmp_path)
    log.append(at(20, None))
    log.append(at(30))
    log.close()
    for steps in ([30], []):
        paper = Paper()
        papers[:] = [paper]
        writer = maker(name)(AuditConfig(), Surroundings(tmp_path, trackers=(name,)))
        assert writer is not None
        log = RunLog(tmp_path)
        writers = start_writers(Writers([writer]), log)
        writers.close()
        log.close()
        assert [(notice.step, "Step 30." in notice.text) for notice in paper.notices] == [
            (step, True) for step in steps
        ]
        assert paper.steps == steps
        assert bool(paper.pages) == bool(steps)


def test_a_channel_that_cannot_start_leaves_it_untold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGN_AUDIT_WEBHOOK_URL", raising=False)
    config = AuditConfig.from_dict({"alerts": {"webhook": {}}})
    log = RunLog(tmp_path)
    log.append(at(30))
    with pytest.raises(ConfigurationError, match="has no url"):
        start_writers(Writers([Webhook(config.alerts.webhook, tmp_path)]), log)
    assert [record.step for record in log.untold] == [30]
