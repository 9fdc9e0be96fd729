"""What :func:`align_audit.transfer` found: how far the subspaces of one probe set carry the effect on another.

Conventions are those of :mod:`align_audit.record.audit_record`: a number that cannot be known is NaN and says why, an
``Estimate`` in its ``reason``, any other field in ``TransferRecord.reasons`` under its dotted path. Sequences run along
``ranks``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from align_audit.record.audit_record import METHODS_VERSION, Control, Cost, Provenance
from align_audit.record.estimate import Estimate
from align_audit.record.schema import Part, Stored

if TYPE_CHECKING:
    import pandas as pd

TRANSFER_SCHEMA_VERSION = 1
"""Version of the fields of a transfer record; newer ones are refused."""


class TransferCell(Part):
    """The subspaces fitted on one set, patched on the pairs of one set, at one layer in one basis (METHODS §4)."""

    effect_fraction: list[Estimate]
    """effect(k) / effect(full), over the patched pairs."""
    explained_variance_ratio: list[float]
    """Share of the patched set's token rows that lies in the subspace; between two sets over all of its pairs."""
    rank_95: float
    full_effect: Estimate
    """Of the full patch on the same pairs, nats."""
    pairs: int
    """Pairs that were patched and count."""
    cross_fitted: int
    """Those of them that the fitted set holds too, in one of its halves: patched with the subspace of the other half."""
    excluded: int
    """Pairs left out because the fitted set holds their sequences in both of its halves."""
    beats_random: list[bool | None]
    """Whether the effect lies above that of random subspaces of the same rank, interval against interval; None: not known."""
    control: Control


class RandomSubspaces(Part):
    """What random subspaces, each pair its own, do to one set's pairs at one layer, patched in the form of one basis."""

    effect: list[Estimate]
    """Nats."""
    effect_fraction: list[Estimate]
    pairs: int


class SubspaceAngles(Part):
    """Principal angles between the subspaces of two sets, each fitted on all of its pairs."""

    between: tuple[str, str]
    angles: list[list[float]]
    """For each rank k its k angles, radians, ascending."""


class TransferRecord(Stored):
    """The transfer matrix of a policy against its reference, over named probe sets."""

    noun: ClassVar[str] = "transfer record"
    newest: ClassVar[int] = TRANSFER_SCHEMA_VERSION
    telling: ClassVar[tuple[str, ...]] = ("schema_version", "cells")

    step: int
    schema_version: int = TRANSFER_SCHEMA_VERSION
    methods_version: int = METHODS_VERSION
    probe_names: list[str]
    provenance: dict[str, Provenance]
    """By probe set: the set, both models, and the settings."""
    reference_source: str
    ranks: list[int]
    layers: list[int]
    chosen_layers: dict[str, list[int]]
    """By probe set: the layers it asked for by itself, where they were chosen by what was found (``auto``)."""
    shift: dict[str, Estimate]
    """By probe set: the mean margin shift, nats."""
    shared_pairs: dict[str, dict[str, int]]
    """``shared_pairs[A][B]``: pairs of B of which A holds a sequence (prompt and completion, token for token)."""
    cells: dict[str, dict[int, dict[str, dict[str, TransferCell]]]]
    """``cells[basis][layer][A][B]``: fitted on A, patched on B. Where A is B, cross-fit by halves as in an audit."""
    random: dict[str, dict[int, dict[str, RandomSubspaces]]]
    """``random[basis][layer][B]``."""
    angles: dict[str, dict[int, list[SubspaceAngles]]]
    """``angles[basis][layer]``, one for each two sets."""
    cost: Cost
    reasons: dict[str, str] = Field(default_factory=dict)

    def each(self) -> Iterator[tuple[str, int, str, str, TransferCell]]:
        """(basis, layer, fitted on, patched on, cell), for every cell."""
        for basis, by_layer in self.cells.items():
            for layer, by_fit in by_layer.items():
                for fitted, by_patch in by_fit.items():
                    for patched, cell in by_patch.items():
                        yield basis, layer, fitted, patched, cell

    def effect_fraction(self, basis: str, layer: int) -> dict[str, dict[str, dict[int, Estimate]]]:
        """The transfer matrix: ``[A][B][k]``, fitted on A, patched on B, at rank k."""
        return {
            fitted: {
                patched: dict(zip(self.ranks, cell.effect_fraction, strict=True)) for patched, cell in by_patch.items()
            }
            for fitted, by_patch in self.cells[basis][layer].items()
        }

    def to_pandas(self) -> pd.DataFrame:
        """One row per basis, layer, fitted set, patched set and rank; what cannot be known is NaN."""
        import pandas

        rows: list[dict[str, Any]] = []
        for basis, layer, fitted, patched, cell in self.each():
            random = self.random.get(basis, {}).get(layer, {}).get(patched)
            angles = {frozenset(pair.between): pair.angles for pair in self.angles.get(basis, {}).get(layer, [])}
            between = angles.get(frozenset((fitted, patched)))
            for place, rank in enumerate(self.ranks):
                share = cell.effect_fraction[place]
                rows.append(
                    {
                        "step": self.step,
                        "basis": basis,
                        "layer": layer,
                        "fitted_on": fitted,
                        "patched_on": patched,
                        "rank": rank,
                        "effect_fraction": share.mean,
                        "effect_fraction_low": share.low,
                        "effect_fraction_high": share.high,
                        "explained_variance_ratio": cell.explained_variance_ratio[place],
                        "random_fraction": float("nan") if random is None else random.effect_fraction[place].mean,
                        "beats_random": cell.beats_random[place],
                        "smallest_angle": float("nan") if between is None else between[place][0],
                        "largest_angle": float("nan") if between is None else between[place][-1],
                        "full_effect": cell.full_effect.mean,
                        "pairs": cell.pairs,
                        "control": cell.control.verdict,
                    }
                )
        return pandas.DataFrame(rows)
