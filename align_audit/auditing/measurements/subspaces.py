"""Subspaces of token rows: gathered, fitted, and patched on pairs (METHODS §4; arXiv 2510.16167 §4.3).

What they are fitted on and patched on may be one probe set, cross-fit by halves, or two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from align_audit.auditing.session.accumulators import merge_by_place
from align_audit.auditing.session.walk import Session
from align_audit.measures.draws import halves, prefix_keys
from align_audit.measures.patching import patched
from align_audit.measures.subspace import (
    Gram,
    GramAccumulator,
    explained_variance_ratio,
    gram_rank,
    random_basis,
    top_basis,
)
from align_audit.models.replay import Recording, Stream
from align_audit.probes.batches import PairBatch
from align_audit.ranks import Ranks

Key = tuple[str, int]
"""Basis name and layer."""

NO_HALVES = "cross-fitting needs two halves: at least 2 independent pairs (those that share a prompt are one), found 1"
"""Why nothing is reconstructed on the pairs that a subspace is fitted on."""


@dataclass
class LowRankEffects:
    """Per-pair effects in nats, float64, in the order of the ``ProbeSet``.

    Attributes:
        ranks: evaluated ranks; those above the model's width are left out.
        fitted: per (basis, layer): [N, K] effect of the rank-k patch, basis fitted on the half the pair is not in; NaN at ranks
            that no half spans.
        random: per (form, layer): [N, K, D] effects of D random subspaces of each pair's own, patched in the form that a
            basis of that name is; NaN for pairs that no control is measured on.
        explained: per (basis, layer): [K] explained variance ratio on held-out halves.
        bases: per (basis, layer): [d, K_max] fitted on all pairs; fewer columns where these span fewer dimensions.
        spanned: per (basis, layer): how many of the ranks the token rows of either half span. Directions of a higher rank are
            arbitrary.
        dimensions: per (basis, layer): how many dimensions the rows of either half span at least.
        skipped: why a (basis, layer) is missing.
    """

    ranks: list[int]
    fitted: dict[Key, np.ndarray] = field(default_factory=dict)
    random: dict[Key, np.ndarray] = field(default_factory=dict)
    explained: dict[Key, list[float]] = field(default_factory=dict)
    bases: dict[Key, np.ndarray] = field(default_factory=dict)
    spanned: dict[Key, int] = field(default_factory=dict)
    dimensions: dict[Key, int] = field(default_factory=dict)
    skipped: dict[Key, str] = field(default_factory=dict)


class TokenGrams:
    """Gram matrices Σ h hᵀ [d, d] of the pooled token rows of each half of a session's pairs, per basis and layer."""

    def __init__(self, session: Session, layers: Sequence[int]) -> None:
        self.session, self.layers = session, list(layers)
        self.halves = halves(session.groups.tolist(), session.config.seed)
        self.distinct = _distinct_rows(session, self.halves)
        width = session.width
        self._sums = {
            (basis, layer): (GramAccumulator(width), GramAccumulator(width))
            for basis in session.config.low_rank.bases
            for layer in layers
        }
        self._counted = {key: np.zeros(len(session.pairs), dtype=bool) for key in self._sums}

    def update(self, batch: PairBatch, policy: Recording, reference: Recording) -> None:
        """Add a batch. Pairs come again after running out of memory; where they were added already they are left out."""
        mask = batch.position_mask(self.session.config.patching.positions)
        places = batch.pair_index.cpu().numpy()
        for key, sums in self._sums.items():
            basis, layer = key
            policy_stream, reference_stream = policy.after(layer), reference.after(layer)
            for half in (False, True):
                new = (self.halves == half) & ~self._counted[key]
                within = mask & _by_row(batch, new)[:, None]
                if not within.any():
                    continue
                rows = policy_stream[within].double()
                if basis == "shift":
                    rows = rows - reference_stream[within].double()
                # A position that stands for both sequences of its pair is two of the pooled rows.
                sums[half].update(rows * batch.copies[within].double().sqrt()[:, None])
                self._counted[key][places[new[places]]] = True

    def gather(self, tick: Callable[[], None] = lambda: None) -> None:
        """A pass of its own over all pairs, no further up than the layers."""
        session, top = self.session, max(self.layers)

        def update(batch: PairBatch) -> Callable[[], None]:
            inputs = batch.model_inputs()
            with session.as_policy() as replay:
                policy = replay.record(inputs, until=top)
            with session.as_reference() as replay:
                reference = replay.record(inputs, until=top)
            session.meter.sample()
            return lambda: self.update(batch, policy, reference)

        session.each_batch(update, tick=tick)
        session.bring_together(self.merge)

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Sums over the pairs of all processes."""
        for key, (first, second) in self._sums.items():
            self._sums[key] = _summed(first, ranks), _summed(second, ranks)

    @property
    def bytes(self) -> int:
        """What the sums take, however many pairs there are."""
        return 2 * len(self._sums) * self.session.width**2 * 8

    def take(self) -> dict[Key, tuple[Gram, Gram]]:
        """Of the first half and of the second. They are handed over: nothing is left here."""
        grams: dict[Key, tuple[Gram, Gram]] = {}
        for key in list(self._sums):
            first, second = self._sums.pop(key)
            grams[key] = (first.freeze(), second.freeze())
        return grams


def _distinct_rows(session: Session, second: np.ndarray) -> tuple[int, int]:
    """How many rows of either half differ at most: a position is one row wherever its whole prefix is the same, whatever
    batches round."""
    positions, seed = session.config.patching.positions, session.config.seed
    rows: tuple[set[int], set[int]] = (set(), set())
    for pair, half in zip(session.pairs, second.tolist(), strict=True):
        for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
            last = slice(max(start - 1, 0), start)
            patched = {"all": slice(None), "prompt": slice(start), "completion": slice(start, None)}.get(
                positions, last
            )
            rows[half].update(prefix_keys(ids, seed)[patched].tolist())
    return len(rows[0]), len(rows[1])


def _summed(sums: GramAccumulator, ranks: Ranks) -> GramAccumulator:
    gram = sums.freeze()
    return GramAccumulator.of(Gram(ranks.sum(gram.matrix), sum(ranks.gather(gram.rows))))


class Fit:
    """Subspaces of one probe set's token rows: on each half of its pairs, and on all of them.

    Attributes:
        ranks: evaluated ranks; those above the model's width are left out.
        halves: [N] booleans, the half each pair is in.
        spans: per (basis, layer), three bases [d, K_max]: for pairs of the first half (fitted on the second), for pairs of
            the second (fitted on the first), and for pairs that are in neither (fitted on all).
        grams: per (basis, layer): Σ h hᵀ of each half's rows.
        explained: per (basis, layer): [K] explained variance ratio on held-out halves; NaN at ranks that no half spans.
        dimensions: per (basis, layer): how many dimensions the rows of either half span at least.
        spanned: how many of the ranks that is enough for.
        skipped: why a (basis, layer) is missing.
    """

    def __init__(self, grams: TokenGrams) -> None:
        session = grams.session
        width = session.width
        self.ranks = [rank for rank in session.config.low_rank.ranks if rank <= width] or [width]
        self.halves = grams.halves
        self._distinct = grams.distinct
        self.spans: dict[Key, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.explained: dict[Key, list[float]] = {}
        self.dimensions: dict[Key, int] = {}
        self.spanned: dict[Key, int] = {}
        self.skipped: dict[Key, str] = {}
        self.grams = grams.take()
        alone = self.halves.all()  # no halves: good for the pairs of other sets only
        for key, (first, second) in self.grams.items():
            halves_span = first.matrix.any() and second.matrix.any()
            if not (torch.isfinite(first.matrix).all() and torch.isfinite(second.matrix).all()):
                self.skipped[key] = f"the activations at layer {key[1]} are not finite"
            elif key[0] == "shift" and not (halves_span or (alone and (first + second).matrix.any())):
                self.skipped[key] = f"policy and reference do not differ at layer {key[1]}: there is no shift to span"
            else:
                # The first is for the first half, so it is fitted on the second.
                spans = [top_basis(gram, self.ranks[-1]) for gram in (second, first, first + second)]
                self.spans[key] = (
                    spans[0].to(session.device),
                    spans[1].to(session.device),
                    spans[2].to(session.device),
                )
                captured = [
                    np.array(explained_variance_ratio(held, basis, self.ranks)) * float(held.matrix.trace())
                    for held, basis in zip((first, second), spans, strict=False)
                ]
                explained = np.sum(captured, axis=0) / float((first + second).matrix.trace())
                dimensions = self.dimensions[key] = min(self.rank(key, 0), self.rank(key, 1))
                spanned = self.spanned[key] = sum(rank <= dimensions for rank in self.ranks)
                explained[spanned:] = np.nan
                self.explained[key] = list(explained)

    def rank(self, key: Key, span: int) -> int:
        """How many dimensions the rows span that one of the three ``spans`` was fitted on."""
        first, second = self.grams[key]
        gram, distinct = (
            (second, self._distinct[1]),
            (first, self._distinct[0]),
            (first + second, sum(self._distinct)),
        )[span]
        return min(gram_rank(gram), distinct)

    @property
    def spans_of_pairs(self) -> np.ndarray:
        """[N] which of the spans each of the set's own pairs is patched with."""
        return self.halves.astype(int)

    @property
    def bases(self) -> dict[Key, np.ndarray]:
        """Per (basis, layer): [d, K_max] fitted on all pairs, without directions that their rows do not span."""
        return {key: spans[2][:, : self.rank(key, 2)].cpu().numpy() for key, spans in self.spans.items()}


class Reconstruction:
    """The streams that patch a fit's subspaces on the pairs of a session, and random ones beside them.

    Args:
        session: whose pairs are patched.
        fit: made on the same pairs, or on another set's.
        which: [N] which of the fit's spans each pair is patched with (0 and 1: it is of that half of the fitted pairs;
            2: it is none of them). None: the fit is of these pairs.
        random: in which bases' form random subspaces are patched.
    """

    def __init__(
        self,
        session: Session,
        fit: Fit,
        which: np.ndarray | None = None,
        random: Sequence[str] = ("shift",),
    ) -> None:
        self.session = session
        self._fit = fit
        self._cross_fitted = which is None
        self._which = fit.spans_of_pairs if which is None else which
        bases = fit.bases if which is None else {}
        self.effects = effects = LowRankEffects(
            fit.ranks,
            explained=fit.explained,
            bases=bases,
            spanned=fit.spanned,
            dimensions=fit.dimensions,
            skipped=fit.skipped,
        )
        count, draws = len(session.pairs), session.config.low_rank.random_draws
        for key in fit.spans:
            effects.fitted[key] = np.full((count, len(fit.ranks)), np.nan)
        for form in random if draws else ():
            for layer in sorted(self.layers):
                effects.random[form, layer] = np.full((count, len(fit.ranks), draws), np.nan)

    @property
    def layers(self) -> set[int]:
        """Where there is a subspace to patch."""
        return {layer for _, layer in self._fit.spans}

    def streams(self, batch: PairBatch, policy: Recording, reference: Recording) -> Iterator[Stream]:
        """Every rank of every fitted subspace on pairs that are patched, random ones on those of the controls."""
        if not self.session.is_exact(batch):
            return
        mask = batch.position_mask(self.session.config.patching.positions)
        which = _by_row(batch, self._which)
        for (basis, layer), spans in self._fit.spans.items():
            for column, rank in enumerate(self._ranks(basis, layer)):
                make = _reconstruction(policy, reference, mask, layer, basis, spans, which, rank)
                yield Stream(("fitted", basis, layer, column), layer, make)
        if not self.session.is_control(batch):
            return
        for form, layer in self.effects.random:
            for draw in range(self.session.config.low_rank.random_draws):
                random_spans = (self._random_spans(batch, layer, draw),)
                for column, rank in enumerate(self.effects.ranks):
                    make = _reconstruction(
                        policy, reference, mask, layer, form, random_spans, torch.zeros_like(which), rank
                    )
                    yield Stream(("random", form, layer, column, draw), layer, make)

    def _ranks(self, basis: str, layer: int) -> list[int]:
        """Those that are patched; of another set's fit all, since which of its spans a pair gets is that set's matter."""
        spanned = self.effects.spanned[basis, layer] if self._cross_fitted else len(self.effects.ranks)
        return self.effects.ranks[:spanned]

    def _random_spans(self, batch: PairBatch, layer: int, draw: int) -> torch.Tensor:
        """[R, d, K] a random subspace for each row's pair: as many subspaces as pairs average better than a few for all."""
        spans = [
            random_basis(
                self.session.width,
                self.effects.ranks[-1],
                _seed(self.session.config.seed, layer, draw, self.session.pairs[int(place)].identity),
            )
            for place in batch.pair_index.cpu()
        ]
        return torch.stack(spans).to(self.session.device)[batch.row_pair]

    def store(self, key: Any, places: np.ndarray, effect: np.ndarray) -> None:
        """Keep the effects [B], nats, of the pairs at ``places``."""
        if key[0] == "fitted":
            self.effects.fitted[key[1], key[2]][places, key[3]] = effect
        else:
            self.effects.random[key[1], key[2]][places, key[3], key[4]] = effect

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Take over what other processes have kept of their pairs."""
        merge_by_place([*self.effects.fitted.values(), *self.effects.random.values()], ranks, places)


def beyond_the_rows(whose: str, dimensions: int) -> str:
    """Why nothing is said of ranks that the rows do not span.

    Example:
        >>> beyond_the_rows("the token rows of a half of the pairs", 3)
        'the token rows of a half of the pairs span 3 dimensions: what lies beyond is arbitrary'
    """
    return f"{whose} span {dimensions} dimensions: what lies beyond is arbitrary"


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])


def _by_row(batch: PairBatch, values: np.ndarray) -> torch.Tensor:
    """[R] the value of each row's pair."""
    by_pair = torch.from_numpy(values[batch.pair_index.cpu().numpy()]).to(batch.row.device)
    return by_pair[batch.row_pair]


def _reconstruction(
    policy: Recording,
    reference: Recording,
    mask: torch.Tensor,
    layer: int,
    basis: str,
    spans: Sequence[torch.Tensor],
    which: torch.Tensor,
    rank: int,
) -> Callable[[], torch.Tensor]:
    """h_l(ρ) + P_k (h_l(π) − h_l(ρ)) in the shift basis, P_k h_l(π) in the activation basis; P_k by each row's span."""

    def make() -> torch.Tensor:
        policy_stream, reference_stream = policy.after(layer), reference.after(layer)
        # Projections are taken in float64: in the activation basis one direction is far larger than all others.
        rows = policy_stream.double() if basis == "activation" else policy_stream.double() - reference_stream.double()
        inside = None
        for place in which.unique().tolist():
            columns = spans[place][..., :rank]
            projected = (rows @ columns) @ columns.mT
            chosen = (which == place)[:, None, None]
            inside = projected if inside is None else torch.where(chosen, projected, inside)
        assert inside is not None
        rebuilt = inside if basis == "activation" else reference_stream.double() + inside
        return patched(reference_stream, rebuilt, mask)

    return make
