"""``untouched`` gives back what a forward, or whoever switches adapters and modes, leaves beside the parameters."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align_audit.auditing.audit import audit
from align_audit.config import AuditConfig
from align_audit.models import module_state
from align_audit.models.guard import untouched
from align_audit.models.reference import Reference
from tests.helpers.audits import QUICK_GENERATIONS
from tests.helpers.states import changed, everything
from tests.helpers.tiny import DEVICE, VOCABULARY, random_pairs, tiny_model
from tests.models.test_families import build

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["lm_head"])


def forward(model: nn.Module, tokens: int) -> torch.Tensor:
    ids = torch.arange(3, 3 + tokens, device=DEVICE).remainder(VOCABULARY)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def rotary(parameters: dict[str, Any]) -> nn.Module:
    return tiny_model("llama", dtype=torch.float32, max_position_embeddings=16, rope_parameters=dict(parameters))


def grown(parameters: dict[str, Any]) -> nn.Module:
    """After a forward longer than any the guard will see: a short one resets it."""
    model = rotary(parameters)
    forward(model, 40)
    return model


def adapted(*, merged: bool = False, options: dict[str, Any] | None = None) -> Any:
    """Three adapters, of which two are active."""
    config = LORA if options is None else LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    model = get_peft_model(tiny_model("llama", dtype=torch.float32), config)
    if options is None:
        plain = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
        model.add_adapter("other", plain)
        model.add_adapter("third", plain)
        model.base_model.set_adapter(["default", "other"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    if merged:
        model.merge_adapter()
    return model


class Odd(nn.Module):
    """What modules of somebody's own may keep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.twice = nn.ModuleList([self.norm, nn.Linear(4, 4)])
        self.register_buffer("mask", torch.tensor([math.nan, 0.0, 1.0, -math.inf]))
        self.register_buffer("spread", torch.ones(1).expand(5))
        self.register_buffer("counts", torch.zeros(3, dtype=torch.long), persistent=False)
        self.register_buffer("absent", None)
        self.calls = 0
        self.scale = 1.5
        self.cached: torch.Tensor | None = None
        self.table = torch.arange(4.0)
        self.rows = [torch.zeros(2), [1, 2]]
        self.places = {"a": torch.zeros(2), "b": {1, 2}}
        self.meta = torch.empty(3, device="meta")


def odd(change: Callable[[Any], object]) -> tuple[Callable[[], nn.Module], Callable[[Any], object]]:
    return Odd, change


def assigned(name: str, value: Any) -> Callable[[Any], object]:
    return lambda model: setattr(model, name, value)


def replaced_weight(model: Any) -> None:
    model.twice[1].weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


def moved_weight(model: Any) -> None:
    model.twice[1].weight.data = torch.zeros(4, 4)


def switched_off(model: Any) -> None:
    with model.disable_adapter():
        forward(model, 5)


def merged_and_unmerged(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def hooked(model: Any) -> None:
    model.norm.register_forward_hook(lambda *_: None)
    model.twice[1].register_full_backward_hook(lambda *_: None)


def trained(model: Any) -> None:
    model.train()
    model.norm(torch.randn(8, 4))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "dynamic rotary frequencies grow": (lambda: rotary(DYNAMIC), lambda model: forward(model, 30)),
    "dynamic rotary frequencies grow further": (lambda: grown(DYNAMIC), lambda model: forward(model, 50)),
    "dynamic rotary frequencies are reset": (lambda: grown(DYNAMIC), lambda model: forward(model, 5)),
    "long rotary frequencies are taken": (lambda: rotary(LONG), lambda model: forward(model, 30)),
    "short rotary frequencies are taken": (lambda: grown(LONG), lambda model: forward(model, 5)),
    "a recurrent state is left": (lambda: build("recurrent_gemma"), lambda model: forward(model, 5)),
    "running statistics": odd(trained),
    "a buffer is written to": odd(lambda model: model.mask.zero_()),
    "one bit of a buffer": odd(lambda model: model.mask[1].mul_(-1.0)),
    "a buffer is written to behind its back": odd(lambda model: model.counts.data.add_(1)),
    "a buffer is replaced": odd(lambda model: model.register_buffer("mask", torch.zeros(4))),
    "a buffer is moved": odd(lambda model: setattr(model.counts, "data", torch.ones(9, dtype=torch.long))),
    "a buffer becomes persistent": odd(lambda model: model.register_buffer("counts", model.counts, persistent=True)),
    "a buffer comes": odd(lambda model: model.register_buffer("new", torch.zeros(2))),
    "a buffer that was none": odd(assigned("absent", torch.zeros(2))),
    "a buffer goes": odd(lambda model: delattr(model, "mask")),
    "an integer": odd(lambda model: setattr(model, "calls", model.calls + 1)),
    "a float": odd(assigned("scale", 2.0)),
    "an attribute comes": odd(assigned("_seq_len_cached", 7)),
    "an attribute goes": odd(lambda model: delattr(model, "scale")),
    "a cache is filled": odd(assigned("cached", torch.ones(3))),
    "a tensor attribute is replaced": odd(assigned("table", torch.ones(4))),
    "a tensor attribute is written to": odd(lambda model: model.table.add_(1.0)),
    "a tensor without data is replaced": odd(assigned("meta", torch.empty(4, device="meta"))),
    "a list grows": odd(lambda model: model.rows.append(1)),
    "a list in a list": odd(lambda model: model.rows[1].clear()),
    "a tensor in a list": odd(lambda model: model.rows[0].add_(1.0)),
    "a dictionary": odd(lambda model: model.places.pop("a")),
    "a dictionary's order": odd(lambda model: model.places.update(a=model.places.pop("a"))),
    "a tensor in a dictionary": odd(lambda model: model.places["a"].add_(1.0)),
    "a set in a dictionary": odd(lambda model: model.places["b"].add(3)),
    "hooks": odd(hooked),
    "a child": odd(lambda model: model.add_module("extra", nn.Linear(2, 2))),
    "a child is replaced": odd(lambda model: setattr(model, "norm", nn.Identity())),
    "a forward of its own": odd(lambda model: setattr(model.norm, "forward", lambda value: value)),
    "a parameter is replaced": odd(replaced_weight),
    "a parameter lies elsewhere": odd(moved_weight),
    "a parameter's gradient": odd(lambda model: setattr(model.norm.weight, "grad", torch.ones(4))),
    "what trains": odd(lambda model: model.requires_grad_(False)),
    "modes": odd(lambda model: model.train()),
    "a configuration": (lambda: tiny_model("llama"), lambda model: setattr(model.config, "use_cache", False)),
    "a list in a configuration": (
        lambda: tiny_model("gemma2"), lambda model: model.config.layer_types.reverse(),
    ),
    "one adapter of two": (adapted, lambda model: model.set_adapter("other")),
    "adapters beneath the wrapper": (adapted, lambda model: model.base_model.set_adapter(["third"])),
    "an adapter of one layer": (
        adapted, lambda model: model.base_model.model.model.layers[1].self_attn.q_proj.set_adapter(["third"]),
    ),
    "adapters off": (adapted, lambda model: model.base_model.disable_adapter_layers()),
    "merged, then switched off": (lambda: adapted(merged=True), switched_off),
    "merged, then another": (lambda: adapted(merged=True), lambda model: model.base_model.set_adapter(["third"])),
    "merged, then unmerged": (lambda: adapted(merged=True), lambda model: model.unmerge_adapter()),
    "unmerged, then merged": (adapted, lambda model: model.merge_adapter()),
    "merged safely": (adapted, lambda model: model.merge_adapter(safe_merge=True)),
    "merged and unmerged": (adapted, merged_and_unmerged),
    "DoRA merged, then unmerged": (
        lambda: adapted(merged=True, options={"use_dora": True}), lambda model: model.unmerge_adapter(),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
@pytest.mark.parametrize("breaks", [False, True], ids=["", "breaks"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back(kind: str, breaks: bool) -> None:
    make, change = KINDS[kind]
    model = make()
    model.train()
    before = everything(model)
    with contextlib.suppress(ZeroDivisionError), untouched(model):
        inside = everything(model)
        change(model)
        assert changed(inside, everything(model)), "the body changes something"
        if breaks:
            raise ZeroDivisionError
    assert changed(before, everything(model)) == []


def test_a_user_s_hooks_stay_and_work() -> None:
    model, calls = Odd(), []
    handle = model.twice[1].register_forward_hook(lambda *_: calls.append(1))
    with untouched(model):
        model.twice[1].register_forward_hook(lambda *_: calls.append(2), prepend=True)
        model.twice[1](torch.zeros(1, 4))
    model.twice[1](torch.zeros(1, 4))
    assert calls == [2, 1, 1]
    handle.remove()
    model.twice[1](torch.zeros(1, 4))
    assert calls == [2, 1, 1]


def test_what_did_not_change_is_not_written_to() -> None:
    model = tiny_model("gpt2")
    versions = {name: tensor._version for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    with untouched(model):
        forward(model, 5)
    assert {name: tensor._version for name, tensor in (*model.named_buffers(), *model.named_parameters())} == versions


def test_a_large_buffer_is_not_copied_and_a_write_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module_state, "_COPIED_BYTES", 64)
    model = nn.Module()
    model.register_buffer("small", torch.zeros(4))
    model.register_buffer("large", torch.zeros(100))
    with untouched(model):
        model.small.add_(1.0)
    assert not caplog.text
    assert torch.equal(model.small, torch.zeros(4))
    with caplog.at_level(logging.WARNING), untouched(model):
        model.large.add_(1.0)
    assert "cannot be given back" in caplog.text


def test_weights_that_a_forward_rescales_stay_consistent() -> None:
    """RWKV divides some of its weights at the first forward in eval mode, and multiplies them again in training mode."""
    model = build("rwkv", num_hidden_layers=4, rescale_every=2).train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with untouched(model):
        forward(model, 5)
    assert model.training
    forward(model, 5)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


# -- autograd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
def test_autograd_mode_comes_back(mode: str, breaks: bool) -> None:
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    with context():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with contextlib.suppress(ZeroDivisionError), untouched(Odd()):
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled() == (mode == "grad")
            torch.set_grad_enabled(mode != "grad")
            if breaks:
                raise ZeroDivisionError
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_models_made_in_inference_mode_are_seen_as_ordinary_ones() -> None:
    with torch.inference_mode():
        model = Odd()
        model.register_parameter("tied", model.twice[1].weight)
    before = everything(model)
    with untouched(model):
        tensors = (*model.parameters(), *model.buffers())
        assert not any(tensor.is_inference() for tensor in tensors)
        assert model.tied is model.twice[1].weight
        with torch.enable_grad():
            model.twice[1](torch.ones(2, 4)).sum().backward()
        model.counts.add_(1)
    assert changed(before, everything(model)) == []


def small(**changes: Any) -> AuditConfig:
    values: dict[str, Any] = {
        "max_pairs": 4, "low_rank": {"enabled": False}, "patching": {"noise_draws": 1, "reverse": False},
        "localization": {"enabled": False}, "spinal": {"enabled": False}, "statistics": {"bootstrap_resamples": 100},
        "progress": False, "generations": QUICK_GENERATIONS,
    }  # fmt: skip
    return AuditConfig.from_dict({**values, **changes})


def findings(policy: nn.Module, reference: nn.Module | None) -> str:
    sites = [{"site": "mlp_output", "estimator": "attribution"}]
    config = small(low_rank={"ranks": [1, 2], "layers": [1]}, sites=sites)
    return audit(policy, reference, random_pairs(4), config).model_dump_json(exclude={"cost", "provenance"})


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.inference_mode])
def test_an_audit_finds_the_same_in_any_autograd_mode(ambient: Any) -> None:
    plain = findings(tiny_model(), tiny_model(seed=1))
    policy = tiny_model()
    with ambient():
        assert findings(policy, tiny_model(seed=1)) == plain, "the reference was made in it"


# -- whole audits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: rotary(DYNAMIC), lambda: grown(DYNAMIC), lambda: rotary(LONG), lambda: grown(LONG),
        lambda: tiny_model("gpt2"), lambda: build("recurrent_gemma"),
    ],
    ids=["dynamic", "dynamic, grown", "longrope", "longrope, long", "gpt2", "recurrent_gemma"],
)  # fmt: skip
def test_an_audit_leaves_two_models_as_they_were(make: Callable[[], nn.Module]) -> None:
    policy, reference = make().train(), make()
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.1)
    before = everything(policy), everything(reference)
    audit(policy, reference, random_pairs(4, longest=20), small())
    assert changed(before[0], everything(policy)) == []
    assert changed(before[1], everything(reference)) == []


@pytest.mark.parametrize("reference", ["adapters off", "ref adapter"])
@pytest.mark.parametrize("merged", [False, True])
def test_an_audit_of_adapters_is_right_and_leaves_them(merged: bool, reference: str) -> None:
    policy = adapted()
    if reference == "ref adapter":
        policy.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"]))
    expected = audit(policy, None, random_pairs(4), small())
    if merged:
        policy.merge_adapter()
    policy.train()
    before = everything(policy)
    found = audit(policy, None, random_pairs(4), small())
    assert changed(before, everything(policy)) == []
    assert expected.margins.shift.mean != 0.0
    assert found.margins.shift.mean == pytest.approx(expected.margins.shift.mean, rel=1e-3)
    assert found.margins.reference.mean == pytest.approx(expected.margins.reference.mean, rel=1e-3)
    assert (found.provenance.policy_hash == expected.provenance.policy_hash) == (not merged)


def test_the_reference_s_turn_gives_a_merged_policy_back() -> None:
    policy = adapted(merged=True).eval()
    own, before = forward(policy, 6), everything(policy)
    reference = Reference("", adapter_of=policy)
    for _ in range(2):
        with reference.active():
            base = forward(policy, 6)
        assert changed(before, everything(policy)) == []
        assert torch.equal(forward(policy, 6), own)
    assert not torch.allclose(base, own)
    unmerged = adapted().eval()
    with unmerged.disable_adapter():
        torch.testing.assert_close(base, forward(unmerged, 6), rtol=1e-3, atol=1e-3)
    assert reference.fingerprint() == reference.fingerprint()
    assert changed(before, everything(policy)) == []
