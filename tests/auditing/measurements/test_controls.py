"""Verdicts of controls where nothing can be said: they were not run, with the reason, and neither passed nor failed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.controls import Controls
from align_audit.auditing.measurements.measurement import AuditTask
from align_audit.auditing.measurements.patching import Patching
from align_audit.config import AuditConfig
from tests.helpers.audits import QUICK_GENERATIONS, audited
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


def config(**patching: Any) -> AuditConfig:
    return AuditConfig.from_dict(
        {
            "patching": patching,
            "low_rank": {"layers": (1,), "ranks": (1, 2)},
            "generations": QUICK_GENERATIONS,
            "localization": {"enabled": False},
            "statistics": {"bootstrap_resamples": 100},
            "progress": False,
        }
    )


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[AuditTask]:
    """The tasks of audits, as their controls see them."""
    seen: list[AuditTask] = []
    real = Controls.part

    def part(self: Controls) -> Any:
        seen.append(self.task)
        return real(self)

    monkeypatch.setattr(Controls, "part", part)
    return seen


def test_of_few_independent_control_pairs_nothing_is_said(judged: list[AuditTask]) -> None:
    """Their means have no interval: a random subspace neither does as well as the fitted one, nor less."""
    reference = tiny_model("llama")
    audited(perturbed(reference), reference, random_pairs(16), config(control_pairs=4))
    (task,) = judged
    state = task[Behaviour].state
    along = task[Patching].direction
    state.chosen_logp.values[:] = state.reference_chosen_logp.values + along * (50.0 + np.arange(16))
    state.rejected_logp.values[:] = state.reference_rejected_logp.values
    task[Patching]._summary = None
    controls = task[Controls].part()[0]
    for control in (controls.noise, controls.reverse, controls.random_subspace):
        assert control.verdict == "not_run", control
        assert "8 independent pairs" in control.reason, control
    assert controls.random_subspace.effect is not None
    assert math.isnan(controls.random_subspace.effect[0].low)


def test_halves_agree_on_no_peak_where_there_is_none(judged: list[AuditTask]) -> None:
    """Every block alone moves the margin against the shift: the one that does least is no peak."""
    reference = tiny_model("llama")
    audited(perturbed(reference), reference, random_pairs(16), config())
    (task,) = judged
    state = task[Patching].state
    along = task[Patching].direction
    state.transplant.values[:, 1:-1] = -along * (1.0 + np.arange(4) + 0.01 * np.arange(16)[:, None])
    shifts = task[Behaviour].state.chosen_logp
    shifts.values[:] = task[Behaviour].state.reference_chosen_logp.values + along * (50.0 + np.arange(16))
    task[Patching]._summary = None
    control = task[Controls].part()[0].split_half
    assert task[Patching].summary is not None and task[Patching].summary.peak_layer is None
    assert control.verdict == "not_run"
    assert control.reason == task[Patching].summary.peak_reason


def test_nothing_is_reversed_while_the_shift_may_be_none(judged: list[AuditTask]) -> None:
    """Its direction is not known then."""
    reference = tiny_model("llama")
    audited(perturbed(reference), reference, random_pairs(16), config())
    (task,) = judged
    state = task[Behaviour].state
    state.chosen_logp.values[:] = state.reference_chosen_logp.values + np.tile([1.0, -1.0], 8)
    state.rejected_logp.values[:] = state.reference_rejected_logp.values
    controls = task[Controls].part()[0]
    for control in (controls.noise, controls.reverse, controls.random_subspace, controls.split_half):
        assert control.verdict == "not_run"
        assert "mean margin shift" in control.reason, control.reason
    assert controls.reverse.effect is not None
