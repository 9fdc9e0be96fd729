"""Which pairs are patched, and at which layers: all of them, a number that was asked for, or as many as an interval needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from align_audit.measures.control_variate import MINIMUM_EXACT, exact_pairs_needed_safely, subset_order

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.record import Attribution

_STEP = 8
"""Where the number of pairs is chosen, it goes in steps of so many: pairs that are patched at the same layers go together,
and which ones those are must not change with every audit, or what is kept of the reference would be of no use."""


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

    def roles(self) -> np.ndarray:
        """[N] of each place: pairs of one role are treated alike. 0 is that of the control pairs."""
        found = np.empty(len(self.order), dtype=int)
        found[self.order] = np.searchsorted((self.controls, *self.steps), np.arange(len(self.order)), side="right")
        return found

    def layers_of(self) -> list[list[int]]:
        """[N] of each place: the layers, −1 for what enters layer 0, that it is patched at."""
        found: list[list[int]] = [[] for _ in self.order]
        for rank, place in enumerate(self.order.tolist()):
            found[place] = [layer - 1 for layer in np.flatnonzero(self.by_layer > rank).tolist()]
        return found


def choose_pairs(
    identities: Sequence[int], layers: int, config: AuditConfig, before: Attribution | None = None
) -> PairChoice:
    """``patching.exact_pairs``, for these pairs.

    With "auto", a layer patches as many pairs as give, corrected by the others' attribution, the interval of
    ``patching.equivalent_pairs`` plain ones: from how well attribution explained the patched effects at that layer in the
    audit before, at the lower 90 % bound of that. Never fewer than ``control_pairs``, or than slopes need. Where there is no
    audit before, or attribution had nothing to explain, ``equivalent_pairs`` are patched.

    Args:
        identities: of the N pairs, such as their index in the data set.
        layers: L.
        before: what the audit before said of attribution on these pairs.
    """
    patching, pairs = config.patching, len(identities)
    order = subset_order(identities, config.seed)
    if patching.exact_pairs != "auto":
        exact = min(patching.exact_pairs or pairs, pairs)
        return PairChoice(order, np.full(layers + 1, exact), min(exact, patching.control_pairs), (exact,))
    least = min(pairs, max(patching.control_pairs, MINIMUM_EXACT + 2 * len(patching.attribution_points)))
    steps = (*range(least, pairs, _STEP), pairs)
    needed = [_needed(layer, pairs, patching.equivalent_pairs, before) for layer in range(layers)]
    chosen = [next(step for step in steps if step >= count) for count in needed]
    # What enters layer 0 has no curve of its own, only a gain, which is of the pairs patched everywhere.
    return PairChoice(order, np.array([least, *chosen]), min(least, patching.control_pairs), steps)


def _needed(layer: int, pairs: int, equivalent: int, before: Attribution | None) -> int:
    if before is None or layer >= len(before.joint_correlation):
        return min(pairs, equivalent)
    pilot = before.patched_pairs[layer] if before.patched_pairs else before.exact_pairs  # not in older records
    correlation, slopes = before.joint_correlation[layer], len(before.points) + 1
    if math.isnan(correlation) or pilot <= slopes + 1:
        return min(pairs, equivalent)
    # Fitted slopes explain some of anything.
    explained = 1 - (1 - correlation**2) * (pilot - 1) / (pilot - 1 - slopes)
    return exact_pairs_needed_safely(math.sqrt(max(explained, 0.0)), pilot, pairs, equivalent)
