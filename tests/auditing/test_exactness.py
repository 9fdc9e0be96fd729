"""``audit`` against an independent plain computation, written from the definitions: METHODS §7's tolerances."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from align_audit.auditing.measurements.patching import Patching
from align_audit.auditing.session import open_models
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.models.reference import resolve_reference
from align_audit.models.replay import Replay, Stream
from align_audit.models.verify import open_replay
from tests.helpers import oracle, oracle_spinal, oracle_subspaces
from tests.helpers.audits import QUICK_GENERATIONS, audited
from tests.helpers.tiny import FAMILIES, perturbed, random_pairs, tiny_model

pytestmark = pytest.mark.device

RANKS = (1, 2, 4, 8)


def config(**changes: Any) -> AuditConfig:
    """Small batches, so that pairs are padded against each other and several batches are walked."""
    values = {
        "batch_tokens": 120,
        "generations": QUICK_GENERATIONS,
        "low_rank": {"ranks": RANKS, "layers": (1,)},
        "statistics": {"bootstrap_resamples": 100},
        "seed": 3,
    }
    return AuditConfig.from_dict({**values, **changes})


def run(policy: Any, reference: Any, probes: Any, settings: AuditConfig) -> Any:
    return audited(policy, reference, probes, settings)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    reference = tiny_model(request.param)
    policy = perturbed(reference)
    probes = random_pairs(8)
    record, arrays = run(policy, reference, probes, config())
    margins = {"policy": oracle.margins(policy, probes.pairs), "reference": oracle.margins(reference, probes.pairs)}
    _, chosen, rejected = margins["reference"]
    # Norms and softmax of several families compute in float32 whatever the model's dtype, so numbers that pass through
    # other shapes (padding) agree to 1e-7 of the summed |log p|, not to float64's own precision.
    scale = float(np.max(np.abs(chosen) + np.abs(rejected)))
    return {
        "policy": policy, "reference": reference, "probes": probes, "record": record, "arrays": arrays,
        "atol": 1e-7 * scale, "margins": margins,
        "effects": oracle.patch_effects(policy, reference, probes.pairs),
        "transplants": oracle.block_transplants(policy, reference, probes.pairs),
    }  # fmt: skip


def test_the_policy_differs_enough_for_the_comparison_to_mean_something(case: dict[str, Any]) -> None:
    effect = case["arrays"]["per_pair.effect"]
    assert np.abs(effect).max() > 1e4 * case["atol"]
    assert np.unique(np.abs(effect).mean(axis=0)).size == effect.shape[1]


def test_margins(case: dict[str, Any]) -> None:
    for prefix, name in (("", "policy"), ("reference_", "reference")):
        _, chosen, rejected = case["margins"][name]
        np.testing.assert_allclose(case["arrays"][f"per_pair.{prefix}chosen_logp"], chosen, atol=case["atol"], rtol=0)
        np.testing.assert_allclose(
            case["arrays"][f"per_pair.{prefix}rejected_logp"], rejected, atol=case["atol"], rtol=0
        )


def test_patching_in_both_directions_and_transplants(case: dict[str, Any]) -> None:
    policy, reference, pairs = case["policy"], case["reference"], case["probes"].pairs
    expected = {
        "effect": case["effects"],
        "reverse": oracle.patch_effects(reference, policy, pairs),
        "transplant": case["transplants"],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(case["arrays"][f"per_pair.{name}"], values, atol=case["atol"], rtol=0, err_msg=name)


def test_recovery_gains_and_additivity_are_ratios_of_sums(case: dict[str, Any]) -> None:
    delta = case["margins"]["policy"][0] - case["margins"]["reference"][0]
    expected = oracle.summary(case["effects"], case["transplants"], delta)
    patching = case["record"].patching
    assert patching.peak_layer == expected["peak_layer"]
    if patching.recovery[0].reason is not None:
        assert case["record"].margins.shift.low <= 0 <= case["record"].margins.shift.high
        return
    tolerance = dict(rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([e.mean for e in patching.recovery], expected["recovery"][1:], **tolerance)
    np.testing.assert_allclose([e.mean for e in patching.layer_gain], expected["layer_gain"], **tolerance)
    np.testing.assert_allclose(patching.additivity.mean, expected["additivity"], **tolerance)
    gains = [patching.embedding_gain.mean, *(e.mean for e in patching.layer_gain), patching.head_gain.mean]
    assert sum(gains) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("positions", ["prompt", "completion", "last_prompt_token"])
def test_patched_positions(positions: str) -> None:
    reference = tiny_model("llama")
    policy, probes = perturbed(reference), random_pairs(4)
    settings = config(patching={"positions": positions, "noise_draws": 0}, low_rank={"enabled": False})
    _, arrays = run(policy, reference, probes, settings)
    expected = oracle.patch_effects(policy, reference, probes.pairs, positions)
    np.testing.assert_allclose(arrays["per_pair.effect"], expected, atol=1e-6, rtol=0)
    whole = oracle.patch_effects(policy, reference, probes.pairs)
    assert np.abs(whole - expected).max() > 1e-3


@pytest.mark.parametrize("basis", ["activation", "shift"])
def test_low_rank_reconstruction(case: dict[str, Any], basis: str) -> None:
    policy, reference, pairs = case["policy"], case["reference"], case["probes"].pairs
    expected = oracle_subspaces.low_rank_effects(policy, reference, pairs, 1, RANKS, basis, oracle.halves(pairs, 3))
    curve = case["record"].low_rank[basis][1]
    np.testing.assert_allclose(curve.explained_variance_ratio, expected["explained_variance_ratio"], rtol=1e-6)
    fitted = case["arrays"][f"per_pair.low_rank.{basis}.1"]
    np.testing.assert_allclose(fitted, expected["effects"], atol=10 * case["atol"], rtol=0)
    if curve.effect_fraction[0].reason is None:
        np.testing.assert_allclose([e.mean for e in curve.effect_fraction], expected["effect_fraction"], rtol=1e-4)


def test_localization_features(case: dict[str, Any]) -> None:
    expected = oracle_subspaces.activation_features(case["policy"], case["reference"], case["probes"].pairs)
    np.testing.assert_allclose(case["arrays"]["per_pair.features"], expected, rtol=1e-5)


def test_spinal(case: dict[str, Any]) -> None:
    pairs, spinal = case["probes"].pairs, case["record"].spinal
    assert spinal.rows == spinal.rows_available == len(oracle_spinal.spectral_rows(case["policy"], pairs)[0])
    traces = {}
    for name, trace in (("policy", spinal.policy), ("reference", spinal.reference)):
        contraction, r2, _ = oracle_spinal.spectra(case[name], pairs)
        transport = oracle_spinal.transport(case[name], pairs)
        traces[name] = (contraction, transport)
        np.testing.assert_allclose(trace.contraction, contraction, rtol=1e-5)
        np.testing.assert_allclose(trace.contraction_r2, r2, rtol=1e-5)
        np.testing.assert_allclose(trace.transport, transport, rtol=1e-5)
    (alpha, travel), (alpha_ref, travel_ref) = traces["policy"], traces["reference"]
    assert spinal.delta_align == pytest.approx(
        oracle_spinal.delta_align(alpha, alpha_ref, travel, travel_ref), abs=1e-5
    )
    assert spinal.coherence == pytest.approx(
        oracle_spinal.coherence(alpha, travel, alpha_ref, travel_ref), abs=1e-5, nan_ok=True
    )
    share = oracle_spinal.gradient_concentration(case["policy"], pairs).mean()
    assert spinal.gradient_concentration.mean == pytest.approx(share, abs=1e-6)


def test_behaviour(case: dict[str, Any]) -> None:
    expected = oracle.behaviour(case["policy"], case["reference"], case["probes"].pairs)
    margins = case["record"].margins
    for name in (
        "shift", "chosen_logp_change", "rejected_logp_change", "chosen_logp_change_per_token",
        "rejected_logp_change_per_token", "kl", "entropy", "reference_entropy", "token_accuracy",
        "reference_token_accuracy",
    ):  # fmt: skip
        assert getattr(margins, name).mean == pytest.approx(expected[name].mean(), abs=case["atol"]), name
    assert margins.accuracy.mean == expected["correct"].mean()
    assert margins.ranking_accuracy.mean == expected["ranking_correct"].mean()


def test_equal_shapes_give_float64_precision() -> None:
    """One pair of equal lengths a batch: no padding anywhere, as in the oracle but for the two rows of a batch."""
    reference = tiny_model("gpt2")  # computes its norms in the model's own dtype
    policy = perturbed(reference)
    probes = random_pairs(1, seed=5)
    pair = probes.pairs[0]
    size = min(len(pair.chosen_ids), len(pair.rejected_ids))
    cut = type(pair)(0, pair.chosen_ids[:size], pair.rejected_ids[:size], pair.chosen_start, pair.rejected_start)
    probes = type(probes)((cut,), "one pair", {}, 64, "keep_start", None)
    _, arrays = run(policy, reference, probes, config(low_rank={"enabled": False}))
    expected = oracle.patch_effects(policy, reference, [cut])
    np.testing.assert_allclose(arrays["per_pair.effect"], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-9)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_dtypes(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """In parts of the summed |log p|; the oracle computes in float64 with the same weights, one sequence at a time.

    In bfloat16 it would stray from that as far as an audit does, and old kernels do so differently for every shape.
    """
    reference = tiny_model(family, dtype=dtype)
    policy, probes = perturbed(reference), random_pairs(7)
    off = {name: {"enabled": False} for name in ("low_rank", "localization", "spinal")}
    _, arrays = run(policy, reference, probes, config(**off))
    policy, reference = copy.deepcopy(policy).double(), copy.deepcopy(reference).double()
    _, chosen, rejected = oracle.margins(reference, probes.pairs)
    scale = np.abs(chosen)[:, None] + np.abs(rejected)[:, None]
    expected = {
        "effect": oracle.patch_effects(policy, reference, probes.pairs),
        "reverse": oracle.patch_effects(reference, policy, probes.pairs),
        "transplant": oracle.block_transplants(policy, reference, probes.pairs),
    }
    for name, values in expected.items():
        assert np.abs(values / scale).max() > 2 * tolerance
        np.testing.assert_allclose(arrays[f"per_pair.{name}"] / scale, values / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equal_weights_give_exactly_zero(family: str) -> None:
    reference = tiny_model(family, dtype=torch.float32)
    policy = perturbed(reference, scale=0.0)
    record, arrays = run(policy, reference, random_pairs(8), config(low_rank={"layers": (0, 1)}))
    for name in ("effect", "reverse", "identity", "noise", "transplant", "features"):
        values = arrays[f"per_pair.{name}"]
        measured = ~np.isnan(values)
        if name != "noise":  # further draws at the peak only
            assert measured.all(), name
        assert measured.any() and not np.any(values[measured]), name
    for estimate in (record.margins.shift, record.margins.kl, *record.patching.effect):
        assert (estimate.mean, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
    assert record.spinal.delta_align == 0.0
    assert record.reference_check.same_weights
    assert record.controls.identity.verdict == "passed"


def test_memory_budget_does_not_change_numbers() -> None:
    """One stream and one pair at a time, or all at once: the same effects within rounding of the padding."""
    reference = tiny_model("llama")
    policy, probes = perturbed(reference), random_pairs(6)
    _, wide = run(policy, reference, probes, config(batch_tokens=4096))
    _, narrow = run(policy, reference, probes, config(batch_tokens=1, working_memory_mb=1))
    for name, values in wide.items():
        if name.startswith("per_pair."):
            np.testing.assert_allclose(narrow[name], values, atol=1e-5, rtol=1e-5, err_msg=name)


def test_the_second_pass_knows_the_unpatched_run_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the batches of the first pass its margins are taken over; on others the unpatched run is computed again."""
    reference = tiny_model("llama")
    policy = perturbed(reference)
    settings = config(batch_tokens=100, low_rank={"layers": (1,), "ranks": (1, 4)}, patching={"noise_draws": 3})
    _, known = run(policy, reference, random_pairs(8), settings)
    whole: list[bool] = []
    real = Session.record_both

    def recorded(self: Session, *args: Any, whole_reference: bool = True, **options: Any) -> Any:
        whole.append(whole_reference)
        return real(self, *args, whole_reference=whole_reference, **options)

    monkeypatch.setattr(Session, "record_both", recorded)
    run(policy, reference, random_pairs(8), settings)
    batches = len(whole) // 2
    assert batches >= 2 and whole == [True] * batches + [False] * batches
    monkeypatch.setattr(Session, "unpatched_before", lambda self, batch: None)
    whole.clear()
    _, computed = run(policy, reference, random_pairs(8), settings)
    assert whole == [True] * 2 * batches
    assert set(known) == set(computed)
    for name, values in known.items():
        np.testing.assert_array_equal(computed[name], values, err_msg=name)


@pytest.mark.parametrize("stray", [False, True], ids=["replayed", "strayed"])
def test_rounding_in_the_shapes_of_a_walk_is_no_effect(monkeypatch: pytest.MonkeyPatch, stray: bool) -> None:
    """A last layer that runs at some positions rounds otherwise, by much here: patched or not, runs have it alike, and those
    whose stream joins behind it have it not. Replays stray from recordings where layers called again round otherwise too."""
    reference, probes = tiny_model("llama"), random_pairs(4)
    real = Replay.layer

    def rounding(self: Replay, index: int, stream: torch.Tensor, recording: Any, read: Any = None) -> torch.Tensor:
        out = real(self, index, stream, recording, read)
        noise = torch.sin(torch.arange(out.shape[-1], device=out.device))
        return out + noise * (0.1 * (read is not None and index == self.num_layers - 1) + 0.01 * (stray and index == 1))

    policy = perturbed(reference)
    with OpenModels(policy, resolve_reference(policy, reference)) as models:
        session = Session(models, probes.pairs, config())
        monkeypatch.setattr(Replay, "layer", rounding)
        batch, last = session.batch(session.plan[0]), session.num_layers - 1
        with session.as_reference() as replay:
            recording = replay.record(batch.model_inputs())
            margins = session.readout.margins(replay, recording.after(last), batch)
            unpatched = session.unpatched(replay, batch, recording, margins, is_reference=True)
            entering = replay.entering_last(recording)
            top = replay.layer(last, entering, recording)
        assert (unpatched.strays is not None) == stray
        assert not torch.allclose(unpatched.margins, unpatched.narrowed)
        streams = [Stream("below", last - 1, lambda: entering), Stream("behind", last, lambda: top)]
        effects = dict(session.effects(session.as_reference, batch, recording, streams, unpatched))
        assert not effects["below"].any() and not effects["behind"].any()
        assert session.unpatched_before(batch) is (None if stray else unpatched)


def test_an_audit_that_breaks_in_a_walk_leaves_the_reference_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when somebody collects what the error holds on to: until then the policy would compute as its reference."""
    inside: list[int] = []
    real = OpenModels.as_reference

    @contextlib.contextmanager
    def counting(self: OpenModels) -> Iterator[Replay]:
        inside.append(1)
        try:
            with real(self) as replay:
                yield replay
        finally:
            inside.pop()

    def breaks(self: Patching, *_: Any) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(OpenModels, "as_reference", counting)
    monkeypatch.setattr(Patching, "store", breaks)
    reference = tiny_model("llama")
    with pytest.raises(ValueError, match="planted") as held:
        run(perturbed(reference), reference, random_pairs(4), config())
    assert held.traceback and not inside


# -- a device on which replay is not bit-exact -------------------------------------------------------------------------


def test_where_replay_strays_the_unpatched_run_is_walked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are not deterministic, as a layer whose second call in the same forward differs by rounding.

    By more than float64's own, or the norms, which round in float32, would hide it nearly everywhere.
    """
    reference = tiny_model("llama")
    policy = perturbed(reference)
    settings = config(low_rank={"layers": (1,), "ranks": (1, 4)})
    exact, ours = run(policy, reference, random_pairs(6), settings)
    real = Replay.layer

    checked: list[Replay] = []

    def drifting(self: Replay, index: int, stream: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return real(self, index, stream, *rest, **options) * (1 + 1e-10 if self in checked else 1)

    def opening(*args: Any, **options: Any) -> Replay:
        checked.append(open_replay(*args, **options))
        return checked[-1]

    monkeypatch.setattr(open_models, "open_replay", opening)
    monkeypatch.setattr(Replay, "layer", drifting)
    unsteady, theirs = run(policy, reference, random_pairs(6), settings)
    assert exact.controls.identity.verdict == "passed"
    assert exact.controls.identity.pairs == 6
    assert unsteady.controls.identity.verdict == "failed"
    assert unsteady.controls.identity.pairs == 6
    for name in ("effect", "low_rank.shift.1"):
        np.testing.assert_allclose(theirs[f"per_pair.{name}"], ours[f"per_pair.{name}"], atol=1e-6, rtol=0)
        assert not np.array_equal(theirs[f"per_pair.{name}"], ours[f"per_pair.{name}"])
