"""Margins over a run, and of one audit."""

from __future__ import annotations

import numpy as np
import pytest

from align_audit.record.estimate import Estimate
from align_audit.writers.plots.canvas import RED
from align_audit.writers.plots.margins import margins_over_steps
from tests.helpers.figures import texts
from tests.helpers.make_record import make_record, make_run

pytestmark = pytest.mark.usefixtures("no_warnings")


def test_margins_over_steps_show_the_curves_bands_and_alerts() -> None:
    run = make_run("destabilizing", 11, 3)
    figure = margins_over_steps(run)
    strip, shift, change, kl, share = figure.axes
    steps = [record.step for record in run]
    for axes, name, label in (
        (shift, "shift", "margin shift"),
        (change, "chosen_logp_change_per_token", "chosen"),
        (change, "rejected_logp_change_per_token", "rejected"),
        (kl, "kl", "KL"),
        (share, "accuracy", "pairs with a margin shift > 0"),
    ):
        line = next(line for line in axes.lines if line.get_label() == label)
        assert list(line.get_xdata()) == steps
        assert list(line.get_ydata()) == [getattr(record.margins, name).mean for record in run]
    band = shift.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == max(record.margins.shift.high for record in run)

    alerts = [alert for record in run for alert in record.alerts]
    rules = [label.get_text() for label in strip.get_yticklabels()]
    assert set(rules) == {alert.rule for alert in alerts}
    marks = {
        (str(marks.get_label()), rules[int(y)], int(x))
        for marks in strip.collections
        for x, y in np.asarray(marks.get_offsets())
    }
    assert marks == {(alert.level, alert.rule, alert.step) for alert in alerts}
    first = min(alert.step for alert in alerts if alert.level == "error")
    assert any(line.get_color() == RED and list(line.get_xdata()) == [first] * 2 for line in shift.lines)


def test_a_healthy_run_has_no_alert_strip_and_an_unknown_margin_is_hatched() -> None:
    run = make_run("healthy", 3, 2)
    lost = run[1].margins.model_copy(update={"kl": Estimate.unknown("logits overflowed")})
    run[1] = run[1].model_copy(update={"margins": lost})
    figure = margins_over_steps(run)
    shift, _, kl, _ = figure.axes
    assert [bool(patch.get_hatch()) for patch in kl.patches] == [True]
    assert not shift.patches
    assert "Hatched is not known (KL, step 50): logits overflowed." in texts(figure)


def test_margins_of_one_audit_show_every_interval_and_its_alerts() -> None:
    record = make_record(70, layers=3, kind="destabilizing", progress=1.0)
    figure = margins_over_steps([record])
    points = [container.lines[0].get_xdata()[0] for axes in figure.axes for container in axes.containers]
    expected = [
        getattr(record.margins, name).mean for name in ("shift", "chosen_logp_change_per_token", "kl", "accuracy")
    ]
    assert set(expected) <= {float(point) for point in points}
    for alert in record.alerts:
        assert alert.rule in texts(figure)
