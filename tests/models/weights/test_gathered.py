"""Weights that are spread over processes: one hash with and without, whole while they are needed, as before afterwards."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from align_audit.errors import ConfigurationError
from align_audit.models.guard import untouched
from align_audit.models.verify import open_replay, probe_inputs
from align_audit.models.weights.fingerprint import bit_sums, fingerprint
from align_audit.models.weights.gathered import gathered_by_layer
from align_audit.models.weights.sharded import engine_hooks, part_of, plain_class, whole_tensors
from align_audit.models.weights.streaming import stream_of
from align_audit.ranks import Ranks
from tests.distributed.watch import snapshot
from tests.helpers.tiny import tiny_model
from tests.models.weights.test_sharded import one_process  # noqa: F401


def sharded(model: nn.Module, dtype: torch.dtype | None = None, output: torch.dtype | None = None) -> nn.Module:
    """Every layer and the root are units of FSDP2, which compute in ``dtype``."""
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, output_dtype=output))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("cuts", [[0, 300_000], [0, 1, 300_000], [0, 65_536, 300_000], [0, 7, 7, 200_001, 300_000]])
def test_the_sums_of_consecutive_parts_add_up_to_the_sums_of_the_whole(dtype: torch.dtype, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-100, 100, (300_000,), generator=generator).to(dtype) / (1 if dtype == torch.int8 else 7)
    values = values.to(dtype)
    parts = [bit_sums(values[first:end], first) for first, end in itertools.pairwise(cuts)]
    assert tuple(sum(column) % 2**64 for column in zip(*parts, strict=True)) == bit_sums(values)


def test_a_part_elsewhere_has_another_sum() -> None:
    values = torch.arange(1.0, 9.0)
    assert bit_sums(values, 8) != bit_sums(values)
    assert bit_sums(values, 65_536)[1] != bit_sums(values, 0)[1]


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_has_the_hash_of_the_whole_one() -> None:
    expected = fingerprint(tiny_model(dtype=torch.float32))
    assert fingerprint(sharded(tiny_model(dtype=torch.float32))) == expected
    assert fingerprint(sharded(tiny_model(dtype=torch.float32, seed=1))) != expected


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_replays_as_the_whole_one_and_is_given_back() -> None:
    plain, model = tiny_model(dtype=torch.float32), sharded(tiny_model(dtype=torch.float32))
    inputs = probe_inputs(plain)
    expected = open_replay(plain).record(inputs, keep_logits=True)
    before = snapshot(model)
    with gathered_by_layer(model, Ranks()) as gathered:
        assert list(engine_hooks(model)) == []
        found = open_replay(model).record(inputs, keep_logits=True)
        whole = [
            index for index, layer in enumerate(model.model.layers) if not isinstance(layer.mlp.up_proj.weight, DTensor)
        ]
        assert whole == [3]
        assert gathered.most == gathered.outside + max(gathered.layers)
    assert torch.equal(found.logits, expected.logits)
    assert all(map(torch.equal, found.streams, expected.streams))
    assert snapshot(model) == before
    assert stream_of(model) is None
    assert len(list(engine_hooks(model))) == 10


@pytest.mark.usefixtures("one_process")
def test_an_error_inside_leaves_nothing_behind() -> None:
    model = sharded(tiny_model(dtype=torch.float32))
    model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), gathered_by_layer(model, Ranks()):
        open_replay(model)
    assert snapshot(model) == before


@pytest.mark.usefixtures("one_process")
def test_what_an_evaluation_left_whole_is_put_back_first() -> None:
    model = sharded(tiny_model(dtype=torch.float32), torch.bfloat16)
    expected = fingerprint(model)
    model.set_reshard_after_forward(False)
    with torch.no_grad():
        model(**probe_inputs(tiny_model()))
    assert not isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
    assert fingerprint(model) == expected
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)


@pytest.mark.usefixtures("one_process")
def test_what_an_evaluation_left_whole_does_not_come_back_empty() -> None:
    model = sharded(tiny_model(dtype=torch.float32))
    model.set_reshard_after_forward(False)
    with torch.no_grad():
        model(**probe_inputs(tiny_model()))
    with untouched(model), gathered_by_layer(model, Ranks()):
        pass
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.usefixtures("one_process")
def test_it_computes_in_the_dtypes_of_the_engine() -> None:
    model = sharded(tiny_model(dtype=torch.float32), torch.bfloat16, torch.float32)
    with torch.no_grad():
        expected = model(**probe_inputs(tiny_model())).logits
    with gathered_by_layer(model, Ranks()):
        replay = open_replay(model)
        found = replay.record(probe_inputs(model), keep_logits=True)
        assert replay.compute_dtype is torch.bfloat16
    assert torch.equal(found.logits, expected)
    assert found.logits.dtype is torch.float32
    assert fingerprint(model) == fingerprint(tiny_model(dtype=torch.float32))


@pytest.mark.usefixtures("one_process")
def test_a_class_is_what_it_was_before_the_engine() -> None:
    plain, model = tiny_model(), sharded(tiny_model())
    assert isinstance(model, FSDPModule)
    assert [plain_class(module) for module in model.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.usefixtures("one_process")
def test_adapters_merged_into_shards_are_refused() -> None:
    model = sharded(tiny_model(dtype=torch.float32))
    model.model.layers[1].merged_adapters = ["default"]
    with (
        pytest.raises(ConfigurationError, match=r"merged into model.layers.1.*Unmerge"),
        gathered_by_layer(model, Ranks()),
    ):
        pass


def test_a_whole_model_is_left_alone() -> None:
    model = tiny_model()
    before = snapshot(model)
    with gathered_by_layer(model, Ranks()) as gathered:
        assert gathered is None
        assert snapshot(model) == before


@pytest.mark.usefixtures("one_process")
def test_parameters_of_all_shapes_are_brought_together() -> None:
    mesh = init_device_mesh("cpu", (1,))
    values = [torch.randn(5, 3), torch.randn(7), torch.randn(1, 2, 2).double(), torch.randn(4, 6)]
    spread = [distribute_tensor(value, mesh, [Shard(0)]) for value in values[:3]]
    spread.append(distribute_tensor(values[3], mesh, [Shard(1)]))
    made: list[int] = []
    found = whole_tensors(
        spread, [torch.float32, torch.bfloat16, torch.float64, torch.float32], ready=lambda: made.append(1)
    )
    assert made == [1]
    assert torch.equal(found[1], values[1].bfloat16())
    assert all(map(torch.equal, (found[0], *found[2:]), (values[0], *values[2:])))
    assert part_of(spread[3]) is None


@pytest.mark.usefixtures("one_process")
def test_nothing_is_waited_for_before_all_have_made_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out on one process leaves the others in no gather: all of it is had before, and none after."""
    mesh = init_device_mesh("cpu", (1,))
    value = torch.randn(5, 3)
    spread = [distribute_tensor(value, mesh, [Shard(0)])]
    order: list[str] = []
    gather = torch.distributed.all_gather

    def gathers(*args: Any, **kwargs: Any) -> Any:
        order.append("gather")
        return gather(*args, **kwargs)

    def no_more(*_: Any, **__: Any) -> Any:
        raise AssertionError("memory is asked for after the others were told that there is room")

    def ready() -> None:
        order.append("ready")
        for name in ("new_empty", "new_zeros", "clone"):
            monkeypatch.setattr(torch.Tensor, name, no_more)

    monkeypatch.setattr(torch.distributed, "all_gather", gathers)
    (found,) = whole_tensors(spread, [torch.float32], ready)
    monkeypatch.undo()
    assert order == ["ready", "gather"]
    assert torch.equal(found, value)
