"""Weights that are spread over processes are seen without calling the model; whole ones are not mistaken for such."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from align_audit.errors import ConfigurationError
from align_audit.models.weights.sharded import (
    how_sharded,
    is_spread,
    refuse_sharded,
    whole_shape,
    whole_size,
    without_engine,
)
from tests.helpers.tiny import tiny_model


def uncallable(model: nn.Module) -> nn.Module:
    def called(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was called")

    model.forward = called
    return model


@pytest.fixture
def one_process() -> object:
    """A process group of this process alone, in which torch shards for real."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    os.environ.pop("MASTER_ADDR", None)


def test_whole_weights_are_whole() -> None:
    model = uncallable(tiny_model("llama"))
    assert how_sharded(model) is None
    refuse_sharded(model, "the policy")


def test_fsdp2_and_tensor_parallelism_are_told_apart(one_process: object) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1,))
    model = tiny_model("llama", dtype=torch.float32)
    parallelize_module(model.model.layers[0].mlp, mesh, {"gate_proj": ColwiseParallel()})
    assert how_sharded(uncallable(model)) == "tensor parallelism"
    sharded = tiny_model("llama", dtype=torch.float32)
    fully_shard(sharded.model.layers[1], mesh=mesh)
    assert how_sharded(uncallable(sharded)) == "FSDP2"
    refuse_sharded(sharded, "the policy")
    with pytest.raises(ConfigurationError, match=r"the weights of the policy are spread over processes \(tensor"):
        refuse_sharded(model, "the policy")


def test_a_parameter_that_deepspeed_has_partitioned_is_known_by_its_marks() -> None:
    """As ``deepspeed.zero.Init`` leaves it: empty, with its own size and state as attributes."""
    model = uncallable(tiny_model("llama"))
    weight = cut(model.model.layers[1].mlp.down_proj.weight)
    assert how_sharded(model) == "DeepSpeed ZeRO-3"
    assert is_spread(weight)
    assert (whole_shape(weight), whole_size(weight)) == ((32, 48), 32 * 48)
    refuse_sharded(model, "the policy")


def cut(weight: Any) -> Any:
    """Marked as DeepSpeed does, with half of the values here."""
    weight.ds_numel, weight.ds_shape, weight.ds_status = weight.numel(), weight.shape, "NOT_AVAILABLE"
    weight.ds_tensor, weight.ds_secondary_tensor = weight.detach().flatten()[: weight.numel() // 2].clone(), None
    weight.data = torch.empty(0, dtype=weight.dtype)
    return weight


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        (lambda weight: setattr(weight, "ds_tensor", weight.ds_tensor.to("meta")), "with its parameters offloaded"),
        (lambda weight: setattr(weight, "nvme_swapper", object()), "with its parameters offloaded"),
        (lambda weight: setattr(weight.ds_tensor, "ds_quant_scale", torch.ones(1)), "with quantized weights"),
        (lambda weight: setattr(weight, "ds_secondary_tensor", weight.ds_tensor), "with a second partition"),
    ],
)
def test_parameters_say_what_an_audit_cannot_follow(mark: Callable[[Any], None], words: str) -> None:
    """Where they lie elsewhere than they compute, and what ZeRO++ does to them."""
    model = uncallable(tiny_model("llama"))
    mark(cut(model.model.layers[1].mlp.down_proj.weight))
    with pytest.raises(
        ConfigurationError, match=rf"the reference are spread over processes \(DeepSpeed ZeRO-3 {words}"
    ):
        refuse_sharded(model, "the reference")


@pytest.mark.parametrize("registrations", [1, 2, 3])
def test_a_method_is_the_models_however_often_it_was_registered(registrations: int, one_process: object) -> None:
    """transformers registers ``generate`` whenever training begins."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = tiny_model("llama", dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    plain = model.generate
    for _ in range(registrations):
        register_fsdp_forward_method(model, "generate")
    registered = model.generate
    put_back = without_engine(model)
    assert model.generate == plain
    put_back()
    assert model.generate is registered
    assert registered != plain
