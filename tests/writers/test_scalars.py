"""Tags and values of a record, and what is not known instead."""

from __future__ import annotations

import math
import re

import pytest

from align_audit.record.alert import Alert
from align_audit.record.estimate import Estimate
from align_audit.record.run import row_of
from align_audit.writers.scalars import ROOT, not_known, scalars
from tests.helpers.make_record import make_record, make_sites
from tests.helpers.record_parts import FEW_VALUES, NO_SHIFT


@pytest.mark.parametrize(("layers", "last"), [(5, "layer_04"), (36, "layer_35"), (120, "layer_119")])
def test_layers_are_padded_so_that_tags_sort_by_layer(layers: int, last: str) -> None:
    record = make_record(100, layers=layers)
    values = scalars(record)
    tags = [tag for tag in values if re.fullmatch(r"align_audit/patching/effect/layer_\d+", tag)]
    assert tags == sorted(tags)
    assert tags[-1].endswith(f"/{last}")
    assert record.patching is not None
    assert [values[tag] for tag in tags] == [estimate.mean for estimate in record.patching.effect]


def test_estimates_stand_beside_the_ends_of_their_interval() -> None:
    record = make_record(100, layers=5)
    values = scalars(record)
    shift = record.margins.shift
    found = [values[f"align_audit/margins/shift{suffix}"] for suffix in ("", "_low", "_high")]
    assert found == [shift.mean, shift.low, shift.high]
    assert record.patching is not None
    effect = record.patching.effect[3]
    assert values["align_audit/patching/effect/layer_03"] == effect.mean
    assert not any("/layer_" in tag.rpartition("/")[2] and tag.endswith(("_low", "_high")) for tag in values)


def test_tags_are_those_of_the_documentation() -> None:
    """Every group, and every per-layer name the module's docstring promises, is emitted; and no other group."""
    record = make_record(100, layers=12, kind="destabilizing", progress=0.9)
    values = scalars(record)
    groups = {tag.split("/")[1] for tag in values}
    assert groups == {"margins", "patching", "controls", "localization", "low_rank", "spinal", "alerts", "cost"}
    assert record.patching is not None
    peak = record.patching.peak_layer
    for tag, value in {
        "patching/peak_layer": peak,
        "patching/effect_p_adjusted/layer_07": record.patching.effect_p_adjusted[7],
        "controls/noise/passed": 0,
        "controls/reverse/passed": 1,
        "controls/noise/effect/layer_07": record.controls.noise.effect[7].mean,  # type: ignore[index]
        "controls/random_subspace/effect/rank_08": record.controls.random_subspace.effect[3].mean,  # type: ignore[index]
        "controls/split_half/value": record.controls.split_half.value,
        "localization/selection_frequency/layer_07": record.localization.selection_frequency[7],  # type: ignore[union-attr]
        "localization/selected_layers": len(record.localization.selected_layers),  # type: ignore[union-attr]
        "localization/null_cv_r2_max": max(record.localization.null_cv_r2),  # type: ignore[union-attr]
        f"low_rank/shift/layer_{peak:02d}/full_effect": record.low_rank["shift"][peak].full_effect.mean,  # type: ignore[index]
        f"low_rank/shift/layer_{peak:02d}/effect_fraction/rank_08": record.low_rank["shift"][peak]
        .effect_fraction[3]
        .mean,  # type: ignore[index]
        f"low_rank/shift/layer_{peak:02d}/largest_principal_angle": 0.9,
        "spinal/policy/transport/layer_07": record.spinal.policy.transport[7],  # type: ignore[union-attr]
        "spinal/reference/contraction_r2/layer_07": record.spinal.reference.contraction_r2[7],  # type: ignore[union-attr]
        "alerts/error": 2,
        "alerts/info": 0,
        "cost/seconds": record.cost.seconds,
    }.items():
        assert values[f"align_audit/{tag}"] == value, tag
    assert "align_audit/spinal/policy/transport/layer_11" not in values, "nothing lies above the last layer"
    assert "align_audit/controls/noise/passed" not in scalars(make_record(0, progress=0.0)), "not run is no verdict"


def test_what_is_not_known_is_left_out_and_listed_with_its_reason() -> None:
    record = make_record(0, layers=36, progress=0.0)
    values = scalars(record)
    assert all(math.isfinite(value) for value in values.values())
    assert not any("recovery" in tag or "peak_layer" in tag for tag in values)
    listed = not_known(record)
    assert listed["patching.recovery", NO_SHIFT] == list(range(36))
    assert listed["patching.peak_layer", "policy and reference are equal bit by bit"] == []
    # R² says why with the reason of its slope.
    assert listed["spinal.policy.contraction", FEW_VALUES] == listed["spinal.policy.contraction_r2", FEW_VALUES] == [0]
    assert listed["low_rank", NO_SHIFT] == []
    assert "the record gives no reason" not in str(listed)


def test_infinities_and_unknown_intervals_are_not_drawn_either() -> None:
    record = make_record(100, layers=2)
    margins = record.margins.model_copy(
        update={
            "kl": Estimate(mean=math.inf, low=0.1, high=math.inf),
            "shift": Estimate(mean=1.0, low=math.nan, high=math.nan, reason="one pair has no interval"),
        }
    )
    record = record.model_copy(update={"margins": margins})
    values = scalars(record)
    assert values["align_audit/margins/shift"] == 1.0
    assert not {"align_audit/margins/kl", "align_audit/margins/shift_low", "align_audit/margins/kl_high"} & set(values)
    assert ("margins.shift", "one pair has no interval") in not_known(record)
    assert ("margins.kl", "the value is inf") in not_known(record)


def test_every_unit_of_a_finer_site_is_a_curve() -> None:
    record = make_record(100, layers=12, sites=make_sites())
    exact = record.model_copy(
        update={"sites": [curve.model_copy(update={"estimator": "exact"}) for curve in record.sites]}
    )
    values = scalars(exact)
    attention, _, heads, windows = exact.sites
    for layer in range(12):
        assert values[f"align_audit/sites/attention_output/layer_{layer:02d}"] == attention.sufficiency[layer].mean
        assert (
            values[f"align_audit/sites/attention_output/necessity/layer_{layer:02d}"] == attention.necessity[layer].mean
        )
    assert values["align_audit/sites/head/layer_05_head_02"] == heads.sufficiency[5 * 8 + 2].mean == 1.2
    assert values["align_audit/sites/head/correlation/layer_05_head_02"] == heads.correlation[5 * 8 + 2]
    assert values["align_audit/sites/block_width_2/layer_10"] == windows.sufficiency[10].mean
    assert "align_audit/sites/block_width_2/layer_11" not in values
    assert "align_audit/sites/head/layer_00_head_00" not in values
    assert not_known(exact)["sites.2.sufficiency", "1 of 64 values are not finite"] == [0]


def test_an_alert_that_is_over_is_none_in_curves_and_tables() -> None:
    record = make_record(100)
    alert = Alert(rule="r", cause="drift", level="error", step=100, since=50, value=1.0, message="M.", suggestion="S")
    for event, count in (("opened", 1), ("open", 1), ("resolved", 0)):
        at = record.model_copy(update={"alerts": [alert.model_copy(update={"event": event})]})
        assert scalars(at)[f"{ROOT}/alerts/error"] == count
        assert row_of(at)["alerts"] == count
