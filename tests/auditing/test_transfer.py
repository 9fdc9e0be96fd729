"""The transfer matrix: planted directions are found, an independent computation agrees, and the diagonal is the audit's."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from align_audit import AuditConfig, ProbeSet, TransferRecord, audit, transfer
from align_audit.auditing.measurements.transfer_cells import EXCLUDED, Cells, held_out_spans
from align_audit.auditing.session.open_models import OpenModels
from align_audit.errors import ConfigurationError, ProbeError, RecordError
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.probes.pairs import ProbePair
from align_audit.record.estimate import Estimate
from align_audit.record.transfer_record import RandomSubspaces
from tests.helpers import oracle
from tests.helpers.alert_cases import about
from tests.helpers.audits import QUICK_GENERATIONS
from tests.helpers.tiny import DEVICE, WIDTH, perturbed, random_pairs, tiny_model
from tests.record.test_reasons import unexplained

pytestmark = pytest.mark.device


def settings(**low_rank: Any) -> AuditConfig:
    """A confidence so low that no interval of these few pairs holds 0: shares are to be compared, not judged."""
    return AuditConfig.from_dict(
        {
            "batch_tokens": 120,
            "generations": QUICK_GENERATIONS,
            "statistics": {"bootstrap_resamples": 100, "confidence": 0.02},
            "low_rank": {"ranks": (1, 2, 4), "layers": (1,), **low_rank},
            "seed": 3,
        }
    )


def made_of(pairs: list[ProbePair]) -> ProbeSet:
    return ProbeSet(tuple(pairs), "made", {}, 64, "keep_start", None)


# -- planted truth -----------------------------------------------------------------------------------------------------

WORDS = {"a": (range(3, 13), range(13, 18), range(18, 23)), "b": (range(23, 33), range(33, 38), range(38, 43))}
"""Per set: tokens of its prompts, of its chosen and of its rejected completions; no token is in both sets."""


def planted_pairs(name: str, count: int = 12) -> ProbeSet:
    generator = np.random.default_rng([count, ord(name)])
    prompt, chosen, rejected = (generator.choice(list(words), (count, 5)) for words in WORDS[name])
    return made_of(
        [
            ProbePair(
                i, (*map(int, prompt[i]), *map(int, chosen[i])), (*map(int, prompt[i]), *map(int, rejected[i])), 5, 5
            )
            for i in range(count)
        ]
    )


def planted_models(shared: bool) -> tuple[Any, Any]:
    """Layer 0 hands its stream on, so that at layer 0 the shift is what the policy's embedding adds: one direction on the
    tokens of each set (the same, or orthogonal ones), which the head reads as preferring that set's chosen tokens."""
    reference: Any = tiny_model("llama", num_hidden_layers=3)
    directions = torch.eye(WIDTH, dtype=torch.float64, device=DEVICE)[: 1 if shared else 2].roll(5, dims=1)
    with torch.no_grad():
        reference.model.layers[0].self_attn.o_proj.weight.zero_()
        reference.model.layers[0].mlp.down_proj.weight.zero_()
        for name, direction in zip("ab", directions.expand(2, -1) if shared else directions, strict=True):
            _, chosen, rejected = WORDS[name]
            reference.lm_head.weight[list(chosen)] += 3.0 * direction
            reference.lm_head.weight[list(rejected)] -= 3.0 * direction
        policy = copy.deepcopy(reference)
        for name, direction in zip("ab", directions.expand(2, -1) if shared else directions, strict=True):
            for words in WORDS[name]:
                policy.model.embed_tokens.weight[list(words)] += direction
    return policy, reference


@pytest.fixture(scope="module", params=[False, True], ids=["orthogonal", "shared"])
def planted(request: pytest.FixtureRequest) -> tuple[bool, TransferRecord]:
    policy, reference = planted_models(request.param)
    config = AuditConfig.from_dict(
        {
            "statistics": {"bootstrap_resamples": 200},
            "low_rank": {"ranks": (1, 2), "layers": (0,), "bases": ("shift",), "random_draws": 2},
        }
    )
    return request.param, transfer(policy, reference, {name: planted_pairs(name) for name in "ab"}, config)


def test_planted_directions_carry_their_own_set_and_no_other(planted: tuple[bool, TransferRecord]) -> None:
    shared, record = planted
    matrix = record.effect_fraction("shift", 0)
    for name in "ab":
        assert record.shift[name].low > 0.5, "there is an effect to carry"
        assert matrix[name][name][1].mean == pytest.approx(1.0, abs=1e-9)
    for fitted, patched in (("a", "b"), ("b", "a")):
        cell = record.cells["shift"][0][fitted][patched]
        assert matrix[fitted][patched][1].mean == pytest.approx(1.0 if shared else 0.0, abs=1e-9)
        assert cell.explained_variance_ratio[0] == pytest.approx(1.0 if shared else 0.0, abs=1e-9)
        assert cell.control.verdict == ("passed" if shared else "failed")
        assert cell.beats_random[0] is shared
    (angles,) = record.angles["shift"][0]
    assert angles.between == ("a", "b")
    assert angles.angles[0][0] == pytest.approx(0.0 if shared else math.pi / 2, abs=1e-6)


def test_beyond_the_dimensions_a_set_spans_nothing_is_known(planted: tuple[bool, TransferRecord]) -> None:
    """The second direction of a set whose shift has one is arbitrary: it could carry anything."""
    _, record = planted
    cell = record.cells["shift"][0]["a"]["b"]
    assert "span 1 dimensions" in (cell.effect_fraction[1].reason or "")
    assert math.isnan(cell.explained_variance_ratio[1])
    assert cell.beats_random[1] is None
    assert cell.rank_95 == pytest.approx(1.0 if planted[0] else math.nan, nan_ok=True), "among the ranks that are known"
    assert np.isnan(record.angles["shift"][0][0].angles[1]).all()
    assert unexplained(record) == []  # type: ignore[arg-type]


# -- against definitions -----------------------------------------------------------------------------------------------


def expected(
    policy: Any,
    reference: Any,
    fitted: list[list[ProbePair]],
    patched: list[ProbePair],
    layer: int,
    basis: str,
    ranks: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Effects [N, K] and full effects [N]; pair i is patched with the SVD basis of the rows of ``fitted[i]``."""

    @functools.cache  # most pairs are fitted with the same others
    def streams(model: Any, pair: ProbePair) -> list[np.ndarray]:
        return [oracle.forward(model, ids).h(layer).cpu().numpy() for ids, _ in oracle.sides(pair)]

    def rows(pair: ProbePair) -> list[np.ndarray]:
        ours, theirs = streams(policy, pair), streams(reference, pair)
        return ours if basis == "activation" else [a - b for a, b in zip(ours, theirs, strict=True)]

    before = oracle.margins(reference, patched)[0]
    full = oracle.patch_effects(policy, reference, patched)[:, layer + 1]
    effects = np.zeros((len(patched), len(ranks)))
    for i, pair in enumerate(patched):
        right = np.linalg.svd(np.concatenate([side for other in fitted[i] for side in rows(other)]))[2]
        base = streams(reference, pair)
        for j, rank in enumerate(ranks):
            inside = [side @ right[:rank].T @ right[:rank] for side in rows(pair)]
            put = inside if basis == "activation" else [a + b for a, b in zip(base, inside, strict=True)]
            effects[i, j] = (
                oracle._patched_margin(reference, pair, layer, [torch.from_numpy(s) for s in put]) - before[i]
            )
    return effects, full


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    reference = tiny_model("llama", num_hidden_layers=3)
    return perturbed(reference), reference


@pytest.mark.parametrize("basis", ["shift", "activation"])
def test_a_matrix_of_two_sets_is_what_its_definition_says(models: tuple[Any, Any], basis: str) -> None:
    policy, reference = models
    sets = {"one": random_pairs(9), "two": random_pairs(8, seed=9)}
    record = transfer(policy, reference, sets, settings(bases=(basis,)))
    for fitted, patched in (("one", "two"), ("two", "one")):
        pairs = list(sets[patched])
        effects, full = expected(policy, reference, [list(sets[fitted])] * len(pairs), pairs, 1, basis, record.ranks)
        cell = record.cells[basis][1][fitted][patched]
        assert (cell.pairs, cell.cross_fitted, cell.excluded) == (len(pairs), 0, 0)
        assert cell.full_effect.mean == pytest.approx(full.mean(), rel=1e-6)
        shares = [share.mean for share in cell.effect_fraction]
        np.testing.assert_allclose(shares, effects.sum(0) / full.sum(), rtol=1e-5, atol=1e-6)
    assert record.cells[basis][1]["one"]["two"] != record.cells[basis][1]["two"]["one"]

    bases = []
    for own in sets.values():
        right = []
        for pair in own:
            for ids, _ in oracle.sides(pair):
                ours, theirs = (oracle.forward(model, ids).h(1).cpu().numpy() for model in models)
                right.append(ours if basis == "activation" else ours - theirs)
        bases.append(np.concatenate(right))
    top = [np.linalg.svd(rows)[2] for rows in bases]
    (angles,) = record.angles[basis][1]
    for rank, found in zip(record.ranks, angles.angles, strict=True):
        np.testing.assert_allclose(found, np.sort(subspace_angles(top[0][:rank].T, top[1][:rank].T)), atol=1e-6)
    explained = record.cells[basis][1]["one"]["two"].explained_variance_ratio
    for rank, share in zip(record.ranks, explained, strict=True):
        assert share == pytest.approx(((bases[1] @ top[0][:rank].T) ** 2).sum() / (bases[1] ** 2).sum(), rel=1e-9)


def test_pairs_in_both_sets_are_held_out_of_what_they_are_patched_with(models: tuple[Any, Any]) -> None:
    """One pair with chosen and rejected swapped, one that shares its prompt, one with something of both halves, new ones."""
    policy, reference = models
    first, new = list(random_pairs(9)), list(random_pairs(6, seed=9))
    halves = oracle.halves(first, 3)
    swapped, asked = (next(pair for pair in first[begin:] if pair.chosen_start > 1) for begin in (0, 4))
    back = ProbePair(7, swapped.rejected_ids, swapped.chosen_ids, swapped.rejected_start, swapped.chosen_start)
    prompt = asked.chosen_ids[: asked.chosen_start]
    again = ProbePair(8, (*prompt, 5, 6, 7), (*prompt, 5, 9), len(prompt), len(prompt))
    unmet = [place for place in range(9) if first[place] not in (swapped, asked)]
    one = next(place for place in unmet if not halves[place])
    other = next(place for place in unmet if halves[place])
    both = ProbePair(
        9, first[one].chosen_ids, first[other].chosen_ids, first[one].chosen_start, first[other].chosen_start
    )
    second = [*new, back, again, both]
    met = [int(halves[first.index(pair)]) for pair in (swapped, asked)]
    assert held_out_spans(second, first, halves).tolist() == [2] * 6 + met + [EXCLUDED]

    record = transfer(policy, reference, {"one": made_of(first), "two": made_of(second)}, settings(bases=("shift",)))
    cell = record.cells["shift"][1]["one"]["two"]
    assert (cell.pairs, cell.cross_fitted, cell.excluded) == (8, 2, 1)
    assert record.shared_pairs == {"one": {"two": 3}, "two": {"one": 4}}
    left = [[pair for pair, half in zip(first, halves, strict=True) if int(half) != own] for own in met]
    effects, full = expected(policy, reference, [first] * 6 + left, second[:8], 1, "shift", record.ranks)
    shares = [share.mean for share in cell.effect_fraction]
    np.testing.assert_allclose(shares, effects.sum(0) / full.sum(), rtol=1e-5, atol=1e-6)
    assert np.isnan(cell.explained_variance_ratio).all()
    assert unexplained(record) == []  # type: ignore[arg-type]


def test_a_pair_given_twice_counts_once(models: tuple[Any, Any]) -> None:
    pairs = list(random_pairs(9))
    sets = {"one": made_of(pairs), "two": random_pairs(8, seed=9)}
    record = transfer(*models, sets, settings(bases=("shift",)))
    repeated = transfer(*models, {**sets, "one": made_of([pairs[3], *pairs[::-1]])}, settings(bases=("shift",)))
    assert repeated.provenance["one"].pairs == 9
    assert dict(repeated.provenance["one"].pairs_dropped) == {"repeats another pair": 1}
    assert repeated.cells["shift"][1]["one"] == record.cells["shift"][1]["one"]
    assert repeated.cells["shift"][1]["two"] == record.cells["shift"][1]["two"]


@pytest.mark.parametrize("layers", ["auto", (0, 2)], ids=["auto", "given"])
def test_the_diagonal_is_the_ordinary_audits_and_the_models_are_untouched(models: tuple[Any, Any], layers: Any) -> None:
    policy, reference = models
    before = fingerprint(policy), fingerprint(reference), torch.get_rng_state()
    sets = {"one": random_pairs(9), "two": random_pairs(8, seed=9)}
    config = settings(layers=layers)
    record = transfer(policy, reference, sets, config)
    assert (fingerprint(policy), fingerprint(reference)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    asked: set[int] = set()
    for name, pairs in sets.items():
        alone = audit(policy, reference, pairs, config)
        low_rank = alone.low_rank
        peak = alone.patching.peak_layer if alone.patching.peak_layer in low_rank["shift"] else min(low_rank["shift"])
        assert record.random["shift"][peak][name].effect == alone.controls.random_subspace.effect
        asked |= set(low_rank["shift"])
        assert record.chosen_layers[name] == sorted(low_rank["shift"])
        for basis, by_layer in low_rank.items():
            for layer, curve in by_layer.items():
                cell = record.cells[basis][layer][name][name]
                assert cell.effect_fraction == curve.effect_fraction
                assert cell.explained_variance_ratio == curve.explained_variance_ratio
                assert cell.full_effect == curve.full_effect
                assert cell.rank_95 == pytest.approx(curve.rank_95, nan_ok=True)
    assert record.layers == sorted(asked)


def test_models_are_opened_once(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = OpenModels._open_replays

    def counted(self: OpenModels) -> None:
        opened.append(self)
        real(self)

    monkeypatch.setattr(OpenModels, "_open_replays", counted)
    transfer(*models, {name: random_pairs(8, seed=i) for i, name in enumerate("abc")}, settings(random_draws=0))
    assert len(opened) == 1


# -- small sets, and what cannot go on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["effect", "random"])
def test_where_a_bound_is_not_known_nothing_is_said_of_random_subspaces(which: str) -> None:
    """A full patch that does something is not enough: neither side is beyond the other where one of them is unknown."""
    nothing = Estimate.unknown("3 independent pairs")
    effects, random = ([nothing], [about(1.0)]) if which == "effect" else ([about(1.0)], [nothing])
    fitted: Any = SimpleNamespace(name="a", session=SimpleNamespace(width=WIDTH))
    patched: Any = SimpleNamespace(name="b")
    drawn = RandomSubspaces(effect=random, effect_fraction=[nothing], pairs=3)
    beats, control = Cells.__new__(Cells)._control(fitted, patched, [1], effects, about(2.0), drawn)
    assert beats == [None]
    assert (control.verdict, control.reason) == ("not_run", "3 independent pairs")


def test_a_set_of_one_pair_is_good_for_others_only(models: tuple[Any, Any]) -> None:
    sets = {"many": random_pairs(9), "one": random_pairs(1, seed=9)}
    record = transfer(*models, sets, settings())
    cells = record.cells["shift"][1]
    assert cells["many"]["many"].effect_fraction[0].reason is None
    assert cells["one"]["many"].effect_fraction[0].reason is None, "its pair spans a subspace for the others"
    assert "at least 2 independent pairs (those that share a prompt are one), found 1" in (
        cells["one"]["one"].effect_fraction[0].reason or ""
    )
    assert cells["many"]["one"].effect_fraction[0].reason
    assert unexplained(record) == []  # type: ignore[arg-type]


def test_nothing_to_find_is_an_error_or_has_its_reason(models: tuple[Any, Any]) -> None:
    reference = models[1]
    sets = {"one": random_pairs(8), "two": random_pairs(8, seed=9)}
    with pytest.raises(ConfigurationError, match=r"no layer to reconstruct at \(on 'one' every block transplant is 0"):
        transfer(copy.deepcopy(reference), reference, sets, settings(layers="auto"))
    record = transfer(copy.deepcopy(reference), reference, sets, settings())
    assert "there is no shift to span" in (record.cells["shift"][1]["one"]["two"].effect_fraction[0].reason or "")
    assert "includes 0" in (record.cells["activation"][1]["one"]["two"].effect_fraction[0].reason or "")
    assert unexplained(record) == []  # type: ignore[arg-type]
    with pytest.raises(ProbeError, match=r"no probe set has more than 7 independent pairs .*at least 8 in one of them"):
        transfer(*models, {"one": random_pairs(7), "two": random_pairs(5, seed=9)}, settings())
    with pytest.raises(ConfigurationError, match="at least two probe sets; found one alone"):
        transfer(*models, {"one": sets["one"]}, settings())
    with pytest.raises(ConfigurationError, match="expected probe sets by name"):
        transfer(*models, sets["one"], settings())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"layers names \[9\]; the model has layers 0 to 2"):
        transfer(*models, sets, settings(layers=(9,)))


# -- stored ------------------------------------------------------------------------------------------------------------


def test_a_record_is_read_back_and_as_a_table(planted: tuple[bool, TransferRecord], tmp_path: Path) -> None:
    _, record = planted
    record.save(tmp_path / "new" / "transfer.json")
    again = TransferRecord.load(tmp_path / "new" / "transfer.json")
    assert again.model_dump_json() == record.model_dump_json()
    table = again.to_pandas()
    assert len(table) == 2 * 2 * 2
    row = table.query("fitted_on == 'a' and patched_on == 'b' and rank == 1").iloc[0]
    assert row.effect_fraction == record.cells["shift"][0]["a"]["b"].effect_fraction[0].mean
    assert row.largest_angle == record.angles["shift"][0][0].angles[0][-1]
    assert row.pairs == 12
    for name in "ab":
        assert record.provenance[name].probe_name == name
        assert record.provenance[name].pairs == 12


def test_files_that_are_no_transfer_record_are_refused(planted: tuple[bool, TransferRecord], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, words in (
        ("{", "is not JSON"),
        ('{"schema_version": 1}', "is not an align_audit transfer record"),
        ('{"schema_version": 99, "cells": {}}', "schema version 99; this align_audit reads up to 1"),
        ('{"schema_version": 1, "cells": {}}', "is not a valid transfer record"),
    ):
        path.write_text(text)
        with pytest.raises(RecordError, match=words):
            TransferRecord.load(path)
    with pytest.raises(RecordError, match="cannot read"):
        TransferRecord.load(tmp_path / "lost.json")
