"""The parts of synthetic records: see :mod:`tests.helpers.make_record`."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from align_audit.config import AuditConfig
from align_audit.measures.layer_set import contributions, standing_clear
from align_audit.record.alert import Alert
from align_audit.record.audit_record import (
    Control,
    Controls,
    DepthTrace,
    LayerSet,
    Localization,
    LowRankCurve,
    Margins,
    Patching,
    Provenance,
    Spinal,
)
from align_audit.record.estimate import Estimate

Kind = Literal["healthy", "destabilizing"]

PAIRS = 64
COMPLETION_TOKENS = 60.0
RANKS = (1, 2, 4, 8, 16)
NO_SHIFT = "the interval of the mean margin shift includes 0: there is no change to attribute"
FEW_VALUES = "the window holds 11 singular values; a slope needs 16"
IDENTICAL = "policy and reference are equal bit by bit"


def _estimate(mean: float, deviation: float) -> Estimate:
    half = 1.96 * deviation / math.sqrt(PAIRS)
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def _share(mean: float) -> Estimate:
    estimate = _estimate(mean, math.sqrt(max(mean * (1 - mean), 0.0)))
    return Estimate(mean=mean, low=max(estimate.low, 0.0), high=min(estimate.high, 1.0))


ZERO = Estimate(mean=0.0, low=0.0, high=0.0)


class Maker:
    """Makes the parts of one record, which agree with each other; ``reasons`` fills with why numbers are NaN."""

    def __init__(
        self, rng: np.random.Generator, step: int, layers: int, kind: Kind, progress: float, seed: int
    ) -> None:
        self.rng, self.step, self.layers, self.kind, self.progress, self.seed = rng, step, layers, kind, progress, seed
        self.identical = progress == 0.0
        self.harm = max(progress - 0.4, 0.0) / 0.6 if kind == "destabilizing" else 0.0
        self.reasons: dict[str, str] = {}

    def margins(self) -> Margins:
        p, d = self.progress, self.harm
        reference_margin = -3.1
        shift = 14.0 * (1 - math.exp(-3 * p)) + 60.0 * d
        chosen_token = 0.03 * p - 0.08 * p * p - 2.2 * d * d
        chosen = chosen_token * COMPLETION_TOKENS
        rejected = chosen - shift
        accuracy = 0.5 + 0.44 * (1 - math.exp(-5 * p)) - 0.2 * max(d - 0.5, 0.0)
        token_accuracy = 0.46 - 0.01 * p - 0.38 * d

        def change(value: float, deviation: float) -> Estimate:
            return ZERO if self.identical else _estimate(value, deviation)

        noise = 0.0 if self.identical else float(self.rng.normal(0, 0.15))
        return Margins(
            reference=_estimate(reference_margin, 21.0),
            policy=_estimate(reference_margin + shift + noise, 24.0),
            shift=change(shift + noise, 2.5 + 0.8 * shift),
            accuracy=ZERO if self.identical else _share(accuracy),
            ranking_accuracy=_share(0.45 + 0.3 * (1 - math.exp(-2 * p))),
            chosen_logp_change=change(chosen, 4.0 + 30.0 * d),
            rejected_logp_change=change(rejected, 6.0 + 40.0 * d),
            chosen_logp_change_per_token=change(chosen_token, 0.06 + 0.5 * d),
            rejected_logp_change_per_token=change(rejected / COMPLETION_TOKENS, 0.09 + 0.6 * d),
            kl=change(0.005 + 0.11 * p + 3.0 * d**1.5, 0.05 + d),
            entropy=_estimate(1.92 - 0.1 * p - 1.4 * d, 0.6),
            reference_entropy=_estimate(1.92, 0.6),
            token_accuracy=_share(token_accuracy),
            reference_token_accuracy=_share(0.46),
        )

    def patching(self, shift: Estimate) -> Patching:
        count, d = self.layers, self.harm
        depth = np.arange(count) / max(count - 1, 1)
        weights = np.exp(-0.5 * ((depth - 0.62) / 0.17) ** 2) + 0.08
        weights = weights * (1 + 0.15 * self.rng.normal(size=count))
        if d:
            # A damaged model: blocks work against each other, the late ones most.
            weights = weights * (1 - 0.8 * d) + d * self.rng.normal(0, 0.35, size=count) + d * (depth > 0.8)
        additivity = 1.0 - 0.12 * self.progress - 0.75 * d
        embedding, head = 0.02, 0.05
        shares = np.abs(weights) / np.abs(weights).sum() * (1 - embedding - head)
        recovery = embedding + np.cumsum(shares)
        if self.identical:
            zeros, unknown = [ZERO] * count, Estimate.unknown(NO_SHIFT)
            return Patching(
                positions="all",
                groups=PAIRS,
                effect=zeros,
                effect_p_adjusted=[1.0] * count,
                recovery=[unknown] * count,
                layer_gain=[unknown] * count,
                block_transplant=zeros,
                embedding_gain=unknown,
                head_gain=unknown,
                embedding_transplant=ZERO,
                head_transplant=ZERO,
                additivity=unknown,
                peak_layer=self._no_peak(),
            )
        mean = shift.mean
        transplants = weights / weights.sum() * (additivity - 0.06) * mean
        gains = np.diff(recovery, prepend=embedding)
        return Patching(
            positions="all",
            groups=PAIRS,
            effect=[_estimate(r * mean, 0.5 + 0.7 * abs(r * mean)) for r in recovery.tolist()],
            effect_p_adjusted=np.clip(0.2 * np.exp(-12 * recovery), 1e-3, 1.0).tolist(),
            recovery=[_estimate(r, 0.05 + 0.3 * math.sqrt(r * abs(1 - r))) for r in recovery.tolist()],
            layer_gain=[_estimate(g, 0.03 + 0.4 * abs(g)) for g in gains.tolist()],
            block_transplant=[_estimate(t, 0.2 + 0.9 * abs(t)) for t in transplants.tolist()],
            embedding_gain=_estimate(embedding, 0.03),
            head_gain=_estimate(1 - float(recovery[-1]), 0.04),
            embedding_transplant=_estimate(0.02 * mean, 0.3),
            head_transplant=_estimate(0.04 * mean, 0.4),
            additivity=_estimate(additivity, 0.3),
            peak_layer=int(np.argmax(transplants)),
            standing_out=self._standing_out(transplants, gains, mean),
        )

    def _standing_out(self, transplants: np.ndarray, gains: np.ndarray, shift: float) -> LayerSet:
        none = np.full(self.layers, 1e-9)
        found = contributions(transplants, gains * shift, (none, none))
        layers = list(standing_clear(found))
        others = np.delete(found, layers)
        apart = float(found[layers].min() / others.max()) if layers and len(others) else math.nan
        return LayerSet(
            layers=layers,
            gain=_estimate(float(gains[layers].sum()), 0.1),
            separation=_estimate(apart, 0.2 * abs(apart)),
            stability=0.9 - 0.4 * self.harm,
            selection_frequency=[0.95 if layer in layers else 0.05 for layer in range(self.layers)],
            contribution=[_estimate(c, 0.1 + 0.5 * abs(c)) for c in found.tolist()],
        )

    def _no_peak(self) -> None:
        self.reasons["patching.peak_layer"] = IDENTICAL

    def controls(self, shift: Estimate, patched: Patching | None) -> Controls:
        count = self.layers
        identity = Control(
            verdict="passed", reason="patching the reference with itself changes nothing", effect=[ZERO] * count
        )
        if patched is None or self.identical:
            why = "patching is switched off" if patched is None else NO_SHIFT
            not_run = Control(verdict="not_run", reason=why)
            return Controls(
                noise=not_run,
                reverse=not_run,
                identity=identity if patched else not_run,
                random_subspace=not_run,
                split_half=not_run,
                permuted_targets=not_run,
            )
        depth = np.arange(count) / max(count - 1, 1)
        noise = shift.mean * (0.03 * depth + 0.75 * self.harm * depth**2)
        peak = patched.peak_layer or 0
        broken = self.harm > 0.6
        if broken:
            noise[peak] = patched.effect[peak].mean
        agreement = 0.93 - 0.5 * self.harm
        return Controls(
            noise=Control(
                verdict="failed" if broken else "passed",
                reason=f"at the peak layer {peak} noise of the same size "
                + ("moves the margin as much as the policy's stream" if broken else "moves the margin far less"),
                effect=[_estimate(n, 0.4 + 0.8 * abs(n)) for n in noise.tolist()],
            ),
            reverse=Control(
                verdict="passed",
                reason="putting the reference's stream into the policy lowers the margin at the peak layer",
                effect=[_estimate(-0.9 * e.mean, 0.5 + 0.7 * abs(e.mean)) for e in patched.effect],
            ),
            identity=identity,
            random_subspace=Control(
                verdict="passed",
                reason="the fitted subspace lies above random ones of the same rank at every rank",
                effect=[_estimate(shift.mean * 0.004 * k, 0.3) for k in RANKS],
            ),
            split_half=Control(
                verdict="passed" if agreement >= 0.8 else "failed",
                reason=f"{agreement:.0%} of 100 random half splits agree on the peak layer",
                value=agreement,
            ),
            permuted_targets=Control(
                verdict="passed",
                reason="cross-validated R² 0.41 against at most 0.05 of 20 permutations (p = 0.048)",
                value=1 / 21,
            ),
        )

    def localization(self, patched: Patching | None) -> Localization:
        count, nan = self.layers, math.nan
        if patched is None or self.identical:
            self.reasons["localization"] = NO_SHIFT if patched else "patching is switched off"
            zeros = [0.0] * count
            return Localization(
                target="shift",
                lasso_coefficients=zeros,
                lasso_lambda=nan,
                cv_r2=nan,
                selected_layers=[],
                selection_frequency=zeros,
                null_selection_frequency=zeros,
                null_cv_r2=[],
                center_of_mass=nan,
                entropy=nan,
            )
        profile = np.array([max(t.mean, 0.0) for t in patched.block_transplant])
        share = profile / profile.sum()
        positive = share[share > 0]
        coefficients = np.where(profile > 0.7 * profile.max(), profile / profile.max(), 0.0)
        return Localization(
            target="shift",
            lasso_coefficients=coefficients.tolist(),
            lasso_lambda=0.21,
            cv_r2=0.34 - 0.2 * self.harm,
            selected_layers=np.flatnonzero(coefficients).tolist(),
            selection_frequency=np.clip(share / share.max() * 0.9, 0.02, 1.0).tolist(),
            null_selection_frequency=self.rng.uniform(0.05, 0.2, size=count).tolist(),
            null_cv_r2=self.rng.normal(-0.05, 0.04, size=20).tolist(),
            center_of_mass=float((np.arange(count) * share).sum() / max(count - 1, 1)),
            entropy=float(-(positive * np.log(positive)).sum() / math.log(count)) if count > 1 else 0.0,
        )

    def low_rank(self, patched: Patching, every_layer: bool) -> dict[str, dict[int, LowRankCurve]]:
        if self.identical or patched.peak_layer is None:
            self.reasons["low_rank"] = NO_SHIFT
            return {}
        gain = int(np.argmax([g.mean for g in patched.layer_gain]))
        layers = range(self.layers) if every_layer else sorted({patched.peak_layer, gain, self.layers - 1})[-2:]
        curves: dict[str, dict[int, LowRankCurve]] = {"activation": {}, "shift": {}}
        ranks = np.array(RANKS)
        for layer in layers:
            for basis, speed in (("activation", 0.12), ("shift", 0.55)):
                speed = speed * (1 + 0.5 * layer / self.layers)
                fraction = 1 - np.exp(-speed * ranks) + 0.02 * self.rng.normal(size=len(ranks))
                enough = [bool((fraction[i:] >= 0.95).all()) for i in range(len(ranks))]
                rank_95 = float(ranks[enough.index(True)]) if True in enough else math.nan
                if math.isnan(rank_95):
                    self.reasons[f"low_rank.{basis}.{layer}.rank_95"] = "no evaluated rank reaches 95 % of the effect"
                explained = 1 - np.exp(-(1.6 if basis == "activation" else 0.35) * ranks**0.6)
                curves[basis][layer] = LowRankCurve(
                    ranks=list(RANKS),
                    effect_fraction=[_estimate(f, 0.15 + 0.3 * abs(1 - f)) for f in fraction.tolist()],
                    explained_variance_ratio=explained.tolist(),
                    rank_95=rank_95,
                    full_effect=patched.effect[layer],
                    principal_angles=None if self.step == 0 else np.linspace(0.05, 0.9, 16).tolist(),
                )
        return curves

    def _trace(self, moved: float) -> DepthTrace:
        count = self.layers
        depth = np.arange(count) / max(count - 1, 1)
        # The same reference in every record of a run: its wiggle comes from the seed alone.
        wiggle = np.random.default_rng([self.seed, count]).normal(size=(2, count))
        late = np.clip((depth - 0.6) / 0.4, 0, 1)
        contraction = 0.55 + 0.35 * np.sin(2.6 * depth) + 0.02 * wiggle[0]
        transport = 0.5 + 0.25 * np.cos(5.0 * depth) + 0.9 * depth**6 + 0.02 * wiggle[1]
        contraction = contraction + moved * (0.12 * late + 0.25 * self.harm * late * self.rng.normal(size=count))
        transport = transport - moved * (0.08 * late - 0.3 * self.harm * late * self.rng.normal(size=count))
        contraction_r2 = 0.985 - 0.05 * np.abs(wiggle[0])
        values = np.minimum(512, 40 + 40 * np.arange(count))
        if count >= 30:
            # Deep models of the tests have a first layer whose rows are too few to fit.
            contraction[0] = contraction_r2[0] = math.nan
            values[0] = 14
        return DepthTrace(
            contraction=contraction.tolist(),
            contraction_r2=contraction_r2.tolist(),
            contraction_stderr=np.where(np.isnan(contraction), math.nan, 0.006).tolist(),
            transport=np.clip(transport[:-1], 0, math.pi).tolist(),
            singular_values=values.tolist(),
            below_rounding_floor=[0] * count,
            transport_stderr=(0.01 * np.clip(transport[:-1], 0, math.pi)).tolist(),
        )

    def spinal(self) -> Spinal:
        count = self.layers
        policy, reference = self._trace(math.sqrt(self.progress)), self._trace(0.0)
        if count >= 30:
            for model in ("policy", "reference"):
                self.reasons[f"spinal.{model}.contraction.0"] = (
                    FEW_VALUES  # its R² and error are NaN for the same reason
                )
        terminal = list(range(count - max(math.ceil(count / 3), min(4, count)), count))
        inner = [i for i in terminal if i < count - 1]
        delta_align = math.nan
        if inner:
            contraction_moved = np.mean([policy.contraction[i] - reference.contraction[i] for i in terminal])
            transport_moved = np.mean([policy.transport[i] - reference.transport[i] for i in inner])
            delta_align = float(contraction_moved - transport_moved)
        else:
            for name in ("delta_align", "delta_align_stderr"):
                self.reasons[f"spinal.{name}"] = "one layer has no transport"
        coherence = self._coherence(policy, reference, inner)
        if math.isnan(coherence):
            for name in ("coherence", "reference_coherence", "score"):
                self.reasons[f"spinal.{name}"] = (
                    f"coherence needs a path of 3 points; the terminal block has {len(inner)}"
                )
        concentration = _share(0.36 + 0.2 * self.harm)
        return Spinal(
            policy=policy,
            reference=reference,
            terminal_layers=terminal,
            rows=4096,
            rows_available=7310,
            transport_rows=896,
            transport_change_stderr=[0.002] * (count - 1),
            delta_align_stderr=0.001 if inner else math.nan,
            delta_align=delta_align,
            coherence=coherence,
            reference_coherence=self._coherence(reference, reference, inner),
            gradient_concentration=concentration,
            score=delta_align + coherence + concentration.mean,
        )

    @staticmethod
    def _coherence(trace: DepthTrace, reference: DepthTrace, inner: list[int]) -> float:
        if len(inner) < 3:
            return math.nan
        scale = np.array([np.nanstd(reference.contraction), np.nanstd(reference.transport)])
        path = np.array([[trace.contraction[i], trace.transport[i]] for i in inner]) / scale
        return float(1 / (1 + np.linalg.norm(np.diff(path, n=2, axis=0), axis=1).mean()))

    def alerts(self, margins: Margins, patched: Patching | None) -> list[Alert]:
        found = []
        change = margins.chosen_logp_change_per_token.mean
        if change < -0.5:
            level: Literal["warning", "error"] = "error" if change < -1.0 else "warning"
            found.append(
                Alert(
                    rule="chosen_logp_falling",
                    level=level,
                    step=self.step,
                    value=change,
                    baseline=0.0,
                    threshold=-1.0 if level == "error" else -0.5,
                    message=f"the chosen completions lost {-change:.2f} nats per token against the reference, while "
                    f"the margin shift stands at {margins.shift.mean:+.1f} nats [95 % interval "
                    f"{margins.shift.low:+.1f}, {margins.shift.high:+.1f}]",
                    suggestion="lower the learning rate, raise beta, or add an SFT term on the chosen completions",
                )
            )
        if margins.kl.mean > 1.0:
            found.append(
                Alert(
                    rule="kl_out_of_bounds",
                    level="error",
                    step=self.step,
                    value=margins.kl.mean,
                    threshold=1.0,
                    message=f"KL to the reference is {margins.kl.mean:.2f} nats per token",
                    suggestion="stop here and go back to the last checkpoint below 0.5",
                )
            )
        if patched is not None and patched.additivity.mean < 0.4:
            found.append(
                Alert(
                    rule="additivity_collapsed",
                    level="warning",
                    step=self.step,
                    layers=sorted(range(self.layers), key=lambda i: patched.block_transplant[i].mean)[:2],
                    value=patched.additivity.mean,
                    baseline=0.97,
                    threshold=0.4,
                    message=f"the layers' updates no longer add up: additivity {patched.additivity.mean:.2f}",
                    suggestion="look at the block transplants: layers below zero undo what the others learned",
                )
            )
        if 0.3 < self.harm < 0.5:
            found.append(
                Alert(
                    rule="accuracy_falling",
                    level="info",
                    step=self.step,
                    value=margins.accuracy.mean,
                    baseline=0.94,
                    message="Preference accuracy has stopped rising.",
                    suggestion="Nothing yet; look again at the next audit",
                )
            )
        return found

    def provenance(self) -> Provenance:
        reference_hash = f"{self.seed:04x}" * 16
        return Provenance(
            created=f"2025-11-23T{self.step // 3600 % 24:02d}:{self.step // 60 % 60:02d}:{self.step % 60:02d}+00:00",
            versions={"align-audit": "0.1.0", "torch": "2.9.0", "transformers": "5.0.0", "trl": "1.0.0"},
            model_type="llama",
            num_layers=self.layers,
            hidden_size=512,
            vocab_size=32000,
            policy_hash=reference_hash if self.identical else f"{self.kind}-{self.seed}-{self.step}",
            reference_hash=reference_hash,
            probe_hash="5b" * 32,
            probe_source="the evaluation dataset of the trainer",
            probe_held_out=True,
            pairs=PAIRS,
            groups=PAIRS,
            pairs_dropped={"too_long": 2},
            seed=self.seed,
            device="cpu",
            parameter_dtype="float32",
            compute_dtype="float32",
            max_length=1024,
            truncation_mode="keep_start",
            beta=0.1,
            config=AuditConfig().to_dict(),
        )
