"""What checkpoints have to keep: gates on numbers of a record, and ``--fail-on``; a line says which broke what, status 2."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from align_audit import AuditRun
from align_audit.cli import gates
from align_audit.cli.gates import Demands, Gate
from align_audit.config import Basis
from align_audit.errors import ConfigurationError
from align_audit.record import measure_names
from align_audit.record.figures import BY_NAME as FIGURES
from align_audit.record.measure_names import check_measure, is_measure
from align_audit.record.numbers import by_path
from tests.cli.commands import arguments, refused
from tests.helpers.alert_cases import about, on_set, with_margins, with_part
from tests.helpers.make_record import make_record, make_sites
from tests.helpers.screens import a_run, calm
from tests.helpers.stored_runs import store

NAMES = {0: "checkpoint-0", 20: "checkpoint-20", 40: "checkpoint-40"}


@pytest.mark.parametrize("module", [gates, measure_names])
def test_the_examples_hold(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted >= 1
    assert results.failed == 0


def test_every_number_of_a_record_has_a_name_that_is_accepted() -> None:
    record = make_record(100, sites=make_sites())
    paths = by_path(record)
    assert len(paths) > 300
    for path in paths:
        check_measure(path)
        if paths[path].low is not None:
            check_measure(f"{path}.low")


def test_what_no_number_of_a_record_can_be_called_is_refused() -> None:
    """Of every number: another place than a whole number, and an end of an interval where there is none."""
    record = make_record(100, sites=make_sites())
    for path, number in by_path(record).items():
        parts = path.split(".")
        for at in (at for at, part in enumerate(parts) if part.isdigit()):
            for odd in ("foo", "-1", "07", "³", ""):
                assert not is_measure(".".join([*parts[:at], odd, *parts[at + 1 :]]))
        for end in ("mean", "low", "high"):
            if number.low is None:
                assert not is_measure(f"{path}.{end}")
            else:
                assert is_measure(f"{path}.{end}")
        assert not is_measure(f"{path}.low.low")
    for name in measure_names.measure_names():
        if "N" in name.split("."):
            assert not is_measure(name)
    assert is_measure("low_rank.shift.3.rank_95") and not is_measure("low_rank.foo.3.rank_95")
    assert all(is_measure(f"low_rank.{basis}.3.rank_95") for basis in get_args(Basis))


@pytest.mark.parametrize(
    "name",
    [
        "patching.effect.foo", "patching.layer_gain.x.low", "finding.localized.low", "spinal.coherence.mean",
        "low_rank.foo.3.rank_95", "peak_layer.low",
    ],
)  # fmt: skip
def test_a_gate_that_every_record_would_break_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"no record has a measure called '{name}'"):
        Gate.parse(f"{name}>=1")


def test_figures_have_ends_where_their_interval_is_in_records() -> None:
    record = with_part(make_record(100), "provenance", beta=0.1)
    for name, figure in FIGURES.items():
        number = figure.read(record)
        assert number.value is not None, name
        assert (number.low is not None) is figure.estimated, name
        if figure.estimated:
            check_measure(f"{name}.low")
        else:
            with pytest.raises(ConfigurationError, match=f"'{name}' is a number without an interval, and has no low"):
                check_measure(f"{name}.low")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("spinal.coherense", "spinal.coherence"),
        ("patching.efect.3", "patching.effect.N"),
        ("reward_acuracy", "reward_accuracy"),
        ("margin.kl.low", "margins.kl"),
        ("spinal", "spinal"),
        ("patching.effect", "patching.effect"),
    ],
)
def test_another_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"called '{name.removesuffix('.low')}(\.low)?' \(did you mean '{near}"
    ):
        Gate.parse(f"{name}>=1")


@pytest.mark.parametrize(
    "text", ["", "kl", "kl>", ">1", "kl=1", "kl>=high", "kl>=nan", "kl>=1 or 2", "kl => 1", "a\x1b[2J"]
)
def test_a_gate_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--gate: found '.*expected NAME>=NUMBER") as refusal:
        Gate.parse(text)
    assert "\x1b" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("margins.kl<=0.5", True), ("margins.kl<0.5", False), ("margins.kl >= 0.5", True), ("margins.kl>0.5", False),
        ("kl==0.5", True), ("kl!=0.5", False), ("margins.kl.low<0.45", True), ("margins.kl.high<0.55", False),
        ("margins.kl.mean<=5e-1", True),
    ],
)  # fmt: skip
def test_a_gate_is_a_comparison_with_a_number_or_an_end_of_its_interval(text: str, kept: bool) -> None:
    record = with_margins(make_record(20), kl=about(0.5, half=0.1))
    assert (Gate.parse(text).broken_by(record) is None) is kept


@pytest.mark.parametrize(
    ("value", "gate", "shown"),
    [
        (0.50003, "kl<=0.5", "kl is 0.50003"),
        (0.123456789, "kl<=0.12345678", "kl is 0.1235"),
        (0.3, "kl<=0.2", "kl is 0.3"),
        (0.5, "kl!=0.5", "kl is 0.5"),
        (1.0000000000000002, "kl<=1", "kl is 1.0000000000000002"),
    ],
)
def test_a_broken_gate_shows_digits_enough_to_see_it(value: float, gate: str, shown: str) -> None:
    parsed = Gate.parse(gate)
    assert parsed.broken_by(with_margins(make_record(20), kl=about(value))) == shown
    assert str(parsed) == gate


def test_a_number_that_is_not_known_breaks_a_gate_with_its_reason() -> None:
    record = make_record(20, spinal=False)
    assert Gate.parse("spinal.coherence!=7").broken_by(record) == (
        "spinal.coherence is not known (switched off in the configuration)"
    )
    unknown = with_part(make_record(20), "spinal", coherence=math.nan)
    unknown = unknown.model_copy(update={"reasons": {"spinal.coherence": "two points\x1b[2J"}})
    assert Gate.parse("spinal.coherence<7").broken_by(unknown) == "spinal.coherence is not known (two points\\x1b[2J)"
    assert "no such" not in (Gate.parse("patching.effect.99>0").broken_by(record) or "")
    assert Gate.parse("patching.effect.99>0").broken_by(record) is not None


def test_the_first_checkpoint_is_named_with_its_value_and_the_others_counted(tmp_path: Path) -> None:
    records = [with_margins(calm(step), kl=about(kl)) for step, kl in ((20, 0.1), (40, 0.3), (60, 0.4))]
    told = Demands.parse(["kl<0.2", "kl<1", "kl<0.35"], None).broken(records, tmp_path, NAMES)
    assert told == [
        "checkpoint-40 broke --gate kl<0.2: kl is 0.3 (and 1 more checkpoint)",
        "step 60 broke --gate kl<0.35: kl is 0.4",
    ]
    named = [on_set(record, "helpful") for record in records[:2]]
    assert Demands.parse(["kl<0.2"], None).broken(named, tmp_path, NAMES) == [
        "checkpoint-40 on 'helpful' broke --gate kl<0.2: kl is 0.3"
    ]


def test_fail_on_asks_what_the_alert_rules_say(tmp_path: Path) -> None:
    records = a_run("ruined")
    store(tmp_path, records)
    told = Demands.parse([], "error").broken(records, tmp_path, NAMES)
    assert told == [
        "checkpoint-20 broke --fail-on error: ERROR, the policy is leaving its language (and 1 more checkpoint)"
    ]
    assert Demands.parse([], "error").broken(records[:3], tmp_path, NAMES) == []


def test_fail_on_warning_takes_warnings_too(tmp_path: Path) -> None:
    record = a_run("ruined")[3]
    milder = [alert.model_copy(update={"level": "warning"}) for alert in record.alerts]
    watched = [record.model_copy(update={"alerts": milder})]
    store(tmp_path, watched)
    lines = {level: Demands.parse([], level).broken(watched, tmp_path, {}) for level in ("error", "warning")}
    assert lines["error"] == []
    assert len(lines["warning"]) == 1
    assert "broke --fail-on warning: WATCH, " in lines["warning"][0]


def test_a_measurement_that_broke_is_no_health(tmp_path: Path) -> None:
    record = calm(20)
    identity = record.controls.identity.model_copy(update={"verdict": "failed", "reason": "a patch with itself moved"})
    broken = with_part(record, "controls", identity=identity)
    store(tmp_path, [broken])
    (line,) = Demands.parse([], "error").broken([broken], tmp_path, NAMES)
    assert line.startswith("checkpoint-20 broke --fail-on error: BLIND, The identity control failed")


def test_a_run_is_gone_through_once_however_many_checkpoints_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [on_set(record, name) for name in ("harmless", "helpful") for record in a_run("ruined")]
    store(tmp_path, sets)
    gone_through: list[int] = []
    go = gates.standings_over
    monkeypatch.setattr(
        gates, "standings_over", lambda course, log: gone_through.append(len(course)) or go(course, log)
    )
    monkeypatch.setattr(gates, "standing_at", None)
    told = Demands.parse([], "error").broken(sets, tmp_path, NAMES)
    assert told == [
        "checkpoint-20 on 'harmless' broke --fail-on error: ERROR, the policy is leaving its language "
        "(and 1 more checkpoint)"
    ]
    assert gone_through == [5, 5]


def test_checkpoints_that_were_audited_out_of_turn_stand_as_they_did(tmp_path: Path) -> None:
    late = with_part(calm(30), "provenance", created="2026-03-01T00:00:00+00:00")
    records = [*a_run("ruined"), late]
    store(tmp_path, records)
    assert [len(Demands.parse([], "error").broken([record], tmp_path, NAMES)) for record in records] == [
        0,
        0,
        0,
        1,
        1,
        0,
    ]


def test_a_level_that_there_is_not_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"--fail-on: expected error or warning; found 'eror' \(did you mean 'error'"
    ):
        Demands.parse([], "eror")


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_broken_gate_ends_with_status_2_after_all_audits(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    call = arguments(place, place.full, tmp_path / "out", "--reference", place.base, "--max-pairs", "3")
    kept = command(*call, "--gate", "kl>=0", "--gate", "margins.accuracy<=1", "--fail-on", "error")
    assert kept.code == 0, kept.err
    broken = command(*call, "--gate", "kl>=1e6", "--gate", "kl>=0", "--resume")
    assert broken.code == 2
    (line,) = [line for line in broken.err.splitlines() if " broke " in line]
    assert "align-audit: checkpoint-1 broke --gate kl>=1e+06: kl is " in line
    assert "(and 1 more checkpoint)" in line
    assert "2 of 2 checkpoints are in the log already" in broken.out
    assert "2 audits in " in kept.out, "the audits are made and shown all the same"


def test_a_wrong_gate_is_refused_before_anything_is_audited(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    call = arguments(place, place.full, tmp_path / "out", "--reference", place.base)
    refused(command(*call, "--gate", "spinal.coherense>=1"), "did you mean 'spinal.coherence'?")
    refused(command(*call, "--fail-on", "eror"), "did you mean 'error'?")
    assert not (tmp_path / "out").exists()


def test_fresh_sets_the_log_aside_and_audits_again(
    command: Any, place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments(
        place, place.full / "checkpoint-1", tmp_path / "out", "--reference", place.base, "--max-pairs", "3"
    )
    assert command(*call).code == 0
    (first,) = AuditRun.load(tmp_path / "out").records
    done = command(*call, "--fresh")
    assert done.code == 0, done.err
    assert "the audit that was in" in done.err and " is in previous-1 there now" in done.err
    (second,) = AuditRun.load(tmp_path / "out").records
    assert second.key == first.key
    (aside,) = AuditRun.load(tmp_path / "out" / "align_audit" / "previous-1").records
    assert aside.to_json() == first.to_json() != second.to_json()
    monkeypatch.setattr("align_audit.monitoring.monitor.run_audit", None)
    assert command(*call, "--resume").code == 0, "what is in the log is not audited again"


def test_progress_names_each_checkpoint_and_the_time_left(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    options = tmp_path / "audit.yaml"
    options.write_text(place.options.read_text().replace("progress: false", "progress: true"))
    changed = SimpleNamespace(**{**vars(place), "options": options})
    call = arguments(changed, place.full, tmp_path / "out", "--reference", place.base, "--max-pairs", "3")
    told = [line for line in command(*call).err.splitlines() if line.startswith("checkpoint-")]
    assert told[0] == "checkpoint-1, 1 of 2"
    assert told[1].startswith("checkpoint-2, 2 of 2, about ") and told[1].endswith(" s left")
    again = [line for line in command(*call).err.splitlines() if line.startswith("checkpoint-")]
    assert again == ["checkpoint-1, 1 of 2", "checkpoint-2, 2 of 2"], "what is in the log already takes no time"
