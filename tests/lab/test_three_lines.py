"""Three lines in a script with TRL's defaults: a ruined run is reported early, although nothing is saved before step 500."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import preference_pairs
from align_audit.lab.demo import BATCH_SIZE, RUINED


def test_the_demos_ruined_run_is_reported_by_step_20(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pairs = preference_pairs(160 + 12, seed=0)
    args = DPOConfig(
        output_dir=str(tmp_path), learning_rate=RUINED.learning_rate, beta=RUINED.beta, max_steps=20,
        per_device_train_batch_size=BATCH_SIZE, lr_scheduler_type="constant", report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    assert args.save_steps == 500

    callback = AlignmentAuditCallback()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(pairs[:160]),
        eval_dataset=Dataset.from_list(pairs[160:]),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        callbacks=[callback],
    )
    callback.attach(trainer)
    trainer.train()

    run = AuditRun.load(tmp_path)
    assert run.failures == []
    assert [record.step for record in run.records if record.kind == "health"] == [0, 5, 10]
    assert [record.step for record in run.records if record.kind == "full"] == [5, 20]
    errors = [alert for alert in run.alerts if alert.level == "error"]
    assert errors, run.status
    assert errors[0].step <= 20
    assert errors[0].cause == "drift"
    assert run.status.word == "ERROR"
    # The look that warned first was followed by a full audit at once: the alert has layers to look at.
    opened = min(alert.step for alert in run.alerts)
    (full,) = [record for record in run.records if record.step == opened and record.kind == "full"]
    assert full.occasion is not None
    assert full.occasion.reason.startswith("a health audit warns: ")
    assert full.patching is not None
    assert full.patching.peak_layer is not None
    # One cause is one alert, told when something happens to it.
    assert len({alert.cause for alert in errors}) == 1
    events = [alert.event for alert in run.alerts if alert.cause == "drift"]
    assert events in (["opened"], ["opened", "worse"])
    assert errors[0].clean_step == 0
    assert errors[0].checkpoint is None
    assert "The last clean audit was before training: start again from the model" in errors[0].suggestion
    assert "Learning rate 0.003 → 0.0006 or lower, or beta 0.02 → 0.04 or higher" in errors[0].suggestion
    assert pytest.approx(RUINED.learning_rate) == max(row.logs.get("learning_rate", 0.0) for row in run.training_log)
