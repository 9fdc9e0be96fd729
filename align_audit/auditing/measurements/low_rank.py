"""Low-rank reconstruction at the layers that matter (METHODS §4; arXiv 2510.16167 §4.3).

The token rows are gathered in the first pass where the layers are named beforehand, else in one more (no further up than
the highest of the layers). The subspaces are patched in the second pass, on the same pairs, cross-fit by halves, or on those
of another probe set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons, RecordedBatch, SecondLook
from align_audit.auditing.measurements.patching import Patching
from align_audit.auditing.previous import Subspaces
from align_audit.auditing.session.estimates import estimate, floats
from align_audit.auditing.session.walk import Session
from align_audit.errors import ConfigurationError
from align_audit.measures.patching import PatchSummary, patched
from align_audit.measures.subspace import (
    Gram,
    GramAccumulator,
    explained_variance_ratio,
    principal_angles,
    random_basis,
    rank_95,
    rank_95_interval,
    top_basis,
)
from align_audit.models.replay import Recording, Stream
from align_audit.probes.batches import PairBatch
from align_audit.record.audit_record import LowRankCurve

Key = tuple[str, int]
"""Basis name and layer."""


@dataclass
class LowRankEffects:
    """Per-pair effects in nats, float64, in the order of the ``ProbeSet``.

    Attributes:
        ranks: evaluated ranks; those above the model's width are left out.
        fitted: per (basis, layer): [N, K] effect of the rank-k patch, basis fitted on the half the pair is not in.
        random: per (form, layer): [N, K, D] effects of D random subspaces of each pair's own, patched in the form that a
            basis of that name is; NaN for pairs that no control is measured on.
        explained: per (basis, layer): [K] explained variance ratio on held-out halves.
        bases: per (basis, layer): [d, K_max] fitted on all pairs.
        skipped: why a (basis, layer) is missing.
    """

    ranks: list[int]
    fitted: dict[Key, np.ndarray] = field(default_factory=dict)
    random: dict[Key, np.ndarray] = field(default_factory=dict)
    explained: dict[Key, list[float]] = field(default_factory=dict)
    bases: dict[Key, np.ndarray] = field(default_factory=dict)
    skipped: dict[Key, str] = field(default_factory=dict)


class TokenGrams:
    """Gram matrices Σ h hᵀ [d, d] of the pooled token rows of each half of a session's pairs, per basis and layer."""

    def __init__(self, session: Session, layers: Sequence[int]) -> None:
        self.session, self.layers = session, list(layers)
        self.halves = split_halves(len(session.pairs), session.config.seed)
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
            ours, theirs = policy.after(layer), reference.after(layer)
            for half in (False, True):
                new = (self.halves == half) & ~self._counted[key]
                within = mask & _by_row(batch, new)[:, None]
                if not within.any():
                    continue
                rows = ours[within].double()
                if basis == "shift":
                    rows = rows - theirs[within].double()
                # A position that stands for both sequences of its pair is two of the pooled rows.
                sums[half].update(rows * batch.copies[within].double().sqrt()[:, None])
                self._counted[key][places[new[places]]] = True

    def gather(self, tick: Callable[[], None] = lambda: None) -> None:
        """A pass of its own over all pairs, no further up than the layers."""
        session, top = self.session, max(self.layers)

        def update(batch: PairBatch) -> None:
            inputs = batch.model_inputs()
            with session.as_policy() as replay:
                policy = replay.record(inputs, until=top)
            with session.as_reference() as replay:
                reference = replay.record(inputs, until=top)
            session.meter.sample()
            self.update(batch, policy, reference)
            tick()

        session.each_batch(update)

    @property
    def bytes(self) -> int:
        """What the sums take, however many pairs there are."""
        return 2 * len(self._sums) * self.session.width**2 * 8

    def take(self) -> dict[Key, tuple[Gram, Gram]]:
        """Of the first half and of the second. They are handed over: nothing is left here."""
        found: dict[Key, tuple[Gram, Gram]] = {}
        for key in list(self._sums):
            one, other = self._sums.pop(key)
            found[key] = (one.freeze(), other.freeze())
        return found


class Fit:
    """Subspaces of one probe set's token rows: on each half of its pairs, and on all of them.

    Attributes:
        ranks: evaluated ranks; those above the model's width are left out.
        halves: [N] booleans, the half each pair is in.
        spans: per (basis, layer), three bases [d, K_max]: for pairs of the first half (fitted on the second), for pairs of
            the second (fitted on the first), and for pairs that are in neither (fitted on all).
        grams: per (basis, layer): Σ h hᵀ of each half's rows.
        explained: per (basis, layer): [K] explained variance ratio on held-out halves.
        skipped: why a (basis, layer) is missing.
    """

    def __init__(self, grams: TokenGrams) -> None:
        session = grams.session
        width = session.width
        self.ranks = [rank for rank in session.config.low_rank.ranks if rank <= width] or [width]
        self.halves = grams.halves
        self.spans: dict[Key, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.explained: dict[Key, list[float]] = {}
        self.skipped: dict[Key, str] = {}
        self.grams = grams.take()
        alone = len(session.pairs) < 2  # no halves: good for the pairs of other sets only
        for key, (one, other) in self.grams.items():
            halves_span = one.matrix.any() and other.matrix.any()
            if not (torch.isfinite(one.matrix).all() and torch.isfinite(other.matrix).all()):
                self.skipped[key] = f"the activations at layer {key[1]} are not finite"
            elif key[0] == "shift" and not (halves_span or (alone and (one + other).matrix.any())):
                self.skipped[key] = f"policy and reference do not differ at layer {key[1]}: there is no shift to span"
            else:
                # The first is for the first half, so it is fitted on the second.
                spans = [top_basis(gram, self.ranks[-1]) for gram in (other, one, one + other)]
                self.spans[key] = (
                    spans[0].to(session.device),
                    spans[1].to(session.device),
                    spans[2].to(session.device),
                )
                captured = [
                    np.array(explained_variance_ratio(held, basis, self.ranks)) * float(held.matrix.trace())
                    for held, basis in zip((one, other), spans, strict=False)
                ]
                self.explained[key] = list(np.sum(captured, axis=0) / float((one + other).matrix.trace()))

    @property
    def own(self) -> np.ndarray:
        """[N] which of the spans each of the set's own pairs is patched with."""
        return self.halves.astype(int)

    @property
    def bases(self) -> dict[Key, np.ndarray]:
        """Per (basis, layer): [d, K_max] fitted on all pairs."""
        return {key: spans[2].cpu().numpy() for key, spans in self.spans.items()}


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
        self._which = fit.own if which is None else which
        bases = fit.bases if which is None else {}
        self.effects = effects = LowRankEffects(fit.ranks, explained=fit.explained, bases=bases, skipped=fit.skipped)
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
            for column, rank in enumerate(self.effects.ranks):
                make = _reconstruction(policy, reference, mask, layer, basis, spans, which, rank)
                yield Stream(("fitted", basis, layer, column), layer, make)
        if not self.session.is_control(batch):
            return
        for form, layer in self.effects.random:
            for draw in range(self.session.config.low_rank.random_draws):
                own = (self._random_spans(batch, layer, draw),)
                for column, rank in enumerate(self.effects.ranks):
                    make = _reconstruction(policy, reference, mask, layer, form, own, torch.zeros_like(which), rank)
                    yield Stream(("random", form, layer, column, draw), layer, make)

    def _random_spans(self, batch: PairBatch, layer: int, draw: int) -> torch.Tensor:
        """[R, d, K] a random subspace for each row's pair: as many subspaces as pairs average better than a few for all."""
        spans = [
            random_basis(
                self.session.width,
                self.effects.ranks[-1],
                _seed(self.session.config.seed, layer, draw, self.session.pairs[int(place)].index),
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
        if not layers or len(self.session.pairs) < 2:
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

    def look_closer(self, tick: Callable[[], None]) -> None:
        """Choose the layers, gather their token rows where that is not done yet, and fit."""
        summary = self.task[Patching].summary
        if not self.enabled or summary is None:
            return
        if len(self.session.pairs) < 2:
            self._nothing = "cross-fitting needs two halves: at least 2 pairs, found 1"
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
        exact, estimates, reasons = self.session.exact_pairs, self.estimates, {}
        full, fitted = self.task[Patching].effect(layer)[exact], effects.fitted[basis, layer][exact]
        fractions = [estimate(interval) for interval in estimates.fractions(fitted, full)]
        least, why = rank_95(effects.ranks, [fraction.mean for fraction in fractions])
        if why is not None:
            reasons["rank_95"] = fractions[-1].reason or why
        low, high = math.nan, math.nan
        if not math.isnan(fractions[-1].mean):
            low, high = rank_95_interval(
                effects.ranks, fitted, full, estimates.resamples, estimates.confidence, estimates.seed
            )
        for bound, value in (("low", low), ("high", high)):
            if math.isnan(value):
                reasons[f"rank_95_{bound}"] = (
                    fractions[-1].reason or "an effect is not finite, or there are fewer than 2 pairs"
                )
        return LowRankCurve(
            ranks=effects.ranks,
            effect_fraction=fractions,
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


def split_halves(count: int, seed: int) -> np.ndarray:
    """Which of two random halves each pair is in, booleans [N]; with an odd number the first is the smaller."""
    order = np.random.default_rng([seed, 0x5B]).permutation(count)
    halves = np.zeros(count, dtype=bool)
    halves[order[count // 2 :]] = True
    return halves


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])


def _by_row(batch: PairBatch, values: np.ndarray) -> torch.Tensor:
    """[R] the value of each row's pair."""
    own = torch.from_numpy(values[batch.pair_index.cpu().numpy()]).to(batch.row.device)
    return own[batch.row_pair]


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
        ours, theirs = policy.after(layer), reference.after(layer)
        # Projections are taken in float64: in the activation basis one direction is far larger than all others.
        rows = ours.double() if basis == "activation" else ours.double() - theirs.double()
        inside = None
        for place in which.unique().tolist():
            columns = spans[place][..., :rank]
            projected = (rows @ columns) @ columns.mT
            chosen = (which == place)[:, None, None]
            inside = projected if inside is None else torch.where(chosen, projected, inside)
        assert inside is not None
        whole = inside if basis == "activation" else theirs.double() + inside
        return patched(theirs, whole, mask)

    return make
