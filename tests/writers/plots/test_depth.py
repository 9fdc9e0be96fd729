"""The depth trace."""

from __future__ import annotations

import numpy as np
import pytest

from align_audit.writers.plots.depth import depth_trace
from tests.helpers.figures import texts
from tests.helpers.make_record import make_record

pytestmark = pytest.mark.usefixtures("no_warnings")


def test_the_depth_trace_shows_both_models_and_the_terminal_block() -> None:
    record = make_record(100, layers=36, kind="destabilizing", progress=0.8)
    spinal = record.spinal
    assert spinal is not None
    figure = depth_trace(record)
    upper, lower, plane = figure.axes
    for axes, name in ((upper, "contraction"), (lower, "transport")):
        lines = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
        np.testing.assert_array_equal(lines["policy"], getattr(spinal.policy, name))
        np.testing.assert_array_equal(lines["reference"], getattr(spinal.reference, name))
        assert len(axes.collections) == 2, "a band of standard errors for each model"
    block = upper.patches[0].get_extents().transformed(upper.transData.inverted())
    assert (round(block.x0, 6), round(block.x1, 6)) == (
        spinal.terminal_layers[0] - 0.5,
        spinal.terminal_layers[-1] + 0.5,
    )
    assert any(patch.get_hatch() for patch in upper.patches), "layer 0 is not known"
    assert not any(patch.get_hatch() for patch in lower.patches)
    assert "Hatched is not known (contraction, layer 0): the window holds 11 singular values" in texts(figure)
    inner = spinal.terminal_layers[:-1]
    paths = [np.asarray(line.get_xydata()) for line in plane.lines]
    ours = np.column_stack([spinal.policy.contraction[:-1], spinal.policy.transport])
    assert any(path.shape == ours[inner].shape and np.array_equal(path, ours[inner]) for path in paths)
    assert f"coherence {spinal.coherence:.3g}" in texts(figure)


def test_older_records_have_no_errors_of_transport() -> None:
    record = make_record(100, layers=6)
    assert record.spinal is not None
    older = {
        name: getattr(record.spinal, name).model_copy(update={"transport_stderr": []})
        for name in ("policy", "reference")
    }
    figure = depth_trace(record.model_copy(update={"spinal": record.spinal.model_copy(update=older)}))
    upper, lower, _ = figure.axes
    assert (len(upper.collections), len(lower.collections)) == (2, 0)
