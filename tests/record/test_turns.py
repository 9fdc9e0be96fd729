"""A run that went back to an earlier step: what it left there is of no course, on no screen, and in no advice."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align_audit.record import course_checkpoints
from align_audit.record import log as module
from align_audit.record.audit_record import AuditRecord, Occasion
from align_audit.record.course import course_of, present_course
from align_audit.record.course_checkpoints import checkpoints_of_course
from align_audit.record.followed import FollowedRun
from align_audit.record.log import RunLog
from align_audit.record.newest import read_newest
from align_audit.record.stored_records import StoredRecords
from align_audit.record.turns import COURSE, Turn, Turns
from align_audit.writers.closing_table import closing
from align_audit.writers.latest_healthy import latest_healthy
from align_audit.writers.model_card import model_card
from align_audit.writers.notebook import AuditRun
from align_audit.writers.runs_table import row_of_run
from align_audit.writers.web.log_folders import LogFolder
from align_audit.writers.web.page_data import page_data
from align_audit.writers.web.shown_runs import ShownRuns
from tests.helpers.alert_cases import healthy, with_part


def made(step: int, ago: float = 0.0, weights: str = "", trained: bool = True, **there: Any) -> AuditRecord:
    """An audit of a step, so many seconds ago; ``trained``: of a training, not of a saved checkpoint."""
    created = datetime.fromtimestamp(time.time() - ago, UTC).isoformat(timespec="seconds")
    record = with_part(
        healthy(step), "provenance", created=created, policy_hash=weights or f"weights of {step}", **there
    )
    return record.model_copy(update={"occasion": Occasion(reason="a look") if trained else None})


def steps(records: Sequence[AuditRecord]) -> list[int]:
    return [record.step for record in records]


def saved(folder: Path, step: int, ago: float, state: bool = True) -> None:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    written = checkpoint
    if state:
        written = checkpoint / "trainer_state.json"
        written.touch()
    at = time.time() - ago
    os.utime(written, (at, at))


def went_back(folder: Path, *then: int, to: int = 20) -> Path:
    """Audited at 10, 20, 24 and 30, resumed, and audited again: at steps that it came by with the same weights, or new ones."""
    log = RunLog(folder)
    for step in (10, 20, 24, 30):
        log.append(made(step, 300 - step))
    log.close()
    follow(folder, to, *then, ago=200)
    return folder


def follow(folder: Path, to: int, *then: int, ago: float, weights: str = "") -> None:
    """Go on from a step, so many seconds ago, and audit these steps, one in 10 seconds."""
    log = RunLog(folder)
    with pytest.MonkeyPatch.context() as patch:
        for place, step in enumerate((to, *then)):
            record = made(step, ago - 10 * place, weights)
            patch.setattr(module, "_now", lambda record=record: record.provenance.created)
            if place == 0:
                log.go_on(step)
            else:
                log.come_by(step, record.provenance.policy_hash)
                log.append(record)
    log.close()


# -- audits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(0, 60, 10))
def test_audits_of_later_steps_are_of_the_course_that_was_left(step: int, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for at in range(0, 60, 10):
        log.append(made(at, 100))
    log.go_on(step)
    assert steps(course_of(made(step + 5), log.records)) == [*range(0, step + 1, 10)]
    assert steps(present_course(log.records)) == [*range(0, step + 1, 10)]


@pytest.mark.parametrize(
    ("then", "course"),
    [
        ([], [10, 20]),
        ([25], [10, 20, 25]),
        ([29, 40], [10, 20, 29, 40]),
        ([24], [10, 20, 24]),
        ([24, 30], [10, 20, 24, 30]),
        ([24, 25, 30], [10, 20, 24, 25, 30]),
        ([24, 25, 30, 40], [10, 20, 24, 25, 30, 40]),
    ],
    ids=["no look yet", "a look", "looks", "by one", "by all", "by one, a look, by one", "and a look"],
)
def test_every_reader_sees_one_course(then: list[int], course: list[int], tmp_path: Path) -> None:
    folder = went_back(tmp_path / "run", *then)
    log = RunLog(folder)
    follower = FollowedRun(folder / "align_audit")
    follower.refresh()
    for records in (AuditRun.load(folder).records, log.records, follower.run.records):
        assert steps(present_course(records)) == course
        assert len(records) == len({10, 20, 24, 30, *then}), "all stay in the log"
    assert steps(present_course(read_newest(folder / "align_audit" / "records.jsonl").records))[-1] == course[-1]


def printed(run: AuditRun) -> str:
    console = Console(file=StringIO(), width=200, color_system=None)
    for part in closing(run, run.checkpoints):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


SCREENS: dict[str, Callable[[AuditRun], Any]] = {
    "table": printed,
    "notebook": lambda run: run._repr_html_() + run.summary(),
    "page": lambda run: json.dumps(page_data(run, "now")),
    "watch": lambda run: repr((row := row_of_run(run, "run")).as_json(datetime.now(UTC))) + repr(row.curve),
    "status": lambda run: repr(run.status),
    "latest healthy": latest_healthy,
    "tab": lambda run: json.dumps(ShownRuns([LogFolder(run.output_dir)], lambda values: None).listing()),  # type: ignore
}


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("to", [20, 5], ids=["after audits", "before the first audit"])
def test_no_screen_shows_what_was_left(screen: str, to: int, tmp_path: Path) -> None:
    folder = went_back(tmp_path / "run", to=to)
    saved(folder, 24, 270)
    words = str(SCREENS[screen](AuditRun.load(folder)))
    assert "weights of 24" not in words and "checkpoint-24" not in words
    assert "step 30" not in words and "'step': 30" not in words and '"step": 30' not in words
    assert to == 20 or "HEALTHY" not in words


def test_a_card_is_of_the_course(tmp_path: Path) -> None:
    run = AuditRun.load(went_back(tmp_path))
    assert "at step 20" in model_card(run)


def test_it_is_followed_while_it_goes_back(tmp_path: Path) -> None:
    folder = went_back(tmp_path, 24, 30)
    followed = FollowedRun(folder / "align_audit")
    followed.refresh()
    log = RunLog(folder)
    log.go_on(10)
    assert followed.refresh()[0]
    assert steps(present_course(followed.run.records)) == [10]
    log.set_aside()
    followed.refresh()
    log.append(made(20))
    followed.refresh()
    assert steps(present_course(followed.run.records)) == [20]


def test_an_audit_of_a_course_that_was_left_stands_among_those_of_its_own(tmp_path: Path) -> None:
    """As TensorBoard writes it, whose curves were deleted."""
    run = AuditRun.load(went_back(tmp_path, 25))
    left = next(record for record in run.records if record.step == 30)
    assert steps(course_of(left, run.records)) == [10, 20, 24, 30]


def test_a_run_that_went_back_twice(tmp_path: Path) -> None:
    folder = went_back(tmp_path, 24, 25, 28)
    follow(folder, 26, ago=100)
    assert steps(present_course(AuditRun.load(folder).records)) == [10, 20, 24, 25]
    follow(folder, 26, 29, ago=80)
    assert steps(present_course(AuditRun.load(folder).records)) == [10, 20, 24, 25, 29]
    follow(folder, 20, 22, 25, ago=50, weights="third")
    assert steps(present_course(AuditRun.load(folder).records)) == [10, 20, 22, 25]


def test_a_log_that_is_deleted_gets_its_turns_back(tmp_path: Path) -> None:
    log = RunLog(went_back(tmp_path))
    for path in (tmp_path / "align_audit").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="deleted or replaced"):
        log.append(made(25))
    log.close()
    assert steps(present_course(AuditRun.load(tmp_path).records)) == [10, 20, 25]


def test_a_disk_that_refuses_costs_the_note_alone(tmp_path: Path) -> None:
    log = RunLog(went_back(tmp_path, to=30))
    (tmp_path / "align_audit" / COURSE).unlink()
    (tmp_path / "align_audit" / COURSE).mkdir()
    with pytest.warns(UserWarning, match="where training went back to could not be noted"):
        log.go_on(20)
    assert steps(present_course(log.records)) == [10, 20]


def test_turns_travel_with_whatever_is_chosen(tmp_path: Path) -> None:
    records = AuditRun.load(went_back(tmp_path)).records
    assert isinstance(records, StoredRecords)
    chosen = [records.by_step(), records[:], records.where(lambda head: True), pickle.loads(pickle.dumps(records))]
    for each in (*chosen, records.followed_by(made(15, 500))):
        assert 24 not in steps(present_course(each))


def test_turns_of_no_run() -> None:
    turns = Turns([Turn(time="2026-01-01T00:00:00+00:00", step=3)])
    assert turns.went_back == [(3, "2026-01-01T00:00:00+00:00")]
    assert not turns.is_left(made(4).key)


# -- checkpoints -----------------------------------------------------------------------------------------------------------


def gone_on(folder: Path, step: int, records: Sequence[AuditRecord] = ()) -> dict[int, str]:
    """The checkpoints of a training that goes on from a step now."""
    stored = StoredRecords()
    for record in records:
        stored.append(record, record.to_json().encode())
    stored.turns.add(Turn(time=datetime.now(UTC).isoformat(timespec="seconds"), step=step))
    return checkpoints_of_course(folder, stored)


@pytest.mark.parametrize("state", [True, False], ids=["with its state", "a folder alone"])
def test_checkpoints_of_later_steps_are_of_the_course_that_was_left(state: bool, tmp_path: Path) -> None:
    for step, ago in ((10, 300.0), (20, 200.0), (30, 100.0), (25, -100.0)):
        saved(tmp_path, step, ago, state)
    assert gone_on(tmp_path, 10) == {10: "checkpoint-10", 25: "checkpoint-25"}
    assert gone_on(tmp_path, 20) == {step: f"checkpoint-{step}" for step in (10, 20, 25)}
    assert sorted(checkpoints_of_course(tmp_path, [])) == [10, 20, 25, 30]


def test_those_of_a_course_that_an_earlier_process_left_are_told_by_the_audits_made_since(tmp_path: Path) -> None:
    """Trained to 30, resumed from 10 and trained to 40, with other checkpoints; now it goes on from 40."""
    for step, ago in ((10, 500.0), (20, 400.0), (30, 300.0), (40, 100.0)):
        saved(tmp_path, step, ago)
    again = [made(step, ago) for step, ago in ((10, 500), (15, 200), (25, 150), (40, 100))]
    assert sorted(gone_on(tmp_path, 40, again)) == [10, 40]
    ordinary = [made(step, ago) for step, ago in ((10, 500), (15, 450), (25, 350), (40, 100))]
    assert sorted(gone_on(tmp_path, 40, ordinary)) == [10, 20, 30, 40]


def test_audits_of_saved_checkpoints_are_made_after_all_of_them(tmp_path: Path) -> None:
    for step, ago in ((10, 500.0), (20, 400.0)):
        saved(tmp_path, step, ago)
    assert sorted(gone_on(tmp_path, 20, [made(10, 50, trained=False), made(20, 40, trained=False)])) == [10, 20]


def test_clocks_that_are_a_little_apart_cost_no_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 20, 3.0)
    assert gone_on(tmp_path, 10, [made(15, 0)]) == {20: "checkpoint-20"}


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert gone_on(tmp_path / "gone", 0) == {}


def test_one_that_is_deleted_meanwhile_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        saved(tmp_path, step, 100)
    listed = course_checkpoints.checkpoints_in(tmp_path)
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-10").rmdir()
    monkeypatch.setattr(course_checkpoints, "checkpoints_in", lambda folder: listed)
    assert checkpoints_of_course(tmp_path, []) == {20: "checkpoint-20"}


def test_no_checkpoint_is_healthy_for_an_audit_of_another_course(tmp_path: Path) -> None:
    """Step 24 is audited again, and the checkpoint that lies there was saved before the run went back."""
    folder = went_back(tmp_path)
    follow(folder, 20, 22, 24, ago=100, weights="new")
    saved(folder, 10, 290)
    saved(folder, 24, 276)
    assert latest_healthy(AuditRun.load(folder)).checkpoint == "checkpoint-10"


def test_runs_that_began_in_one_folder_have_their_own_checkpoints(tmp_path: Path) -> None:
    """Both save under the same names; that of step 40 is the first one's still."""
    log = RunLog(tmp_path)
    for step in (20, 40):
        log.append(made(step, 1000 - step))
    log.set_aside()
    for step in (5, 20, 40):
        log.append(made(step, 500 - step, "another"))
    log.close()
    saved(tmp_path, 20, 480)
    saved(tmp_path, 40, 960)
    first, second = AuditRun.load(tmp_path / "align_audit" / "previous-1"), AuditRun.load(tmp_path)
    assert first.checkpoints == {40: "checkpoint-40"}
    assert second.checkpoints == {20: "checkpoint-20"}
