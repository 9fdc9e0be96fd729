"""What one rank sees of a small model's weights under DeepSpeed ZeRO-3, without a trainer."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align_audit.models.anatomy import unwrap_only
from align_audit.models.build import build_fingerprint
from align_audit.models.guard import untouched
from align_audit.models.verify import open_replay, probe_inputs
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.models.weights.gathered import gathered_by_layer
from align_audit.models.weights.sharded import engine_hooks, whole_tensors
from align_audit.models.weights.streaming import find_layers
from align_audit.models.weights.zero3 import is_partitioned, loading_whole, unsupported
from align_audit.ranks import Ranks
from tests.distributed.watch import snapshot
from tests.helpers.dpo import saved_model
from tests.helpers.tiny import tiny_model

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {"zero_hpz_partition_size": 1, "offload_param": {"device": "none"}, "mics_shard_size": -1},
    "quantized": {"zero_quantized_weights": True},
    "quantized, frozen": {"zero_quantized_nontrainable_weights": True},
    "disk": {"offload_param": {"device": "nvme"}},
    "groups": {"mics_shard_size": 8},
    "gradients": {"zero_quantized_gradients": True, "offload_optimizer": {"device": "cpu"}},
}


def run(folder: Path, rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Cut a model, train it by a step, open it between its layers; what was seen."""
    import deepspeed

    base = saved_model(folder / f"base-{rank}")  # now: where processes know of each other, the first one alone saves
    deepspeed.init_distributed("gloo")
    ranks = Ranks.of_this_run()
    seen: dict[str, Any] = {"loading": _loading(base), "settings": _settings()}
    # Biases of odd length end in padding on the second process.
    plain = tiny_model(dtype=torch.float32, mlp_bias=True, intermediate_size=47)
    # A list that is no layers' stands before theirs, and holds less.
    plain._modules = {"few": nn.ModuleList([nn.Linear(2, 2)]).requires_grad_(False), **plain._modules}
    model = copy.deepcopy(plain)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1),
        config={"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": {
            "stage": 3, "stage3_param_persistence_threshold": 0,
        }},
    )  # fmt: skip
    seen["unwrapped"] = unwrap_only(engine) is model
    seen["padded"] = sum(is_partitioned(each) and each.ds_numel % 2 == 1 for each in model.parameters())
    seen["begins alike"] = _hashes(model, ranks) == _hashes(plain, ranks)
    inputs = probe_inputs(plain)
    engine.backward(engine(**inputs, labels=inputs["input_ids"]).loss)
    engine.step()
    seen["moved"] = fingerprint(model, ranks=ranks) != fingerprint(plain)
    with torch.no_grad():
        for (_, parameter), values in zip(plain.named_parameters(), _whole(model), strict=True):
            parameter.copy_(values)
    seen["goes on alike"] = _hashes(model, ranks) == _hashes(plain, ranks)
    seen["same layers"] = find_layers(model)[0] == find_layers(plain)[0] == "model.layers"
    seen.update(_opened(model, plain, ranks))
    with deepspeed.zero.GatheredParameters(model.model.layers[1].mlp.up_proj.weight, modifier_rank=0), torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
        plain.model.layers[1].mlp.up_proj.weight.mul_(2)
    seen["written to, alike"] = _hashes(model, ranks) == _hashes(plain, ranks)
    return seen


def _hashes(model: nn.Module, ranks: Ranks) -> tuple[str, str]:
    return fingerprint(model, ranks=ranks), build_fingerprint(model)


def _whole(model: nn.Module) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    return whole_tensors(parameters, [parameter.dtype for parameter in parameters])


def _opened(model: nn.Module, plain: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """The model between its layers beside the plain one, and what is left of that."""
    seen: dict[str, Any] = {}
    alone = open_replay(plain)
    inputs = probe_inputs(plain)
    expected = alone.record(inputs, keep_logits=True)
    before = snapshot(model)
    with untouched(model), gathered_by_layer(model, ranks) as gathered:
        assert gathered is not None
        seen["hooks"] = len(list(engine_hooks(model)))
        replay = open_replay(model)
        recording = replay.record(inputs, keep_logits=True)
        seen["same streams"] = all(map(torch.equal, recording.streams, expected.streams))
        seen["same logits"] = torch.equal(recording.logits, expected.logits)
        seen["pointwise"] = [len(replay.pointwise), len(alone.pointwise)]
        held = [index for index, layer in enumerate(replay.layers) if layer.mlp.up_proj.weight.numel()]
        seen["held"] = held
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.model.norm.register_parameter("added", nn.Parameter(torch.zeros(1)))
    seen["left"] = snapshot(model) == before
    seen["hooks after"] = len(list(engine_hooks(model)))
    with contextlib.suppress(ZeroDivisionError), untouched(model), gathered_by_layer(model, ranks):
        model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        open_replay(model)
        seen["broke"] = False
    seen["left after an error"] = snapshot(model) == before
    return seen


def _loading(base: str) -> dict[str, bool]:
    """Which parameters of a model that is loaded beside a trainer with ZeRO-3 are cut."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, deepspeed_config, is_deepspeed_zero3_enabled

    lives = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    with loading_whole():
        inside = AutoModelForCausalLM.from_pretrained(base)
    outside = AutoModelForCausalLM.from_pretrained(base)
    return {
        "inside": any(map(is_partitioned, inside.parameters())),
        "outside": all(map(is_partitioned, outside.parameters())),
        "as before": is_deepspeed_zero3_enabled() and deepspeed_config() is lives.config,
    }


def _settings() -> dict[str, str | None]:
    """By configuration of a trainer: why it is refused."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    reasons = {}
    lives = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "torch_autocast": {"enabled": True}})
    reasons["autocast"] = unsupported([])
    for name, settings in SETTINGS.items():
        lives = HfDeepSpeedConfig({"zero_optimization": {"stage": 3, **settings}})
        reasons[name] = unsupported([])
        del lives
    return reasons
