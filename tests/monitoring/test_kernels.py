"""DPO with other kernels than usual, with activations elsewhere, and with a scaled loss: audits change nothing, and are right.

Most of it needs a CUDA device (`make test-gpu`, or this file alone with ``ALIGN_AUDIT_TEST_DEVICE=cuda``, some minutes); what
is not installed there is passed over by name.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun, ProbeSet, audit
from tests.helpers.audits import QUICK_GENERATIONS
from tests.helpers.dpo import ROWS, train
from tests.helpers.probe_tokenizer import make_tokenizer
from tests.helpers.tiny import DEVICE, perturbed, random_pairs, tiny_model

pytestmark = pytest.mark.device


@dataclass(frozen=True)
class Kernels:
    """One situation.

    Attributes:
        options: of ``DPOConfig``.
        cuda: whether it needs a CUDA device.
        package: what has to be installed for it.
        margin: by how much, in nats, the record's margins may differ from a plain forward's in the model's own precision.
    """

    mode: str = "ref_model made"
    options: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    cuda: bool = True
    package: str | None = None
    margin: float = 1e-3


CASES = {
    "eager attention": Kernels(attention="eager", cuda=False),
    "flex attention": Kernels(attention="flex_attention"),
    "flex attention, adapter": Kernels(mode="new adapter", attention="flex_attention"),
    "flash attention": Kernels(
        mode="bf16",
        attention="flash_attention_2",
        package="flash_attn",
        margin=0.5,
        options={"gradient_checkpointing": False},
    ),
    "eager attention in bfloat16": Kernels(mode="bf16", attention="eager", margin=0.5),
    "compiled": Kernels(options={"torch_compile": True}),
    "scaled loss": Kernels(options={"fp16": True}, margin=0.1),
    "scaled loss, adapter": Kernels(mode="new adapter", options={"fp16": True}, margin=0.1),
    "offloaded activations": Kernels(options={"activation_offloading": True, "gradient_checkpointing": False}),
    "offloaded activations, adapter": Kernels(
        mode="new adapter", options={"activation_offloading": True, "gradient_checkpointing": False}
    ),
    "Liger's kernels": Kernels(options={"use_liger_kernel": True}, package="liger_kernel", margin=0.05),
    "Liger's kernels, adapter": Kernels(
        mode="new adapter", options={"use_liger_kernel": True}, package="liger_kernel", margin=0.05
    ),
}


def probes() -> ProbeSet:
    return ProbeSet.from_dataset(ROWS[16:20], make_tokenizer())


def audited(output: Path, case: Kernels, callback: AlignmentAuditCallback | None) -> Any:
    return train(output, case.mode, callback, attention=case.attention, **case.options)


@pytest.mark.filterwarnings("default")  # other people's kernels warn of much
@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_and_margins_are_those_of_plain_forwards(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if case.cuda and DEVICE.type != "cuda":
        pytest.skip("needs a CUDA device: make test-gpu")
    if case.package is not None and importlib.util.find_spec(case.package) is None:
        pytest.skip(f"{case.package} is not installed")
    transformers_logging.set_verbosity_error()
    config = AuditConfig.from_dict(
        {
            "generations": QUICK_GENERATIONS, "localization": {"enabled": False}, "tensorboard": "off", "strict": True,
            "statistics": {"bootstrap_resamples": 100}, "schedule": {"every_n_steps": 1}, "budget": None, "progress": False,
        }
    )  # fmt: skip
    plain = audited(tmp_path / "plain", case, None)
    run = audited(tmp_path / "audited", case, AlignmentAuditCallback(probes=probes(), config=config))
    assert plain.losses == run.losses
    for key, value in plain.weights.items():
        assert torch.equal(value, run.weights[key]), key

    stored = AuditRun.load(tmp_path / "audited")
    assert not stored.failures
    assert [(record.step, record.kind) for record in stored.records] == [(step, "full") for step in range(4)]
    last = stored.records[-1]
    assert last.patching is not None
    assert last.controls.identity.verdict == "passed", last.controls.identity.reason
    assert last.margins.shift.mean != 0.0
    assert last.margins.policy.mean == pytest.approx(plain_margin(run, case), abs=case.margin)


@torch.no_grad()
def plain_margin(run: Any, case: Kernels) -> float:
    """Mean margin of the trained policy on the probes, one sequence at a time through the model as training leaves it."""
    model = run.trainer.accelerator.unwrap_model(run.trainer.model).eval()
    margins = []
    for pair in probes().pairs:
        logps = []
        for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
            tokens = torch.tensor([ids], device=DEVICE)
            with run.trainer.accelerator.autocast():
                logits = model(input_ids=tokens, use_cache=False).logits
            logp = logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            logps.append(float(logp[max(start, 1) - 1 :].double().sum()))
        margins.append(logps[0] - logps[1])
    return sum(margins) / len(margins)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_flex_attention_is_audited_as_any_other() -> None:
    """Without gradients, which it has on accelerators only; `pytest -m slow` runs it, on a CPU in half a minute."""
    config = AuditConfig.from_dict({"spinal": {"gradient_concentration": False}, "localization": {"enabled": False}})
    records = []
    for attention in ("sdpa", "flex_attention"):
        reference = tiny_model("llama", dtype=torch.float32)
        policy = perturbed(reference)
        for model in (policy, reference):
            model.set_attn_implementation(attention)
        records.append(audit(policy, reference, random_pairs(5), config))
    usual, flex = records
    assert usual.provenance.shared_prompts
    assert not flex.provenance.shared_prompts
    assert flex.provenance.layout_reason is not None and "flex_attention" in flex.provenance.layout_reason
    assert flex.controls.identity.verdict == "passed"
    one, other = ([estimate.mean for estimate in record.patching.effect] for record in records)
    assert one == pytest.approx(other, abs=1e-4)
    assert max(map(abs, one)) > 0.01
