"""The recipe is a program that runs: full fine-tuning and LoRA, on local files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align_audit import AuditRun
from tests.helpers.dpo import ROWS, saved_model

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "dpo.py"


@pytest.mark.parametrize("extra", [[], ["--use_peft", "--lora_r", "4"]], ids=["full", "lora"])
def test_the_recipe_trains_and_audits(extra: list[str], tmp_path: Path) -> None:
    model = saved_model(tmp_path / "base")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    options = {
        "model_name_or_path": model, "dtype": "float32", "dataset_name": pairs, "output_dir": tmp_path / "out",
        "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "bf16": False,
        "report_to": "tensorboard", "audit_pairs": 3, "audit_held_out": 6,
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(RECIPE), *arguments, "--use_cpu", *extra], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = AuditRun.load(tmp_path / "out")
    assert [record.step for record in run.records] == [0, 1, 2]
    assert run.records[0].reference_check.verdict == "passed"
    assert run.records[0].provenance.probe_held_out
    assert ("adapters off" in run.records[0].reference_check.source) == bool(extra)
    assert "align_audit, step 2" in done.stdout


def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path) -> None:
    wrong = tmp_path / "pairs.txt"
    wrong.write_text("nothing", encoding="utf-8")
    arguments = ["--model_name_or_path", "x", "--dataset_name", str(wrong), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(RECIPE), *arguments, "--use_cpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "expected a file ending in .jsonl" in done.stderr
