"""Sites inside the layers of every decoder family: found, swapped as plain hooked forwards would, and refused where absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align_audit.errors import AnatomyError, SiteError
from align_audit.models.find_sites import find_sites
from align_audit.models.sites import LayerSites, Place
from align_audit.models.verify import Verified, open_replay
from align_audit.models.weights.fingerprint import fingerprint
from tests.helpers.tiny import VOCABULARY, perturbed
from tests.helpers.toys import batch
from tests.models.test_families import FAMILIES, DeckConfig, DeckForCausalLM, build

pytestmark = pytest.mark.device

ATTENTION, MLP, HEAD = "attention_output", "mlp_output", "head"
KINDS = (ATTENTION, MLP, HEAD)

# Layers without a site, and why; every family that is not named has all three at every layer.
ABSENT: dict[str, dict[str, tuple[list[int], str]]] = {
    "opt:projected": {kind: ([0, 1, 2], "normalized or gated as a whole") for kind in KINDS},  # a norm after each sum
    "lfm2": {kind: ([0, 2], "its mixer is Lfm2ShortConv") for kind in (ATTENTION, HEAD)},
    **{
        name: {
            ATTENTION: ([0, 1, 2], f"its mixer is {mixer}"),
            HEAD: ([0, 1, 2], f"its mixer is {mixer}"),
            MLP: ([0, 1, 2], "everything it adds to the stream mixes positions"),
        }
        for name, mixer in (("mamba", "MambaMixer"), ("falcon_mamba", "FalconMambaMixer"), ("mamba2", "Mamba2Mixer"))
    },
    "jamba": {kind: ([0, 2], "its mixer is JambaMambaMixer") for kind in (ATTENTION, HEAD)},
    "nemotron_h": {  # one of the three a layer
        ATTENTION: ([0, 2], "its mixer is NemotronHMamba2Mixer"),
        HEAD: ([0, 2], "its mixer is NemotronHMamba2Mixer"),
        MLP: ([0, 1], "everything it adds to the stream mixes positions"),
    },
    "recurrent_gemma": {kind: ([0, 1], "its mixer is RecurrentGemmaRecurrentBlock") for kind in (ATTENTION, HEAD)},
    "xlstm": {kind: ([0, 1, 2], "its mixer is xLSTMLayer") for kind in (ATTENTION, HEAD)},
    "rwkv": {  # layer 0 normalizes the stream first; both parts of the others look back at the token before
        ATTENTION: ([0], "normalized or gated as a whole"),
        MLP: ([0, 1, 2], "normalized or gated as a whole"),
        HEAD: ([0, 1, 2], "normalized or gated as a whole"),
    },
}
WHERE = {
    "llama": LayerSites("self_attn", "mlp", "self_attn.o_proj", 4, ("self_attn", "mlp")),
    "gemma2": LayerSites(
        "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.o_proj", 4,
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "gpt2": LayerSites("attn", "mlp", "attn.c_proj", 4, ("attn", "mlp")),
    "gptj": LayerSites("attn", "mlp", "attn.out_proj", 4, ("attn", "mlp")),
    "bloom": LayerSites(  # whose modules return the stream they have added to
        "self_attention.dense", "mlp.dense_4h_to_h", "self_attention.dense", 4,
        ("self_attention.dense", "mlp.dense_4h_to_h"),
    ),
    "mixtral": LayerSites("self_attn", "mlp", "self_attn.o_proj", 4, ("self_attn", "mlp")),
}  # fmt: skip


def plain(model: nn.Module, inputs: dict[str, torch.Tensor], module: nn.Module, swap: Any = None) -> Any:
    """One full forward with an ordinary hook on one module: what it returned, and what the layers' last one did."""
    seen: list[torch.Tensor] = []

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        seen.append(tensor.clone())
        if swap is None:
            return None
        new = swap(args, tensor)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return seen[0], logits


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    """Which sites there are; a model's own tensors swapped in change no bit; another's, as a plain forward would."""
    model = build(name)
    policy = perturbed(model)
    before = fingerprint(model)
    replay = open_replay(model)
    sites = find_sites(replay)
    donor = find_sites(open_replay(policy, like=Verified.of(replay)), sites)
    absent = ABSENT.get(name, {})
    for kind in KINDS:
        missing = [layer for layer, found in enumerate(sites.layers) if found.path(kind) is None]
        layers, why = absent.get(kind, ([], ""))
        assert missing == layers
        if layers:
            with pytest.raises(SiteError, match=f"layer {layers[0]} has block.*; no {kind}: .*{why}"):
                sites.check(kind, layers[0])
    if name in WHERE:
        assert sites.layers == [WHERE[name]] * replay.num_layers

    inputs = batch(VOCABULARY)
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        recording, source = replay.record(inputs, keep_logits=True), donor.replay.record(inputs)
        hooked = hooks(model)  # transformers leaves some of its own where routers are recorded
        layer_modules = model.get_submodule(FAMILIES[name][0])
        for layer, found in enumerate(sites.layers):
            if layer and found in sites.layers[:layer]:
                continue  # built as one that was tried
            for kind in KINDS:
                if found.path(kind) is None:
                    continue
                place = Place(kind, 1 if kind == HEAD else None)
                own = sites.record(layer, recording, [place])[place]
                assert own.shape == recording.after(layer).shape
                if name == "xlstm" and kind == MLP:
                    assert not own.any()  # begins as zeros
                    continue
                assert own.abs().max() > 1e-4
                same = sites.swapped(layer, recording, place, lambda tensor, own=own: own)
                assert torch.equal(same, recording.after(layer)), (layer, kind)

                theirs = donor.record(layer, source, [place])[place]
                assert not torch.allclose(own, theirs, atol=1e-6)
                stream = sites.swapped(layer, recording, place, lambda tensor, theirs=theirs: theirs)
                for above in range(layer + 1, replay.num_layers):
                    stream = replay.layer(above, stream, recording)

                def swap(
                    args: Any, tensor: torch.Tensor, own: Any = own, theirs: Any = theirs, kind: Any = kind
                ) -> Any:
                    new = tensor.view(own.shape) + (theirs - own) if kind == HEAD else theirs.clone()
                    return new.view(tensor.shape)

                module = layer_modules[layer].get_submodule(found.path(kind))
                _, logits = plain(model, inputs, module, swap)
                assert (logits - recording.logits)[valid].abs().max() > 1e-6
                headed = replay.head(stream[valid])
                torch.testing.assert_close(headed, logits[valid], rtol=1e-6, atol=1e-6)
    assert fingerprint(model) == before
    assert hooks(model) == hooked


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "deepseek_v3", "qwen3_next"])
def test_the_parts_of_all_heads_and_the_bias_sum_to_the_projection(name: str) -> None:
    model = build(name)
    replay = open_replay(model)
    sites = find_sites(replay)
    with torch.no_grad():
        recording = replay.record(batch(VOCABULARY))
        for layer, found in enumerate(sites.layers):
            parts = sites.record(layer, recording, [Place(HEAD, head) for head in range(found.heads)])
            projection = replay.layers[layer].get_submodule(found.projection)
            output, _ = plain(model, batch(VOCABULARY), projection)
            bias = projection.bias if projection.bias is not None else 0.0
            torch.testing.assert_close(sum(parts.values()) + bias, output, rtol=1e-9, atol=1e-9)
            assert len(parts) == 4


def test_a_residual_multiplier_is_part_of_the_sum() -> None:
    """Granite adds a multiple of what the modules return."""
    sites = find_sites(open_replay(build("granite", residual_multiplier=0.3)))
    assert sites.layers == [WHERE["llama"]] * 3


def test_heads_are_not_found_where_the_config_counts_wrongly() -> None:
    model = build("llama")
    for count in (2, 8):
        model.config.num_attention_heads = count
        found = find_sites(open_replay(model)).layers[0]
        assert found.projection is None
        assert f"an input that splits into {count} heads" in found.missing[HEAD]
        assert found.attention == "self_attn"


def test_an_attention_whose_parts_are_not_modules() -> None:
    """Its MLP is a sum that no module returns, so what the attention adds cannot be told from what follows of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DeckForCausalLM(DeckConfig()).double().eval()
    sites = find_sites(open_replay(model))
    assert [found.kinds for found in sites.layers] == [["block"]] * 3
    with pytest.raises(SiteError, match="layer 1 has block; no head: its output is not the stream that enters it plus"):
        sites.check(HEAD, 1, 0)


def test_lora() -> None:
    """One module in two states: adapters inside the projection belong to its heads."""
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"])).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.eval()
    replay = open_replay(model)
    sites = find_sites(replay)
    assert sites.layers == [WHERE["llama"]] * 3
    with model.disable_adapter():
        reference = find_sites(open_replay(model, replay.anatomy), sites)
        with torch.no_grad():
            off = reference.replay.record(batch(VOCABULARY))
            theirs = reference.record(1, off, [Place(HEAD, 2)])[Place(HEAD, 2)]
    merged = build("llama")
    merged.load_state_dict({
        name.replace(".base_layer", ""): value + (
            model.get_base_model().get_submodule(name.rsplit(".", 2)[0]).get_delta_weight("default")
            if "base_layer" in name else 0.0
        )
        for name, value in model.get_base_model().state_dict().items() if "lora" not in name
    })  # fmt: skip
    with torch.no_grad():
        own = sites.record(1, replay.record(batch(VOCABULARY)), [Place(HEAD, 2)])[Place(HEAD, 2)]
        plainly = find_sites(open_replay(merged))
        expected = plainly.record(1, plainly.replay.record(batch(VOCABULARY)), [Place(HEAD, 2)])[Place(HEAD, 2)]
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
    assert (own - theirs).abs().max() > 1e-2


def test_sites_of_another_build_are_not_taken_over() -> None:
    """A model whose layer does something else with the same modules is refused, not patched at the wrong place."""
    model, other = build("llama"), build("llama")
    sites = find_sites(open_replay(model))
    layer = other.model.layers[1]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda stream: forward(stream).square()
    find_sites(open_replay(other), sites)  # still added to the stream
    layer.mlp.forward = forward
    whole = layer.forward
    layer.forward = lambda stream, *args, **kwargs: torch.tanh(whole(stream, *args, **kwargs))
    with pytest.raises(SiteError, match="layer 1 of the policy"):
        find_sites(open_replay(other), sites)


def test_a_site_that_is_not_met_is_an_error_and_leaves_no_hook() -> None:
    model = build("llama")
    replay = open_replay(model)
    sites = find_sites(replay)
    with torch.no_grad():
        recording = replay.record(batch(VOCABULARY))
        forward: Callable[..., Any] = model.model.layers[0].forward
        model.model.layers[0].forward = lambda stream, *args, **kwargs: stream
        with pytest.raises(AnatomyError, match="expected 'mlp' to run once in a call of its decoder layer; it ran 0"):
            sites.record(0, recording, [Place(MLP)])
        model.model.layers[0].forward = forward

        def broken(tensor: torch.Tensor) -> torch.Tensor:
            raise MemoryError

        with pytest.raises(MemoryError):
            sites.swapped(0, recording, Place(HEAD, 0), broken)
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "olmo3", "mamba", "recurrent_gemma", "rwkv"])
def test_in_half_precision(name: str) -> None:
    """bfloat16, of the model or of the trainer's autocast, rounds what float64 tells apart; the sites are the same."""
    expected = find_sites(open_replay(build(name))).layers
    assert find_sites(open_replay(build(name).to(torch.bfloat16))).layers == expected
    wrapped = open_replay(build(name).float(), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert find_sites(wrapped).layers == expected
