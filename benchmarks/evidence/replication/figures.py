"""Numbers that claims are about, each with its interval: over probe pairs in each run and slice, or over seeds.

A figure over *pairs* is the mean over all seeds and both slices. Its interval reaches from the lowest lower to the highest
upper bound of their 95 % intervals over pairs, so that it lies beyond a line only where each of them does. Where a number has
no interval over pairs (the slope of a spectrum, a score) the figure is the mean over seeds, each the mean of its slices, with
Student's 95 % interval over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from align_audit.measures.statistics import statistic_intervals
from align_audit.record.audit_record import AuditRecord, DepthTrace
from align_audit.record.estimate import Estimate
from replication.plan import FIRST, SECOND
from replication.stored import StoredRun

Third = int
"""0, 1, 2: the early, middle and late third of a model's layers."""


@dataclass(frozen=True)
class Figure:
    """A number with its interval; NaN with a reason."""

    mean: float
    low: float
    high: float
    reason: str | None = None

    @classmethod
    def unknown(cls, reason: str) -> Figure:
        """NaN, for that reason."""
        return cls(math.nan, math.nan, math.nan, reason)


def third(layer: int, layers: int) -> Third:
    """The third of the depth in which the middle of a layer lies."""
    return min(2, int(3 * (layer + 0.5) / layers))


def in_third(wanted: Third, layers: int) -> list[int]:
    """The layers of a third."""
    return [layer for layer in range(layers) if third(layer, layers) == wanted]


# -- intervals -------------------------------------------------------------------------------------------------------------


def envelope(parts: Iterable[Figure | Estimate]) -> Figure:
    """Mean of all, from the lowest lower bound to the highest upper one; unknown where one is."""
    figures = list(parts)
    for figure in figures:
        if not all(math.isfinite(number) for number in (figure.mean, figure.low, figure.high)):
            return Figure.unknown(figure.reason or "a number that is not finite")
    if not figures:
        return Figure.unknown("no runs")
    return Figure(
        sum(figure.mean for figure in figures) / len(figures),
        min(figure.low for figure in figures),
        max(figure.high for figure in figures),
    )


def over_seeds(values: Sequence[float]) -> Figure:
    """Mean of a number per seed with Student's 95 % interval; unknown below two seeds."""
    from scipy.stats import t

    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return Figure.unknown(f"an interval over seeds takes two of them, found {len(numbers)}")
    if not np.isfinite(numbers).all():
        return Figure.unknown("a number that is not finite")
    half = float(t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return Figure(float(numbers.mean()), float(numbers.mean()) - half, float(numbers.mean()) + half)


def counted(values: Sequence[float]) -> Figure:
    """Mean, least and largest of a count or a share per run and slice."""
    return envelope(Figure(value, value, value) for value in values)


# -- over pairs ------------------------------------------------------------------------------------------------------------


def of_effects(run: StoredRun, name: str, statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Figure:
    """A function of mean effects ``[..., L + 1]`` (the embedding first) and mean shift ``[...]``, bootstrapped over pairs."""
    effect, shift = run.values[f"{name}.effect"], run.values[f"{name}.shift"]
    patched = np.isfinite(effect).all(axis=1)
    columns = np.column_stack([effect[patched], shift[patched]])
    interval = statistic_intervals(
        columns,
        lambda means: statistic(means[..., :-1], means[..., -1])[..., None],
        guard=-1,
        guard_name="the mean margin shift",
    )[0]
    return Figure(interval.mean, interval.low, interval.high, interval.reason)


def each_slice(runs: Sequence[StoredRun], figure: Callable[[StoredRun, str], Figure]) -> Figure:
    """The envelope over runs and both slices."""
    return envelope(figure(run, name) for run in runs for name in (FIRST, SECOND))


def each_audit(runs: Sequence[StoredRun], figure: Callable[[AuditRecord], Figure | Estimate]) -> Figure:
    """The envelope over the last audits of runs, of both slices."""
    return envelope(figure(record) for run in runs for record in run.last)


def gain_of_third(run: StoredRun, name: str, wanted: Third, *, ends: bool = False) -> Figure:
    """Share of the margin shift that a third of the layers adds to what lies below; with ``ends``, embedding or head too."""
    layers = run.values[f"{name}.effect"].shape[1] - 1
    inside = in_third(wanted, layers)

    def share(effects: np.ndarray, shift: np.ndarray) -> np.ndarray:
        top = shift if ends and wanted == 2 else effects[..., inside[-1] + 1]
        bottom = 0.0 if ends and wanted == 0 else effects[..., inside[0]]
        result: np.ndarray = (top - bottom) / shift
        return result

    return of_effects(run, name, share)


def mean_of_third(effects: np.ndarray, wanted: Third) -> np.ndarray:
    """Mean effect of the layers of a third, of ``[..., L + 1]``."""
    layers = effects.shape[-1] - 1
    result: np.ndarray = effects[..., [layer + 1 for layer in in_third(wanted, layers)]].mean(axis=-1)
    return result


# -- SPINAL ----------------------------------------------------------------------------------------------------------------


def slope(values: Sequence[float]) -> float:
    """Least squares slope along a sequence, per layer; NaN below two values."""
    return float(np.polyfit(np.arange(len(values)), np.asarray(values), 1)[0]) if len(values) > 1 else math.nan


def terminal(record: AuditRecord, series: Sequence[float]) -> tuple[list[float], list[float]]:
    """The values of a series in the terminal block, and those before it (transport has none at the last layer)."""
    assert record.spinal is not None
    inside = set(record.spinal.terminal_layers)
    return (
        [value for layer, value in enumerate(series) if layer in inside],
        [value for layer, value in enumerate(series) if layer not in inside],
    )


def changes(record: AuditRecord, part: str) -> list[float]:
    """π minus ρ, by layer, of ``contraction`` or ``transport``."""
    assert record.spinal is not None
    policy, reference = getattr(record.spinal.policy, part), getattr(record.spinal.reference, part)
    return [a - b for a, b in zip(policy, reference, strict=True)]


def late_change(record: AuditRecord, part: str) -> float:
    """Mean change in the terminal block minus mean change before it."""
    inside, outside = terminal(record, changes(record, part))
    return float(np.mean(inside) - np.mean(outside))


def share_of_layers(record: AuditRecord, part: str, layers: Sequence[int]) -> float:
    """Of all change of a part of the trace, in absolute value, the share in some layers; NaN where nothing changed."""
    sizes = np.abs(changes(record, part))
    inside = [layer for layer in layers if layer < len(sizes)]
    return float(sizes[inside].sum() / sizes.sum()) if sizes.sum() > 0 else math.nan


def share_of_last_third(record: AuditRecord) -> float:
    """The share of the last third of the layers, the mean of contraction's and transport's."""
    late = in_third(2, record.provenance.num_layers)
    return float(np.mean([share_of_layers(record, part, late) for part in ("contraction", "transport")]))


def per_seed(runs: Sequence[StoredRun], number: Callable[[AuditRecord], float]) -> list[float]:
    """A number of the last audits, the mean of both slices, by run."""
    return [float(np.mean([number(record) for record in run.last])) for run in runs]


def paired(
    runs: Sequence[StoredRun], others: Sequence[StoredRun], number: Callable[[AuditRecord], float]
) -> list[float]:
    """The difference of such a number between runs of the same seed, which are audited on the same pairs."""
    by_seed = dict(zip([run.seed for run in others], per_seed(others, number), strict=True))
    mine = zip([run.seed for run in runs], per_seed(runs, number), strict=True)
    return [value - by_seed[seed] for seed, value in mine if seed in by_seed]


def trace_slope(trace: DepthTrace, record: AuditRecord, part: str) -> float:
    """Slope of a trace along the terminal block."""
    return slope(terminal(record, getattr(trace, part))[0])
