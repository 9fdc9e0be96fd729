"""From what was gathered to the parts of a record: pure arithmetic on per-pair numbers, with a reason for every NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from align_audit.auditing.measurements.low_rank import LowRankFindings
from align_audit.auditing.measurements.patching import Collected
from align_audit.config import AuditConfig
from align_audit.measures import spinal as spinal_measures
from align_audit.measures.control_variate import ControlVariate, beside_attribution, control_variate_means
from align_audit.measures.layer_set import layer_set
from align_audit.measures.localization import center_of_mass, lasso_localization, normalized_entropy
from align_audit.measures.patching import Options, PatchSummary, gain_of, summarize_patching
from align_audit.measures.spectrum import below_rounding_floor, contraction, singular_values
from align_audit.measures.statistics import (
    Interval,
    disjoint,
    mean_interval,
    mean_intervals,
    ratio_intervals,
    share_interval,
    split_half_agreement,
)
from align_audit.measures.subspace import principal_angles, rank_95, rank_95_interval
from align_audit.record.audit_record import (
    Attribution,
    Control,
    Controls,
    DepthTrace,
    Estimate,
    LayerSet,
    Localization,
    LowRankCurve,
    Margins,
    Patching,
    Spinal,
)


@dataclass
class Assembler:
    """Turns :class:`Collected` into record parts; ``reasons`` fills with why a number is NaN (dotted path → reason)."""

    found: Collected
    config: AuditConfig
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pair = self.found.per_pair
        with np.errstate(invalid="ignore"):  # an infinite log-probability on both sides: NaN, and said so later
            self.reference_margin = pair["reference_chosen_logp"] - pair["reference_rejected_logp"]
            self.policy_margin = pair["chosen_logp"] - pair["rejected_logp"]
            self.shift = self.policy_margin - self.reference_margin
        statistics = self.config.statistics
        self.resamples = statistics.bootstrap_resamples
        self.confidence = statistics.confidence
        self.method = statistics.interval
        self.seed = self.config.seed

    # -- intervals ---------------------------------------------------------------------------------------------------

    def mean(self, values: np.ndarray) -> Estimate:
        """Mean of per-pair values [N] with its interval."""
        return estimate(mean_interval(values, self.resamples, self.confidence, self.method, self.seed))

    def means(self, values: np.ndarray) -> list[Estimate]:
        """Means of the columns of [N, K], all from the same resampled pairs."""
        return [
            estimate(interval)
            for interval in mean_intervals(values, self.resamples, self.confidence, self.method, self.seed)
        ]

    def share(self, hits: np.ndarray) -> Estimate:
        """Share of pairs [N] for which something holds, with its interval."""
        if self.found.identical and not hits.any():
            return self.mean(hits)  # equal models: exactly 0, and no sample of anything
        return estimate(share_interval(hits, self.confidence))

    # -- parts -------------------------------------------------------------------------------------------------------

    def margins(self) -> Margins:
        """METHODS, notation and §6."""
        pair = self.found.per_pair
        known = np.isfinite(self.shift)
        with np.errstate(invalid="ignore"):
            chosen = pair["chosen_logp"] - pair["reference_chosen_logp"]
            rejected = pair["rejected_logp"] - pair["reference_rejected_logp"]
        return Margins(
            reference=self.mean(self.reference_margin),
            policy=self.mean(self.policy_margin),
            shift=self.mean(self.shift),
            accuracy=self.share(np.where(known, self.shift > 0, np.nan)),
            ranking_accuracy=self.share(np.where(known, self.policy_margin > 0, np.nan)),
            chosen_logp_change=self.mean(chosen),
            rejected_logp_change=self.mean(rejected),
            chosen_logp_change_per_token=self.mean(chosen / pair["chosen_tokens"]),
            rejected_logp_change_per_token=self.mean(rejected / pair["rejected_tokens"]),
            kl=self.mean(pair["kl"]),
            entropy=self.mean(pair["entropy"]),
            reference_entropy=self.mean(pair["reference_entropy"]),
            token_accuracy=self.mean(pair["token_accuracy"]),
            reference_token_accuracy=self.mean(pair["reference_token_accuracy"]),
        )

    def patching(self) -> tuple[Patching, PatchSummary] | tuple[None, None]:
        """METHODS §1, with the summary that controls and low rank go on from; None twice where it is off."""
        if not self.config.patching.enabled:
            self.reasons["patching"] = "switched off (patching.enabled)"
            return None, None
        pair, exact = self.found.per_pair, self.found.exact_pairs
        summary = summarize_patching(
            pair["effect"][exact],
            pair["transplant"][exact],
            self.shift[exact],
            resamples=self.resamples,
            confidence=self.confidence,
            method=self.method,
            seed=self.seed,
        )
        summary = self._without_what_was_switched_off(summary)
        if summary.peak_reason is not None:
            self.reasons["patching.peak_layer"] = summary.peak_reason
        if any(math.isnan(p) for p in summary.effect_p_adjusted):
            self.reasons["patching.effect_p_adjusted"] = (
                "an effect is not finite, or there are too few pairs for a test"
            )
        effect, attribution = summary.effect, None
        if "attribution" in pair:
            attributed = pair["attribution"][:, 1:]
            combined, alone = self.corrected_effects()
            effect = [one.interval for one in combined]
            attribution = Attribution(
                exact_pairs=len(exact),
                patched_pairs=[one.exact_pairs for one in combined],
                pairs=self.found.num_pairs,
                correlation=floats([one.correlation for one in alone]),
                joint_correlation=floats([one.correlation for one in combined]),
                equivalent_pairs=floats([one.equivalent_pairs for one in combined]),
                points=list(self.config.patching.attribution_points),
                path=self.config.patching.attribution_path,
                mean=self.means(attributed.mean(axis=2)),
            )
            for layer, (own, joint) in enumerate(zip(alone, combined, strict=True)):
                flat = f"neither effect nor attribution varies over the {joint.exact_pairs} patched pairs"
                if math.isnan(own.correlation) or own.reason is not None:
                    self.reasons[f"patching.attribution.correlation.{layer}"] = own.reason or flat
                for name, value in (
                    ("joint_correlation", joint.correlation), ("equivalent_pairs", joint.equivalent_pairs),
                ):  # fmt: skip
                    if math.isnan(value) or joint.reason is not None:
                        self.reasons[f"patching.attribution.{name}.{layer}"] = joint.reason or flat
        standing = self._standing_out(pair["effect"][exact], pair["transplant"][exact])
        part = Patching(
            positions=self.config.patching.positions,
            estimator="exact" if attribution is None else "control_variate",
            attribution=attribution,
            effect=[estimate(interval) for interval in effect],
            effect_p_adjusted=summary.effect_p_adjusted,
            recovery=[estimate(interval) for interval in summary.recovery],
            layer_gain=[estimate(interval) for interval in summary.layer_gain],
            block_transplant=[estimate(interval) for interval in summary.block_transplant],
            embedding_gain=estimate(summary.embedding_gain),
            head_gain=estimate(summary.head_gain),
            embedding_transplant=estimate(summary.embedding_transplant),
            head_transplant=estimate(summary.head_transplant),
            additivity=estimate(summary.additivity),
            peak_layer=summary.peak_layer,
            standing_out=standing,
        )
        return part, summary

    def corrected_effects(self) -> tuple[list[ControlVariate], list[ControlVariate]]:
        """Mean effect of each layer, corrected by attribution and margin shift; and by attribution alone."""
        pair, options = self.found.per_pair, (self.resamples, self.confidence, self.seed)
        attributed, effects = pair["attribution"][:, 1:], pair["effect"][:, 1:]
        beside = beside_attribution(attributed, self.shift, len(self.found.exact_pairs))
        return control_variate_means(effects, beside, *options), control_variate_means(effects, attributed, *options)

    def _standing_out(self, effects: np.ndarray, transplants: np.ndarray) -> LayerSet | None:
        if not self.config.patching.transplants:
            self.reasons["patching.standing_out"] = "block transplants are switched off (patching.transplants)"
            return None
        # At chosen positions a stream's effect may fall with depth, and its steps are no layer's work.
        gains = np.diff(effects, axis=1) if self.config.patching.positions == "all" else transplants[:, 1:-1].copy()
        if not self.config.patching.embedding:
            gains[:, 0] = transplants[:, 1]
        found = layer_set(transplants[:, 1:-1], gains, self.resamples, self.confidence, self.seed)
        if found.reason is not None:
            for name in ("stability", "selection_frequency"):
                self.reasons[f"patching.standing_out.{name}"] = found.reason
            gain = Interval.unknown(found.reason)
        elif 0 in found.layers and not self.config.patching.embedding:
            gain = Interval.unknown("the gain of layer 0 is switched off (patching.embedding)")
        else:
            options: Options = {
                "resamples": self.resamples, "confidence": self.confidence, "method": self.method, "seed": self.seed,
            }  # fmt: skip
            gain = gain_of(effects, self.shift[self.found.exact_pairs], found.layers, options)
        return LayerSet(
            layers=list(found.layers),
            gain=estimate(gain),
            separation=estimate(found.separation),
            stability=found.stability,
            selection_frequency=floats(found.selection_frequency),
            contribution=[estimate(interval) for interval in found.contribution],
        )

    def _without_what_was_switched_off(self, summary: PatchSummary) -> PatchSummary:
        """The true reason where a number is missing because nobody asked for it."""
        config = self.config.patching
        if not config.embedding:
            off = Interval.unknown("switched off (patching.embedding)")
            summary = replace(
                summary,
                embedding_gain=off,
                layer_gain=[off, *summary.layer_gain[1:]],
                embedding_transplant=off,
                additivity=off,
            )
        if not config.transplants:
            off = Interval.unknown("switched off (patching.transplants)")
            summary = replace(
                summary,
                block_transplant=[off] * len(summary.block_transplant),
                embedding_transplant=off,
                head_transplant=off,
                additivity=off,
                peak_reason=off.reason,
            )
        return summary

    def localization(self, summary: PatchSummary | None) -> Localization | None:
        """METHODS §3; None, with a reason, where it is off or has no target."""
        config = self.config.localization
        if not config.enabled:
            self.reasons["localization"] = "switched off (localization.enabled)"
            return None
        target = self.shift
        if config.target == "effect":
            if summary is None or summary.peak_layer is None:
                self.reasons["localization"] = "target 'effect' needs a peak layer, and there is none"
                return None
            target = self.found.per_pair["effect"][:, summary.peak_layer + 1]
        known = self.found.exact_pairs if config.target == "effect" else np.arange(self.found.num_pairs)
        fit = lasso_localization(
            self.found.per_pair["features"][known],
            target[known],
            folds=config.folds,
            resamples=config.selection_resamples,
            permutations=config.permutations,
            seed=self.seed,
        )
        if fit.reason is not None:
            for name in (
                "lasso_coefficients", "lasso_lambda", "cv_r2", "selection_frequency", "null_selection_frequency",
                "null_cv_r2",
            ):  # fmt: skip
                self.reasons[f"localization.{name}"] = fit.reason
        blocks = np.array([interval.mean for interval in summary.block_transplant]) if summary is not None else None
        center = spread = math.nan
        if blocks is None:
            reason: str | None = "patching is switched off, so there are no block transplants"
        elif not self.config.patching.transplants:
            reason = "block transplants are switched off (patching.transplants)"
        elif not np.isfinite(blocks).all():
            reason = "a block transplant is not finite"
        else:
            weights = np.maximum(blocks, 0.0)
            center, reason = center_of_mass(weights)
            spread, why = normalized_entropy(weights)
            if why is not None:
                self.reasons["localization.entropy"] = why
        if reason is not None:
            self.reasons["localization.center_of_mass"] = reason
            self.reasons.setdefault("localization.entropy", reason)
        return Localization(
            target=config.target,
            lasso_coefficients=floats(fit.coefficients),
            lasso_lambda=fit.alpha,
            cv_r2=fit.cv_r2,
            selected_layers=[int(layer) for layer in fit.selected],
            selection_frequency=floats(fit.selection_frequency),
            null_selection_frequency=floats(fit.null_selection_frequency),
            null_cv_r2=floats(fit.null_cv_r2),
            center_of_mass=center,
            entropy=spread,
        )

    def low_rank(
        self, findings: LowRankFindings, previous: dict[tuple[str, int], np.ndarray]
    ) -> dict[str, dict[int, LowRankCurve]]:
        """METHODS §4; ``previous`` holds the subspaces of the audit before, for principal angles."""
        curves: dict[str, dict[int, LowRankCurve]] = {}
        for (basis, layer), reason in findings.skipped.items():
            self.reasons[f"low_rank.{basis}.{layer}"] = reason
        for (basis, layer), fitted in findings.fitted.items():
            full, fitted = (
                values[self.found.exact_pairs] for values in (self.found.per_pair["effect"][:, layer + 1], fitted)
            )
            fractions = [estimate(interval) for interval in self.fractions(fitted, full)]
            least, why = rank_95(findings.ranks, [fraction.mean for fraction in fractions])
            if why is not None:
                self.reasons[f"low_rank.{basis}.{layer}.rank_95"] = fractions[-1].reason or why
            low, high = math.nan, math.nan
            if not math.isnan(fractions[-1].mean):
                low, high = rank_95_interval(findings.ranks, fitted, full, self.resamples, self.confidence, self.seed)
            for bound, value in (("low", low), ("high", high)):
                if math.isnan(value):
                    self.reasons[f"low_rank.{basis}.{layer}.rank_95_{bound}"] = (
                        fractions[-1].reason or "an effect is not finite, or there are fewer than 2 pairs"
                    )
            angles = None
            if (basis, layer) in previous:
                now, before = findings.bases[basis, layer], previous[basis, layer]
                width = min(now.shape[1], before.shape[1])
                angles = floats(principal_angles(torch.from_numpy(now[:, :width]), torch.from_numpy(before[:, :width])))
            curves.setdefault(basis, {})[layer] = LowRankCurve(
                ranks=findings.ranks,
                effect_fraction=fractions,
                explained_variance_ratio=floats(findings.explained[basis, layer]),
                rank_95=least,
                rank_95_low=low,
                rank_95_high=high,
                full_effect=self.mean(full),
                principal_angles=angles,
            )
        return curves

    def fractions(self, fitted: np.ndarray, full: np.ndarray) -> list[Interval]:
        """Effects of the rank-k patches [N, K] over the full patch's [N]: ratios of sums."""
        return ratio_intervals(
            fitted, full, self.resamples, self.confidence, self.method, self.seed, "effect of the full patch"
        )

    # -- controls ----------------------------------------------------------------------------------------------------

    def controls(
        self, summary: PatchSummary | None, findings: LowRankFindings | None, localization: Localization | None
    ) -> Controls:
        """METHODS §2, each with verdict and reason."""
        permuted = self._permuted_targets(localization)
        if summary is None:
            off = Control(verdict="not_run", reason="patching is switched off (patching.enabled)")
            return Controls(
                noise=off, reverse=off, identity=off, random_subspace=off, split_half=off, permuted_targets=permuted
            )
        fewer = {"pairs": len(self.found.control_pairs)}
        return Controls(
            noise=self._noise(summary).model_copy(update=fewer),
            reverse=self._reverse(summary).model_copy(update=fewer),
            identity=self._identity().model_copy(update={"pairs": len(self.found.identity_pairs)}),
            random_subspace=self._random_subspace(summary, findings).model_copy(update=fewer),
            split_half=self._split_half().model_copy(update={"pairs": len(self.found.exact_pairs)}),
            permuted_targets=permuted,
        )

    def _no_shift(self) -> str | None:
        """Why controls that need a shift cannot be run, or None."""
        shift = self.mean(self.shift)
        if math.isnan(shift.mean) or math.isnan(shift.low):
            return f"the mean margin shift is not known: {shift.reason}"
        if shift.low <= 0.0 <= shift.high:
            return f"the interval of the mean margin shift, [{shift.low:.3g}, {shift.high:.3g}] nats, includes 0"
        return None

    def _noise(self, summary: PatchSummary) -> Control:
        draws, counts = self.found.per_pair["noise"][self.found.control_pairs], self.found.noise_draws
        if draws.shape[1] == 0:
            return Control(verdict="not_run", reason="no noise draws were asked for (patching.noise_draws)")
        effect = self.means(
            np.stack([draws[:, :count, layer].mean(axis=1) for layer, count in enumerate(counts)], axis=1)
        )
        reason = self._no_shift()
        if reason is not None:
            return Control(verdict="not_run", reason=reason, effect=effect)
        if summary.peak_layer is None:
            return Control(verdict="not_run", reason=summary.peak_reason or "no peak layer", effect=effect)
        real, noise = summary.effect[summary.peak_layer], effect[summary.peak_layer]
        apart = disjoint(real, Interval(noise.mean, noise.low, noise.high))
        words = f"[{real.low:.3g}, {real.high:.3g}] against [{noise.low:.3g}, {noise.high:.3g}] nats of noise"
        return Control(
            verdict="passed" if apart else "failed",
            reason=f"at the peak layer {summary.peak_layer} the intervals "
            + (f"are disjoint: {words}" if apart else f"overlap: {words}; a random shift of this length does the same"),
            effect=effect,
        )

    def _reverse(self, summary: PatchSummary) -> Control:
        if not self.config.patching.reverse:
            return Control(verdict="not_run", reason="switched off (patching.reverse)")
        effect = self.means(self.found.per_pair["reverse"][self.found.control_pairs, 1:])
        raised = [layer for layer, real in enumerate(summary.effect) if real.low > 0.0]
        if not raised:
            return Control(
                verdict="not_run", reason="no layer's patch raises the margin beyond its interval", effect=effect
            )
        against = [layer for layer in raised if not effect[layer].mean < 0.0]
        if against:
            reason = f"putting the reference's stream back does not lower the margin at layers {against}"
            return Control(verdict="failed", reason=reason, effect=effect)
        reason = f"the reference's stream lowers the policy's margin at all {len(raised)} layers whose patch raised it"
        return Control(verdict="passed", reason=reason, effect=effect)

    def _identity(self) -> Control:
        if not self.found.identity_pairs:
            return Control(verdict="not_run", reason="no batch was replayed at every layer")
        values = self.found.per_pair["identity"][sorted(self.found.identity_pairs)]
        effect = self.means(values)
        off = [layer for layer in range(values.shape[1]) if np.any(values[:, layer] != 0.0)]
        if not np.isfinite(values).all():
            return Control(verdict="failed", reason="the reference's own margins are not finite", effect=effect)
        if off:
            largest = float(np.abs(values).max())
            return Control(
                verdict="failed",
                reason=f"the reference patched with its own stream moves by up to {largest:.3g} nats at layers {off}",
                effect=effect,
            )
        return Control(
            verdict="passed",
            reason=f"the reference patched with its own stream moves by exactly 0 (on {len(values)} pairs at every layer, "
            "on each other batch at one)",
            effect=effect,
        )

    def _random_subspace(self, summary: PatchSummary, findings: LowRankFindings | None) -> Control:
        if findings is None or not findings.random:
            return Control(verdict="not_run", reason="no random subspaces were patched (low_rank)")
        layers = [layer for _, layer in findings.random]
        peak = summary.peak_layer if summary.peak_layer in layers else layers[0]
        if ("shift", peak) not in findings.fitted:
            return Control(verdict="not_run", reason="the shift basis was not fitted (low_rank.bases)")
        effect = self.means(findings.random["shift", peak][self.found.control_pairs].mean(axis=-1))
        reason = self._no_shift()
        if reason is not None:
            return Control(verdict="not_run", reason=reason, effect=effect)
        fitted = self.means(findings.fitted["shift", peak][self.found.exact_pairs])
        sign = math.copysign(1.0, summary.effect[peak].mean)
        more = beyond(fitted, effect, sign)
        losing = [rank for rank, does in zip(findings.ranks, more, strict=True) if not does]
        if losing:
            return Control(
                verdict="failed",
                reason=f"at layer {peak} random subspaces of rank {losing} do as well as the fitted one",
                effect=effect,
            )
        reason = f"at layer {peak} the fitted subspace beats random ones at every rank of {findings.ranks}"
        return Control(verdict="passed", reason=reason, effect=effect)

    def _split_half(self) -> Control:
        config = self.config.patching
        reason = self._no_shift()
        if reason is not None:
            return Control(verdict="not_run", reason=reason)
        if not config.transplants:
            return Control(verdict="not_run", reason="block transplants are switched off (patching.transplants)")
        agreement, why = split_half_agreement(
            self.found.per_pair["transplant"][self.found.exact_pairs, 1:-1], config.split_half_repeats, self.seed
        )
        if why is not None:
            return Control(verdict="not_run", reason=why)
        passed = agreement >= config.split_half_agreement
        return Control(
            verdict="passed" if passed else "failed",
            reason=f"{agreement:.0%} of {config.split_half_repeats} random half splits agree on the peak layer "
            f"({config.split_half_agreement:.0%} wanted)",
            value=agreement,
        )

    def _permuted_targets(self, localization: Localization | None) -> Control:
        """The LASSO of the true targets against that of permuted ones (METHODS §3): a permutation test of its CV score."""
        if localization is None:
            why = self.reasons.get("localization", "switched off (localization.enabled)")
            return Control(verdict="not_run", reason=why)
        null = np.array(localization.null_cv_r2)
        if not (math.isfinite(localization.cv_r2) and np.isfinite(null).all()):
            return Control(verdict="not_run", reason=self.reasons.get("localization.cv_r2", "the fit is not known"))
        p = (1 + int((null >= localization.cv_r2).sum())) / (1 + len(null))
        words = (
            f"cross-validated R² {localization.cv_r2:.2f} against at most {null.max():.2f} of {len(null)} permutations "
            f"(p = {p:.2g})"
        )
        level = 1 - self.confidence
        if 1 / (1 + len(null)) > level:
            reason = f"{len(null)} permutations cannot show p ≤ {level:.2g} (localization.permutations): {words}"
            return Control(verdict="not_run", reason=reason, value=p)
        if p <= level:
            return Control(verdict="passed", reason=f"the layers' shifts predict the target: {words}", value=p)
        reason = f"the layers' shifts predict the target no better than a permuted one: {words}"
        return Control(verdict="failed", reason=reason, value=p)

    # -- SPINAL ------------------------------------------------------------------------------------------------------

    def trace(
        self, rows: list[torch.Tensor], distances: np.ndarray, epsilon: float
    ) -> tuple[DepthTrace, dict[str, str]]:
        """One model's depth trace, of rows by batch [n, L, d] and what they travel [rows, L − 1]; and why a layer's
        contraction or transport is NaN (layer → reason)."""
        order = torch.from_numpy(np.argsort(np.concatenate(self.found.row_keys), kind="stable"))
        fits, floor, why = [], [], {}
        for layer in range(self.found.num_layers):
            # One layer at a time, in the order of the keys: no second copy of all rows, and batches cannot matter.
            pooled = torch.cat([part[:, layer] for part in rows])[order]
            spectrum = singular_values(pooled)
            fit = contraction(spectrum, pooled.shape[0], pooled.shape[1], window=self.config.spinal.window)
            if fit.reason is not None:
                for name in ("contraction", "contraction_r2", "contraction_stderr"):
                    why[f"{name}.{layer}"] = fit.reason
            floor.append(below_rounding_floor(spectrum, epsilon))
            fits.append(fit)
        for layer in np.flatnonzero(~np.isfinite(distances).all(axis=0)).tolist():
            why[f"transport.{layer}"] = f"the logit lens at layer {layer} or {layer + 1} is not finite on some rows"
        return (
            DepthTrace(
                contraction=[fit.alpha for fit in fits],
                contraction_r2=[fit.r2 for fit in fits],
                contraction_stderr=[fit.stderr for fit in fits],
                transport=floats(distances.mean(axis=0)) if len(distances) else [math.nan] * distances.shape[1],
                singular_values=[int(fit.n) for fit in fits],
                below_rounding_floor=[int(count) for count in floor],
            ),
            why,
        )

    def spinal(self, policy: DepthTrace, reference: DepthTrace) -> Spinal:
        """METHODS §5, from the depth traces of both models."""
        config = self.config.spinal
        layers = self.found.num_layers
        terminal = spinal_measures.terminal_layers(layers, config.terminal_fraction)
        ours = (np.array(policy.contraction), np.array(policy.transport))
        theirs = (np.array(reference.contraction), np.array(reference.transport))
        delta, delta_reason = spinal_measures.delta_align(ours[0], theirs[0], ours[1], theirs[1], terminal)
        coherence, reason = spinal_measures.coherence(*ours, *theirs, terminal)
        own_coherence, own_reason = spinal_measures.coherence(*theirs, *theirs, terminal)
        for name, why in (
            ("delta_align", delta_reason),
            ("coherence", reason),
            ("reference_coherence", own_reason),
        ):
            if why is not None:
                self.reasons[f"spinal.{name}"] = why
        if config.gradient_concentration:
            norms = self.found.per_pair["gradient_norm"][self.found.control_pairs]
            concentration = self.mean(spinal_measures.gradient_share(norms, terminal))
        else:
            concentration = Estimate.unknown("switched off (spinal.gradient_concentration)")
        score, why = spinal_measures.spinal_score(delta, coherence, concentration.mean, config.weights)
        if why is not None:
            self.reasons["spinal.score"] = why
        return Spinal(
            policy=policy,
            reference=reference,
            terminal_layers=[int(layer) for layer in terminal],
            rows=int(sum(len(keys) for keys in self.found.row_keys)),
            rows_available=self.found.rows_available,
            delta_align=delta,
            coherence=coherence,
            reference_coherence=own_coherence,
            gradient_concentration=concentration,
            score=score,
        )


def estimate(interval: Interval) -> Estimate:
    """An interval as a record keeps it."""
    return Estimate(
        mean=float(interval.mean), low=float(interval.low), high=float(interval.high), reason=interval.reason
    )


def beyond(ours: Sequence[Estimate], chance: Sequence[Estimate], sign: float) -> list[bool]:
    """Whether each interval lies beyond its counterpart in the direction of ``sign``; False where a bound is unknown."""
    return [
        min(sign * one.low, sign * one.high) > max(sign * other.low, sign * other.high)
        for one, other in zip(ours, chance, strict=True)
    ]


def floats(values: object) -> list[float]:
    """A plain list of floats from any one-dimensional array."""
    return [float(value) for value in np.asarray(values).ravel()]
