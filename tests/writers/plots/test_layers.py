"""Effects by layer: the maps over audits and the curve of one audit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from align_audit.record.audit_record import Control
from align_audit.record.estimate import Estimate
from align_audit.writers.plots.canvas import RED, pixels
from align_audit.writers.plots.layers import block_transplants, layer_gain_by_layer_and_step, recovery_by_layer_and_step
from tests.helpers.figures import FAILED, broken, error_bars, heat, main_axes, texts
from tests.helpers.make_record import make_record, make_run
from tests.helpers.record_parts import NO_SHIFT

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.mark.parametrize(
    ("draw", "field", "below", "above"),
    [
        (recovery_by_layer_and_step, "recovery", None, None),
        (layer_gain_by_layer_and_step, "layer_gain", "embedding_gain", "head_gain"),
        (block_transplants, "block_transplant", "embedding_transplant", "head_transplant"),
    ],
)
def test_a_heat_map_shows_the_records_numbers(draw: Any, field: str, below: str | None, above: str | None) -> None:
    run = make_run("destabilizing", 4, 6)
    figure = draw([run[2], run[0], run[3], run[1]])  # in any order
    expected = []
    for record in run:
        patching = record.patching
        assert patching is not None
        column = [getattr(patching, below).mean] if below else []
        column += [estimate.mean for estimate in getattr(patching, field)]
        column += [getattr(patching, above).mean] if above else []
        expected.append(column)
    shown = heat(figure)
    assert shown.shape == np.array(expected).T.shape
    np.testing.assert_array_equal(shown.filled(math.nan), np.array(expected).T)
    bottom, top = main_axes(figure).get_ylim()
    assert bottom < top, "layer 0 lies at the bottom"
    assert main_axes(figure).images[0].origin == "lower"
    norm = main_axes(figure).images[0].norm
    assert norm.vmin == -norm.vmax, "the diverging map is centred on 0"
    labels = [label.get_text() for label in main_axes(figure).get_yticklabels()]
    assert labels == ["embedding"] * bool(below) + [str(layer) for layer in range(6)] + ["head"] * bool(above)
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0", "50", "100", "150"]


def test_the_peak_layer_is_marked_in_its_row() -> None:
    run = make_run("destabilizing", 3, 6)
    figure = block_transplants(run)
    (dots,) = main_axes(figure).collections
    rows = [int(y) for _, y in np.asarray(dots.get_offsets())]
    peaks = [record.patching.peak_layer for record in run[1:] if record.patching is not None]
    assert rows == [peak + 1 for peak in peaks if peak is not None]  # the embedding is row 0
    assert len(rows) == 2


def test_what_is_unknown_is_masked_and_said() -> None:
    run = make_run("healthy", 3, 5)
    run[2] = make_record(100, layers=5, patching=False)
    figure = recovery_by_layer_and_step(run)
    assert heat(figure).mask.all(axis=0).tolist() == [True, False, True]
    said = texts(figure)
    assert f"Hatched is not known (step 0): {NO_SHIFT}." in said
    assert "Hatched is not known (step 100): switched off in the configuration." in said
    assert main_axes(figure).patch.get_hatch()


def test_failed_controls_are_said_in_red_and_stand_under_their_columns() -> None:
    run = make_run("healthy", 4, 5)
    run[3] = broken(run[3], noise=FAILED)
    figure = recovery_by_layer_and_step(run)
    (warning,) = [t for t in figure.findobj(Text) if t.get_text() == "Not evidence at step 150: noise control failed"]
    assert warning.get_color() == RED
    strip = figure.axes[1]
    names = [label.get_text() for label in strip.get_yticklabels()]
    verdicts = np.asarray(strip.images[0].get_array())
    assert names == ["noise", "reverse", "identity", "split half"]
    assert verdicts[0].tolist() == [2, 0, 0, 1]  # not run, passed, passed, failed
    assert verdicts[2].tolist() == [0, 0, 0, 0]

    calm = texts(recovery_by_layer_and_step(make_run("healthy", 4, 5)))
    assert "Not evidence" not in calm
    # Unstable halves doubt the peak, which this picture does not show.
    halves = texts(recovery_by_layer_and_step([*run[:3], broken(run[2], split_half=FAILED)]))
    assert "Not evidence" not in halves
    peaks = texts(block_transplants([*run[:2], broken(run[2], split_half=FAILED)]))
    assert "Peak layer is not evidence at step 100: split half control failed" in peaks


def test_one_audit_falls_back_to_a_curve_with_intervals() -> None:
    record = make_record(70, layers=5)
    patching = record.patching
    assert patching is not None
    axes = main_axes(block_transplants([record]))
    shown = error_bars(axes)["block transplant, with interval"]
    expected = [(float(layer), e.mean, e.low, e.high) for layer, e in enumerate(patching.block_transplant)]
    np.testing.assert_allclose(shown, expected, rtol=1e-12)
    (ring,) = [artist for artist in axes.collections if artist.get_label() == f"peak layer {patching.peak_layer}"]
    assert np.asarray(ring.get_offsets())[0, 0] == patching.peak_layer

    curve = main_axes(recovery_by_layer_and_step([record]))
    noise = record.controls.noise.effect
    assert noise is not None
    shown = error_bars(curve)["noise of the same size"]
    shift = record.margins.shift.mean
    np.testing.assert_allclose(shown, [(i, e.mean / shift, e.low / shift, e.high / shift) for i, e in enumerate(noise)])


def test_one_audit_with_a_failed_control_or_nothing_known() -> None:
    record = broken(make_record(70, layers=5), noise=Control(verdict="failed", reason="so says a test", effect=None))
    assert "Not evidence: noise control failed (so says a test)" in texts(layer_gain_by_layer_and_step([record]))
    said = texts(recovery_by_layer_and_step([make_record(0, layers=5, progress=0.0)]))
    assert "not known (reason below)" in said
    assert f"Hatched is not known: {NO_SHIFT}." in said


def test_columns_of_another_model_are_left_out() -> None:
    run = [*make_run("healthy", 3, 4), make_record(150, layers=6), make_record(200, layers=6, progress=1.0)]
    assert heat(recovery_by_layer_and_step(run)).shape == (6, 2)


def test_a_runaway_value_does_not_bleach_a_large_map() -> None:
    run = make_run("healthy", 30, 20)
    patching = run[5].patching
    assert patching is not None
    wild = [Estimate(mean=1e6, low=9e5, high=2e6), *patching.layer_gain[1:]]
    run[5] = run[5].model_copy(update={"patching": patching.model_copy(update={"layer_gain": wild})})
    figure = layer_gain_by_layer_and_step(run)
    assert main_axes(figure).images[0].norm.vmax < 1
    assert main_axes(figure).images[0].colorbar.extend == "both"


def test_a_long_run_of_a_deep_model_stays_readable() -> None:
    figure = block_transplants(make_run("destabilizing", 200, 48))
    pixels(figure, dpi=60)
    for labels in (main_axes(figure).get_yticklabels(), figure.axes[1].get_xticklabels()):
        assert 3 < len(labels) <= 20
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
