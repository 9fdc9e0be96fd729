"""Margins equal the ones ``DPOTrainer`` computes on the same pairs, in float32 and under bf16 autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun
from tests.helpers.audits import QUICK_GENERATIONS
from tests.helpers.dpo import build

pytestmark = pytest.mark.device


@pytest.mark.parametrize("mode", ["ref_model passed", "bf16", "new adapter"])
def test_margins_equal_the_trainers(mode: str, tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(
        config=AuditConfig.from_dict(
            {
                "low_rank": {"enabled": False}, "spinal": {"enabled": False}, "patching": {"enabled": False},
                "tensorboard": "off", "strict": True, "progress": False, "generations": QUICK_GENERATIONS,
            }
        )
    )  # fmt: skip
    run = build(tmp_path / "out", mode, [callback], beta=0.25, learning_rate=5e-2, per_device_eval_batch_size=8)
    callback.attach(run.trainer)
    run.trainer.train()
    record = AuditRun.load(tmp_path / "out").records[-1]
    assert record.step == 3
    assert record.provenance.pairs == len(run.trainer.eval_dataset)
    assert record.provenance.compute_dtype == ("bfloat16" if mode == "bf16" else "float32")

    metrics = run.trainer.evaluate()
    margins = record.margins
    scale = abs(metrics["eval_logps/chosen"]) + abs(metrics["eval_logps/rejected"])
    tolerance = scale * (2**-7 if mode == "bf16" else 1e-6)
    assert abs(metrics["eval_rewards/margins"]) > 50 * 0.25 * scale * 1e-6
    assert metrics["eval_rewards/margins"] == pytest.approx(0.25 * margins.shift.mean, abs=0.25 * tolerance)
    assert metrics["eval_logps/chosen"] - metrics["eval_logps/rejected"] == pytest.approx(
        margins.policy.mean, abs=tolerance
    )
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.25 * margins.chosen_logp_change.mean, abs=tolerance)
    if mode != "bf16":  # rounding may flip the sign of a small shift
        assert metrics["eval_rewards/accuracies"] == pytest.approx(margins.accuracy.mean)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(
        _pooled_accuracy(callback, tmp_path / "out"), abs=0.02 if mode == "bf16" else 1e-6
    )


def _pooled_accuracy(callback: AlignmentAuditCallback, folder: Path) -> float:
    """Over all chosen tokens, as the trainer pools them (a record's is a mean over pairs)."""
    arrays = AuditRun.load(folder).load_arrays(3, "arrays")
    tokens = torch.from_numpy(arrays["per_pair.chosen_tokens"])
    share = torch.from_numpy(arrays["per_pair.token_accuracy"])
    return float((share * tokens).sum() / tokens.sum())
