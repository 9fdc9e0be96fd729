"""Every decoder family of transformers that is tried: found, replayed, read and patched as its own forward would do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from align_audit.errors import AnatomyError
from align_audit.measures.patching import patched
from align_audit.models.replay import Replay, Stream
from align_audit.models.verify import open_replay
from align_audit.models.weights.fingerprint import fingerprint
from tests.helpers.tiny import DEVICE, VOCABULARY, perturbed, same
from tests.helpers.toys import batch

pytestmark = pytest.mark.device

LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "max_position_embeddings": 64, "sliding_window": 6,
}  # fmt: skip
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
NEOX = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "intermediate_size": 48, "time_step_rank": 4}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}

# name: (where its layers are, its configuration); "name:variant" is the same family configured otherwise
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi", "starcoder2",
            "stablelm", "olmo2", "olmo3", "cohere", "cohere2", "granite", "glm4", "smollm3", "ernie4_5", "exaone4",
            "seed_oss", "helium", "arcee", "hunyuan_v1_dense", "apertus",
        ),
        ("model.layers", LLAMA),
    ),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "gpt_oss", "olmoe", "granitemoe", "phimoe"),
        ("model.layers", LLAMA | EXPERTS),
    ),
    "deepseek_v3": ("model.layers", LLAMA | EXPERTS | LATENT | {"num_key_value_heads": 4, "head_dim": 4}),
    "mixtral:router_logits": ("model.layers", LLAMA | EXPERTS | {"output_router_logits": True}),
    "gemma4_text": (
        "model.layers",
        LLAMA | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    ),
    "gpt2": ("transformer.h", GPT),
    "gptj": ("transformer.h", GPT | {"rotary_dim": 4}),
    "codegen": ("transformer.h", GPT | {"rotary_dim": 4}),
    "gpt_bigcode": ("transformer.h", GPT),
    "gpt_neo": (
        "transformer.h",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("gpt_neox.layers", NEOX),
    "opt": ("model.decoder.layers", NEOX | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "opt:projected": (
        "model.decoder.layers",
        NEOX
        | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "do_layer_norm_before": False},
    ),
    "falcon": ("transformer.h", NEOX),
    "falcon:alibi": ("transformer.h", NEOX | {"alibi": True}),
    "bloom": ("transformer.h", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mpt": (
        "transformer.blocks", {"d_model": 32, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64}
    ),
    "lfm2": ("model.layers", LLAMA | {"layer_types": ["conv", "full_attention", "conv"]}),
    "mamba": ("backbone.layers", MAMBA),
    "falcon_mamba": ("backbone.layers", MAMBA),
    "mamba2": (
        "backbone.layers", MAMBA | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    ),
    "jamba": (
        "model.layers",
        LLAMA
        | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
           "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "nemotron_h": (
        "model.layers",
        LLAMA
        | {"hybrid_override_pattern": "M*-", "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
           "n_groups": 1, "chunk_size": 4},
    ),
    "recurrent_gemma": ("model.layers", LLAMA | {"lru_width": 32}),
    "qwen3_next": ("model.layers", LLAMA | EXPERTS | LINEAR_ATTENTION),
    "qwen3_5_text": ("model.layers", LLAMA | LINEAR_ATTENTION),
    "xlstm": ("backbone.blocks", LLAMA),
    "rwkv": ("rwkv.blocks", NEOX | {"attention_hidden_size": 32, "context_length": 64}),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A tiny model of the family, with weights large enough that every layer does visible work."""
    kind = name.split(":")[0]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    options = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**options, **FAMILIES[name][1], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if "num_experts" in FAMILIES[name][1]:
        model.set_experts_implementation("eager")  # the grouped kernels refuse float64
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in parameter_name:
                parameter.mul_(4.0)
    return model.to(DEVICE)


Edit = Callable[[int, torch.Tensor], torch.Tensor]


def forward(
    model: nn.Module, layers: nn.ModuleList, inputs: dict[str, torch.Tensor], edit: Edit = lambda layer, stream: stream
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One plain forward with hooks that swap streams: h_{−1} … h_{L−1} as the model goes on with them, and logits."""
    streams: dict[int, torch.Tensor] = {}

    def enter(module: nn.Module, args: Any) -> Any:
        streams[-1] = edit(-1, args[0].clone())
        return (streams[-1].clone(), *args[1:])

    def leave(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            whole = output if isinstance(output, tuple) else (output,)
            streams[layer] = edit(layer, whole[0].clone())
            changed = (streams[layer].clone(), *whole[1:])
            return changed if isinstance(output, tuple) else changed[0]

        return hook

    handles = [layers[0].register_forward_pre_hook(enter)]
    handles += [module.register_forward_hook(leave(layer)) for layer, module in enumerate(layers)]
    try:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return [streams[layer] for layer in range(-1, len(layers))], logits


def check(replay: Replay, model: nn.Module, layers: nn.ModuleList, source: list[torch.Tensor]) -> None:
    """Replay from every layer, the head, and patching ``source`` into every layer, against plain forwards."""
    inputs = batch(VOCABULARY)
    valid = inputs["attention_mask"].bool()
    depth = len(layers)
    with torch.no_grad():
        recording = replay.record(inputs, keep_logits=True)
        own, logits = forward(model, layers, inputs)
        assert torch.isfinite(logits).all()
        assert same(recording.logits, logits)
        assert len(recording.streams) == depth + 1
        for recorded, stream in zip(recording.streams, own, strict=True):
            assert same(recorded, stream)
        moved = [float((one - other).abs().max()) for one, other in itertools.pairwise(own)]
        assert min(moved) > 1e-3, "a layer that does nothing tests nothing"

        for start in range(-1, depth):
            stream = own[start + 1]
            for layer in range(start + 1, depth):
                stream = replay.layer(layer, stream, recording)
            assert same(stream, own[-1]), f"replay from layer {start}"
        headed(replay.head(own[-1][valid]), logits[valid])

        patches = [
            Stream(layer, layer, lambda layer=layer: patched(own[layer + 1], source[layer + 1], valid))
            for layer in range(-1, depth)
        ]
        tops = dict(replay.walk(recording, patches, max_streams=2))
        assert len(tops) == depth + 1
        for layer, top in tops.items():

            def swap(at: int, stream: torch.Tensor, layer: int = layer) -> torch.Tensor:
                return patched(stream, source[at + 1], valid) if at == layer else stream

            streams, swapped = forward(model, layers, inputs, swap)
            assert same(top, streams[-1]), f"patched at layer {layer}"
            assert (swapped[valid] - logits[valid]).abs().max() > 1e-4
            headed(replay.head(top[valid]), swapped[valid])

        # The same walks by the calls of a recording that ended at the lowest layer.
        begun = replay.record(inputs, until=0, calls_above=True)
        assert (len(begun.streams), len(begun.calls)) == (2, depth)
        for layer, top in replay.walk(begun, patches, max_streams=2):
            assert top is not None and same(top, tops[layer]), f"patched at layer {layer}, with the calls alone"


def headed(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits of some rows against those of all rows: other shapes, so other roundings; norms round in float32 at best."""
    rtol = atol = 1e-6
    if expected.dtype != torch.float64:
        rtol = max(rtol, 8 * torch.finfo(expected.dtype).eps)
        atol = rtol * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    before = fingerprint(model)
    path = FAMILIES[name][0]
    layers = model.get_submodule(path)
    replay = open_replay(model)
    assert (replay.anatomy.layers, replay.num_layers) == (path, len(layers))
    assert (replay.anatomy.hidden_size, replay.anatomy.vocab_size) == (32, VOCABULARY)
    policy = perturbed(model)
    source, _ = forward(policy, policy.get_submodule(path), batch(VOCABULARY))
    check(replay, model, layers, source)
    assert fingerprint(model) == before


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT turns it on for GPT-2's Conv1D
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("gpt2", ["c_attn"]),
        ("gpt_neox", ["query_key_value"]),
        ("mixtral", ["q_proj", "v_proj"]),
        ("falcon_mamba", ["in_proj"]),
        ("lfm2", ["in_proj", "q_proj"]),
    ],
)
def test_lora(name: str, targets: list[str]) -> None:
    """A LoRA policy as it is, and patched into itself with its adapters off."""
    model = get_peft_model(build(name), LoraConfig(r=2, target_modules=targets)).double().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                parameter.copy_(drawn)
    layers = model.get_base_model().get_submodule(FAMILIES[name][0])
    policy, _ = forward(model, layers, batch(VOCABULARY))
    with model.disable_adapter():
        reference, _ = forward(model, layers, batch(VOCABULARY))
    assert not torch.allclose(policy[-1], reference[-1], rtol=1e-3)
    policy[0], reference[0] = policy[0].flip(-1), reference[0].flip(-1)  # adapters leave the embedding alone
    check(open_replay(model), model, layers, reference)
    with model.disable_adapter():
        check(open_replay(model), model, layers, policy)


def test_layers_between_which_the_model_rescales_are_refused() -> None:
    open_replay(build("rwkv", num_hidden_layers=4, rescale_every=6))
    with pytest.raises(AnatomyError, match="between layer 1 and layer 2 the model changes the residual stream"):
        open_replay(build("rwkv", num_hidden_layers=4, rescale_every=2))


def test_layers_that_share_keys_and_values_are_refused() -> None:
    """Gemma 4's upper layers attend to keys and values of a lower one, which a patch between the two leaves stale."""
    layers = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    open_replay(build("gemma4_text", **layers, num_kv_shared_layers=0))
    with pytest.raises(AnatomyError, match="layer 3, called again"):
        open_replay(build("gemma4_text", **layers, num_kv_shared_layers=2))


# -- a model from somebody's repository -------------------------------------------------------------------------------


class DeckConfig(PretrainedConfig):
    model_type = "deck"

    def __init__(self, depth: int = 3, **rest: Any) -> None:
        self.depth = depth
        super().__init__(**rest)


class Deck(nn.Module):
    """Called by keyword, and returns the stream second."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, *, positions: torch.Tensor, flow: torch.Tensor, blocked: torch.Tensor) -> Any:
        mixed, weights = self.attention(flow + positions, flow, flow, attn_mask=blocked)
        flow = flow + 3 * mixed
        return weights, flow + sum(torch.tanh(expert(flow)) for expert in self.experts)


class DeckForCausalLM(PreTrainedModel):
    config_class = DeckConfig

    def __init__(self, config: DeckConfig) -> None:
        super().__init__(config)
        self.inputs = nn.Embedding(VOCABULARY, 16)
        self.places = nn.Embedding(64, 16)
        self.decks = nn.ModuleList(Deck() for _ in range(config.depth))
        # One more than there are decks, all run, none of them after another.
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(config.depth + 1))
        self.outputs = nn.Linear(16, VOCABULARY)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.4)

    def get_input_embeddings(self) -> nn.Module:
        return self.inputs

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, use_cache: bool | None = None
    ) -> CausalLMOutput:
        count = input_ids.shape[1]
        here = input_ids.device
        blocked = torch.triu(torch.ones(count, count, dtype=torch.bool, device=here), 1)
        positions = self.places(torch.arange(count, device=here))[None].expand(len(input_ids), -1, -1)
        flow = self.norms[-1](self.inputs(input_ids))
        collected = flow
        for deck, norm in zip(self.decks, self.norms, strict=False):
            _, flow = deck(positions=positions, flow=flow, blocked=blocked)
            collected = norm(flow)
        return CausalLMOutput(logits=20 * torch.tanh(self.outputs(collected) / 20))


def test_a_model_that_transformers_does_not_know() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DeckForCausalLM(DeckConfig()).double().to(DEVICE).eval()
    policy = perturbed(model)
    replay = open_replay(model)
    found = replay.anatomy
    assert (found.layers, found.stream_argument, found.output_index, found.num_layers) == ("decks", "flow", 1, 3)
    inputs = batch(VOCABULARY)
    with torch.no_grad():
        recording = replay.record(inputs, keep_logits=True)
        source = open_replay(policy).record(inputs)
        for start in range(-1, 3):
            ((_, top),) = replay.walk(recording, [Stream(start, start, lambda at=start: recording.after(at))], 1)
            assert same(top, recording.after(2))
        ((_, top),) = replay.walk(recording, [Stream(1, 1, lambda: source.after(1))], 1)

        handle = model.decks[1].register_forward_hook(lambda module, args, output: (output[0], source.after(1)))
        swapped = model(**inputs).logits
        handle.remove()
        assert not torch.allclose(swapped, recording.logits, atol=1e-3)
        torch.testing.assert_close(replay.head(top.flatten(0, 1)), swapped.flatten(0, 1), rtol=1e-12, atol=1e-12)
