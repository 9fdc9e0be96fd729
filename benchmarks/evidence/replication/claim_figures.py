"""The figures that the claims are about, each from the runs of one setup."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from align_audit.record.audit_record import AuditRecord
from replication.criteria import healthy
from replication.destabilized import first_harm, told
from replication.figures import (
    Figure,
    counted,
    each_audit,
    each_slice,
    gain_of_third,
    mean_of_third,
    of_effects,
    over_seeds,
    paired,
    per_seed,
    trace_slope,
)
from replication.plan import FIRST
from replication.stored import Runs, StoredRun

RANK = 4
OFTEN = 0.8
"""Share of resamples from which on the LASSO selects a layer."""


# -- figures of AL ---------------------------------------------------------------------------------------------------------


def middle_over_ends(runs: Runs) -> Figure:
    return each_slice(healthy(runs), lambda run, name: of_effects(
        run, name, lambda effects, shift: (
            mean_of_third(effects, 1) - np.maximum(mean_of_third(effects, 0), mean_of_third(effects, 2))
        ) / shift,
    ))  # fmt: skip


def ends_over_middle(runs: Runs) -> Figure:
    return each_slice(healthy(runs), lambda run, name: of_effects(
        run, name, lambda effects, shift: (
            np.maximum(mean_of_third(effects, 0), mean_of_third(effects, 2)) / mean_of_third(effects, 1)
        ),
    ))  # fmt: skip


def larger_end(runs: Runs) -> Figure:
    """Of the early third with the embedding and the late third with the head, the larger share of the shift."""

    def larger(run: StoredRun, name: str) -> Figure:
        early, late = (gain_of_third(run, name, wanted, ends=True) for wanted in (0, 2))
        return max(early, late, key=lambda figure: figure.mean)

    return each_slice(healthy(runs), larger)


def selected(runs: Runs) -> Figure:
    return counted(
        [
            len(record.localization.selected_layers)
            for run in healthy(runs)
            for record in run.last
            if record.localization
        ]
    )


def often_selected(runs: Runs) -> Figure:
    return counted([
        sum(share >= OFTEN for share in record.localization.selection_frequency)
        for run in healthy(runs) for record in run.last if record.localization
    ])  # fmt: skip


def kept(basis: str) -> Callable[[Runs], Figure]:
    """Share of the full effect that a subspace of rank 4 keeps, at the peak layer."""

    def kept(record: AuditRecord) -> Figure:
        layer = record.patching.peak_layer if record.patching else None
        curves = record.low_rank.get(basis, {})
        if layer is None or layer not in curves or RANK not in curves[layer].ranks:
            return Figure.unknown("no peak layer at which a subspace was fitted")
        share = curves[layer].effect_fraction[curves[layer].ranks.index(RANK)]
        return Figure(share.mean, share.low, share.high, share.reason)

    return lambda runs: each_audit(healthy(runs), kept)


def noise_at_peak(runs: Runs) -> Figure:
    def ratio(record: AuditRecord) -> Figure:
        noise, patching = record.controls.noise.effect, record.patching
        if noise is None or patching is None or patching.peak_layer is None:
            return Figure.unknown("noise was not patched, or there is no peak layer")
        layer = patching.peak_layer
        real = patching.effect[layer].mean
        return Figure(noise[layer].mean / real, noise[layer].low / real, noise[layer].high / real, noise[layer].reason)

    return each_audit(healthy(runs), ratio)


def beyond_noise(runs: Runs) -> Figure:
    def share(record: AuditRecord) -> float:
        noise, patching = record.controls.noise.effect, record.patching
        if noise is None or patching is None:
            return math.nan
        real = [layer for layer, effect in enumerate(patching.effect) if effect.low > 0]
        return sum(patching.effect[layer].low > noise[layer].high for layer in real) / len(real) if real else math.nan

    return counted([share(record) for run in healthy(runs) for record in run.last])


def reverse_at_peak(runs: Runs) -> Figure:
    def share(record: AuditRecord) -> Figure:
        back, patching, shift = record.controls.reverse.effect, record.patching, record.margins.shift.mean
        if back is None or patching is None or patching.peak_layer is None:
            return Figure.unknown("nothing was patched back, or there is no peak layer")
        at = back[patching.peak_layer]
        return Figure(at.mean / shift, at.low / shift, at.high / shift, at.reason)

    return each_audit(healthy(runs), share)


def reversed_below(runs: Runs) -> Figure:
    """Only below the last third: where a replaced stream decides what follows, the shift is undone by construction."""

    def share(record: AuditRecord) -> float:
        back, patching = record.controls.reverse.effect, record.patching
        if back is None or patching is None:
            return math.nan
        below = range(2 * record.provenance.num_layers // 3)
        real = [layer for layer in below if patching.effect[layer].low > 0]
        return sum(back[layer].high < 0 for layer in real) / len(real) if real else math.nan

    return counted([share(record) for run in healthy(runs) for record in run.last])


# -- figures of SPINAL -----------------------------------------------------------------------------------------------------


def slopes(part: str) -> Callable[[Runs], Figure]:
    return lambda runs: over_seeds(
        per_seed(
            healthy(runs),
            lambda record: trace_slope(record.spinal.policy, record, part) if record.spinal else math.nan,
        )
    )


def beyond_null(number: Callable[[AuditRecord], float]) -> Callable[[Runs], Figure]:
    return lambda runs: over_seeds(paired(healthy(runs), runs["null"], number))


def coherence(record: AuditRecord) -> float:
    return record.spinal.coherence if record.spinal else math.nan


def more_coherent(record: AuditRecord) -> float:
    return record.spinal.coherence - record.spinal.reference_coherence if record.spinal else math.nan


def coherence_at_harm(runs: Runs) -> Figure:
    """Of each ruined run at its first harmed audit, coherence minus that of the healthy run of its seed at the same step."""
    differences = []
    for run in runs["ruined"]:
        step = first_harm(run)
        twin = next((each for each in runs["healthy"] if each.seed == run.seed), None)
        if step is not None and twin is not None:
            differences.append(coherence(run.audit(FIRST, step)) - coherence(twin.audit(FIRST, step)))
    return over_seeds(differences)


def told_in_time(runs: Runs) -> Figure:
    """Of the ruined runs, told in time by the best signal that is silent in all others; a run of 0 or 1."""
    judged = told(runs["ruined"], [*runs["healthy"], *runs["null"]])
    silent = [in_time for in_time, false in judged.values() if false == 0]
    return counted([float(each) for each in max(silent, key=sum)]) if silent else counted([0.0 for _ in runs["ruined"]])
