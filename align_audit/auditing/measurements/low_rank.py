"""Low-rank reconstruction at the layers that matter (METHODS §4; arXiv 2510.16167 §4.3).

The token rows are gathered in the first pass where the layers are named beforehand, else in one more (no further up than
the highest of the layers). The subspaces are patched in the second pass, on the same pairs, cross-fit by halves, or on those
of another probe set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons, RecordedBatch, SecondLook
from align_audit.auditing.measurements.patching import Patching
from align_audit.auditing.measurements.subspaces import (
    NO_HALVES,
    Fit,
    LowRankEffects,
    Reconstruction,
    TokenGrams,
    beyond_the_rows,
)
from align_audit.auditing.previous import Subspaces
from align_audit.auditing.session.estimates import estimate, floats
from align_audit.auditing.session.walk import Session
from align_audit.errors import ConfigurationError
from align_audit.measures.patching import PatchSummary
from align_audit.measures.subspace import (
    principal_angles,
    rank_95,
    rank_95_interval,
)
from align_audit.ranks import Ranks
from align_audit.record.audit_record import LowRankCurve
from align_audit.record.estimate import Estimate


class LowRank(Measurement):
    """Subspaces of the policy's shift (and of its activations) at the layers asked for, patched back rank by rank.

    Attributes:
        effects: per pair, once there are subspaces; None where there is nothing to reconstruct.
    """

    name: ClassVar[str | None] = "low_rank"

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        self.enabled = self.config.low_rank.enabled and self.config.patching.enabled
        self.effects: LowRankEffects | None = None
        self._look: Reconstruction | None = None
        self._nothing = "switched off (low_rank.enabled, patching.enabled)"
        self.grams = self._grams_beforehand() if self.enabled else None

    def _grams_beforehand(self) -> TokenGrams | None:
        """What the first pass gathers; None where the layers are not known yet, or where beside all else that it holds
        there is no room: in a pass of their own there may be."""
        layers = named_layers(self.session)
        if not layers or self.session.estimates.independent < 2:
            return None
        grams = TokenGrams(self.session, layers)
        return grams if self.session.has_room(grams.bytes) else None

    @property
    def batches(self) -> int:
        """One pass, where the token rows are not gathered in the first."""
        return len(self.session.plan) if self.enabled and self.grams is None else 0

    @property
    def may_look_again(self) -> bool:
        """The subspaces are patched in the second pass."""
        return self.enabled

    @property
    def spanned(self) -> Subspaces:
        """Subspaces to measure the next audit's principal angles from: these, or the previous ones where there are none."""
        return self.task.request.previous.subspaces if self.effects is None else dict(self.effects.bases)

    def commit(self, recorded: RecordedBatch) -> None:
        """Add the batch's token rows."""
        if self.grams is not None:
            self.grams.update(recorded.batch, recorded.policy, recorded.reference)

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """The sums over all pairs, where they are gathered in the first pass."""
        if self.grams is not None:
            self.grams.merge(ranks, places)

    def look_closer(self, tick: Callable[[], None]) -> None:
        """Choose the layers, gather their token rows where that is not done yet, and fit."""
        summary = self.task[Patching].summary
        if not self.enabled or summary is None:
            return
        if self.session.estimates.independent < 2:
            self._nothing = NO_HALVES
            return
        layers = layers_to_reconstruct(self.session, summary)
        if not layers:
            self._nothing = f"no layer to reconstruct: {summary.peak_reason}"
            return
        if self.grams is None:
            self.grams = TokenGrams(self.session, layers)
            self.grams.gather(tick)
        self._look = Reconstruction(self.session, Fit(self.grams))
        self.effects = self._look.effects

    def second_looks(self) -> Sequence[SecondLook]:
        """The subspaces' patches, and random ones'."""
        return () if self._look is None else (self._look,)

    def part(self) -> tuple[dict[str, dict[int, LowRankCurve]], Reasons]:
        """METHODS §4: by basis and layer; empty, with a reason, where there is nothing to reconstruct."""
        if self.effects is None:
            return {}, {"": self._nothing}
        reasons = {f"{basis}.{layer}": reason for (basis, layer), reason in self.effects.skipped.items()}
        curves: dict[str, dict[int, LowRankCurve]] = {}
        for basis, layer in self.effects.fitted:
            curves.setdefault(basis, {})[layer], why = self._curve(basis, layer, self.effects)
            reasons |= {f"{basis}.{layer}.{path}": reason for path, reason in why.items()}
        return curves, reasons

    def _curve(self, basis: str, layer: int, effects: LowRankEffects) -> tuple[LowRankCurve, Reasons]:
        exact, estimates, reasons = self.session.exact_pairs, self.session.exact_estimates, {}
        full, fitted = self.task[Patching].effect(layer)[exact], effects.fitted[basis, layer][exact]
        spanned = effects.spanned[basis, layer]
        beyond = beyond_the_rows("the token rows of a half of the pairs", effects.dimensions[basis, layer])
        fractions = [estimate(interval) for interval in estimates.fractions(fitted[:, :spanned], full)]
        ranks, unknown = effects.ranks[:spanned], [Estimate.unknown(beyond)] * (len(effects.ranks) - spanned)
        if unknown:
            reasons["explained_variance_ratio"] = beyond
        least, low, high = math.nan, math.nan, math.nan
        why: str | None = beyond
        if ranks:
            least, why = rank_95(ranks, [fraction.mean for fraction in fractions])
            why = why and (fractions[-1].reason or why)
            if not math.isnan(fractions[-1].mean):
                low, high = rank_95_interval(
                    ranks, fitted[:, :spanned], full, estimates.resamples, estimates.confidence, estimates.seed,
                    groups=estimates.groups,
                )  # fmt: skip
        if why is not None:
            reasons["rank_95"] = why
        for bound, value in (("low", low), ("high", high)):
            if math.isnan(value):
                reasons[f"rank_95_{bound}"] = (fractions[-1].reason if ranks else beyond) or (
                    "an effect is not finite, or there are too few independent pairs"
                )
        return LowRankCurve(
            ranks=effects.ranks,
            effect_fraction=fractions + unknown,
            explained_variance_ratio=floats(effects.explained[basis, layer]),
            rank_95=least,
            rank_95_low=low,
            rank_95_high=high,
            full_effect=estimates.mean(full),
            principal_angles=self._angles(effects.bases[basis, layer], basis, layer),
        ), reasons

    def _angles(self, basis: np.ndarray, name: str, layer: int) -> list[float] | None:
        """To the previous audit's subspace of the same layer and basis, radians ascending."""
        previous = self.task.request.previous.subspaces.get((name, layer))
        if previous is None:
            return None
        width = min(basis.shape[1], previous.shape[1])
        return floats(principal_angles(torch.from_numpy(basis[:, :width]), torch.from_numpy(previous[:, :width])))

    def arrays(self) -> dict[str, np.ndarray]:
        """Each subspace basis, and the effects per pair (of random subspaces their mean over the draws)."""
        effects = self.effects
        if effects is None:
            return {}
        return {
            **{f"subspace.{basis}.{layer}": values for (basis, layer), values in effects.bases.items()},
            **{f"per_pair.low_rank.{basis}.{layer}": values for (basis, layer), values in effects.fitted.items()},
            **{
                f"per_pair.low_rank.random.{layer}": values.mean(axis=-1)
                for (_, layer), values in effects.random.items()
            },
        }


def layers_to_reconstruct(session: Session, summary: PatchSummary) -> list[int]:
    """The layers asked for (``low_rank.layers``), ascending; none where ``auto`` finds none that stands out.

    Raises:
        ConfigurationError: the model has no such layer.
    """
    named = named_layers(session)
    if named is not None:
        return named
    chosen = (summary.peak_layer, _largest([gain.mean for gain in summary.layer_gain]))
    return sorted({layer for layer in chosen if layer is not None})


def named_layers(session: Session) -> list[int] | None:
    """The layers asked for, ascending; None where they are for the audit to find (``auto``).

    Raises:
        ConfigurationError: the model has no such layer.
    """
    layers = session.config.low_rank.layers
    if layers == "auto":
        return None
    if layers == "all":
        return list(range(session.num_layers))
    outside = [layer for layer in sorted(set(layers)) if not 0 <= layer < session.num_layers]
    if outside:
        raise ConfigurationError(f"low_rank.layers names {outside}; the model has layers 0 to {session.num_layers - 1}")
    return sorted(set(layers))


def _largest(values: list[float]) -> int | None:
    return int(np.argmax(values)) if np.isfinite(values).all() else None
