"""The one walk over a record: nothing is left out, and every number says its unit, what it is of, and why it is unknown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel

from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, Control
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import Number, Word, by_path, by_series, is_unknown, numbers, span, walk, why_unknown
from align_audit.record.run import AuditRun, row_of
from align_audit.record.schema import Part
from align_audit.record.units import In, Labels
from tests.helpers.make_record import make_record, make_sites
from tests.helpers.record_parts import NO_SHIFT
from tests.helpers.views import cases

CASES = cases()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of a record as it is dumped, under its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def elsewhere(path: str) -> bool:
    """Keys of their own, what others run along, events, and reasons, which stand with their numbers."""
    parts = path.split(".")
    return (
        parts[0] in ("alerts", "reasons")
        or path.startswith(("provenance.config", "provenance.versions", "provenance.pairs_dropped"))
        or bool({"ranks", "units"} & set(parts))
        or parts[-1] == "reason"
    )


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_out_and_nothing_comes_twice(case: str) -> None:
    record = CASES[case]
    dumped = {path: value for path, value in leaves(record.model_dump()) if not elsewhere(path) and value is not None}
    walked: dict[str, Any] = {}
    for item in walk(record):
        ends = ("mean", "low", "high") if isinstance(item, Number) and item.low is not None else ()
        flat = {f"{item.path}.{end}": getattr(item, "value" if end == "mean" else end) for end in ends}
        for path, value in (flat or {item.path: item.value}).items():
            assert path not in walked
            walked[path] = value
    # NaN is unequal to itself.
    assert {path: str(value) for path, value in walked.items() if value is not None} == {
        path: str(value) for path, value in dumped.items()
    }


def test_paths_lead_to_the_numbers_and_indices_say_what_they_are_of() -> None:
    record = make_record(100, layers=6, sites=make_sites(6, heads=3, peak=1))
    at = by_path(record)
    (layer, curve), *_ = record.low_rank["shift"].items()
    fraction = at[f"low_rank.shift.{layer}.effect_fraction.2"]
    assert (fraction.value, fraction.low, fraction.high) == tuple(
        getattr(curve.effect_fraction[2], end) for end in ("mean", "low", "high")
    )
    assert (fraction.layer, fraction.index, fraction.index_kind, fraction.unit) == (layer, 4, "rank", "share")
    assert fraction.series == f"low_rank.shift.{layer}.effect_fraction"
    rank = at[f"low_rank.shift.{layer}.rank_95"]
    assert (rank.series, rank.layer, rank.index, rank.low) == (rank.path, layer, None, None)

    random = [number.index for number in by_series(record)["controls.random_subspace.effect"]]
    assert random == curve.ranks, "the control has no ranks of its own"
    transport = by_series(record)["spinal.policy.transport"]
    assert [(number.layer, number.unit) for number in transport] == [(layer, "radians") for layer in range(5)]

    heads = record.sites[2]
    place = next(i for i, unit in enumerate(heads.units) if (unit.layer, unit.head) == (4, 1))
    head = at[f"sites.2.necessity.{place}"]
    assert (head.layer, head.index, head.index_kind) == (4, place, "unit")
    assert at["sites.2.pairs"].index is None

    assert (at["margins.kl"].unit, at["cost.peak_memory"].unit) == ("nats per token", "bytes")
    assert (at["controls.split_half.value"].unit, at["controls.noise.effect.0"].unit) == ("share", "nats")
    assert at["reference_check.same_weights"].value is False


def test_words_stand_between_the_numbers() -> None:
    words = {item.path: item.value for item in walk(make_record()) if isinstance(item, Word)}
    assert words["controls.noise.verdict"] == "passed"
    assert words["provenance.probe_name"] is None
    assert not any(isinstance(number.value, str) for number in numbers(make_record()))


def test_what_is_not_known_says_why() -> None:
    before = by_path(make_record(0, layers=3, progress=0.0))
    assert {number.reason for number in before.values() if is_unknown(number.value) and "recovery" in number.path} == {
        NO_SHIFT
    }
    assert before["patching.peak_layer"].reason == "policy and reference are equal bit by bit"
    assert before["margins.shift"].reason is None

    gaps = by_path(CASES["gaps"])
    assert gaps["margins.shift"].reason == "one pair has no interval", "the mean is known, its interval is not"
    assert gaps["margins.entropy"].reason == "of all margins"
    assert gaps["controls.split_half.value"].reason == "halves", "a control always says why"
    assert gaps["spinal.policy.contraction_r2.0"].reason == "the window is short", "NaN for the reason of its slope"
    assert gaps["margins.kl"].reason is None, "infinite, which is known"


def test_a_part_that_the_schema_gains_is_shown_at_once() -> None:
    class Speed(Part):
        layer_time: Annotated[list[Estimate], In("seconds", along="layer")]
        total: Annotated[float, In("seconds")]
        engine: str

    class Later(AuditRecord):
        speed: Speed

    half = Estimate(mean=0.5, low=0.4, high=0.6)
    speed = Speed(layer_time=[half, Estimate.unknown("the clock stood still")], total=math.nan, engine="fast")
    record = make_record(100, layers=2)
    later = Later(**dict(record), speed=speed)
    later = later.model_copy(update={"reasons": {**later.reasons, "speed": "no clock"}})
    first, second, total, engine = [item for item in walk(later) if item.path.startswith("speed")]
    assert first == Number("speed.layer_time.0", "seconds", 0.5, 0.4, 0.6, None, 0, 0, "layer")
    assert isinstance(second, Number)
    assert (second.path, second.layer, second.reason) == ("speed.layer_time.1", 1, "the clock stood still")
    assert isinstance(total, Number)
    assert (total.path, total.unit, total.reason) == ("speed.total", "seconds", "no clock")
    assert engine == Word("speed.engine", "fast")
    row = row_of(later)
    assert math.isnan(row["speed.total"])
    assert row["speed.engine"] == "fast"


def test_parts_without_a_field_stand_under_their_own_names_also_when_read_back() -> None:
    plain = {
        "runs": 3,
        "note": "fast",
        "total": {"mean": math.nan, "low": 0.5, "high": math.inf},
        "by_hour": [1.5, math.nan],
    }
    record = make_record(layers=2, extra={"speed": plain})
    record = record.model_copy(update={"reasons": {"speed": "no clock"}})
    shown = [item for item in walk(record) if item.path.startswith("speed.")]
    assert shown[:2] == [Number("speed.runs", "", 3), Word("speed.note", "fast")]
    assert [(item.path, str(item.value)) for item in shown[2:]] == [
        ("speed.total", "nan"), ("speed.by_hour.0", "1.5"), ("speed.by_hour.1", "nan")
    ]  # fmt: skip
    again = [item for item in walk(AuditRecord.from_json(record.to_json())) if item.path.startswith("speed.")]
    assert list(map(str, again)) == list(map(str, shown))
    assert all(isinstance(item, Number) and item.reason == "no clock" for item in (shown[2], shown[4]))
    assert shown[2].high == math.inf  # type: ignore[union-attr]


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_records_of_older_versions_have_the_same_paths(version: int) -> None:
    record = AuditRecord.load(Path(__file__).parent / "data" / f"schema-{version}.json")
    at = by_path(record)
    assert at["patching.effect.2"].value == record.patching.effect[2].mean  # type: ignore[union-attr]
    assert at["low_rank.shift.1.effect_fraction.1"].index == 2
    assert len(AuditRun(Path("run"), [record], [], []).to_pandas(layers=True)) == 3
    assert row_of(record)["schema_version"] == version


def says(cls: type[BaseModel], unit: bool = False, along: bool = False, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, what is missing) of every field of numbers that does not say its unit, or along what it runs."""
    for name, info in cls.model_fields.items():
        if any(isinstance(entry, Labels) for entry in info.metadata):
            continue
        markers = [entry for entry in info.metadata if isinstance(entry, In)]
        has_unit = unit or any(marker.unit is not None for marker in markers)
        has_along = along or any(marker.along is not None for marker in markers)
        here, kinds = f"{path}.{name}" if path else name, kinds_of(info.annotation)
        if {int, float, Estimate} & kinds and dict not in kinds:
            if not has_unit:
                yield here, "unit"
            if list in kinds and not has_along:
                yield here, "along"
        for part in kinds:
            if isinstance(part, type) and issubclass(part, Part) and part not in (Estimate, Alert):
                yield from says(part, has_unit, has_along, here)


def kinds_of(annotation: Any) -> set[Any]:
    """All types in an annotation."""
    return {annotation, getattr(annotation, "__origin__", None)}.union(*map(kinds_of, get_args(annotation)))


def test_every_field_says_its_unit_and_what_it_runs_along() -> None:
    # Agreement and p-value: the two controls that have one have no effect.
    assert set(says(AuditRecord)) == {
        ("controls.split_half.effect", "along"),
        ("controls.permuted_targets.effect", "along"),
    }
    assert set(says(Control)) == {("effect", "along"), ("value", "unit")}, "the check could fail"


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([], "none"),
        ([3], "3"),
        ([4, 3], "3, 4"),
        ([0, 1, 2, 5], "0–2, 5"),
        ([1, 1, 2, 3], "1–3"),
        (list(range(0, 40, 2)), "0, 2, 4, 6, 8, …, 38"),
    ],
)
def test_span(numbers: list[int], words: str) -> None:
    assert span(numbers) == words


def test_the_nearest_reason_is_given() -> None:
    reasons = {"spinal": "off", "spinal.policy.contraction": "no rows", "spinal.policy.contraction.3": "too few"}
    record = make_record(layers=2, reasons=reasons)
    assert why_unknown(record, "spinal.policy.contraction.3") == "too few"
    assert why_unknown(record, "spinal.policy.contraction.30") == "no rows"
    assert why_unknown(record, "spinal.score") == "off"
    assert why_unknown(record, "margins.kl", Estimate.unknown("own")) == "own"
    assert "no reason" in why_unknown(record, "margins.kl", math.nan)
