"""What both models must be before anything of an audit runs: in memory, and of one dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from align_audit import audit
from align_audit.auditing.session import open_models
from align_audit.auditing.session.open_models import OpenModels
from align_audit.errors import AnatomyError, ReferenceUnavailableError
from align_audit.models.reference import resolve_reference
from align_audit.models.replay import Replay
from align_audit.probes.pairs import ProbeSet
from tests.helpers.callback_runs import quick
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def margin(model: Any, pairs: ProbeSet) -> float:
    """Mean margin, of plain forwards."""

    def logp(ids: Any, start: int) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(ids)])).logits[0].double()
        each = logits[:-1].log_softmax(-1).gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]
        return float(each[max(start, 1) - 1 :].sum())

    shares = [
        logp(pair.chosen_ids, pair.chosen_start) - logp(pair.rejected_ids, pair.rejected_start) for pair in pairs.pairs
    ]
    return sum(shares) / len(shares)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


# -- opened again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_run_tries_its_models_at_length_until_it_has_trained(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies at how they are built is known then; that their layers can be continued from is tried every time."""
    reference = tiny_model("llama")
    policy: Any = get_peft_model(reference, LoraConfig()) if kind == "adapter" else perturbed(reference)
    source = resolve_reference(policy, None if kind == "adapter" else reference)
    calls: list[int] = []
    real = Replay.layer
    monkeypatch.setattr(Replay, "layer", lambda *asked, **options: calls.append(1) or real(*asked, **options))
    opened = []
    for _ in range(5):
        calls.clear()
        with OpenModels(policy, source) as models:
            replays = models.open().policy, models.reference
            opened.append((len(calls), [(r.pointwise, r.copies, r.may_skip_layers, r.anatomy) for r in replays]))
    short = opened[-1][0]
    assert [count > short for count, _ in opened] == [True, False, True, False, False]
    assert all(found == opened[0][1] for _, found in opened)
    assert all(pointwise for pointwise, *_ in opened[0][1])
    # Built otherwise, it is tried at length; and a layer that cannot be continued from is refused whenever it is so.
    policy.set_attn_implementation("eager")
    calls.clear()
    with OpenModels(policy, source) as models:
        models.open()
    assert len(calls) > short
    layer = replays[0].layers[1]
    handle = layer.register_forward_hook(lambda _, given, out, seen=[]: seen.append(1) or out + len(seen))
    with pytest.raises(AnatomyError, match="layer 1, called again"), OpenModels(policy, source) as models:
        models.open()
    handle.remove()


class Mixing(nn.Module):
    """A module around an MLP that mixes positions, by nothing before it is trained: ``ahead``, also with those that follow."""

    def __init__(self, inner: nn.Module, ahead: bool) -> None:
        super().__init__()
        self.inner, self.ahead = inner, ahead
        self.gate = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        beside = stream.roll(-1 if self.ahead else 1, dims=1).clone()
        beside[:, -1 if self.ahead else 0] = 0
        out: torch.Tensor = self.inner(stream + self.gate * beside)
        return out


@pytest.mark.parametrize("opened_before", [1, 4])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_began_at_zero_is_seen_once_it_is_trained(ahead: bool, opened_before: int) -> None:
    """New modules do nothing before the first step: what was found of a model then is no word on it later."""
    reference: Any = tiny_model("llama")
    policy: Any = perturbed(reference)
    for model in (policy, reference):
        last = model.model.layers[-1]
        last.mlp = Mixing(last.mlp, ahead)
    source = resolve_reference(policy, reference)

    def found() -> set[str]:
        with OpenModels(policy, source) as models:
            replay = models.open().policy
            return {type(module).__name__ for module in replay.pointwise}

    for _ in range(opened_before):
        assert "Mixing" in found()
    with torch.no_grad():
        policy.model.layers[-1].mlp.gate.fill_(0.5)
    if ahead:
        with pytest.raises(AnatomyError, match="not a causal language model"):
            found()
    else:
        assert "Mixing" not in found()


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["path", "model"])
def test_a_reference_on_disk_computes_in_the_policys_dtype(form: str, stored: torch.dtype, tmp_path: Path) -> None:
    """A float32 policy of a base in 16 bits: the shift is that of plain float32 forwards."""
    base = saved(tiny_model(dtype=stored), tmp_path / "base")
    wide: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policy = perturbed(wide)
    pairs = random_pairs(4)
    record = audit(saved(policy, tmp_path / "policy") if form == "path" else policy, base, pairs, quick())
    assert record.margins.reference.mean == pytest.approx(margin(wide, pairs), rel=1e-4)
    assert record.margins.shift.mean == pytest.approx(margin(policy, pairs) - margin(wide, pairs), rel=1e-3)


@pytest.mark.parametrize(
    ("policy", "reference"), [(one, other) for one in DTYPES for other in DTYPES if one != other], ids=str
)
def test_two_models_of_different_dtypes_are_refused_before_an_audit(
    policy: torch.dtype, reference: torch.dtype
) -> None:
    calls: list[Any] = []
    other: Any = tiny_model(dtype=reference)
    other.register_forward_pre_hook(lambda *_: calls.append(None))
    words = f"policy computes in {policy}, the reference in {reference}; expected one dtype".replace("torch.", "")
    with pytest.raises(ReferenceUnavailableError, match=words) as refusal:
        audit(tiny_model(dtype=policy), other, random_pairs(2), quick())
    assert f"dtype={policy}" in str(refusal.value)
    assert not calls


def test_inside_autocast_dtypes_of_weights_may_differ() -> None:
    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    policy = tiny_model(dtype=torch.float32)
    reference = resolve_reference(policy, tiny_model(dtype=torch.bfloat16))
    with OpenModels(policy, reference, autocast=autocast) as models:
        assert models.open().policy.compute_dtype == models.reference.compute_dtype == torch.bfloat16


# -- weights that are not in memory ------------------------------------------------------------------------------------


def on_disk(folder: Path) -> nn.Module:
    saved(tiny_model(dtype=torch.float32), folder / "whole")
    ends = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    layers = {f"model.layers.{layer}": "disk" if layer > 1 else "cpu" for layer in range(4)}
    return AutoModelForCausalLM.from_pretrained(
        folder / "whole", dtype=torch.float32, device_map={**ends, **layers}, offload_folder=str(folder / "offload")
    )


def kept_on_the_cpu(folder: Path) -> nn.Module:
    return accelerate.cpu_offload(tiny_model(dtype=torch.float32), torch.device("cpu"))


def never_loaded(folder: Path) -> nn.Module:
    config = tiny_model().config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def one_weight_lost(folder: Path) -> nn.Module:
    model: Any = tiny_model(dtype=torch.float32)
    model.lm_head.to("meta")
    return model


def under_an_adapter(folder: Path) -> nn.Module:
    return get_peft_model(on_disk(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))  # type: ignore[arg-type]


ABSENT: list[Callable[[Path], nn.Module]] = [on_disk, kept_on_the_cpu, never_loaded, one_weight_lost, under_an_adapter]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("role", ["policy", "reference"])
@pytest.mark.parametrize("make", ABSENT)
def test_a_model_that_is_not_in_memory_is_refused(make: Callable[[Path], nn.Module], role: str, tmp_path: Path) -> None:
    absent, whole = make(tmp_path), tiny_model(dtype=torch.float32)
    models = (absent, whole) if role == "policy" else (whole, absent)
    with pytest.raises(AnatomyError, match=f"tensors of the {role} hold no data, such as .*expected all weights"):
        audit(*models, random_pairs(2), quick())


def test_special_tokens_that_a_trainer_writes_into_one_configuration_make_no_other_model() -> None:
    policy, reference = tiny_model("llama"), tiny_model("llama")
    policy.config.pad_token_id, policy.config.eos_token_id = 7, 8  # type: ignore[union-attr, assignment]
    assert open_models._built_alike(policy, reference)
    policy.config.rms_norm_eps = 0.5  # type: ignore[union-attr, assignment]
    assert not open_models._built_alike(policy, reference)
