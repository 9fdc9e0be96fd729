"""Observation is inert: training with the callback is bit-identical to training without it, in every reference mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun
from tests.helpers.audits import QUICK_GENERATIONS, QUICK_LASSO
from tests.helpers.dpo import MODES, train

pytestmark = pytest.mark.device


def small(**changes: Any) -> AuditConfig:
    """Every measurement, on few pairs; no pictures."""
    values = {
        "max_pairs": 4,
        "low_rank": {"ranks": [1, 4], "layers": [1]},
        "patching": {"noise_draws": 1},
        "statistics": {"bootstrap_resamples": 100},
        "schedule": {"every_n_steps": 1},
        "budget": None,
        "generations": QUICK_GENERATIONS,
        "localization": QUICK_LASSO,
        "tensorboard_images": False,
        "progress": False,
        "strict": True,
    }
    return AuditConfig.from_dict({**values, **changes})


HEALTH: dict[str, Any] = {"budget": 0.001, "schedule": {"first_health": 1, "escalate": False, "last_step_seconds": 0.0}}
"""No room for a full audit, and a look at every step of four."""


@pytest.mark.parametrize("mode", MODES)
def test_losses_gradients_and_weights_are_bit_identical(mode: str, tmp_path: Path) -> None:
    """Full audits, and health audits. Pictures are drawn in the first mode alone: they are made of records."""
    plain = train(tmp_path / "plain", mode)
    full, health = small(tensorboard_images=mode == MODES[0]), small(**HEALTH)
    audited = train(tmp_path / "audited", mode, AlignmentAuditCallback(config=full))
    looked = train(tmp_path / "looked", mode, AlignmentAuditCallback(config=health))
    assert len(plain.losses) == 4
    assert plain.losses == audited.losses == looked.losses
    weights = plain.weights
    for other in (audited.weights, looked.weights):
        assert weights.keys() == other.keys()
        for name, value in weights.items():
            assert torch.equal(value, other[name]), name

    run, looks = AuditRun.load(tmp_path / "audited"), AuditRun.load(tmp_path / "looked")
    assert not run.failures
    assert not looks.failures
    assert [record.step for record in run.records] == [0, 1, 2, 3]
    assert [(record.step, record.kind) for record in looks.records] == [(step, "health") for step in range(4)]
    for one, other in zip(run.records, looks.records, strict=True):
        assert one.generations is not None
        assert other.generations is not None
        assert other.generations.model_dump_json() == one.generations.model_dump_json()
        # A look sees to the bit what the whole audit sees.
        assert other.margins.model_dump_json() == one.margins.model_dump_json()
        whole, look = run.pair_texts(one), looks.pair_texts(other)
        assert whole is not None
        assert whole == look
        assert bool(whole.lost + whole.gained) == (one.margins.shift.mean != 0.0)
    first, last = run.records[0], run.records[-1]
    # At step 0 every mode's reference is the policy's starting point: exactly zero everywhere.
    assert first.reference_check.verdict == "passed", first.reference_check.reason
    assert first.reference_check.same_weights
    assert all(estimate.mean == 0.0 for estimate in first.patching.effect)
    assert first.margins.kl.mean == 0.0
    # And training moved it, so the audits that followed had something to see.
    assert last.margins.shift.mean != 0.0
    assert last.provenance.policy_hash != first.provenance.policy_hash
    for earlier, later in zip(run.records, run.records[1:], strict=False):
        moved = later.provenance.reference_hash != earlier.provenance.reference_hash
        assert moved == (mode == "sync" and later.step == 2)
    assert not [alert for alert in run.alerts if alert.rule.startswith("reference")]


def test_the_models_are_left_as_they_were(tmp_path: Path) -> None:
    """Modes, flags, hooks, gradients and random state around one audit of a PEFT policy in training mode."""
    from tests.helpers.dpo import build

    callback = AlignmentAuditCallback(config=small())
    run = build(tmp_path / "out", "pretrained adapter", [callback])
    callback.attach(run.trainer)
    model = run.model
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)

    def state() -> Any:
        modules = [
            (
                name,
                module.training,
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                "forward" in vars(module),
            )
            for name, module in model.named_modules()
        ]
        parameters = [
            (name, parameter.requires_grad, None if parameter.grad is None else float(parameter.grad.sum()))
            for name, parameter in model.named_parameters()
        ]
        return modules, parameters, list(model.active_adapters), torch.get_rng_state().tolist(), model.config.to_dict()

    trainer = run.trainer
    trainer.state.max_steps = 3
    before = state()
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert AuditRun.load(tmp_path / "out").records
    assert state() == before
