"""Running parts of the last layer at some positions only: found by trying, exact where it matters, and undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align_audit.models.pointwise import find_pointwise, narrowed
from align_audit.models.verify import open_replay
from tests.helpers.states import left_on
from tests.helpers.tiny import VOCABULARY, tiny_model
from tests.helpers.toys import batch
from tests.models.test_families import FAMILIES, build

pytestmark = pytest.mark.device


def names(model: nn.Module, modules: list[nn.Module]) -> set[str]:
    return {name.rsplit(".layers.", 1)[-1] for name, module in model.named_modules() if module in set(modules)}


def test_the_llama_layer_is_split_where_it_should_be() -> None:
    model = tiny_model("llama")
    replay = open_replay(model)
    assert names(model, replay.pointwise) == {"3.self_attn.q_proj", "3.self_attn.o_proj", "3.mlp"}


def test_fused_projections_are_left_alone() -> None:
    model = tiny_model("gpt2")
    found = {name for name, module in model.named_modules() if module in set(open_replay(model).pointwise)}
    assert found == {"transformer.h.2.attn.c_proj", "transformer.h.2.mlp"}


def test_adapters_come_along() -> None:
    model: Any = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double()
    found = {type(module).__name__ for module in open_replay(model.eval()).pointwise}
    assert found == {"Linear", "LlamaMLP"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_at_some_positions(name: str) -> None:
    """What the last layer gives at the positions read is what it gives when it runs everywhere."""
    model = build(name)
    replay = open_replay(model)
    inputs = batch(VOCABULARY)
    recording = replay.record(inputs)
    last = replay.num_layers - 1
    stream = recording.after(last - 1).roll(1, dims=0)
    generator = torch.Generator().manual_seed(3)
    before = left_on(model)
    with torch.no_grad():
        whole = replay.layer(last, stream, recording).flatten(0, 1)
        for _ in range(3):
            valid = torch.nonzero(inputs["attention_mask"].flatten()).flatten()
            read = valid[torch.randperm(len(valid), generator=generator)[:5]].sort().values
            some = replay.layer(last, stream, recording, read).flatten(0, 1)
            torch.testing.assert_close(some[read], whole[read], rtol=1e-6, atol=1e-6)
            if replay.pointwise:
                others = torch.ones(len(whole), dtype=torch.bool)
                others[read] = False
                assert not torch.equal(some[others], whole[others]), "nothing was saved"
            # Lower layers are never narrowed: those above read all of their stream.
            if last:
                lower = replay.layer(last - 1, recording.after(last - 2), recording, read)
                assert torch.equal(lower, recording.after(last - 1))
    assert left_on(model) == before


class Mixing(nn.Module):
    """The wide part looks at the position before; only the small one treats each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 8)
        self.small = nn.Linear(8, 8)
        self.idle = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        mixed = self.wide(stream)
        stream = stream + 1e-3 * torch.cat([torch.zeros_like(mixed[:, :1]), mixed[:, :-1]], 1)
        return stream + self.small(stream)


def test_a_weak_dependence_on_other_positions_is_seen() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, stream = Mixing().double(), torch.randn(2, 6, 8, dtype=torch.float64)
    kept = torch.tensor([3, 4, 5, 9, 10, 11])
    with torch.no_grad():
        found = find_pointwise(layer, lambda: layer(stream), stream, kept, tolerance=1e-6)
    assert found == [layer.small], "not the mixing part, and not one that never runs"


def test_narrowing_is_undone_when_the_layer_breaks() -> None:
    layer = nn.Linear(4, 4)
    own = layer.forward
    layer.forward = own  # somebody's wrapper

    def breaks() -> None:
        with narrowed([layer], torch.tensor([0]), (1, 2)):
            assert layer.forward is not own
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert vars(layer)["forward"] is own
