"""What W&B, MLflow and Trackio hold of a run that goes well and of one that is ruined, read back from their own stores."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from align_audit import AuditConfig, AuditRun
from align_audit.record.audit_record import AuditRecord
from align_audit.record.stored_records import events_of
from align_audit.writers.few_scalars import few_scalars
from align_audit.writers.messages import without_markup
from align_audit.writers.plots.at_a_glance import HEIGHT, WIDTH
from align_audit.writers.registry import writers_for
from align_audit.writers.standing import standing_at
from align_audit.writers.trackers import sender
from align_audit.writers.trackers.entry import Notice
from align_audit.writers.trackers.writer import TrackerWriter, maker
from align_audit.writers.writer import Surroundings, Writers
from tests.helpers.alert_cases import on_set
from tests.helpers.pages import data_in
from tests.helpers.paper_tracker import until
from tests.helpers.screens import LOG, a_run, quick_look
from tests.helpers.tracker_stores import Store, Stored

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TRAINED = 90
"""The step that training ends at, after its last audit."""
LEVELS = {"info": "info", "warning": "warn", "error": "error"}


def writers(store: Store, output_dir: Path) -> Writers:
    """Those of a training that reports to this tracker alone."""
    around = Surroundings(output_dir, training_log=lambda: LOG, trackers=(store.name,))  # type: ignore[arg-type]
    return writers_for(AuditConfig(), around, [maker(store.name)])  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "PAUSES", (0.0, 0.0))


def tell(told: Writers, records: Sequence[AuditRecord]) -> None:
    """A run as the monitor tells it."""
    for place, record in enumerate(records):
        told.record(record, records[: place + 1])
        for alert in events_of(record.alerts):
            told.alert(alert, record)


def a_quick_run(ends: str) -> list[AuditRecord]:
    """The first audit and the last are full ones: pictures take time to draw."""
    records = a_run(ends)
    return [records[0], *map(quick_look, records[1:-1]), records[-1]]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What align_audit has logged; W&B logs much of its own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("align_audit")]


def shown(store: Store, name: str, records: Sequence[AuditRecord], output_dir: Path) -> Stored:
    """What the tracker holds of a run after its end."""
    with store.run(name):
        told = writers(store, output_dir)
        told.start(AuditRun(output_dir, [], [], []))
        tell(told, records)
        until(lambda: _idle(told))
        store.train(TRAINED)
        told.close()
    return store.read(name)


def _idle(told: Writers) -> bool:
    """Was all that was taken sent?"""
    (only,) = told._writers
    assert isinstance(only, TrackerWriter) and only._sender is not None
    outbox = only._sender._outbox
    idle = outbox._waiting.empty() and outbox._under_way is None
    time.sleep(0.05)
    return idle and outbox._waiting.empty() and outbox._under_way is None


def expected(records: Sequence[AuditRecord]) -> dict[str, dict[int, float]]:
    """The ten curves of every audit."""
    curves: dict[str, dict[int, float]] = {}
    for place, record in enumerate(records):
        for tag, value in few_scalars(standing_at(record, records[: place + 1], LOG)).items():
            curves.setdefault(tag, {})[record.step] = value
    return curves


@pytest.mark.parametrize("ends", ["well", "ruined", "resolved"])
def test_a_tracker_holds_curves_pictures_status_alerts_and_report(
    store: Store, ends: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = a_quick_run(ends)
    stored = shown(store, f"{store.name} {ends}", records, tmp_path)
    assert said(caplog) == []
    wanted = expected(records)
    assert len(wanted) == 10
    assert {tag for tag in stored.curves if tag.startswith("align_audit")} == set(wanted)
    for tag, points in wanted.items():
        assert stored.curves[tag] == pytest.approx(points)
    steps = [records[0].step, records[-1].step]
    assert sorted(stored.pictures["align_audit health/over_steps"]) == steps
    assert set(stored.pictures) == {"align_audit health/over_steps", "align_audit where/by_layer"}
    assert {size for points in stored.pictures.values() for size in points.values()} == {(WIDTH, HEIGHT)}
    standing = standing_at(records[-1], records, LOG)
    assert standing.status.word == {"well": "HEALTHY", "ruined": "ERROR", "resolved": "HEALTHY"}[ends]
    assert standing.status.word in stored.status
    assert stored.report is not None
    assert stored.report_step in (None, TRAINED), "the axis is not set back"
    (shown_set,) = data_in(stored.report)["sets"]
    assert shown_set["panels"][0]["steps"] == [record.step for record in records]
    assert shown_set["status"]["word"] == standing.status.word
    compare_alerts(store, stored, records, tmp_path)


def compare_alerts(store: Store, stored: Stored, records: Sequence[AuditRecord], output_dir: Path) -> None:
    """Each is told as it opens, gets worse and is over, and at no audit between."""
    alerts = [alert for record in records for alert in record.alerts if alert.level != "info"]
    events = [Notice.of(alert, output_dir) for alert in events_of(alerts)]
    if store.name == "mlflow":  # one tag a cause, its newest notice
        newest = {notice.key: notice for notice in events}.values()
        assert sorted(stored.notices) == sorted(("", notice.title, notice.text) for notice in newest)
        return
    assert [(level.lower(), title, text) for level, title, text in stored.notices] == [
        (LEVELS[notice.level], notice.title, without_markup(notice.text)) for notice in events
    ]
    opened = [title for _, title, _ in stored.notices if " opened" in title]
    assert len(opened) == len(set(opened)) <= len(alerts) / 2


def test_a_health_audit_is_shown_by_its_curves_alone(store: Store, tmp_path: Path) -> None:
    records = [quick_look(record) for record in a_run("well")[:2]]
    stored = shown(store, f"{store.name} looks", records, tmp_path)
    assert stored.pictures == {}
    assert {step for points in stored.curves.values() for step in points} >= {record.step for record in records}


def test_probe_sets_have_curves_and_status_of_their_own(store: Store, tmp_path: Path) -> None:
    records = [on_set(record, name) for record in a_run("ruined")[-2:] for name in ("harmless", "helpful-1.1")]
    stored = shown(store, f"{store.name} sets", records, tmp_path)
    for name in ("harmless", "helpful-1.1"):
        assert len([tag for tag in stored.curves if tag.startswith("align_audit") and tag.split("/")[1] == name]) == 10
    if store.name != "trackio":  # whose status is a text of the last audit
        assert "harmless.status: ERROR" in stored.status
        assert "helpful-1.1.status: ERROR" in stored.status


def test_what_an_earlier_process_sent_is_no_news(store: Store, tmp_path: Path) -> None:
    records = a_run("ruined")
    name = f"{store.name} resumed"
    with store.run(name):
        told = writers(store, tmp_path)
        told.start(AuditRun(tmp_path, records[:-1], [], []))
        tell(told, records)
        told.close()
    steps = {step for points in store.read(name).curves.values() for step in points}
    assert steps == {records[-1].step}


def test_nothing_is_said_of_a_report_where_there_is_none(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{store.name} no report"
    with store.run(name):
        around = Surroundings(tmp_path, trackers=(store.name,))  # type: ignore[arg-type]
        told = writers_for(AuditConfig(report=False), around, [maker(store.name)])  # type: ignore[arg-type]
        told.start(AuditRun(tmp_path, [], [], []))
        records = a_run("ruined")[3:4]
        told.record(records[0], records)
        told.close()
    assert store.read(name).report is None
    assert said(caplog) == []


def test_what_slack_reads_in_an_alert_is_no_markup(store: Store, tmp_path: Path) -> None:
    """W&B and Trackio hand alerts on to it."""
    (record,) = a_run("ruined")[3:4]
    hostile = {"message": "<!channel> see <https://example.org|this> @here", "cause": "<!here>"}
    record = quick_look(record).model_copy(
        update={"alerts": [alert.model_copy(update=hostile) for alert in record.alerts]}
    )
    stored = shown(store, f"{store.name} markup", [record], tmp_path)
    assert stored.notices
    if store.name != "mlflow":  # which hands on nothing
        assert not any(mark in text for notice in stored.notices for text in notice[1:] for mark in "<>@")


def test_random_numbers_of_the_training_stay_as_they_are(store: Store, tmp_path: Path) -> None:
    def states() -> tuple[object, ...]:
        name, keys, *rest = np.random.get_state()  # noqa: NPY002
        return random.getstate(), name, keys.tobytes(), *rest, torch.get_rng_state().numpy().tobytes()

    with store.run(f"{store.name} random"):
        told = writers(store, tmp_path)
        told.start(AuditRun(tmp_path, [], [], []))
        earlier = states()
        tell(told, a_run("ruined")[2:4])
        told.close()
        assert states() == earlier


def test_a_run_that_was_closed_breaks_nothing_and_is_said_once_at_most(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """W&B refuses then; MLflow and Trackio go on taking what comes."""
    records = [quick_look(record) for record in a_run("ruined")]
    name = f"{store.name} closed"
    with store.run(name):
        told = writers(store, tmp_path)
        told.start(AuditRun(tmp_path, [], [], []))
        tell(told, records[:2])
        until(lambda: _idle(told))
    tell(told, records[2:])
    told.close()
    steps = {step for points in store.read(name).curves.values() for step in points}
    if store.name == "wandb":
        assert steps == {record.step for record in records[:2]}
        words, counted = said(caplog)
        assert "could not write step 10 to W&B" in words
        assert "that is said once, training goes on" in words
        assert "3 audits (steps 10, 20, 40)" in counted and "the report" in counted
    else:
        assert steps == {record.step for record in records}
        assert said(caplog) == []
