"""Audits that patch some pairs only: controls on fewer pairs, and effects of the others by attribution."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from align_audit import AlignmentAuditCallback, AuditRun, ProbeSet
from align_audit.auditing.previous import PreviousAudit
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.subsets import PairChoice, choose_pairs, more_pairs
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError
from align_audit.measures.control_variate import control_variate_means
from align_audit.measures.draws import subset_order
from align_audit.measures.exact_pairs import exact_pairs_needed_safely
from align_audit.models.reference import resolve_reference
from align_audit.monitoring.checkpoints import audit_saved
from align_audit.probes.batches import make_batch
from align_audit.record.audit_record import Attribution, AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.writers.audit_table import summary_table
from align_audit.writers.scalars import not_known, scalars
from tests.helpers.audits import QUICK_GENERATIONS, QUICK_LASSO, audited, session_of
from tests.helpers.dpo import ROWS, build
from tests.helpers.probe_tokenizer import make_tokenizer
from tests.helpers.tiny import DEVICE, perturbed, random_pairs, tiny_model

pytestmark = pytest.mark.device

LOW_RANK = {"layers": (1,), "ranks": (1, 4)}


def run(policy: Any, reference: Any, pairs: int, **changes: Any) -> tuple[AuditRecord, dict[str, np.ndarray]]:
    config = AuditConfig.from_dict(
        {
            "low_rank": LOW_RANK, "localization": QUICK_LASSO, "statistics": {"bootstrap_resamples": 200},
            "batch_tokens": 100, "generations": QUICK_GENERATIONS, **changes,
        }
    )  # fmt: skip
    return audited(policy, reference, random_pairs(pairs), config)


def drawn(count: int) -> list[int]:
    """Places of ``random_pairs(count)`` in the order that they are patched in."""
    pairs = random_pairs(count).pairs
    return subset_order([pair.identity for pair in pairs], 0).tolist()


@pytest.fixture(scope="module")
def models(pair_of_models: Any) -> tuple[Any, Any]:
    return pair_of_models("llama")


def test_controls_on_fewer_pairs_are_those_of_the_whole(models: tuple[Any, Any]) -> None:
    whole, all_pairs = run(*models, 14, patching={"control_pairs": 14})
    part, some_pairs = run(*models, 14, patching={"control_pairs": 5})
    chosen = np.zeros(14, dtype=bool)
    chosen[drawn(14)[:5]] = True
    scale = 1e-7 * float(np.abs(all_pairs["per_pair.chosen_logp"]).max())
    peak = part.patching.peak_layer
    for name in ("reverse", "noise", "low_rank.random.1", "gradient_norm"):
        found, expected = some_pairs[f"per_pair.{name}"], all_pairs[f"per_pair.{name}"]
        if name == "noise":  # further draws at the peak only
            found, expected = found[:, :, peak], expected[:, :, peak]
        assert np.isnan(found[~chosen]).all(), name
        np.testing.assert_allclose(found[chosen], expected[chosen], atol=scale, rtol=1e-6, err_msg=name)
    for name in ("effect", "transplant", "low_rank.shift.1"):
        np.testing.assert_allclose(some_pairs[f"per_pair.{name}"], all_pairs[f"per_pair.{name}"], atol=scale, rtol=1e-6)
    controls = part.controls
    assert [controls.noise.pairs, controls.reverse.pairs, controls.random_subspace.pairs] == [5, 5, 5]
    assert (controls.split_half.pairs, whole.controls.noise.pairs) == (14, 14)
    expected = all_pairs["per_pair.noise"][chosen, 0].mean(0)
    others = [layer for layer in range(4) if layer != peak]
    np.testing.assert_allclose([controls.noise.effect[layer].mean for layer in others], expected[others], rtol=1e-6)


def hidden_states(model: Any, ids: tuple[int, ...]) -> list[torch.Tensor]:
    """What enters layer 0, then what every layer returns."""
    kept: list[torch.Tensor] = []
    layers = model.model.layers
    handles = [layers[0].register_forward_pre_hook(lambda module, args: kept.append(args[0]))]
    handles += [layer.register_forward_hook(lambda module, args, output: kept.append(output)) for layer in layers]
    with torch.no_grad():
        model(torch.tensor([ids], device=DEVICE), use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def plain_attribution(policy: Any, reference: Any, pairs: Any, point: float) -> np.ndarray:
    """⟨∂m/∂h_l, Δh_l⟩ by one graph per sequence, in which every layer is given its own leaf on the line between both
    models' streams; [N, L + 1], column 0 what enters layer 0."""
    found = np.zeros((len(pairs), 5))
    for row, pair in enumerate(pairs):
        for sign, ids, start in (
            (1, pair.chosen_ids, pair.chosen_start),
            (-1, pair.rejected_ids, pair.rejected_start),
        ):
            ours, theirs = hidden_states(policy, ids), hidden_states(reference, ids)
            leaves = [(a + point * (b - a)).requires_grad_() for a, b in zip(theirs, ours, strict=True)]
            outputs: list[torch.Tensor] = []
            handles = []
            for index, layer in enumerate(reference.model.layers):
                handles.append(
                    layer.register_forward_pre_hook(lambda module, args, leaf=leaves[index]: (leaf, *args[1:]))
                )

                def swap(module: Any, args: Any, output: Any, leaf: Any = leaves[index + 1]) -> Any:
                    outputs.append(output)  # noqa: B023
                    return leaf

                handles.append(layer.register_forward_hook(swap))
            logits = reference(torch.tensor([ids], device=DEVICE), use_cache=False).logits[0]
            for handle in handles:
                handle.remove()
            logp = torch.log_softmax(logits, -1)[torch.arange(start - 1, len(ids) - 1), list(ids[start:])].sum()
            (gradient,) = torch.autograd.grad(logp, leaves[-1])
            for layer in range(len(outputs), -1, -1):
                found[row, layer] += sign * float((gradient * (ours[layer] - theirs[layer])).sum())
                if layer:
                    (gradient,) = torch.autograd.grad(outputs[layer - 1], leaves[layer - 1], gradient)
    return found


@pytest.mark.parametrize("shared", [True, False])
def test_attribution_equals_plain_autograd(models: tuple[Any, Any], probes: Any, shared: bool) -> None:
    record, arrays = run(*models, 10, patching={"exact_pairs": 8}, share_prompts=shared)
    assert record.provenance.shared_prompts == shared
    assert record.patching.attribution.points == [0.0, 0.5]
    for place, point in enumerate((0.0, 0.5)):
        expected = plain_attribution(*models, probes(10).pairs, point)
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(arrays["per_pair.attribution"][:, :, place], expected, rtol=1e-6, atol=1e-7)


def test_integrated_gradients_are_the_effect(models: tuple[Any, Any]) -> None:
    """Along each layer's own path, Gauss points add up to the exact effect: of every pair, also where it is far from linear."""
    points = tuple(((np.polynomial.legendre.leggauss(5)[0] + 1) / 2).tolist())
    weights = np.polynomial.legendre.leggauss(5)[1] / 2
    patching = {"exact_pairs": 10, "attribution_points": points, "attribution_path": "layer"}
    record, arrays = run(*models, 10, patching=patching)
    assert record.patching.attribution.path == "layer"
    exact, integrated = arrays["per_pair.effect"], arrays["per_pair.attribution"] @ weights
    scale = np.abs(exact).max(axis=0)
    assert (np.abs(integrated - exact).max(axis=0) < 1e-3 * scale).all()
    first, _ = run(*models, 10, patching={"exact_pairs": 10, "attribution_points": (0.0,)})
    far = [
        abs(one.mean - real.mean)
        for one, real in zip(first.patching.attribution.mean, first.patching.effect, strict=True)
    ]
    assert max(far) > 20 * max(np.abs((integrated - exact).mean(axis=0)))


def test_only_the_exact_pairs_are_patched(models: tuple[Any, Any]) -> None:
    whole, all_pairs = run(*models, 14)
    assert (whole.patching.estimator, whole.patching.attribution) == ("exact", None)
    part, some_pairs = run(*models, 14, patching={"exact_pairs": 9})
    chosen = np.zeros(14, dtype=bool)
    chosen[drawn(14)[:9]] = True
    for name in ("effect", "transplant", "low_rank.shift.1", "low_rank.activation.1"):
        assert np.isnan(some_pairs[f"per_pair.{name}"][~chosen]).all(), name
        assert np.isfinite(some_pairs[f"per_pair.{name}"][chosen]).all(), name
    np.testing.assert_allclose(some_pairs["per_pair.effect"][chosen], all_pairs["per_pair.effect"][chosen], rtol=1e-6)
    np.testing.assert_allclose(some_pairs["per_pair.chosen_logp"], all_pairs["per_pair.chosen_logp"], rtol=1e-9)
    assert part.patching.estimator == "control_variate"
    attribution = part.patching.attribution
    assert attribution is not None
    assert (attribution.exact_pairs, attribution.pairs) == (9, 14)
    assert part.cost.forward_equivalents < whole.cost.forward_equivalents
    transplants = [block.mean for block in part.patching.block_transplant]
    np.testing.assert_allclose(transplants, all_pairs["per_pair.transplant"][chosen, 1:-1].mean(0), rtol=1e-6)
    shown = scalars(part)
    assert shown["align_audit/patching/attribution/correlation/layer_02"] == attribution.correlation[2]
    assert all(reason for _, reason in not_known(part))
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(part))
    assert "14 pairs (9 patched)" in console.file.getvalue()
    assert AuditRecord.from_json(part.to_json()).to_json() == part.to_json()


def test_attribution_is_exact_to_first_order_and_then_narrows_the_interval() -> None:
    """A tiny step: the proxy is the effect, and 8 exact pairs of 40 give almost what all 40 do."""
    reference = tiny_model("llama")
    policy = perturbed(reference, scale=1e-4)
    off: dict[str, Any] = {"low_rank": {"enabled": False}, "spinal": {"enabled": False}}
    whole, _ = run(policy, reference, 40, **off)
    part, _ = run(policy, reference, 40, patching={"exact_pairs": 8}, **off)
    assert part.patching.attribution is not None
    assert min(part.patching.attribution.correlation) > 0.999
    assert min(part.patching.attribution.equivalent_pairs) > 35
    for ours, theirs in zip(part.patching.effect, whole.patching.effect, strict=True):
        width = theirs.high - theirs.low
        assert abs(ours.mean - theirs.mean) < 0.05 * width
        assert (ours.high - ours.low) < 1.4 * width


def test_the_shift_narrows_what_attribution_alone_does_not() -> None:
    """A large step, at which attribution fails: the last stream's effect is the margin shift, known of every pair."""
    reference = tiny_model("llama")
    policy = perturbed(reference, scale=2.0)
    policy.lm_head.load_state_dict(reference.lm_head.state_dict())
    policy.model.norm.load_state_dict(reference.model.norm.state_dict())
    off: dict[str, Any] = {"low_rank": {"enabled": False}, "spinal": {"enabled": False}}
    part, arrays = run(policy, reference, 60, patching={"exact_pairs": 20, "attribution_points": (0.0,)}, **off)
    found = part.patching.attribution
    assert found.correlation[-1] < 0.6
    assert found.joint_correlation[-1] > 0.999
    assert found.equivalent_pairs[-1] > 59
    few, _ = run(policy, reference, 60, patching={"exact_pairs": 9, "attribution_points": (0.0,)}, **off)
    assert few.patching.attribution.joint_correlation == few.patching.attribution.correlation
    pair = {name.removeprefix("per_pair."): values for name, values in arrays.items()}
    patched = np.isfinite(pair["effect"][:, -1])
    shift = (
        pair["chosen_logp"] - pair["rejected_logp"] - pair["reference_chosen_logp"] + pair["reference_rejected_logp"]
    )
    for layer in range(3):
        design = np.column_stack([np.ones(20), pair["attribution"][patched, layer + 1, 0], shift[patched]])
        effect = pair["effect"][patched, layer + 1]
        rest = effect - design @ np.linalg.lstsq(design, effect, rcond=None)[0]
        assert found.joint_correlation[layer] == pytest.approx(np.sqrt(1 - rest.var() / effect.var()))


def test_too_few_exact_pairs_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="exact_pairs"):
        AuditConfig.from_dict({"patching": {"exact_pairs": 3}})


def test_batches_do_not_mix_roles(models: tuple[Any, Any], probes: Any) -> None:
    policy, reference = models
    config = AuditConfig.from_dict({"patching": {"exact_pairs": 9, "control_pairs": 4}, "batch_tokens": 400})
    with OpenModels(policy, resolve_reference(policy, reference)) as opened:
        session = session_of(opened, probes(14), config)
    roles = []
    for group in session.plan:
        batch = make_batch([session.pairs[i] for i in group], group, 0)
        roles.append((session.is_exact(batch), session.is_control(batch)))
        assert {(i in session.exact_pairs, i in session.control_pairs) for i in group} == {roles[-1]}
    assert set(roles) == {(True, True), (True, False), (False, False)}


# -- as many as an interval needs ------------------------------------------------------------------------------------


def record_before(correlation: list[float], patched: list[int], pairs: int) -> Attribution:
    layers = len(correlation)
    return Attribution(
        exact_pairs=min(patched), patched_pairs=patched, pairs=pairs, points=[0.0], correlation=correlation,
        joint_correlation=correlation, equivalent_pairs=[50.0] * layers, mean=[Estimate.unknown("-")] * layers,
    )  # fmt: skip


def choice(before: Attribution | None, pairs: int = 100, **patching: Any) -> PairChoice:
    options = {"exact_pairs": "auto", "attribution_points": (0.0,), "control_pairs": 12, **patching}
    return choose_pairs(random_pairs(pairs).pairs, 3, AuditConfig.from_dict({"patching": options}), before)


def test_where_it_begins_is_chosen_by_the_audit_before() -> None:
    """12 control pairs, then steps of 8: 12, 20, 28, …; what enters layer 0 is patched on the control pairs alone."""
    assert choice(None).by_layer.tolist() == [12, 12, 12, 12]
    found = choice(record_before([0.6, 0.97, 0.9999], [68, 68, 68], 100))
    # R² = 1 − 0.64·67/65 = 0.340, its lower bound 0.22: 59 pairs. 0.9391 → 0.915: 13. The last needs none.
    assert found.by_layer.tolist() == [12, 60, 20, 12]
    assert found.control_pairs.tolist() == found.everywhere.tolist() == sorted(drawn(100)[:12])
    # The same correlation on fewer pairs is less certain: 0.9277, at least 0.82 of the variance.
    assert choice(record_before([0.97] * 3, [12, 12, 68], 100)).by_layer.tolist() == [12, 28, 28, 20]
    # Nothing was there to explain; and fitted slopes explain some of anything.
    assert choice(record_before([math.nan, 0.3, 0.3], [68, 12, 12], 100)).by_layer.tolist() == [12, 12, 68, 68]
    # A set no larger than what is wanted is patched whole.
    assert choice(record_before([0.9, 0.9, 1.0], [40] * 3, 40), pairs=40).by_layer.tolist() == [12, 40, 40, 40]
    assert choice(None, pairs=9).by_layer.tolist() == [9, 9, 9, 9]


def test_more_pairs_are_those_that_the_intervals_lack() -> None:
    """Effects of which attribution explains nothing, 94 % and all; and effects that do not vary at all."""
    generator = np.random.default_rng(0)
    proxy = generator.normal(size=(100, 4))
    effects = proxy + generator.normal(size=(100, 4)) * [100.0, 0.25, 1e-6, 0.0]
    effects[:, 3] = 2.0
    begun = choose_pairs(random_pairs(100).pairs, 4, AuditConfig.from_dict({"patching": {"exact_pairs": "auto"}}))
    assert begun.by_layer.tolist() == [24] * 5
    measured = np.full_like(effects, np.nan)
    measured[begun.order[:24]] = effects[begun.order[:24]]
    estimates = control_variate_means(measured, proxy)
    more = more_pairs(begun, measured, estimates, 64)
    expected = exact_pairs_needed_safely(math.sqrt(estimates[1].explained), 24, 100, 64)
    assert more.by_layer.tolist() == [24, 64, 24 + -(-max(expected - 24, 0) // 8) * 8, 24, 24]
    assert more.roles().tolist() == begun.roles().tolist()
    # A proxy that cannot be used is none.
    broken = control_variate_means(measured, np.full_like(proxy, np.inf))
    assert more_pairs(begun, measured, broken, 64).by_layer.tolist() == [24, 64, 64, 64, 24]
    assert more_pairs(more, measured, estimates, 8).by_layer.tolist() == more.by_layer.tolist(), "never fewer"


def test_a_pair_keeps_its_role_whatever_is_chosen() -> None:
    """What is kept of the reference is kept by batch: which pairs go together may not depend on how many are patched."""
    few, many = choice(None), choice(None).raised([61, 68, 61])
    assert few.roles().tolist() == many.roles().tolist()
    assert sorted(np.unique(few.roles(), return_counts=True)[1].tolist()) == [8] * 11 + [12]
    for place, layers in enumerate(many.layers_of()):
        rank = many.order.tolist().index(place)
        assert layers == ([-1, 0, 1, 2] if rank < 12 else [0, 1, 2] if rank < 68 else [])
    assert few.layers_of()[few.order[12]] == []


def test_too_few_pairs_to_save_any_are_pointed_out(models: tuple[Any, Any]) -> None:
    patching = {"exact_pairs": "auto", "equivalent_pairs": 12}
    with pytest.warns(UserWarning, match=r"saves nothing here: there are 12 probe pairs.*max_pairs"):
        record, _ = run(*models, 12, patching=patching)
    assert record.patching.attribution.patched_pairs == [12] * 4


def test_an_audit_patches_each_layer_on_as_many_pairs_as_its_interval_needs() -> None:
    """A large step: low layers are hardly attributed, the last stream's effect is the margin shift itself."""
    reference = tiny_model("llama")
    policy = perturbed(reference, scale=1.0)
    policy.lm_head.load_state_dict(reference.lm_head.state_dict())
    policy.model.norm.load_state_dict(reference.model.norm.state_dict())
    probes, resolved = random_pairs(60), resolve_reference(policy, reference)

    def once(previous: PreviousAudit, **patching: Any) -> tuple[AuditRecord, dict[str, np.ndarray]]:
        config = AuditConfig.from_dict(
            {
                "patching": {"attribution_points": (0.0,), "control_pairs": 10, **patching}, "batch_tokens": 100,
                "low_rank": LOW_RANK, "localization": QUICK_LASSO, "spinal": {"enabled": False},
                "generations": QUICK_GENERATIONS,
            }
        )  # fmt: skip
        return audited(policy, resolved, probes, config, previous=previous)

    first, arrays = once(PreviousAudit(), exact_pairs="auto", equivalent_pairs=40)
    found = first.patching.attribution
    assert found.exact_pairs == found.patched_pairs[3] == 10 < found.patched_pairs[0]
    # The next audit begins with what this one needed, and finds the same.
    second, again = once(PreviousAudit(attribution=found), exact_pairs="auto", equivalent_pairs=40)
    assert second.cost.forward_equivalents < first.cost.forward_equivalents
    both = np.isfinite(arrays["per_pair.effect"]) & np.isfinite(again["per_pair.effect"])
    np.testing.assert_allclose(arrays["per_pair.effect"][both], again["per_pair.effect"][both], rtol=1e-6, atol=1e-6)
    whole, every = once(PreviousAudit())
    effects = arrays["per_pair.effect"]
    for layer, count in enumerate(found.patched_pairs):
        patched = np.isfinite(effects[:, layer + 1])
        assert np.flatnonzero(patched).tolist() == sorted(drawn(60)[:count])
        np.testing.assert_allclose(
            effects[patched, layer + 1], every["per_pair.effect"][patched, layer + 1], rtol=1e-6, atol=1e-6
        )
        ours, theirs = first.patching.effect[layer], whole.patching.effect[layer]
        assert ours.low < theirs.mean < ours.high
        # As wide as 40 of 60 pairs' would be, or narrower; both widths are estimates.
        assert ours.high - ours.low < 1.3 * (theirs.high - theirs.low) * math.sqrt(60 / 40)
    everywhere = np.isfinite(effects).all(axis=1)
    assert everywhere.sum() == 10
    for name in ("transplant", "low_rank.shift.1"):
        values = arrays[f"per_pair.{name}"]
        assert np.isfinite(values[everywhere]).all() and np.isnan(values[~everywhere]).all(), name
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(first))
    assert f"(10 to {max(found.patched_pairs)} patched)" in console.file.getvalue()
    assert scalars(first)["align_audit/patching/attribution/patched_pairs/layer_00"] == found.patched_pairs[0]


def test_a_training_chooses_by_its_last_audit_and_a_resumed_one_does_too(tmp_path: Path) -> None:
    patching = {"exact_pairs": "auto", "equivalent_pairs": 23, "control_pairs": 10, "attribution_points": (0.0,)}
    values: dict[str, Any] = {
        "max_pairs": 24, "low_rank": {"enabled": False}, "localization": {"enabled": False}, "spinal": {"enabled": False},
        "tensorboard": "off", "progress": False, "strict": True, "patching": patching, "budget": None,
        # What is tried once a process would tell the resumed run from the other one.
        "generations": {"enabled": False}, "share_prompts": False,
    }  # fmt: skip
    config = AuditConfig.from_dict(values)

    def trained(where: str, steps: int, resume: bool = False) -> list[AuditRecord]:
        callback = AlignmentAuditCallback(ROWS, config=config)
        options = {"max_steps": steps, "save_steps": 1, "lr_scheduler_type": "constant"}
        built = build(tmp_path / where / "run", "ref_model made", [callback], **options)
        callback.attach(built.trainer)
        built.trainer.train(resume_from_checkpoint=resume or None)
        return AuditRun.load(tmp_path / where / "run").records

    straight = trained("straight", 3)
    trained("interrupted", 2)
    resumed = trained("interrupted", 3, resume=True)
    assert [record.step for record in straight] == [record.step for record in resumed] == [0, 1, 2, 3]
    assert straight[3].patching.model_dump_json() == resumed[3].patching.model_dump_json()
    # Pairs patched only after a first look are recorded twice: the same work, so both began alike, with more than the least.
    assert straight[3].cost.forward_equivalents == resumed[3].cost.forward_equivalents
    pairs = ProbeSet.from_dataset(ROWS, make_tokenizer(), max_pairs=24).pairs
    for before, record in itertools.pairwise(straight):
        begun = choose_pairs(pairs, 3, config, before.patching.attribution).by_layer[1:]
        assert (np.array(record.patching.attribution.patched_pairs) >= begun).all()
    assert begun.max() > 10
    # Before training there is nothing to explain, and nothing that would vary.
    assert straight[0].patching.attribution.patched_pairs == [10] * 3
    probes = tmp_path / "probes.jsonl"
    probes.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    folders = {tmp_path / "straight" / "run" / f"checkpoint-{step}": step for step in (1, 2, 3)}
    saved = audit_saved(folders, str(tmp_path / "straight" / "base"), probes, config, tmp_path / "again").records
    for one, other in zip(saved, straight[1:], strict=True):
        assert one.patching.attribution.patched_pairs == other.patching.attribution.patched_pairs


@pytest.mark.parametrize("exact_pairs", [None, 12, 20])
def test_a_patched_pair_without_a_number_makes_the_mean_unknown(exact_pairs: int | None) -> None:
    """Whether attribution helps or not: one pair whose effect is no number is not left out of a mean that counts it."""
    reference = tiny_model("llama")
    policy, probes = perturbed(reference), random_pairs(12)
    broken = probes.pairs[drawn(12)[0]]
    elsewhere = {
        token for pair in probes.pairs if pair is not broken for token in (*pair.chosen_ids, *pair.rejected_ids)
    }
    # A token of its own: what it reads there is no number, in the policy alone.
    spare = next(
        token for token in range(3, policy.config.vocab_size) if token not in {*elsewhere, *broken.rejected_ids}
    )
    start = broken.chosen_start
    own = replace(broken, chosen_ids=(*broken.chosen_ids[:start], spare, *broken.chosen_ids[start + 1 :]))
    probes = replace(probes, pairs=tuple(own if pair is broken else pair for pair in probes.pairs))
    with torch.no_grad():
        policy.get_input_embeddings().weight[spare] = math.nan
    config = AuditConfig.from_dict(
        {
            "patching": {"exact_pairs": exact_pairs}, "low_rank": {"enabled": False}, "localization": {"enabled": False},
            "spinal": {"enabled": False}, "generations": {"enabled": False}, "statistics": {"bootstrap_resamples": 100},
        }
    )  # fmt: skip
    record, _ = audited(policy, reference, probes, config)
    last = record.patching.effect[-1]
    assert math.isnan(last.mean) and last.reason is not None and "not finite" in last.reason
    assert all(math.isnan(p) for p in record.patching.effect_p_adjusted)
