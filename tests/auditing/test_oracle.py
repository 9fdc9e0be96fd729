"""The oracle checks itself: planted changes are found where they were planted, identical models give exactly 0.

What is compared here comes from another road than the oracle's hooks: the model's own outputs, its ``hidden_states``,
its norm and head called by hand, closed forms, finite differences.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.helpers import oracle, oracle_spinal, oracle_subspaces
from tests.helpers.oracle import Pair

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")
VOCAB, WIDTH, DEPTH = 61, 24, 5

PAIRS = [
    Pair((3, 14, 15, 9, 26, 5), (3, 14, 15, 35, 8, 9, 7), 3, 3),  # completions of different lengths
    Pair((2, 7, 18, 28, 18), (2, 7, 18, 45, 9), 2, 2),  # completions that begin with the same token
    Pair((1, 41, 42, 13, 5, 6, 23), (1, 41, 42, 13, 37), 4, 4),
    Pair((5, 57, 21), (6, 6, 4, 9), 0, 0),  # no prompt
]
FEW = PAIRS[2:]  # for what takes a forward per layer


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, depth: int = DEPTH) -> Any:
    common = {"vocab_size": VOCAB, "initializer_range": 0.2, "tie_word_embeddings": False}
    llama_like = {
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(seed)
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**common, **llama_like))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, **llama_like))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(**common, **llama_like, query_pre_attn_scalar=6, sliding_window=4, final_logit_softcapping=5.0)
        )
    else:
        model = GPT2LMHeadModel(GPT2Config(**common, n_embd=WIDTH, n_layer=depth, n_head=4, n_positions=64))
    return model.to(dtype).eval()


def shaken(model: Any, part: str = "", scale: float = 0.05, seed: int = 1) -> Any:
    """A copy whose parameters with ``part`` in their names have moved; the others are the same."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if part in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((scale * noise).to(parameter.dtype))
    return moved


def norm_and_head(model: Any, family: str, stream: torch.Tensor) -> torch.Tensor:
    """Final norm, unembedding and soft-cap written out by hand."""
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    logits = model.lm_head(norm(stream))
    return 5.0 * torch.tanh(logits / 5.0) if family == "gemma2" else logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_streams_and_margins_are_the_models_own(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype=dtype)
    margin, chosen, rejected = oracle.margins(model, PAIRS)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    for i, pair in enumerate(PAIRS):
        expected = []
        for ids, start in oracle.sides(pair):
            with torch.no_grad():
                plain = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            run = oracle.forward(model, ids)
            assert torch.equal(run.logits, plain.logits[0])
            for layer in range(-1, DEPTH - 1):
                assert torch.equal(run.h(layer), plain.hidden_states[layer + 1][0])
            with torch.no_grad():  # transformers gives the last one after the norm, so go through norm and head
                torch.testing.assert_close(norm_and_head(model, family, run.h(DEPTH - 1)), run.logits)
            logp = torch.log_softmax(plain.logits[0].double(), dim=-1)
            expected.append(sum(logp[t - 1, ids[t]].item() for t in range(max(start, 1), len(ids))))
        assert chosen[i] == pytest.approx(expected[0], rel=1e-12)
        assert rejected[i] == pytest.approx(expected[1], rel=1e-12)
        assert margin[i] == pytest.approx(expected[0] - expected[1], rel=1e-9)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_identical_models_give_exactly_zero(family: str) -> None:
    model = make(family)
    twin = copy.deepcopy(model)
    for positions in ("all", "last_prompt_token"):
        assert not oracle.patch_effects(twin, model, FEW, positions).any()
    assert not oracle.block_transplants(twin, model, FEW).any()
    assert not oracle_subspaces.activation_features(twin, model, FEW).any()
    halves = np.array([True, False])
    low_rank = oracle_subspaces.low_rank_effects(twin, model, FEW, 2, [3], "shift", halves)
    assert not low_rank["effects"].any()
    assert not low_rank["full_effect"].any()
    changes = oracle.behaviour(twin, model, FEW)
    for name in ("chosen_logp_change", "rejected_logp_change", "kl", "shift", "correct"):
        assert not changes[name].any(), name
    np.testing.assert_array_equal(changes["entropy"], changes["reference_entropy"])
    np.testing.assert_array_equal(changes["token_accuracy"], changes["reference_token_accuracy"])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_changed_block_is_found_where_it_is(family: str) -> None:
    reference, planted = make(family), 2
    policy = shaken(reference, part=f"{'h' if family == 'gpt2' else 'layers'}.{planted}.")
    delta = oracle.margins(policy, FEW)[0] - oracle.margins(reference, FEW)[0]
    assert np.abs(delta).min() > 1e-3
    effects = oracle.patch_effects(policy, reference, FEW)
    assert not effects[:, : planted + 1].any()
    np.testing.assert_allclose(effects[:, planted + 1 :], delta[:, None].repeat(DEPTH - planted, 1), atol=1e-9)
    transplants = oracle.block_transplants(policy, reference, FEW)
    np.testing.assert_allclose(transplants[:, planted + 1], delta, atol=1e-9)
    assert not np.delete(transplants, planted + 1, axis=1).any()
    found = oracle.summary(effects, transplants, delta)
    assert found["additivity"] == pytest.approx(1)
    assert found["head_gain"] == pytest.approx(0, abs=1e-9)
    assert found["layer_gain"] == pytest.approx(np.eye(DEPTH)[planted])
    assert found["peak_layer"] == planted  # whichever way the margin moved
    turned = oracle.summary(-effects, -transplants, -delta)
    assert turned["peak_layer"] == planted
    reverse = oracle.patch_effects(reference, policy, FEW)
    np.testing.assert_allclose(reverse[:, planted + 1 :], -delta[:, None].repeat(DEPTH - planted, 1), atol=1e-9)
    features = oracle_subspaces.activation_features(policy, reference, FEW)
    assert not features[:, :planted].any()
    assert (features[:, planted:] > 0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("part", ["embed", "head"])
def test_changed_embedding_and_changed_head(family: str, part: str) -> None:
    reference = make(family)
    policy = shaken(reference, part={"embed": "wte" if family == "gpt2" else "embed_tokens", "head": "lm_head"}[part])
    delta = oracle.margins(policy, FEW)[0] - oracle.margins(reference, FEW)[0]
    assert np.abs(delta).min() > 1e-3
    effects = oracle.patch_effects(policy, reference, FEW)
    transplants = oracle.block_transplants(policy, reference, FEW)
    expected = delta if part == "embed" else np.zeros_like(delta)
    np.testing.assert_allclose(effects, expected[:, None].repeat(DEPTH + 1, 1), atol=1e-9)
    column = 0 if part == "embed" else DEPTH + 1
    np.testing.assert_allclose(transplants[:, column], delta, atol=1e-9)
    assert not np.delete(transplants, column, axis=1).any()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gains_sum_to_one_and_the_last_patch_leaves_only_the_head(family: str) -> None:
    reference = make(family)
    policy = shaken(reference)
    delta = oracle.margins(policy, FEW)[0] - oracle.margins(reference, FEW)[0]
    effects = oracle.patch_effects(policy, reference, FEW)
    found = oracle.summary(effects, oracle.block_transplants(policy, reference, FEW), delta)
    assert found["embedding_gain"] + found["layer_gain"].sum() + found["head_gain"] == pytest.approx(1)
    for i, pair in enumerate(FEW):  # the reference's norm and head, by hand, on the policy's last stream
        logps = []
        for ids, start in oracle.sides(pair):
            with torch.no_grad():
                logits = norm_and_head(reference, family, oracle.forward(policy, ids).h(DEPTH - 1))
            logps.append(oracle.token_log_probs(logits, ids, start).sum().item())
        expected = logps[0] - logps[1] - oracle.margins(reference, [pair])[0][0]
        assert effects[i, -1] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_positions_add_up_above_the_last_layer(family: str) -> None:
    reference = make(family)
    policy = shaken(reference)
    effects = {
        positions: oracle.patch_effects(policy, reference, PAIRS, positions)
        for positions in ("all", "prompt", "completion", "last_prompt_token")
    }
    last = {positions: values[:, -1] for positions, values in effects.items()}
    # No layer mixes positions any more: the log-prob is a sum over them, and only the prompt's last one predicts.
    np.testing.assert_allclose(last["prompt"] + last["completion"], last["all"], atol=1e-9)
    np.testing.assert_allclose(last["prompt"], last["last_prompt_token"], atol=1e-9)
    assert np.abs(effects["prompt"][:-1, 2] - effects["last_prompt_token"][:-1, 2]).min() > 1e-6
    assert not effects["prompt"][-1].any()  # the pair without a prompt
    np.testing.assert_array_equal(effects["completion"][-1], effects["all"][-1])


def test_positions_of_a_pair() -> None:
    ids = (9, 8, 7, 6)
    assert oracle.prediction_positions(ids, 2) == [1, 2]
    assert oracle.prediction_positions(ids, 1) == oracle.prediction_positions(ids, 0) == [0, 1, 2]
    assert oracle.prediction_positions(ids, 4) == []
    assert [oracle.patched_positions(ids, 2, p) for p in ("all", "prompt", "completion", "last_prompt_token")] == [
        [0, 1, 2, 3],
        [0, 1],
        [2, 3],
        [1],
    ]
    assert oracle.spectral_positions(PAIRS[:1]) == [([2, 3, 4], [3, 4, 5])]
    assert oracle.spectral_positions(PAIRS[1:2]) == [([1, 2, 3], [3])]
    assert oracle.spectral_positions([Pair((2, 7, 18, 28), (2, 7, 18, 45), 2, 2)]) == [([1, 2], [])]
    assert oracle.spectral_positions(PAIRS[3:]) == [([0, 1], [0, 1, 2])]
    # Of a second pair with the same prompt what it shares with the first is known already.
    second = Pair((3, 14, 15, 9, 26, 8), (3, 14, 15, 1, 1), 3, 3)
    assert oracle.spectral_positions([PAIRS[0], second]) == [([2, 3, 4], [3, 4, 5]), ([], [3])]


def test_halves_are_of_whole_groups() -> None:
    same = [Pair((9, 8, completion, 3), (9, 8, completion, 4), 2, 2) for completion in range(5)]
    short = [Pair((1, completion, 3), (1, completion, 4), 1, 1) for completion in range(6)]
    assert len({oracle.prompt_group(pair) for pair in same}) == 1
    assert len({oracle.prompt_group(pair) for pair in short}) == 6
    for seed in range(4):
        halves = oracle.halves([*same, *short], seed)
        assert len(set(halves[:5].tolist())) == 1
        assert abs(int(halves.sum()) - int((~halves).sum())) <= 5
    assert len({tuple(oracle.halves(short, seed).tolist()) for seed in range(10)}) > 3


def test_activation_features_from_the_models_hidden_states() -> None:
    reference = make("qwen3")
    policy = shaken(reference)
    got = oracle_subspaces.activation_features(policy, reference, PAIRS)
    assert got.shape == (len(PAIRS), DEPTH)
    for i, pair in enumerate(PAIRS):
        pooled = []
        for ids, start in oracle.sides(pair):
            with torch.no_grad():
                new, old = (
                    torch.cat(model(torch.tensor([ids]), output_hidden_states=True).hidden_states)
                    for model in (policy, reference)
                )
            pooled.append((new - old)[1:DEPTH, max(start, 1) - 1 : -1].square().sum(-1))  # h_0 … h_{L-2}
        expected = torch.cat(pooled, dim=1).mean(dim=1).sqrt()
        np.testing.assert_allclose(got[i, : DEPTH - 1], expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("basis", ["activation", "shift"])
def test_low_rank(basis: Any) -> None:
    reference = make("llama")
    policy = shaken(reference)
    pairs, halves, ranks = PAIRS, np.array([True, True, False, False]), [1, 4, 16]
    got = oracle_subspaces.low_rank_effects(policy, reference, pairs, 3, ranks, basis, halves)
    np.testing.assert_array_equal(got["full_effect"], oracle.patch_effects(policy, reference, pairs)[:, 4])
    assert (np.diff(got["explained_variance_ratio"]) > 0).all()
    assert 0 < got["explained_variance_ratio"][0] < got["explained_variance_ratio"][-1] <= 1 + 1e-12
    swapped = oracle_subspaces.low_rank_effects(policy, reference, pairs, 3, ranks, basis, ~halves)
    np.testing.assert_array_equal(got["effects"], swapped["effects"])
    # The same patch on one held-out pair, and the explained variance, from their formulas.
    stacked = []
    for half in (pairs[:2], pairs[2:]):
        basis_rows = []
        for pair in half:
            for ids, _ in oracle.sides(pair):
                pi, rho = (oracle.forward(model, ids).h(3).numpy() for model in (policy, reference))
                basis_rows.append(pi if basis == "activation" else pi - rho)
        stacked.append(np.concatenate(basis_rows))
    projectors = []
    for rows in stacked:
        eigenvectors = np.linalg.eigh(rows.T @ rows)[1][:, -4:]
        projectors.append(eigenvectors @ eigenvectors.T)
    captured = [np.trace(rows @ p @ rows.T) for rows, p in zip(stacked, projectors[::-1], strict=True)]
    energy = [np.trace(rows @ rows.T) for rows in stacked]
    assert got["explained_variance_ratio"][1] == pytest.approx(sum(captured) / sum(energy))
    projector = torch.from_numpy(projectors[1])
    margin = 0.0
    for sign, (ids, start) in zip((1, -1), oracle.sides(pairs[0]), strict=True):
        pi, rho = oracle.forward(policy, ids).h(3), oracle.forward(reference, ids).h(3)
        patched = pi @ projector if basis == "activation" else rho + (pi - rho) @ projector
        logits = oracle.run_patched(reference, ids, 3, oracle.replace_with(patched)).logits
        margin += sign * oracle.token_log_probs(logits, ids, start).sum().item()
    assert got["effects"][0, 1] == pytest.approx(margin - oracle.margins(reference, pairs[:1])[0][0], abs=1e-6)


def test_low_rank_at_full_rank_is_the_whole_patch() -> None:
    reference = make("qwen3")
    policy = shaken(reference)
    rng = np.random.default_rng(0)
    pairs = [Pair(*(tuple(rng.integers(1, VOCAB, 16).tolist()) for _ in range(2)), 4, 4) for _ in range(2)]
    halves = np.array([True, False])
    for basis in ("activation", "shift"):
        got = oracle_subspaces.low_rank_effects(policy, reference, pairs, 1, [WIDTH], basis, halves)  # type: ignore[arg-type]
        np.testing.assert_allclose(got["effects"][:, 0], got["full_effect"], atol=1e-5)
        assert got["explained_variance_ratio"][0] == pytest.approx(1)
        assert got["effect_fraction"][0] == pytest.approx(1, abs=1e-4)
        assert got["rank_95"] == WIDTH
    assert oracle_subspaces.rank_95([1, 2, 4, 8], np.array([0.96, 0.5, 0.97, 1.2])) == 4
    assert np.isnan(oracle_subspaces.rank_95([1, 2], np.array([0.99, 0.9])))


def test_tail_slope_recovers_a_power_law() -> None:
    ranks = np.arange(1, 101)
    alpha, r2, error = oracle_spinal.tail_slope(3.0 * ranks**-1.3, 100)
    assert (alpha, r2) == (pytest.approx(1.3), pytest.approx(1))
    assert error == pytest.approx(0, abs=1e-6)
    bent = np.where((ranks < 10) | (ranks > 90), 1e-9, 3.0 * ranks**-1.3)  # ranks 10 … 90 are the window
    assert oracle_spinal.tail_slope(bent, 100)[0] == pytest.approx(1.3)
    assert np.isnan(oracle_spinal.tail_slope(3.0 * ranks**-1.3, 18)).all()  # ranks 2 … 16: 15 values
    assert not np.isnan(oracle_spinal.tail_slope(3.0 * ranks**-1.3, 19)).any()  # ranks 2 … 17: 16 values


def test_spectra_and_their_rows() -> None:
    model = make("llama")
    rng = np.random.default_rng(0)
    pairs = [Pair(*(tuple(rng.integers(1, VOCAB, 12).tolist()) for _ in range(2)), 3, 3) for _ in range(4)]
    alpha, r2, values = oracle_spinal.spectra(model, pairs)
    assert [len(v) for v in values] == [WIDTH] * DEPTH
    assert np.isfinite(alpha).all()
    assert ((r2 > 0) & (r2 <= 1)).all()
    x = np.log(np.arange(3, 22))  # n = 24: ranks 3 … 21
    for layer in range(DEPTH):
        y = np.log(values[layer][2:21])
        assert alpha[layer] == pytest.approx(-np.polyfit(x, y, 1)[0])
        assert r2[layer] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    # chosen == rejected: every row counts once, and the energy is that of one side.
    doubled = [Pair(p.chosen_ids, p.chosen_ids, 3, 3) for p in pairs]
    energy = sum(oracle.forward(model, p.chosen_ids).h(2)[2:11].square().sum().item() for p in pairs)
    assert (oracle_spinal.spectra(model, doubled)[2][2] ** 2).sum() == pytest.approx(energy)
    assert np.isnan(oracle_spinal.spectra(model, PAIRS[:2])[0]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_transport_is_the_bhattacharyya_angle(family: str) -> None:
    model = make(family)
    expected: list[list[float]] = [[] for _ in range(DEPTH - 1)]
    for pair, places in zip(FEW, oracle.spectral_positions(FEW), strict=True):
        for (ids, _), positions in zip(oracle.sides(pair), places, strict=True):
            run = oracle.forward(model, ids)
            with torch.no_grad():
                p = [norm_and_head(model, family, run.h(layer)).double().softmax(-1) for layer in range(DEPTH)]
            for layer in range(DEPTH - 1):
                angle = 2 * (p[layer] * p[layer + 1]).sqrt().sum(-1).clamp(max=1).arccos()
                expected[layer] += angle[positions].tolist()
    got = oracle_spinal.transport(model, FEW)
    np.testing.assert_allclose(got, [np.mean(values) for values in expected], atol=1e-7)
    assert ((got > 0.01) & (got < np.pi)).all()


def test_spinal_parts_by_hand() -> None:
    assert [oracle_spinal.terminal_block(depth) for depth in (1, 3, 5)] == [[0], [0, 1, 2], [1, 2, 3, 4]]
    assert oracle_spinal.terminal_block(12) == [8, 9, 10, 11]
    assert oracle_spinal.terminal_block(30) == list(range(20, 30))
    alpha, length = np.array([5.0, 1.0, 2.0, 4.0, 7.0]), np.array([0.5, 0.1, 0.3, 0.2])
    alpha_policy, length_policy = alpha + np.array([9, 1, 1, 1, 5]), length + np.array([9, 0.1, 0.2, 0.3])
    assert oracle_spinal.delta_align(alpha_policy, alpha, length_policy, length) == pytest.approx(2 - 0.2)
    scales = alpha.std(), length.std()
    second = np.array([(4 - 2 * 2 + 1) / scales[0], (0.2 - 2 * 0.3 + 0.1) / scales[1]])  # layers 1, 2, 3: one bend
    kappa = np.sqrt((second**2).sum())
    assert oracle_spinal.coherence(alpha, length, alpha, length) == pytest.approx(1 / (1 + kappa))
    straight = np.arange(5.0)
    assert oracle_spinal.coherence(straight, straight[:4], alpha, length) == pytest.approx(1)
    assert np.isnan(oracle_spinal.coherence(alpha, length, alpha, length, block=[2, 3, 4]))


def test_gradient_norms_match_finite_differences() -> None:
    model, pair, layer, step = make("gpt2", depth=2), PAIRS[3], 0, 1e-5  # GPT-2: float64 all the way through
    square = 0.0
    for ids, start in oracle.sides(pair):
        stream = oracle.forward(model, ids).h(layer)
        for index in np.ndindex(*stream.shape):
            logps = []
            for sign in (1, -1):
                moved = stream.clone()
                moved[index] += sign * step
                logits = oracle.run_patched(model, ids, layer, oracle.replace_with(moved)).logits
                logps.append(oracle.token_log_probs(logits, ids, start).sum().item())
            square += ((logps[0] - logps[1]) / (2 * step)) ** 2
    assert oracle_spinal.gradient_norms(model, [pair])[0, layer] == pytest.approx(np.sqrt(square), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_concentration_leaves_the_model_alone(family: str) -> None:
    model = make(family)
    share = oracle_spinal.gradient_concentration(model, FEW)
    norms = oracle_spinal.gradient_norms(model, FEW)
    assert (norms > 0).all()
    np.testing.assert_allclose(share, 1 - norms[:, 0] / norms.sum(axis=1))  # S is layers 1 … 4 of 5
    np.testing.assert_allclose(oracle_spinal.gradient_concentration(model, FEW, range(DEPTH)), 1)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    frozen = copy.deepcopy(model).requires_grad_(False)
    np.testing.assert_array_equal(oracle_spinal.gradient_concentration(frozen, FEW), share)


def test_behaviour_against_torch_distributions() -> None:
    reference = make("gemma2")
    policy = shaken(reference)
    got = oracle.behaviour(policy, reference, PAIRS)
    for i, pair in enumerate(PAIRS):
        kl, entropy, old_entropy = [], [], []
        for ids, start in oracle.sides(pair):
            with torch.no_grad():
                new, old = (
                    torch.distributions.Categorical(logits=model(torch.tensor([ids])).logits[0, max(start, 1) - 1 : -1])
                    for model in (policy, reference)
                )
            kl += torch.distributions.kl_divergence(new, old).tolist()
            entropy += new.entropy().tolist()
            old_entropy += old.entropy().tolist()
            if ids == pair.chosen_ids:
                hits = new.logits.argmax(-1) == torch.tensor(ids[max(start, 1) :])
                assert got["token_accuracy"][i] == pytest.approx(hits.double().mean().item())
        assert got["kl"][i] == pytest.approx(np.mean(kl))
        assert got["kl"][i] > 0
        assert got["entropy"][i] == pytest.approx(np.mean(entropy))
        assert got["reference_entropy"][i] == pytest.approx(np.mean(old_entropy))
    new_margins, old_margins = oracle.margins(policy, PAIRS), oracle.margins(reference, PAIRS)
    np.testing.assert_allclose(got["shift"], new_margins[0] - old_margins[0], atol=1e-12)
    np.testing.assert_allclose(got["chosen_logp_change"], new_margins[1] - old_margins[1], atol=1e-12)
    np.testing.assert_allclose(
        got["rejected_logp_change_per_token"], (new_margins[2] - old_margins[2]) / [4, 3, 1, 3], atol=1e-12
    )
    np.testing.assert_array_equal(got["ranking_correct"], new_margins[0] > 0)
    assert not oracle.behaviour(policy, reference, [Pair((1, 2), (1, 2), 1, 1)])["correct"].any()


def test_wrong_models_are_refused() -> None:
    model = make("llama", depth=1)
    with pytest.raises(ValueError, match="train mode"):
        oracle.forward(copy.deepcopy(model).train(), (1, 2))
    model.config.model_type = "opt"
    with pytest.raises(ValueError, match="LAYER_PATHS"):
        oracle.margins(model, PAIRS)
