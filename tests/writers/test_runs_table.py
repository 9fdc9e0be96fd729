"""Many runs in one table: red first, whatever their names; what is wrong with the worst of them, and what to do."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from align_audit.cli.intervals import interval
from align_audit.record.audit_record import AuditRecord, Occasion
from align_audit.record.compare import Side, compare
from align_audit.record.log import Failure
from align_audit.record.run import AuditRun
from align_audit.record.training_log import LogRow
from align_audit.writers.audit_table import summary_table
from align_audit.writers.closing_table import closing
from align_audit.writers.comparison import ComparisonTable, called
from align_audit.writers.runs_table import RunRow, RunsTable, row_of_run, sparkline
from tests.helpers.alert_cases import about, on_set, with_margins
from tests.helpers.screens import LOG, a_run, calm, later_on

NOW = datetime(2026, 1, 1, 0, 43, tzinfo=UTC)
ESCAPE = "\x1b[31m[bold]x[/bold]"


def row(records: Sequence[AuditRecord], name: str = "run", unread: str | None = None, **run: Any) -> RunRow:
    failures = run.pop("failures", [])
    stored = AuditRun(Path("runs") / name / "align_audit", records, [], failures, training_log=LOG, unread=unread)
    return row_of_run(stored, name)


def lines(*rows: RunRow, width: int = 80, encoding: str = "utf-8", **table: Any) -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False).print(
        RunsTable(rows, NOW, **table)
    )
    file.flush()
    return [line.rstrip() for line in raw.getvalue().decode(encoding).splitlines()]


RUINED, WELL = row(a_run("ruined"), "zebra"), row(a_run("well"), "ant")
BLIND = row([], "mole", failures=[Failure(step=3, time="2026-01-01T00:03:00+00:00", error="Traceback\nValueError: no")])


def test_red_first_then_silence_then_health() -> None:
    shown = lines(WELL, BLIND, RUINED)
    assert shown[0].startswith("3 runs: 1 ERROR, 1 BLIND, 1 HEALTHY")
    assert [line.split()[0] for line in shown[2:5]] == ["ERROR", "BLIND", "HEALTHY"]
    assert shown[2].split()[1:3] == ["20", "40"], "since which step, and how far"
    assert shown[2].split()[4] == "−5.40" and shown[2].split()[6] == "9.40"
    assert shown[2].split()[-3:] == ["3", "min", "zebra"], "age of the last audit"
    assert shown[6] == "zebra  the policy is leaving its language, since step 20"
    assert "last clean audit: step 10" in " ".join(shown[7:])


@pytest.mark.parametrize("width", [60, 80, 160])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    wide = row(a_run("ruined") * 3, "a/very/long/path/of/a/run/that/nobody/can/tell/from/another/but-for-its-end")
    shown = lines(wide, WELL, width=width)
    assert max(map(len, shown)) <= width
    assert all(word in shown[2] for word in ("ERROR", "−5.40", "9.40", "-its-end"[-3:]))


def test_names_that_end_alike_are_told_apart() -> None:
    """Runs of a sweep differ at the beginning of their paths: two that look the same are one run to whoever reads."""
    names = [f"exp_lr1e-{rate}_beta0.1/seed-1/dpo-final-run" for rate in (5, 4)]
    shown = lines(row(a_run("ruined"), names[0]), row(a_run("well"), names[1]), row(a_run("well"), "short"), width=80)
    called = [line.split()[-1] for line in shown[2:5]]
    assert len(set(called)) == 3
    assert "lr1e-5"[-4:] in called[0] and "1e-4" in "".join(called[1:])
    assert max(map(len, shown[:5])) <= 80


@pytest.mark.parametrize(
    ("minutes", "logs", "silent"),
    [
        (9, {"loss": 0.5}, False),
        (9 * 60, {"loss": 0.5}, True),
        (9 * 60, {"train_runtime": 9.0, "train_loss": 0.5}, False),
    ],
)
def test_a_training_that_was_killed_or_hangs_is_told_from_one_that_ended(
    minutes: int, logs: dict[str, float], silent: bool
) -> None:
    """Its last audit says that all is well, and nothing comes any more."""
    records = [
        record.model_copy(
            update={
                "occasion": Occasion(reason=f"at step {record.step}", next_step=100),
                "provenance": record.provenance.model_copy(update={"created": f"2026-01-01T00:{10 + place}:00+00:00"}),
            }
        )
        for place, record in enumerate(a_run("well"))
    ]
    run = AuditRun(Path("runs/quiet/align_audit"), records, [], [], training_log=[*LOG, LogRow(LOG[-1].step, logs)])
    last = row_of_run(run, "quiet").created
    assert last is not None
    now = last + timedelta(minutes=minutes)
    quiet = replace(row_of_run(run, "quiet"), heard=last)
    assert (quiet.silence(now) is not None) == silent
    assert quiet.as_json(now)["ended"] is ("train_runtime" in logs)
    raw = io.StringIO()
    Console(file=raw, width=160).print(RunsTable([quiet], now))
    said = "nothing heard for 9 h, and training has not said that it ended: killed, or hung?"
    assert (said in " ".join(raw.getvalue().split())) == silent
    heard = replace(quiet, heard=now - timedelta(minutes=2))
    assert heard.silence(now) is None, "what it logs is a sign of life"
    assert replace(quiet, heard=None).silence(now) is None, "nothing is known of when it logged"
    saved = [record.model_copy(update={"occasion": None}) for record in records]
    stored = row_of_run(AuditRun(run.directory, saved, [], [], training_log=run.training_log), "quiet")
    assert replace(stored, heard=last).silence(now) is None, "saved checkpoints are no training"


def test_of_a_healthy_few_nothing_more_is_said() -> None:
    assert len(lines(WELL)) == 3


def test_a_run_without_audits_says_what_broke_them() -> None:
    shown = lines(BLIND, WELL)
    assert shown[5].startswith("mole  No audit has come through; the last broke at step 3: ValueError: no")
    assert "failures.jsonl" in " ".join(shown[6:])
    assert BLIND.as_json(NOW)["failures"] == 1


def test_the_newest_of_the_errors_is_named() -> None:
    later = [record.model_copy(update={"step": record.step + 5}) for record in a_run("ruined")]
    assert "zebra" in lines(RUINED, row([calm(0)], "new"), WELL)[6]
    moved = row(
        [
            record.model_copy(
                update={"provenance": record.provenance.model_copy(update={"created": "2026-01-02T00:00:00+00:00"})}
            )
            for record in later
        ],
        "badger",
    )
    assert lines(RUINED, moved, WELL)[6].startswith("badger")


def test_more_runs_than_lines() -> None:
    shown = lines(RUINED, *[row(a_run("well"), f"run-{place}") for place in range(9)], most_rows=3)
    assert [line.split()[0] for line in shown[2:5]] == ["ERROR", "HEALTHY", "HEALTHY"]
    assert shown[5] == "and 7 HEALTHY more"


def test_the_worst_of_several_probe_sets_is_shown() -> None:
    records = [
        *(on_set(record, "harmless") for record in a_run("well")),
        *(on_set(record, "helpful") for record in a_run()),
    ]
    both = row(records)
    assert both.status.word == "ERROR"
    assert lines(both)[2].endswith("run (helpful)")
    assert both.as_json(NOW)["probes"] == "helpful"


def test_a_probe_set_that_the_run_goes_on_without_says_nothing_of_it() -> None:
    """Ruined by one set, and resumed without it."""
    left = [on_set(record, "helpful") for record in a_run() if record.step <= 20]
    assert left[-1].alerts
    both = row([*left, *(on_set(record, "harmless") for record in later_on(a_run("well")))])
    assert (both.status.word, both.alerts) == ("HEALTHY", ())
    assert both.as_json(NOW)["probes"] == "harmless"


def test_an_alert_of_two_probe_sets_is_one() -> None:
    both = row([on_set(record, name) for name in ("harmless", "helpful") for record in a_run()])
    causes = [alert["cause"] for alert in both.as_json(NOW)["alerts"]]
    assert causes and len(causes) == len(set(causes))


def test_a_log_that_cannot_be_read_is_not_healthy() -> None:
    assert row(a_run("well"), unread="no permission.").status.word == "BLIND"
    assert row(a_run("ruined"), unread="no permission.").status.word == "ERROR", "what was read still holds"


def test_plain_json_whatever_is_not_known() -> None:
    odd = row([with_margins(calm(5), kl=about(math.nan), accuracy=about(math.inf))])
    read = json.loads(json.dumps(odd.as_json(NOW), allow_nan=False))
    assert (read["kl"], read["reward_accuracy"], read["step"]) == (None, None, 5)
    told = RUINED.as_json(NOW)
    assert (told["run"], told["folder"], told["status"], told["since"]) == ("zebra", "runs/zebra", "ERROR", 20)
    assert told["age_seconds"] == 180.0
    assert told["alerts"][0]["level"] == "error" and told["to_do"]


def test_names_are_text_and_all_can_be_encoded() -> None:
    shown = lines(row(a_run("ruined"), ESCAPE), WELL, width=120, encoding="ascii")
    assert "\x1b[31m" not in "".join(shown)
    assert "[bold]x[/bold]" in shown[2]
    assert "?" not in shown[2], "bars that this output has"


LONG = [
    "a-long-name-of-a-run-with-learning-rate-0.001-and-beta-0.1",
    "偏好训练实验第三组学习率一二三四五六七八九十" * 2,
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", LONG, ids=["latin", "of two columns a character"])
def test_a_long_name_takes_no_room_from_what_is_to_be_read(name: str, encoding: str) -> None:
    shown = lines(row(a_run("ruined"), name), WELL, width=80, encoding=encoding)
    assert max(map(cell_len, shown)) <= 80
    assert all(word in shown[2] for word in ("ERROR", "5.40", "9.40", "3 min", "..." if encoding == "ascii" else "…"))
    assert "HEALTHY" in shown[3]
    assert encoding == "ascii" or shown[2].endswith(name[-3:])


STORED = AuditRun(Path("runs/dpo/align_audit"), a_run("ruined"), [], [])
TABLES = {
    "runs": RunsTable([RUINED, WELL], NOW),
    "end of a run": closing(STORED, {})[0],
    "audit": summary_table(a_run("ruined")[-1]),
    "comparison": ComparisonTable(compare([Side(name, STORED) for name in LONG], interval)),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("width", [12, 30, 60])
def test_no_table_is_too_narrow_for_an_output_of_few_characters(table: str, width: int) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=width, color_system=None).print(TABLES[table])
    file.flush()


def test_bars_reach_from_the_lowest_to_the_highest() -> None:
    assert sparkline([-1.0, 0.0, 1.0], -1.0, 1.0) == "▁▅█"
    assert sparkline([math.nan, math.inf, -math.inf, 5.0], 0.0, 1.0) == " █▁█"
    assert sparkline([0.0, 0.0], 0.0, 0.0) == "▁▁"
    assert sparkline([0.0, 1.0], 0.0, 1.0, ascii_only=True) == "_#"


def test_what_is_far_from_a_limit_looks_flat() -> None:
    """Noise of a healthy run, stretched to the height of a line, would look like a ruin."""
    records = [with_margins(calm(step), kl=about(0.01 * (step % 3))) for step in range(0, 12)]
    assert set(lines(row(records), width=120)[2].split()[5]) <= set("▁▂")


def test_long_names_that_differ_at_their_end_stay_apart() -> None:
    beginning = "llama-3.1-8b-instruct-dpo-ultrafeedback-binarized-beta0.1-"
    sides = [SimpleNamespace(name=beginning + end) for end in ("lr5e-7-seed1", "lr1e-6-seed1")]
    first, second = called(SimpleNamespace(sides=sides), 40)  # type: ignore[arg-type]
    assert first.endswith("lr5e-7-seed1") and second.endswith("lr1e-6-seed1") and len(first) == len(second) == 40
    same = [SimpleNamespace(name="x" * 90), SimpleNamespace(name="y" + "x" * 90)]
    assert [name[-4:] for name in called(SimpleNamespace(sides=same))] == [" (1)", " (2)"]  # type: ignore[arg-type]
