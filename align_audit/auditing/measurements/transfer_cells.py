"""From effects of one set's subspaces on another set's pairs to the cells of a transfer matrix (METHODS §4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.measurement import AuditTask
from align_audit.auditing.measurements.patching import Patching
from align_audit.auditing.measurements.subspaces import NO_HALVES, Fit, Key, Reconstruction, beyond_the_rows
from align_audit.auditing.session.estimates import Estimates, beyond, estimate, floats
from align_audit.auditing.session.walk import Session
from align_audit.measures.subspace import explained_variance_ratio, principal_angles, rank_95
from align_audit.probes.pairs import ProbePair
from align_audit.record.audit_record import Control
from align_audit.record.estimate import Estimate
from align_audit.record.transfer_record import RandomSubspaces, SubspaceAngles, TransferCell

EXCLUDED = -1
"""In place of a span: the fitted set holds the pair's sequences in both of its halves, so no subspace is held out."""
HELD_OUT = 2
"""The span fitted on all pairs of a set."""


@dataclass
class ProbeSide:
    """One probe set of a transfer: what was measured on it and what was fitted on it."""

    name: str
    task: AuditTask
    fit: Fit | None = None

    @property
    def session(self) -> Session:
        """Both models over the set's pairs."""
        return self.task.session

    @property
    def estimates(self) -> Estimates:
        """How the set's intervals are made."""
        return self.task.session.estimates

    @property
    def behaviour(self) -> Behaviour:
        """Margins of the set's pairs."""
        return self.task[Behaviour]

    def effect(self, layer: int) -> np.ndarray:
        """[N] effects of the full patch after ``layer``, nats."""
        return self.task[Patching].effect(layer)

    @property
    def fitted(self) -> Fit:
        """The fit, once there is one."""
        assert self.fit is not None
        return self.fit


def held_out_spans(pairs: Sequence[ProbePair], fitted_on: Sequence[ProbePair], halves: np.ndarray) -> np.ndarray:
    """[N] which span of a fit each of ``pairs`` may be patched with, without having been part of it.

    A pair occurs in the fitted set when that holds its prompt or one of its two sequences, token for token: rows of it are
    then among those the subspace was made of, also where chosen and rejected are swapped.

    Args:
        halves: [M] booleans, the half each of ``fitted_on`` is in.

    Returns:
        ``HELD_OUT`` for a pair that does not occur there; 0 or 1, its half, where it occurs in one of them (the span of that
        index is fitted on the other half); ``EXCLUDED`` where it occurs in both.

    Example:
        >>> one, two = ProbePair(0, (1, 1, 2), (1, 1, 3), 2, 2), ProbePair(1, (1, 4, 4), (1, 4, 5), 2, 2)
        >>> new = ProbePair(0, (1, 6, 6), (1, 6, 7), 2, 2)
        >>> held_out_spans([one, two, new], [one, two], np.array([False, True])).tolist()
        [0, 1, 2]
    """
    where: dict[object, set[int]] = {}
    for pair, half in zip(fitted_on, halves.tolist(), strict=True):
        for content in (pair.group, pair.chosen_ids, pair.rejected_ids):
            where.setdefault(content, set()).add(int(half))
    spans = np.full(len(pairs), HELD_OUT)
    for place, pair in enumerate(pairs):
        met = set().union(*(where.get(content, ()) for content in (pair.group, pair.chosen_ids, pair.rejected_ids)))
        if met:
            # A set of one group has no other half to fit on.
            spans[place] = next(iter(met)) if len(met) == 1 and not halves.all() else EXCLUDED
    return spans


def _dimensions(fitted: ProbeSide, spans: np.ndarray, key: Key) -> int:
    """How many dimensions the rows span, at least, that the ``spans`` in use were fitted on."""
    return min(fitted.fitted.rank(key, span) for span in np.unique(spans).tolist())


class Cells:
    """Turns effects into cells; ``reasons`` fills with why a number is NaN (dotted path → reason)."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons

    def random(self, side: ProbeSide, key: Key, on_itself: Reconstruction) -> RandomSubspaces | None:
        """What random subspaces do to a set's own pairs; None where none were patched."""
        if key not in on_itself.effects.random:
            return None
        places = side.session.control_pairs
        effects = on_itself.effects.random[key][places].mean(axis=-1)
        full = side.effect(key[1])[places]
        return RandomSubspaces(
            effect=side.session.control_estimates.means(effects),
            effect_fraction=[
                estimate(interval) for interval in side.session.control_estimates.fractions(effects, full)
            ],
            pairs=len(places),
        )

    def cell(
        self,
        fitted: ProbeSide,
        patched: ProbeSide,
        which: np.ndarray,
        look: Reconstruction | None,
        key: Key,
        random: RandomSubspaces | None,
    ) -> TransferCell:
        """One cell.

        Args:
            which: [N] as :func:`held_out_spans`, of all of the patched set's pairs.
            look: holds the effects; None where nothing was patched.
        """
        path = f"cells.{key[0]}.{key[1]}.{fitted.name}.{patched.name}"
        itself, exact = fitted is patched, patched.session.exact_pairs
        places = exact if itself else exact[which[exact] != EXCLUDED]
        counts = {
            "pairs": len(places),
            "cross_fitted": len(places) if itself else int((which[places] != HELD_OUT).sum()),
            "excluded": len(exact) - len(places),
        }
        why = fitted.fitted.skipped.get(key)
        if itself and fitted.session.estimates.independent < 2:
            why = NO_HALVES
        elif not len(places):
            why = f"every pair of {patched.name!r} occurs in {fitted.name!r}, and no half of that is free of it"
        if why is None and look is not None:
            return TransferCell(**self._measured(fitted, patched, which, places, look, key, random, path), **counts)
        why = why or "nothing was patched"
        self.reasons[path] = why
        ranks, full = fitted.fitted.ranks, patched.effect(key[1])[places]
        return TransferCell(
            effect_fraction=[Estimate.unknown(why)] * len(ranks),
            explained_variance_ratio=[math.nan] * len(ranks),
            rank_95=math.nan,
            full_effect=patched.estimates.over(places).mean(full) if len(places) else Estimate.unknown(why),
            beats_random=[None] * len(ranks),
            control=Control(verdict="not_run", reason=why, pairs=len(places)),
            **counts,
        )

    def _measured(
        self,
        fitted: ProbeSide,
        patched: ProbeSide,
        which: np.ndarray,
        places: np.ndarray,
        look: Reconstruction,
        key: Key,
        random: RandomSubspaces | None,
        path: str,
    ) -> dict[str, Any]:
        """What a cell says of the pairs at ``places``, all but how many they are."""
        ranks, estimates = fitted.fitted.ranks, patched.estimates.over(places)
        effects, full = look.effects.fitted[key][places], patched.effect(key[1])[places]
        if fitted is patched:
            dimensions, explained = fitted.fitted.dimensions[key], floats(look.effects.explained[key])
        else:
            dimensions = _dimensions(fitted, which[places], key)
            explained = self._explained(fitted, patched, which, key, path)
        spanned = sum(rank <= dimensions for rank in ranks)
        arbitrary = beyond_the_rows(f"the token rows of {fitted.name!r}", dimensions)
        if spanned < len(ranks):
            self.reasons.setdefault(f"{path}.explained_variance_ratio", arbitrary)
        fractions = [estimate(interval) for interval in estimates.fractions(effects[:, :spanned], full)]
        least = math.nan
        reason: str | None = arbitrary
        if spanned:
            least, why = rank_95(ranks[:spanned], [fraction.mean for fraction in fractions])
            reason = why and (fractions[-1].reason or why)
        if reason is not None:
            self.reasons[f"{path}.rank_95"] = reason
        full_effect = estimates.mean(full)
        does = estimates.means(effects[:, :spanned])
        beats, control = self._control(fitted, patched, ranks[:spanned], does, full_effect, random)
        unspanned = len(ranks) - spanned
        return {
            "effect_fraction": fractions + [Estimate.unknown(arbitrary)] * unspanned,
            "explained_variance_ratio": explained[:spanned] + [math.nan] * unspanned,
            "rank_95": least,
            "full_effect": full_effect,
            "beats_random": beats + [None] * unspanned,
            "control": control.model_copy(update={"pairs": None if random is None else random.pairs}),
        }

    def _explained(self, fitted: ProbeSide, patched: ProbeSide, which: np.ndarray, key: Key, path: str) -> list[float]:
        """Of the whole basis on all rows of the patched set, which is held out only where no pair is in both sets."""
        ranks = fitted.fitted.ranks
        shared = int((which != HELD_OUT).sum())
        first, second = patched.fitted.grams[key]
        if shared:
            self.reasons[f"{path}.explained_variance_ratio"] = (
                f"{shared} of {len(which)} pairs of {patched.name!r} are in {fitted.name!r} too: those rows are not held out"
            )
            return [math.nan] * len(ranks)
        shares = explained_variance_ratio(first + second, fitted.fitted.spans[key][HELD_OUT], ranks)
        if any(math.isnan(share) for share in shares):
            self.reasons[f"{path}.explained_variance_ratio"] = (
                f"the rows of {patched.name!r} at layer {key[1]} are all zero, or not finite"
            )
        return shares

    def _control(
        self,
        fitted: ProbeSide,
        patched: ProbeSide,
        ranks: Sequence[int],
        effects: Sequence[Estimate],
        full: Estimate,
        random: RandomSubspaces | None,
    ) -> tuple[list[bool | None], Control]:
        """Does the fitted subspace do more than random ones of its rank? For each rank, and in one verdict."""
        unknown: list[bool | None] = [None] * len(ranks)
        if random is None:
            return unknown, Control(
                verdict="not_run", reason="no random subspaces were patched (low_rank.random_draws)"
            )
        if math.isnan(full.low) or full.low <= 0.0 <= full.high:
            why = full.reason or f"[{full.low:.3g}, {full.high:.3g}] nats, includes 0"
            reason = f"the interval of the full patch's effect on {patched.name!r}: {why}"
            return unknown, Control(verdict="not_run", reason=reason)
        sign = math.copysign(1.0, full.mean)
        does_more = beyond(effects, random.effect[: len(ranks)], sign)
        # The whole space is no subspace: what random directions of it do is all there is to do.
        tested = [rank for rank in ranks if rank < fitted.session.width]
        both = [each for pair in zip(effects[: len(tested)], random.effect, strict=False) for each in pair]
        not_known = [each.reason for each in both if math.isnan(each.low)]
        if not_known:
            return unknown, Control(verdict="not_run", reason=not_known[0])
        losing = [rank for rank, more in zip(tested, does_more, strict=False) if not more]
        what = f"the subspace of {fitted.name!r}"
        beats: list[bool | None] = [*does_more[: len(tested)], *unknown[len(tested) :]]
        if losing:
            reason = f"on {patched.name!r} random subspaces of rank {losing} do as well as {what}"
            return beats, Control(verdict="failed", reason=reason)
        reason = f"on {patched.name!r} {what} does more than random ones at every rank of {tested}"
        if not tested:
            reason = f"none of the ranks {list(ranks)} is less than the model's width, {fitted.session.width}"
        return beats, Control(verdict="passed" if tested else "not_run", reason=reason)

    def angles(self, left: ProbeSide, right: ProbeSide, key: Key, place: int) -> SubspaceAngles:
        """Between the subspaces that each set's pairs, all of them, give; the ``place``-th two sets."""
        path = f"angles.{key[0]}.{key[1]}.{place}"
        ranks = left.fitted.ranks
        angles = []
        spanned = {side.name: side.fitted.rank(key, HELD_OUT) for side in (left, right)}
        for rank in ranks:
            short = [name for name, dimensions in spanned.items() if dimensions < rank]
            skipped = [side.fitted.skipped[key] for side in (left, right) if key in side.fitted.skipped]
            if skipped or short:
                angles.append([math.nan] * rank)
                self.reasons.setdefault(
                    path,
                    skipped[0]
                    if skipped
                    else f"the rows of {short[0]!r} span {spanned[short[0]]} dimensions, not {rank}",
                )
                continue
            first, second = (side.fitted.spans[key][HELD_OUT][:, :rank] for side in (left, right))
            angles.append(floats(principal_angles(first, second)))
        return SubspaceAngles(between=(left.name, right.name), angles=angles)
