"""The recipe is a program that runs: full fine-tuning and LoRA, on local files.

Once it runs as a process; the other times in this one, which has its imports already.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditConfig, AuditRun
from tests.helpers.audits import QUICK
from tests.helpers.dpo import ROWS, saved_model

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "dpo.py"


def arguments(folder: Path) -> list[str]:
    """A training of two steps, on a model, pairs and an audit configuration in ``folder``."""
    model, pairs, audit = saved_model(folder / "base"), folder / "pairs.jsonl", folder / "audit.yaml"
    pairs.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    AuditConfig.from_dict({**QUICK, "seed": 5}).to_yaml(audit)
    options = {
        "model_name_or_path": model, "dtype": "float32", "dataset_name": pairs, "output_dir": folder / "out",
        "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "bf16": False,
        "report_to": "tensorboard", "audit_pairs": 3, "audit_held_out": 6, "audit_config": audit,
    }  # fmt: skip
    return [*(text for name, value in options.items() for text in (f"--{name}", str(value))), "--use_cpu"]


def check(folder: Path, said: str, source: str) -> None:
    """What a training of :func:`arguments` leaves and prints."""
    run = AuditRun.load(folder / "out")
    assert [record.step for record in run.records] == [0, 1, 2]
    first = run.records[0]
    assert first.reference_check.verdict == "passed"
    assert first.provenance.probe_held_out
    assert (first.provenance.pairs, first.provenance.seed) == (3, 5), "the command line, then the file"
    assert source in first.reference_check.source
    assert "align_audit step 2" in said


def test_the_recipe_trains_and_audits(tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPE), *arguments(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    check(tmp_path, done.stdout, "")
    assert "adapters off" not in AuditRun.load(tmp_path / "out").records[0].reference_check.source


def called(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *options])
    runpy.run_path(str(RECIPE), run_name="__main__")


def test_it_trains_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    called(monkeypatch, *arguments(tmp_path), "--use_peft", "--lora_r", "4")
    check(tmp_path, capsys.readouterr().out, "adapters off")


def test_options_of_the_command_line_leave_those_of_the_file_whole(tmp_path: Path) -> None:
    """Secrets too, which a configuration leaves out of what it writes of itself."""
    secret = "https://hooks.slack.com/services/T0/B0/secret"
    rules = {"norms": {"signal": "grad_norm", "above": 50}}
    webhook = {"url": secret, "headers": {"Authorization": "Bearer abc"}}
    file = tmp_path / "audit.yaml"
    values = {"schedule": {"on_evaluate": True}, "alerts": {"webhook": webhook, "rules": rules, "kl_warning": 0.2}}
    file.write_text(json.dumps(values), encoding="utf-8")
    recipe = runpy.run_path(str(RECIPE), run_name="recipe")
    arguments = recipe["AuditArguments"](
        audit_config=str(file), audit_pairs=7, audit_action="stop", audit_every_n_steps=3
    )
    merged = recipe["audit_config"](arguments)
    assert (merged.max_pairs, merged.schedule.on_evaluate, merged.schedule.every_n_steps) == (7, True, 3)
    alerts = merged.alerts
    assert (alerts.action, alerts.kl_warning, alerts.rules["norms"].above) == ("stop", 0.2, 50)
    assert alerts.webhook.url.get_secret_value() == secret
    assert alerts.webhook.headers["Authorization"].get_secret_value() == "Bearer abc"


def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "pairs.txt"
    wrong.write_text("nothing", encoding="utf-8")
    options = ["--model_name_or_path", "x", "--dataset_name", str(wrong), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"pairs\.txt: expected a file ending in \.jsonl") as ended:
        called(monkeypatch, *options, "--use_cpu")
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model_name_or_path", "x"], "expected --dataset_name: a hub name or a local path"),
        ([], "expected --model_name_or_path and --dataset_name: a hub name or a local path"),
        (
            ["--model_name_or_path", "x", "--dataset_name", "y", "--dataset_streaming"],
            "--dataset_streaming is not provided",
        ),
        (["--model_name_or_path", "x", "--dataset_name", "y", "--ignore_bias_buffers"], "--ignore_bias_buffers is not"),
    ],
)
def test_what_is_missing_or_would_be_passed_over_is_said_in_one_line(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=words) as ended:
        called(monkeypatch, *options, "--output_dir", str(tmp_path / "out"), "--use_cpu")
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("name", "engine", "stage"),
    [("ddp", "MULTI_GPU", None), ("fsdp2", "FSDP", None), ("zero2", "DEEPSPEED", 2), ("zero3", "DEEPSPEED", 3)],
)
def test_accelerate_reads_the_launch_configurations(name: str, engine: str, stage: int | None) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(RECIPE.parent / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == engine
    assert config.deepspeed_config.get("zero_stage") == stage
    assert len(list((RECIPE.parent / "accelerate").iterdir())) == 4
