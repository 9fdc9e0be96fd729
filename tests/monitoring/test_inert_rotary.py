"""Observation is inert where a forward changes what the next one computes: rotary frequencies that follow the length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from align_audit import AlignmentAuditCallback, AuditRun
from tests.helpers import dpo
from tests.helpers.states import changed, everything
from tests.monitoring.test_inert import small

ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0,
        "rope_theta": 10000.0, "original_max_position_embeddings": 12,
    },
}  # fmt: skip


def rows(repeats: int) -> list[dict[str, str]]:
    return [{**row, "chosen": row["chosen"] * repeats, "rejected": row["rejected"] * repeats} for row in dpo.ROWS]


@pytest.fixture(params=ROPES)
def rope(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of ``tests.dpo`` whose training pairs are beyond their first length, and whose held-out pairs far beyond."""
    saved = dpo.saved_model

    def with_rope(folder: Path, **changes: Any) -> str:
        parameters = dict(ROPES[request.param])
        return saved(folder, max_position_embeddings=12, rope_parameters=parameters, **changes)

    monkeypatch.setattr(dpo, "saved_model", with_rope)
    monkeypatch.setattr(dpo, "ROWS", rows(1)[:16] + rows(4)[16:])


@pytest.mark.usefixtures("rope")
@pytest.mark.parametrize("mode", ["ref_model passed", "new adapter"])
def test_training_is_bit_identical(mode: str, tmp_path: Path) -> None:
    plain = dpo.train(tmp_path / "plain", mode)
    audited = dpo.train(tmp_path / "audited", mode, AlignmentAuditCallback(config=small(spinal={"enabled": False})))
    assert plain.losses == audited.losses
    weights, other = plain.weights, audited.weights
    assert weights.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in weights.items())
    for name, buffer in plain.model.named_buffers():
        assert torch.equal(buffer, audited.model.get_buffer(name)), name
    run = AuditRun.load(tmp_path / "audited")
    assert not run.failures
    assert [record.step for record in run.records] == [0, 1, 2, 3]
    assert run.records[0].reference_check.same_weights


@pytest.mark.usefixtures("rope")
def test_frequencies_move_in_these_runs(tmp_path: Path) -> None:
    """Else the test above would test nothing."""
    model = dpo.train(tmp_path / "out", "ref_model passed", max_steps=1).model
    with torch.no_grad():
        model(input_ids=torch.arange(3, 8)[None])
        before = everything(model)
        model(input_ids=torch.arange(3, 60)[None])
    assert any("rotary" in name for name in changed(before, everything(model)))


def test_a_merged_adapter_stays_merged_in_training(tmp_path: Path) -> None:
    """Another adapter beside it is audited as what the model computes; nothing is unmerged."""
    callback = AlignmentAuditCallback(config=small(spinal={"enabled": False}))
    run = dpo.build(tmp_path / "out", "pretrained adapter", [callback])
    callback.attach(run.trainer)
    model = run.model
    model.add_adapter("spare", LoraConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter()
    before = everything(model)
    trainer = run.trainer
    trainer.state.max_steps = 3
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert AuditRun.load(tmp_path / "out").records
    assert changed(before, everything(model)) == []
