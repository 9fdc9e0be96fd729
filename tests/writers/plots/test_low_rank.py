"""The low-rank curve, and its map where there are many layers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align_audit.record.estimate import Estimate
from align_audit.writers.plots.low_rank import low_rank_curve
from tests.helpers.figures import error_bars, texts
from tests.helpers.make_record import make_record

pytestmark = pytest.mark.usefixtures("no_warnings")


def test_the_low_rank_curve_shows_fractions_control_and_rank_95() -> None:
    record = make_record(100, layers=12)
    assert record.patching is not None
    peak = record.patching.peak_layer
    assert peak is not None
    figure = low_rank_curve(record)
    panels = {axes.get_title(loc="left").split(":")[0]: axes for axes in figure.axes}
    assert set(panels) == {f"layer {layer}, {basis} basis" for basis, by in record.low_rank.items() for layer in by}
    for basis, by_layer in record.low_rank.items():
        for layer, curve in by_layer.items():
            axes = panels[f"layer {layer}, {basis} basis"]
            bars = error_bars(axes)
            np.testing.assert_allclose(
                bars["share of the effect"],
                [(k, e.mean, e.low, e.high) for k, e in zip(curve.ranks, curve.effect_fraction, strict=True)],
            )
            lines = {line.get_label(): line for line in axes.lines}
            np.testing.assert_array_equal(lines["explained variance"].get_ydata(), curve.explained_variance_ratio)
            if math.isnan(curve.rank_95):
                assert "rank 95" not in lines
                assert axes.get_title(loc="left").endswith("rank 95 not known")
            else:
                assert list(lines["rank 95"].get_xdata()) == [curve.rank_95] * 2
            # The control belongs to the shift basis at the peak layer, and is in nats there.
            assert ("random subspaces" in bars) == ((basis, layer) == ("shift", peak))
    random = record.controls.random_subspace.effect
    assert random is not None
    full = record.low_rank["shift"][peak].full_effect.mean
    shown = error_bars(panels[f"layer {peak}, shift basis"])["random subspaces"]
    np.testing.assert_allclose([y for _, y, _, _ in shown], [estimate.mean / full for estimate in random])
    assert "no evaluated rank reaches 95 % of the effect" in texts(figure)


@pytest.mark.parametrize(("most", "said"), [(3.7, True), (1.2, False)])
def test_a_share_far_above_1_is_pointed_out(most: float, said: bool) -> None:
    record = make_record(100, layers=12)
    layer, curve = next(iter(record.low_rank["activation"].items()))
    shares = [Estimate(mean=share, low=share, high=share) for share in np.linspace(0.96, most, len(curve.ranks))]
    changed = curve.model_copy(update={"effect_fraction": shares, "rank_95": float(curve.ranks[0])})
    low_rank = {"activation": {layer: changed}, "shift": record.low_rank["shift"]}
    figure = low_rank_curve(record.model_copy(update={"low_rank": low_rank}))
    titles = {axes.get_title(loc="left") for axes in figure.axes}
    assert f"layer {layer}, activation basis: rank 95 is {curve.ranks[0]}" + (", overshoots" if said else "") in titles
    words = f"In the activation basis the share reaches {most:g} (layer {layer})"
    assert (words in texts(figure).replace("\n", " ")) == said

    many = make_record(100, layers=20, low_rank="all")
    bases = {**many.low_rank, "activation": {**many.low_rank["activation"], 3: changed}}
    figure = low_rank_curve(many.model_copy(update={"low_rank": bases}))
    assert (f"the share reaches {most:g} (layer 3)" in texts(figure).replace("\n", " ")) == said
    rings = [tuple(place) for found in figure.axes[0].collections for place in np.asarray(found.get_offsets())]
    assert ((0, 3) in rings) == (not said)


def test_many_layers_of_low_rank_become_a_map() -> None:
    record = make_record(100, layers=20, low_rank="all")
    figure = low_rank_curve(record)
    for axes, (basis, by_layer) in zip(figure.axes, record.low_rank.items(), strict=False):
        assert axes.get_title(loc="left") == f"{basis} basis"
        expected = [[estimate.mean for estimate in by_layer[layer].effect_fraction] for layer in range(20)]
        np.testing.assert_array_equal(np.ma.asarray(axes.images[0].get_array()).filled(math.nan), expected)
        rings = axes.collections[0].get_offsets() if axes.collections else []
        assert len(rings) == sum(not math.isnan(curve.rank_95) for curve in by_layer.values())
