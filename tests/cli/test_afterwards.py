"""Checkpoints audited afterwards give the numbers that the callback gave live, in every form that they may be saved in."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from align_audit import AlignmentAuditCallback, AuditRecord, AuditRun
from align_audit.record.numbers import by_path
from tests.cli.commands import arguments
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import train


@pytest.fixture(scope="module")
def adapter(place: SimpleNamespace) -> SimpleNamespace:
    """A LoRA training that was audited while it ran, with its base."""
    folder = place.folder / "lora-afterwards"
    callback = AlignmentAuditCallback(probes=str(place.probes), config=quick())
    train(folder / "out", "new adapter", callback, max_steps=2, save_steps=2)
    return SimpleNamespace(run=folder / "out", base=folder / "base")


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def with_tokenizer(folder: Path, base: Path) -> Path:
    for path in base.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def sharded(checkpoint: Path, base: Path, folder: Path) -> Path:
    """The same weights in several safetensors files with an index."""
    loaded(checkpoint).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return with_tokenizer(folder, base)


def merged(checkpoint: Path, base: Path, folder: Path) -> Path:
    """The adapter added to its base: a model like any other."""
    PeftModel.from_pretrained(loaded(base), checkpoint).merge_and_unload().save_pretrained(folder)
    assert not (folder / "adapter_config.json").exists()
    return with_tokenizer(folder, base)


def live(run: Path) -> AuditRecord:
    """What the callback recorded at step 2."""
    (record,) = [record for record in AuditRun.load(run).records if record.step == 2]
    return record


def measured(record: AuditRecord) -> dict[str, float]:
    """All that it measured: no times, and nothing of when it was made; saved weights do not tell β."""
    numbers = [
        each for each in by_path(record).values() if not each.path.startswith(("cost.", "occasion.", "provenance.beta"))
    ]
    return {each.path: math.nan if each.value is None else each.value for each in numbers}


def audited(command: Any, place: SimpleNamespace, checkpoint: Path, output: Path, *more: Any) -> AuditRecord:
    done = command(*arguments(place, checkpoint, output, "--step", 2, *more))
    assert done.code == 0, done.err
    (record,) = AuditRun.load(output).records
    return record


@pytest.mark.parametrize("kind", ["full", "sharded", "adapter", "merged"])
def test_a_checkpoint_in_any_form_gives_the_live_numbers(
    kind: str, command: Any, place: SimpleNamespace, adapter: SimpleNamespace, tmp_path: Path
) -> None:
    run, base = (place.full, place.base) if kind in ("full", "sharded") else (adapter.run, adapter.base)
    checkpoint = run / "checkpoint-2"
    if kind in ("sharded", "merged"):
        checkpoint = (sharded if kind == "sharded" else merged)(checkpoint, base, tmp_path / "model")
    named = [] if kind == "adapter" else ["--reference", base]
    then = measured(live(run))
    now = measured(audited(command, place, checkpoint, tmp_path / "out", *named))
    assert now.keys() == then.keys() and abs(then["margins.shift"]) > 0.1
    assert {path.split(".")[0] for path in now} >= {"margins", "patching", "controls"}
    # Merging rounds each weight once more, and what is measured are differences of log-probabilities of so many nats.
    nats = float(np.abs(AuditRun.load(run).load_arrays(2, "arrays")["per_pair.chosen_logp"]).max())
    bounds = {"rel": 1e-6, "abs": 1e-6 * nats} if kind == "merged" else {"rel": 0.0, "abs": 0.0}
    assert now == pytest.approx(then, nan_ok=True, **bounds)


def test_in_a_narrower_dtype_the_numbers_differ_and_it_is_said(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    more = ["--reference", place.base, "--dtype", "bfloat16"]
    record = audited(command, place, place.full / "checkpoint-2", tmp_path / "out", *more)
    then, now = measured(live(place.full)), measured(record)
    assert now["margins.shift"] != pytest.approx(then["margins.shift"], rel=1e-6)
    assert "is read in bfloat16 and was recorded in float32" in record.extra["origin"]["policy"]["reason"]
