"""What a run ends with: the table over its checkpoints, the latest healthy one, and full audits that there was no time for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align_audit.config import AuditConfig
from align_audit.monitoring.pace import Pace
from align_audit.monitoring.schedule import Due, Training
from align_audit.record.audit_record import AuditRecord, Occasion
from align_audit.record.log import Failure, RunLog
from align_audit.record.run import AuditRun
from align_audit.writers.closing_table import closing, thinned
from align_audit.writers.standing import standing_at
from align_audit.writers.terminal import Terminal
from tests.helpers.alert_cases import on_set, with_part
from tests.helpers.screens import LOG, a_run, calm, quick_look, ruined, screen

NONE: dict[int, str] = {}


def shown(records: Sequence[AuditRecord], checkpoints: dict[int, str] = NONE, width: int = 80, **run: Any) -> list[str]:
    """The lines at the end of a run."""
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        stored = AuditRun(Path("runs/dpo/align_audit"), records, [], run.pop("failures", []), training_log=LOG)
        for part in closing(stored, checkpoints):
            console.print(part, soft_wrap=True)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_row_for_each_step_and_the_latest_healthy_checkpoint() -> None:
    lines = shown(a_run("ruined"), {5: "checkpoint-5", 20: "checkpoint-20"})
    assert lines[0] == "align_audit: 64 pairs, 5 steps audited, 5 in full"
    assert lines[1].split("  ")[0] == "step"
    assert [line.split()[:2] for line in lines[2:7]] == [
        ["0", "HEALTHY"], ["5", "HEALTHY"], ["10", "HEALTHY"], ["20", "ERROR"], ["40", "ERROR"],
    ]  # fmt: skip
    assert lines[5].split()[2:10] == ["−5.40", "9.40", "40", "%", "90", "%", "+7.90", "peak"]
    assert lines[2].split()[2:] == ["+0.01", "0.04", "82", "%", "–", "–", "–"], "of equal models there is no margin"
    assert lines[7:] == ["latest healthy: checkpoint-5"]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (
            24,
            "steps 0, 5: audited on other pairs (24, not 64) than the last, so that numbers differ by the pairs as well",
        ),
        (64, "steps 0, 5: audited on other pairs than the last, so that numbers differ by the pairs as well"),
    ],
)
def test_audits_on_other_pairs_than_the_last_are_said_to_be(pairs: int, words: str) -> None:
    """A run that went on with other options goes on in the same table."""
    records = a_run("well")
    before = [with_part(record, "provenance", probe_hash="0" * 16, pairs=pairs) for record in records[:2]]
    assert words in shown([*before, *records[2:]])
    assert not any("other pairs" in line for line in shown(records))


def test_what_audits_took_is_said_in_the_trainers_unit_where_one_trained() -> None:
    records = a_run("well")
    known = {"reason": "the last step", "share_spent": 0.0413, "training_pair_seconds": 0.5}
    told = [*records[:-1], records[-1].model_copy(update={"occasion": Occasion(**known)})]
    took = "all audits, with what is written of them, took 4.1 % of the run"
    line = f"5 audits took 78 s, as long as training on 156 pairs; {took}"
    assert shown(told)[7] == line
    assert line.replace(", as long as training on 156 pairs", "") in shown(
        [
            *records[:-1],
            records[-1].model_copy(update={"occasion": Occasion(**known | {"training_pair_seconds": None})}),
        ]
    )
    assert not [line for line in shown(records) if "audits took" in line]


def test_pairs_that_are_trained_on_are_said_to_be() -> None:
    records = [
        record.model_copy(update={"provenance": record.provenance.model_copy(update={"probe_held_out": False})})
        for record in a_run("well")
    ]
    assert [line for line in shown(records, {}) if "trained on these pairs" in line]
    assert not [line for line in shown(a_run("well"), {}) if "trained on these pairs" in line]


@pytest.mark.parametrize(
    ("records", "checkpoints", "words"),
    [
        (a_run("well"), {40: "checkpoint-40"}, "checkpoint-40"),
        (a_run("well"), {}, "step 40 (no checkpoint of it was kept)"),
        ([calm(0), *a_run("ruined")[3:]], {20: "checkpoint-20"}, "step 0, the model that training started from"),
        (a_run("ruined")[3:], {20: "checkpoint-20"}, "none of the audits"),
    ],
)
def test_the_latest_healthy_is_one_that_exists(
    records: list[AuditRecord], checkpoints: dict[int, str], words: str
) -> None:
    assert shown(records, checkpoints)[-1] == f"latest healthy: {words}"


def test_the_report_is_named_only_once_there_is_one(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for record in a_run("well"):
        log.append(record)
    log.close()
    console = Console(width=400, color_system=None)
    for there in (False, True):
        if there:
            (log.directory / "report.html").write_text("")
        with console.capture() as capture:
            for part in closing(AuditRun.load(tmp_path), {}):
                console.print(part)
        assert capture.get().rstrip().endswith(f"report: {log.directory / 'report.html'}") == there


def test_a_checkpoint_without_an_audit_is_not_called_healthy() -> None:
    """Those that the budget left out: a run that is well at 20 and 40 says nothing by name of what was saved between."""
    lines = shown(a_run("well"), {10: "checkpoint-10", 30: "checkpoint-30", 50: "checkpoint-50"})
    assert lines[-1] == "latest healthy: checkpoint-10"
    lines = shown(a_run("well"), {30: "checkpoint-30", 50: "checkpoint-50"})
    assert lines[-1] == "latest healthy: step 40 (no checkpoint of it was kept)"
    lines = shown(a_run("ruined"), {5: "checkpoint-5", 15: "checkpoint-15", 30: "checkpoint-30"})
    assert lines[-1] == "latest healthy: checkpoint-5"


def test_each_set_has_a_table_and_healthy_is_what_is_so_in_all() -> None:
    records = [on_set(record, "a") for record in a_run("well")] + [on_set(record, "b") for record in a_run("ruined")]
    lines = shown(records, {10: "checkpoint-10", 40: "checkpoint-40"})
    assert [line for line in lines if line.startswith("align_audit")] == [
        f"align_audit on '{name}': 64 pairs, 5 steps audited, 5 in full" for name in "ab"
    ]
    assert lines[-1] == "latest healthy: checkpoint-10"


def test_a_run_whose_audits_break_ends_blind() -> None:
    failure = Failure(step=60, time="2026-01-01T01:00:00+00:00", error="Traceback\nValueError: no")
    lines = shown(a_run("well"), {40: "checkpoint-40", 20: "checkpoint-20"}, failures=[failure])
    assert lines[6].split()[:2] == ["40", "BLIND"]
    assert lines[7] == "an audit broke at step 60: the tracebacks are in runs/dpo/align_audit/failures.jsonl"
    assert lines[-1] == "latest healthy: checkpoint-20"


def out_of_budget(step: int) -> AuditRecord:
    """A health audit where a full one was asked for, with the reason that the schedule gives."""
    pace = Pace(AuditConfig(budget=0.01), 0, clock=iter(map(float, range(100))).__next__)
    with pace.timed("full"):
        pace.occasion(calm(0), "before training", Training(0, 60))
    due = pace.choose(Due("full", "a checkpoint was saved", budgeted=True), Training(step, 60))
    assert due is not None
    assert due.kind == "health"
    record = quick_look(calm(step))
    return record.model_copy(update={"occasion": Occasion(reason=due.reason, unaffordable_seconds=due.unaffordable)})


def test_full_audits_that_did_not_fit_are_told_once_with_what_they_take() -> None:
    records = [calm(0), out_of_budget(20), out_of_budget(40)]
    lines = shown(records, {40: "checkpoint-40"})
    (line,) = [line for line in lines if "budget" in line]
    assert line.startswith("2 full audits did not fit the budget (about ")
    assert "was not measured at steps 20, 40. To get it: AuditConfig(budget=None)" in line
    assert line.endswith(
        "or afterwards: align-audit run runs/dpo/checkpoint-40 --probes PAIRS (and --reference MODEL, if not an adapter)"
    )
    assert lines[0] == "align_audit: 64 pairs, 3 steps audited, 1 in full"
    # One that followed at the same step after all is not missed.
    assert not [line for line in shown([calm(0), out_of_budget(20), calm(20)]) if "budget" in line]


def test_a_long_run_is_thinned_and_keeps_what_matters() -> None:
    ruined_last = with_part(a_run("ruined")[3], "provenance", created="2026-01-01T00:50:00+00:00")
    records = [calm(step) for step in range(50)] + [ruined_last.model_copy(update={"step": 50})]
    rows = [standing_at(record, records[: place + 1]) for place, record in enumerate(records)]
    kept = [row.record.step for row in thinned(rows, {7: "checkpoint-7", 31: "checkpoint-31"})]
    assert len(kept) == 24
    assert {0, 7, 31, 50} <= set(kept)
    assert kept == sorted(kept)
    assert "27 more audits are in the record log" in shown(records)
    assert thinned(rows[:24], {}) == rows[:24]


def test_eighty_columns_are_enough() -> None:
    records = [on_set(record, "a" * 20) for record in a_run("ruined")]
    assert max(map(len, shown(records, {10: "checkpoint-10"}))) <= 80


def test_a_terminal_ends_with_it_where_anything_was_audited(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for record in a_run("ruined"):
        log.append(record)
    for step in (5, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    text = screen(log.records, output_dir=tmp_path)
    assert text.endswith("latest healthy: checkpoint-5\n")
    assert screen(log.records, output_dir=tmp_path, checkpoints={10: "final"}).endswith("latest healthy: final\n")
    assert screen([], output_dir=tmp_path) == ""
    log.close()


def test_the_log_is_not_read_again_for_it(tmp_path: Path) -> None:
    """The terminal was given every audit; of the log only the audits that broke are looked up."""
    log = RunLog(tmp_path)
    log.append_failure(60, "Traceback\nValueError: no")
    log.close()
    text = screen(a_run("well"), output_dir=tmp_path)
    assert "align_audit: 64 pairs, 5 steps audited, 5 in full" in text
    assert "an audit broke at step 60" in text
    assert text.splitlines()[-1].startswith("latest healthy: step 20")


def test_a_writer_that_was_never_told_anything_reads_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(output_dir=tmp_path / "nowhere").close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "nowhere").exists()


def test_shift_is_shown_where_beta_is_not_known() -> None:
    record = ruined(20)
    bare = record.model_copy(update={"provenance": record.provenance.model_copy(update={"beta": None})})
    lines = shown([bare])
    assert "shift (nats)" in lines[1]
    assert "+79.00" in lines[2]
