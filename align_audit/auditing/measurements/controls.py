"""What turns a number into evidence: the controls that stand beside the patching, each with its verdict (METHODS §2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.localization import Localization
from align_audit.auditing.measurements.low_rank import LowRank
from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons, RecordedBatch, SecondLook
from align_audit.auditing.measurements.patching import Patching, constant, patch_with
from align_audit.auditing.session.accumulators import PerPair, State
from align_audit.auditing.session.estimates import beyond, estimate, no_shift
from align_audit.auditing.session.walk import Session
from align_audit.measures.draws import noise_directions
from align_audit.measures.patching import PatchSummary, noised
from align_audit.measures.significance import split_half_agreement
from align_audit.models.replay import Recording, Stream
from align_audit.probes.batches import PairBatch
from align_audit.ranks import Ranks
from align_audit.record.audit_record import Control
from align_audit.record.audit_record import Controls as ControlsPart


@dataclass
class ControlsState(State):
    """Nats, NaN for pairs that a control is not measured on.

    Attributes:
        reverse: [N, L + 1] m_i(π patched with ρ's stream) − m_i(π); the first for what enters layer 0.
        identity: [N, L] ρ patched with its own stream.
        noise: [N, draws, L] ρ's stream shifted by as much as π's, in a random direction.
    """

    reverse: PerPair
    identity: PerPair
    noise: PerPair


class Controls(Measurement):
    """Noise, reverse and identity are walked beside the patching; the other verdicts are of numbers measured already."""

    name: ClassVar[str | None] = "controls"
    state: ControlsState

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        pairs, layers, config = len(self.session.pairs), self.session.num_layers, self.config.patching
        self.enabled = config.enabled
        if self.enabled:
            self.state = ControlsState(
                PerPair(pairs, layers + 1), PerPair(pairs, layers), PerPair(pairs, config.noise_draws, layers)
            )

    @property
    def may_look_again(self) -> bool:
        """Further noise draws are walked in the second pass."""
        return self.enabled and self.config.patching.noise_draws > 1

    # -- what is walked ------------------------------------------------------------------------------------------------

    def policy_streams(self, recorded: RecordedBatch) -> Iterator[Stream]:
        """``reference_into_policy``: π's stream with ρ's at the patched positions."""
        config = self.config.patching
        if not (self.enabled and config.reverse and self.session.is_control(recorded.batch)):
            return
        mask = recorded.batch.position_mask(config.positions)
        for layer in range(-1 if config.embedding else 0, self.session.num_layers):
            yield Stream(("reverse", layer), layer, patch_with(recorded.policy, recorded.reference, mask, layer))

    def streams(self, recorded: RecordedBatch) -> Iterator[Stream]:
        """One noise direction at every layer; and the identity patches where replaying does not settle them."""
        if not self.enabled or recorded.unpatched is None:
            return
        batch, config = recorded.batch, self.config.patching
        if config.noise_draws and self.session.is_control(batch):
            for layer in range(self.session.num_layers):
                make = noise_with(self.session, batch, recorded.policy, recorded.reference, layer, 0)
                yield Stream(("noise", 0, layer), layer, make)
        if self.session.is_exact(batch):
            # Where a recording replays to itself, patching it with itself cannot change anything.
            for layer in range(self.session.num_layers):
                self.state.identity.put(batch, torch.zeros_like(recorded.unpatched.margins), layer)
            for layer in recorded.unpatched.strays or []:
                yield Stream(("identity", layer), layer, constant(recorded.reference.after(layer)))

    def store(self, key: Hashable, recorded: RecordedBatch, effect: torch.Tensor) -> None:
        """``reverse`` begins with what enters layer 0."""
        assert isinstance(key, tuple)
        kind, *where = key
        if kind == "reverse":
            self.state.reverse.put(recorded.batch, effect, where[0] + 1)
        elif kind == "noise":
            self.state.noise.put(recorded.batch, effect, *where)
        else:
            self.state.identity.put(recorded.batch, effect, *where)

    def second_looks(self) -> Sequence[SecondLook]:
        """Further noise draws at the layer whose verdict they decide."""
        summary, draws = self.task[Patching].summary, self.config.patching.noise_draws
        if summary is None or summary.peak_layer is None or draws < 2:
            return ()
        return (MoreNoise(self.session, self.state.noise, summary.peak_layer),)

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def part(self) -> tuple[ControlsPart, Reasons]:
        """METHODS §2, each with verdict and reason."""
        permuted = _permuted_targets(self.task, 1 - self.estimates.confidence)
        summary, session = self.task[Patching].summary, self.session
        if summary is None:
            off = Control(verdict="not_run", reason="patching is switched off (patching.enabled)")
            return ControlsPart(
                noise=off, reverse=off, identity=off, random_subspace=off, split_half=off, permuted_targets=permuted
            ), {}
        pairs = {"pairs": len(session.control_pairs)}
        return ControlsPart(
            noise=self._noise(summary).model_copy(update=pairs),
            reverse=self._reverse(summary).model_copy(update=pairs),
            identity=self._identity().model_copy(update={"pairs": len(session.exact_pairs)}),
            random_subspace=self._random_subspace(summary).model_copy(update=pairs),
            split_half=self._split_half(summary).model_copy(update={"pairs": len(session.exact_pairs)}),
            permuted_targets=permuted,
        ), {}

    def _no_shift(self) -> str | None:
        return no_shift(self.task[Behaviour].mean_shift)

    def _noise(self, summary: PatchSummary) -> Control:
        draws = self.state.noise.values[self.session.control_pairs]
        if draws.shape[1] == 0:
            return Control(verdict="not_run", reason="no noise draws were asked for (patching.noise_draws)")
        # One direction at every layer, and all of them at the layer that the verdict is of.
        layers = range(draws.shape[2])
        by_layer = [draws[:, : None if layer == summary.peak_layer else 1, layer].mean(axis=1) for layer in layers]
        effect = self.session.control_estimates.means(np.stack(by_layer, axis=1))
        reason = self._no_shift()
        if reason is not None:
            return Control(verdict="not_run", reason=reason, effect=effect)
        if summary.peak_layer is None:
            return Control(verdict="not_run", reason=summary.peak_reason or "no peak layer", effect=effect)
        real, noise = estimate(summary.effect[summary.peak_layer]), effect[summary.peak_layer]
        words = f"[{real.low:.3g}, {real.high:.3g}] against [{noise.low:.3g}, {noise.high:.3g}] nats of noise"
        if math.isnan(real.low) or math.isnan(noise.low):
            return Control(verdict="not_run", reason=real.reason or noise.reason, effect=effect)
        passed = beyond([real], [noise], self.task[Patching].direction)[0]
        return Control(
            verdict="passed" if passed else "failed",
            reason=f"at the peak layer {summary.peak_layer} the effect's interval lies "
            + ("beyond" if passed else "not beyond")
            + f" the noise's: {words}"
            + ("" if passed else "; a random shift of this length does as much"),
            effect=effect,
        )

    def _reverse(self, summary: PatchSummary) -> Control:
        """Over the pairs of the controls alone, so that both directions are known of the same ones.

        Passed when at every layer whose patch moves the margin along the shift, with its whole interval, putting the
        reference's stream back moves it against the shift, with its whole interval.
        """
        if not self.config.patching.reverse:
            return Control(verdict="not_run", reason="switched off (patching.reverse)")
        session, along = self.session, self.task[Patching].direction
        values = self.state.reverse.values[session.control_pairs, 1:]
        effect = session.control_estimates.means(values)
        no_shift = self._no_shift()
        if no_shift is not None:
            return Control(verdict="not_run", reason=no_shift, effect=effect)
        patched = session.control_estimates.means(
            along * self.task[Patching].state.effect.values[session.control_pairs, 1:]
        )
        moved = [layer for layer, real in enumerate(patched) if real.low > 0.0]
        if not moved:
            reason = patched[0].reason or (
                "no layer's patch moves the margin in the direction of the shift beyond its interval"
            )
            return Control(verdict="not_run", reason=reason, effect=effect)
        back = session.control_estimates.means(-along * values)
        unknown = next((back[layer].reason for layer in moved if math.isnan(back[layer].low)), None)
        if unknown is not None:
            return Control(verdict="not_run", reason=unknown, effect=effect)
        kept = [layer for layer in moved if not back[layer].low > 0.0]
        if kept:
            reason = (
                f"putting the reference's stream back does not take the effect away at layers {kept}, by its interval"
            )
            return Control(verdict="failed", reason=reason, effect=effect)
        reason = f"the reference's stream takes the effect away at all {len(moved)} layers whose patch moves the margin"
        return Control(verdict="passed", reason=reason, effect=effect)

    def _identity(self) -> Control:
        values = self.state.identity.values[self.session.exact_pairs]
        effect = self.session.exact_estimates.means(values)
        off = [layer for layer in range(values.shape[1]) if np.any(values[:, layer] != 0.0)]
        if not np.isfinite(values).all():
            return Control(verdict="failed", reason="the reference's own margins are not finite", effect=effect)
        if off:
            largest = float(np.abs(values).max())
            reason = f"the reference patched with its own stream moves by up to {largest:.3g} nats at layers {off}"
            return Control(verdict="failed", reason=reason, effect=effect)
        return Control(
            verdict="passed",
            reason="the reference patched with its own stream moves by exactly 0 (computed again layer by layer: at every "
            "layer on the first batch, at one on each other batch)",
            effect=effect,
        )

    def _random_subspace(self, summary: PatchSummary) -> Control:
        findings = self.task[LowRank].effects if LowRank in self.task else None
        if findings is None or not findings.random:
            return Control(verdict="not_run", reason="no random subspaces were patched (low_rank)")
        layers = [layer for _, layer in findings.random]
        peak = summary.peak_layer if summary.peak_layer in layers else layers[0]
        if ("shift", peak) not in findings.fitted:
            return Control(verdict="not_run", reason="the shift basis was not fitted (low_rank.bases)")
        effect = self.session.control_estimates.means(
            findings.random["shift", peak][self.session.control_pairs].mean(axis=-1)
        )
        reason = self._no_shift()
        if reason is not None:
            return Control(verdict="not_run", reason=reason, effect=effect)
        fitted = self.session.exact_estimates.means(findings.fitted["shift", peak][self.session.exact_pairs])
        spanned = findings.ranks[: findings.spanned["shift", peak]]
        if not spanned:
            dimensions = findings.dimensions["shift", peak]
            reason = f"at layer {peak} a half of the pairs spans {dimensions} dimensions, fewer than each of {findings.ranks}"
            return Control(verdict="not_run", reason=reason, effect=effect)
        more = beyond(fitted, effect, math.copysign(1.0, summary.effect[peak].mean))
        # The whole space is no subspace: what random directions of it do is all there is to do.
        tested = [rank for rank in spanned if rank < self.session.width]
        if not tested:
            reason = (
                f"at layer {peak} the one rank of {spanned} is the model's whole width, which has no other subspace"
            )
            return Control(verdict="not_run", reason=reason, effect=effect)
        compared = [each for both in zip(fitted[: len(tested)], effect, strict=False) for each in both]
        unknown = next((each.reason for each in compared if math.isnan(each.low)), None)
        if unknown is not None:
            return Control(verdict="not_run", reason=unknown, effect=effect)
        losing = [rank for rank, does in zip(tested, more, strict=False) if not does]
        if losing:
            reason = f"at layer {peak} random subspaces of rank {losing} do as well as the fitted one"
            return Control(verdict="failed", reason=reason, effect=effect)
        reason = f"at layer {peak} the fitted subspace beats random ones at every rank of {tested}"
        return Control(verdict="passed", reason=reason, effect=effect)

    def _split_half(self, summary: PatchSummary) -> Control:
        config = self.config.patching
        reason = self._no_shift()
        if reason is not None:
            return Control(verdict="not_run", reason=reason)
        if not config.transplants:
            return Control(verdict="not_run", reason="block transplants are switched off (patching.transplants)")
        if summary.peak_layer is None:
            return Control(verdict="not_run", reason=summary.peak_reason or "no peak layer")
        transplants = self.task[Patching].state.transplant.values[self.session.exact_pairs, 1:-1]
        agreement, why = split_half_agreement(
            self.task[Patching].direction * transplants,
            config.split_half_repeats,
            self.estimates.seed,
            self.session.exact_estimates.groups,
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


def _permuted_targets(task: AuditTask, level: float) -> Control:
    """The LASSO of the true targets against that of permuted ones (METHODS §3): a permutation test of its CV score."""
    localization, reasons = task[Localization].part()
    if localization is None:
        return Control(verdict="not_run", reason=reasons[""])
    null = np.array(localization.null_cv_r2)
    if not (math.isfinite(localization.cv_r2) and np.isfinite(null).all()):
        return Control(verdict="not_run", reason=reasons.get("cv_r2", "the fit is not known"))
    p = (1 + int((null >= localization.cv_r2).sum())) / (1 + len(null))
    words = (
        f"cross-validated R² {localization.cv_r2:.2f} against at most {null.max():.2f} of {len(null)} permutations "
        f"(p = {p:.2g})"
    )
    if 1 / (1 + len(null)) > level:
        reason = f"{len(null)} permutations cannot show p ≤ {level:.2g} (localization.permutations): {words}"
        return Control(verdict="not_run", reason=reason, value=p)
    if p <= level:
        return Control(verdict="passed", reason=f"the layers' shifts predict the target: {words}", value=p)
    reason = f"the layers' shifts predict the target no better than a permuted one: {words}"
    return Control(verdict="failed", reason=reason, value=p)


class MoreNoise:
    """Further noise draws at one layer, on the pairs of the controls.

    Args:
        noise: [N, draws, L], where their effects are kept.
    """

    def __init__(self, session: Session, noise: PerPair, layer: int) -> None:
        self.session = session
        self.layers = {layer}
        self._noise = noise

    def streams(self, batch: PairBatch, policy: Recording, reference: Recording) -> Iterator[Stream]:
        """All draws but the first."""
        if not self.session.is_control(batch):
            return
        for layer in self.layers:
            for draw in range(1, self._noise.values.shape[1]):
                make = noise_with(self.session, batch, policy, reference, layer, draw)
                yield Stream((draw, layer), layer, make)

    def store(self, key: Any, places: np.ndarray, effect: np.ndarray) -> None:
        """Keep the effects [B], nats, of the pairs at ``places``."""
        self._noise.put_at(places, effect, *key)

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Take over what other processes have kept of their pairs."""
        self._noise.merge(ranks, places)


def noise_with(
    session: Session, batch: PairBatch, policy: Recording, reference: Recording, layer: int, draw: int
) -> Callable[[], torch.Tensor]:
    """ρ's stream with a random shift of π's length, the same direction wherever the same token stands (METHODS §2)."""

    def make() -> torch.Tensor:
        base = reference.after(layer)
        pairs = [session.pairs[int(i)].identity for i in batch.pair_index]
        longest = int(batch.place.max()) + 1
        directions = noise_directions(session.config.seed, pairs, layer, draw, longest, base.shape[2]).to(base.device)
        mask = batch.position_mask(session.config.patching.positions)
        return noised(base, policy.after(layer), mask, directions[batch.row_pair[:, None], batch.place])

    return make
