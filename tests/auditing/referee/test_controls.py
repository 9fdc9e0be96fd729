"""Controls that a misleading model fails, and what a claim may say of ranks."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from align_audit import AuditRecord, ProbeSet, audit
from align_audit.lab.planting.parts import weights_of
from align_audit.lab.planting.reading import margins
from align_audit.probes.pairs import ProbePair
from tests.helpers import oracle
from tests.helpers.misleading import (
    HEAD,
    asked,
    layer,
    leaves,
    pair_of,
    probe_set,
    pushed,
    small_llama,
    together,
    truth,
)
from tests.helpers.tiny import VOCABULARY, perturbed, random_pairs, tiny_model

# -- noise -------------------------------------------------------------------------------------------------------------


def by_margin(model: nn.Module, pairs: ProbeSet, sign: float) -> ProbeSet:
    """The same pairs with their sides so that every margin of the model has that sign."""
    return probe_set(
        pair
        if sign * margin > 0
        else ProbePair(pair.index, pair.rejected_ids, pair.chosen_ids, pair.rejected_start, pair.chosen_start)
        for pair, margin in zip(pairs, margins(model, pairs).tolist(), strict=True)
    )


def lengthened(model: nn.Module, pairs: ProbeSet, number: int, factor: float) -> nn.Module:
    """The layer's MLP also writes ``factor`` of the stream that leaves the layer: the norm above takes nearly all of it
    away again, while noise of that length turns the stream."""
    result = together(model)
    module = result.model.layers[number]  # type: ignore[union-attr, index]
    inputs, outputs = [], []
    handle = module.mlp.down_proj.register_forward_hook(lambda _, args, output: inputs.append(args[0][0].double()))
    for pair in pairs:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            outputs.append(oracle.forward(result, ids).h(number).double())
    handle.remove()
    change = torch.linalg.lstsq(torch.cat(inputs), factor * torch.cat(outputs), driver="gelsd").solution
    with torch.no_grad():
        module.mlp.down_proj.weight.add_(change.T)
    return result


@cache
def wide() -> nn.Module:
    """More features in the MLP than there are tokens, so that it can be made to write anything."""
    model = tiny_model(
        "llama", seed=11, num_hidden_layers=2, hidden_size=16, intermediate_size=256, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)  # type: ignore[union-attr, operator]
    return model


@pytest.mark.parametrize("towards", [1.0, -1.0], ids=["towards chosen", "towards rejected"])
def test_noise_that_does_more_in_the_same_direction_does_not_pass(towards: float) -> None:
    generator = np.random.default_rng(5)
    pairs = probe_set(
        pair_of(index, *(generator.integers(3, VOCABULARY, size=count).tolist() for count in (2, 1, 1)))
        for index in range(120)
    )
    reference = wide()
    # Noise takes margins towards 0: up where they are negative, and most where they are large.
    sizes = margins(reference, pairs).abs()
    pairs = by_margin(reference, probe_set(pairs[int(place)] for place in sizes.argsort()[-24:]), -towards)
    policy = lengthened(reference, pairs, 1, 1.5)
    now = float(margins(policy, pairs).mean() - margins(reference, pairs).mean())
    policy = pushed(policy, pairs, layer(1), towards * 0.25 - now, step=0.002)
    record = audit(policy, reference, pairs, asked())
    assert record.patching is not None
    noise = record.controls.noise
    assert noise.effect is not None
    effect, random = record.patching.effect[1], noise.effect[1]
    if towards > 0:
        assert record.margins.shift.low > 0 and effect.high < random.low, (effect, random)
    else:
        assert record.margins.shift.high < 0 and effect.low > random.high, (effect, random)
    assert record.patching.peak_layer == 1
    assert noise.verdict != "passed", noise.reason
    assert record.finding is not None and not record.finding.localized


def test_a_patch_against_the_shift_does_not_pass_by_being_unlike_noise() -> None:
    """At the peak the layers so far have lowered the margin; the head makes up for it."""
    reference = small_llama(layers=4, seed=4)
    pairs = random_pairs(28, seed=5, longest=5)
    policy = together(reference, pushed(reference, pairs, layer(0), -3.0), pushed(reference, pairs, layer(2), 1.5))
    now = float((margins(policy, pairs) - margins(reference, pairs)).mean())
    policy = pushed(policy, pairs, HEAD, 2.0 - now)
    known = truth(policy, reference, pairs)
    assert known.transplants.mean(0)[1:-1].argmax() == 2
    record = audit(policy, reference, pairs, asked())
    assert record.patching is not None and record.controls.noise.effect is not None
    assert record.patching.peak_layer == 2
    effect, random = record.patching.effect[2], record.controls.noise.effect[2]
    assert record.margins.shift.low > 0 and effect.high < min(0.0, random.low), (effect, random)
    assert record.controls.noise.verdict != "passed", record.controls.noise.reason


# -- reverse -----------------------------------------------------------------------------------------------------------


@cache
def rebuilt(seed: int) -> AuditRecord:
    """Layer 0 raises the margin by a little; the layers above are other layers, to which that little means nothing."""
    reference, other = small_llama(layers=3, width=16, seed=seed), small_llama(layers=3, width=16, seed=seed + 100)
    pairs = random_pairs(16, seed=seed, longest=4)
    policy = together(reference, pushed(reference, pairs, layer(0), 0.4))
    for name, weight in weights_of(policy).items():
        if name.startswith((layer(1), layer(2))):
            weight.mul_(1.5).add_(1.5 * weights_of(other)[name])
    now = float((margins(policy, pairs) - margins(reference, pairs)).mean())
    return audit(pushed(policy, pairs, layer(2), 2.0 - now), reference, pairs, asked())


def unsure(record: AuditRecord) -> list[int]:
    """Layers whose effect lies above 0 while that of the reverse patch is negative in its mean alone."""
    assert record.patching is not None and record.controls.reverse.effect is not None
    both = zip(record.patching.effect, record.controls.reverse.effect, strict=True)
    return [place for place, (effect, back) in enumerate(both) if effect.low > 0 and back.mean < 0 < back.high]


@pytest.mark.parametrize("seed", [5, 6])
def test_reverse_does_not_pass_by_the_sign_of_a_mean(seed: int) -> None:
    record = rebuilt(seed)
    assert unsure(record), "the reverse patch is to be unsure somewhere"
    assert record.controls.reverse.verdict != "passed", record.controls.reverse


def test_reverse_does_not_pass_where_putting_the_stream_back_raises_the_margin() -> None:
    """Layer 0 raises the reference's margin and lowers the policy's, whose layers above are others."""
    reference, other = small_llama(layers=3, width=16, seed=4), small_llama(layers=3, width=16, seed=104)
    pairs = random_pairs(24, seed=4, longest=4)
    policy = together(reference, pushed(reference, pairs, layer(0), 1.0))
    for name, weight in weights_of(policy).items():
        if name.startswith((layer(1), layer(2))):
            weight.add_(2.0 * weights_of(other)[name])
    policy = pushed(policy, pairs, layer(2), 4.0 - float((margins(policy, pairs) - margins(reference, pairs)).mean()))
    back = {name: value for name, value in weights_of(reference).items() if name.startswith(layer(0))}
    policy = pushed(
        policy, pairs, layer(0), float((margins(policy, pairs, back) - margins(policy, pairs)).mean()) - 0.9
    )
    record = audit(policy, reference, pairs, asked())
    assert record.patching is not None and record.controls.reverse.effect is not None
    assert record.patching.effect[0].low > 0 and record.controls.reverse.effect[0].low > 0
    assert record.patching.effect[2].low > 0 and record.controls.reverse.effect[2].high < 0
    assert record.controls.reverse.verdict == "failed", record.controls.reverse


# -- ranks in the words ------------------------------------------------------------------------------------------------


@cache
def planted(*layers: int) -> tuple[nn.Module, nn.Module, ProbeSet]:
    reference, pairs = small_llama(layers=4, seed=4), random_pairs(28, seed=5, longest=5)
    return together(reference, *(pushed(reference, pairs, layer(number), 2.5) for number in layers)), reference, pairs


def claim(layers: tuple[int, ...], measured: tuple[int, ...]) -> AuditRecord:
    policy, reference, pairs = planted(*layers)
    record = audit(policy, reference, pairs, asked(low_rank={"layers": measured, "ranks": (1, 2, 4, 8, 16)}))
    assert record.finding is not None and record.finding.localized, record.finding
    assert record.finding.layers == list(layers)
    return record


def ranks_said(record: AuditRecord) -> list[int]:
    assert record.finding is not None
    return [int(rank) for rank in re.findall(r"rank ≤ (\d+)", record.finding.words)]


def test_no_rank_is_said_of_a_layer_at_which_it_was_not_measured() -> None:
    assert ranks_said(claim((1,), measured=(0, 2))) == []


def test_a_rank_measured_at_one_of_two_layers_is_not_said_of_both() -> None:
    record = claim((1, 2), measured=(1,))
    assert record.finding is not None
    said = re.search(r"rank ≤ \d+([^;]*)", record.finding.words)
    assert said is None or re.search(r"layer 1\b", said.group()), record.finding.words


def test_a_rank_that_is_said_is_what_the_curve_shows() -> None:
    record = claim((1,), measured=(1,))
    shown = {record.low_rank[basis][1].rank_95 for basis in ("activation", "shift")}
    shown |= {record.low_rank[basis][1].rank_95_high for basis in ("activation", "shift")}
    assert all(float(rank) in shown for rank in ranks_said(record))


# -- p-values ----------------------------------------------------------------------------------------------------------


def test_p_values_are_of_the_estimates_beside_them() -> None:
    """Twelve pairs are patched and all are attributed; both say something of the same estimate, so they agree."""
    checked = 0
    for seed in range(3):
        reference = small_llama(layers=1, width=16, seed=seed)
        policy = perturbed(reference, 0.02, seed=seed)
        pairs = random_pairs(60, seed=seed, longest=4)
        record = audit(policy, reference, pairs, asked(patching={"exact_pairs": 12, "control_pairs": 8}))
        assert record.patching is not None and record.patching.estimator == "control_variate"
        for effect, p in zip(record.patching.effect, record.patching.effect_p_adjusted, strict=True):
            half = (effect.high - effect.low) / 2
            size = abs(effect.mean) / half
            # In units of half a 95 % interval: z = 1.96 · size, with some room for a bootstrap's and t's tails.
            if size > 1.5:
                assert p < 0.03, (seed, effect, p)
            elif size < 0.7:
                assert p > 0.09, (seed, effect, p)
            checked += size > 1.5 or size < 0.7
    assert checked >= 2


# -- fingerprints ------------------------------------------------------------------------------------------------------


def with_corners(model: nn.Module, name: str, *, swapped: bool) -> nn.Module:
    """A copy with two rows × two columns of a weight made a, b / b, a; or b, a / a, b: no row or column has another sum."""
    result = together(model)
    weight = weights_of(result)[name]
    one, two = weight[1, 1].clone(), weight[1, 5].clone()
    corners = torch.stack([torch.stack([one, two]), torch.stack([two, one])])
    weight[1:6:4, 1:6:4] = corners.flip(0) if swapped else corners
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_equal_sums_of_rows_and_columns_are_not_equal_weights(name: str, dtype: torch.dtype) -> None:
    """At a width at which the rows of the weight are whole rows of any layout that takes a thousand numbers at once."""
    model = tiny_model(
        "llama", dtype=dtype, num_hidden_layers=1, hidden_size=1024, intermediate_size=8, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    models = [with_corners(model, name, swapped=swapped) for swapped in (False, True)]
    one, two = (weights_of(each)[name] for each in models)
    bits = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    assert not torch.equal(one, two)
    for axis in (0, 1):
        assert torch.equal(one.view(bits).long().sum(axis), two.view(bits).long().sum(axis))
    pairs, reference = random_pairs(2, longest=3), perturbed(model, 0.05)
    config = asked(patching={"enabled": False})
    hashes = [audit(policy, reference, pairs, config).provenance.policy_hash for policy in models]
    assert hashes[0] != hashes[1]


def test_leaves_see_every_number() -> None:
    """The comparison that other tests rest on: a record's numbers are all there."""
    record = planted_record()
    seen = leaves(record)
    assert sum(isinstance(value, float) for value in seen.values()) > 100
    assert record.patching is not None
    assert seen["patching.effect.1.mean"] == record.patching.effect[1].mean
    assert seen["controls.noise.effect.2.high"] == record.controls.noise.effect[2].high  # type: ignore[index]


def planted_record() -> AuditRecord:
    return audit(*planted(1), asked())
