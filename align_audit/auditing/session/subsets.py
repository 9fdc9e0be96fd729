"""Which pairs are patched, and at which layers: all, a number that was asked for, or as many as an interval needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from align_audit.measures.control_variate import ControlVariate
from align_audit.measures.draws import subset_order
from align_audit.measures.exact_pairs import exact_pairs_needed_safely
from align_audit.measures.exact_sample import MINIMUM_EXACT

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.probes.pairs import ProbePair
    from align_audit.record.audit_record import Attribution

_STEP = 8
"""Where the number of pairs is chosen, it goes in steps of so many: pairs that are patched at the same layers go together,
and which ones those are must not change with every audit, or what is kept of the reference would be of no use."""


CONTROL, PATCHED = 0, 1
"""Roles of a pair."""


@dataclass(frozen=True)
class PairChoice:
    """N pairs in an order drawn by hash, of which each layer patches the first so many.

    Attributes:
        order: [N] places of the pairs.
        by_layer: [L + 1] how many of them are patched, the first for what enters layer 0.
        controls: on how many of the first of them controls are measured.
        steps: ascending; pairs between two of these are patched at the same layers.
    """

    order: np.ndarray
    by_layer: np.ndarray
    controls: int
    steps: tuple[int, ...]

    @property
    def everywhere(self) -> np.ndarray:
        """Places of the pairs that are patched at every layer, ascending."""
        return np.sort(self.order[: int(self.by_layer.min())])

    @property
    def control_pairs(self) -> np.ndarray:
        """Places of the pairs that controls are measured on, ascending."""
        return np.sort(self.order[: self.controls])

    @property
    def patched(self) -> np.ndarray:
        """bool [N, L]: which pairs each layer patches."""
        ranks = np.empty(len(self.order), dtype=int)
        ranks[self.order] = np.arange(len(self.order))
        patched: np.ndarray = ranks[:, None] < self.by_layer[None, 1:]
        return patched

    def raised(self, needed: Sequence[int]) -> PairChoice:
        """With ``needed`` pairs or more at each of L layers, up to the next step; nowhere fewer than now."""
        counts = [next(step for step in self.steps if step >= count) for count in needed]
        return replace(self, by_layer=np.maximum(self.by_layer, [0, *counts]))

    def roles(self) -> np.ndarray:
        """[N] of each place: pairs of one role are treated alike. ``CONTROL``; ``PATCHED`` at every layer too; and above that
        those between two steps, at some layers or none."""
        roles = np.empty(len(self.order), dtype=int)
        roles[self.order] = np.searchsorted((self.controls, *self.steps), np.arange(len(self.order)), side="right")
        return roles

    def layers_of(self) -> list[list[int]]:
        """[N] of each place: the layers, −1 for what enters layer 0, that it is patched at."""
        layers: list[list[int]] = [[] for _ in self.order]
        for rank, place in enumerate(self.order.tolist()):
            layers[place] = [layer - 1 for layer in np.flatnonzero(self.by_layer > rank).tolist()]
        return layers


def choose_pairs(
    pairs: Sequence[ProbePair], layers: int, config: AuditConfig, previous: Attribution | None = None
) -> PairChoice:
    """``patching.exact_pairs``, for these pairs; with "auto" where to begin: see :func:`more_pairs`.

    That is ``control_pairs``, or what slopes need if that is more; and at a layer for which the audit before says that more
    will be needed, so many at once.

    Args:
        pairs: N of them.
        layers: L.
        previous: what the audit before said of attribution on these pairs.
    """
    patching, count = config.patching, len(pairs)
    order = subset_order([pair.identity for pair in pairs], config.seed)
    if patching.exact_pairs != "auto":
        exact = min(patching.exact_pairs or count, count)
        return PairChoice(order, np.full(layers + 1, exact), min(exact, patching.control_pairs), (exact,))
    least = min(count, max(patching.control_pairs, MINIMUM_EXACT + 2 * len(patching.attribution_points)))
    # What enters layer 0 has no curve of its own, only a gain, which is of the pairs patched everywhere.
    choice = PairChoice(
        order,
        np.full(layers + 1, least),
        min(least, patching.control_pairs),
        (*range(least, count, _STEP), count),
    )
    if previous is None or len(previous.joint_correlation) != layers:
        return choice
    patched = previous.patched_pairs or [previous.exact_pairs] * layers  # not in older records
    needed = []
    for correlation, pilot in zip(previous.joint_correlation, patched, strict=True):
        slopes = len(previous.points) + 1
        if math.isnan(correlation) or pilot <= slopes + 1:
            needed.append(0)
            continue
        # Fitted slopes explain some of anything.
        explained = 1 - (1 - correlation**2) * (pilot - 1) / (pilot - 1 - slopes)
        needed.append(_needed(explained, pilot, count, patching.equivalent_pairs))
    return choice.raised(needed)


def more_pairs(
    choice: PairChoice, effects: np.ndarray, estimates: Sequence[ControlVariate], equivalent: int
) -> PairChoice:
    """As many pairs as give each layer's effect the interval of ``equivalent`` plain ones, going by those patched so far.

    A layer needs n = (1 − R²) / (1/equivalent − R²/N) pairs, R² the share of the effects' variance that attribution and
    shift explain over the pairs patched so far, at the lower 90 % bound of that. That the same pairs say how many are
    needed, and count among them, biases the estimate by a tenth of a standard error at most
    (``benchmarks/evidence/control_variate.py``).

    Args:
        effects: [N, L], NaN where not patched.
        estimates: of each layer's mean effect.
    """
    pairs = len(effects)
    needed = []
    for column, patched, estimate in zip(effects.T, choice.patched.T, estimates, strict=True):
        measured = column[patched]
        if not len(measured) or (measured == measured[0]).all():
            needed.append(0)  # nothing varies: the interval has no width
        elif estimate.reason is not None:
            needed.append(min(pairs, equivalent))
        else:
            needed.append(_needed(estimate.explained, estimate.exact_pairs, pairs, equivalent))
    return choice.raised(needed)


def _needed(explained: float, pilot: int, pairs: int, equivalent: int) -> int:
    return exact_pairs_needed_safely(math.sqrt(min(max(explained, 0.0), 1.0)), pilot, pairs, equivalent)
