"""Is the model all right? Four curves over steps with their limits, and what the training log showed meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.record.stored_records import Head
from align_audit.record.training_log import LogRow
from align_audit.writers.standing import figure, limit_of, logged_figure, percent
from align_audit.writers.web.json_values import number, row

LOGGED = (("loss", "Training loss"), ("rewards/margins", "Reward margin of the training pairs, β·nats"))
"""Columns of the trainer's log that a page draws, and their titles."""
MOST_LOGGED = 300
"""Points of a curve of the trainer's log; of more, each stands for the rows around it."""

_LEVELS = ("warning", "error")
_ROOM = 0.12
"""Share of an axis that lies beyond the outermost limit."""


@dataclass(frozen=True)
class _Panel:
    key: str
    title: str
    unit: str
    field: str
    options: str
    """Options of the limits, without their level."""
    limit: Callable[[float, _Base], float]
    """The value of an option's limit on the axis."""
    worse: str
    """The side of a limit that is worse: ``above`` or ``below``."""
    reference: str = ""
    """The field that the reference is drawn from."""
    share: bool = False
    signed: bool = False
    moves: Callable[[_Base], str] = lambda base: ""
    """What its limits move with or need, in a sentence; empty: they stay, and need nothing."""


@dataclass(frozen=True)
class _Base:
    """What relative limits are relative to, and what that of KL needs beside it."""

    reference_tokens: float
    best_accuracy: float
    chosen_drop: float


def _needed_by_kl(base: _Base) -> str:
    """What KL up to its second limit needs to warn alone; the option may be below 0."""
    drop = base.chosen_drop
    needs = f"where chosen answers lose {drop:.3g}" if drop > 0 else f"unless chosen answers gain {-drop:.3g}"
    return f"Up to an error's limit it warns {needs} nats per token."


_PANELS = (
    _Panel(
        "chosen", "Chosen log-prob. change", "nats/token", "chosen_logp_change_per_token",
        "chosen_drop_{}", lambda limit, base: -limit, "below", signed=True,
    ),
    _Panel(
        "kl", "KL to the reference", "nats/token", "kl", "kl_{}", lambda limit, base: limit, "above",
        moves=_needed_by_kl,
    ),
    _Panel(
        "tokens", "Next-token accuracy", "share", "token_accuracy", "token_accuracy_ratio_{}",
        lambda limit, base: limit * base.reference_tokens, "below", reference="reference_token_accuracy", share=True,
    ),
    _Panel(
        "accuracy", "Reward accuracy", "share", "reward_accuracy", "accuracy_drop_{}",
        lambda limit, base: base.best_accuracy - limit, "below", share=True,
        moves=lambda base: f"The limits move with the run's best, {percent(base.best_accuracy)}.",
    ),
)  # fmt: skip


def health_panels(heads: Sequence[Head], newest: AuditRecord) -> list[dict[str, Any]]:
    """The four panels of a probe set.

    Args:
        heads: of its audits, one a step, by step; not empty.
        newest: the last of these audits, whose configuration has the limits.

    Returns:
        Of each panel its ``key``, ``title``, ``unit`` and ``share`` (a number from 0 to 1); ``steps`` with ``mean``, ``low``
        and ``high`` (None: not known); ``reference``, as long as these, or None; ``limits`` of ``level``, ``value`` and
        ``says``; ``worse``, the side of a limit that is worse; ``reach``, the ends of its axis; ``now`` and ``interval`` in
        words; ``note``, what the limits move with (empty: they stay), and ``says``, the panel as a sentence.
    """
    seen = [head.accuracy.mean for head in heads if math.isfinite(head.accuracy.mean)]
    drop = limit_of(newest, "kl_chosen_drop")
    base = _Base(
        heads[-1].reference_token_accuracy.mean, max(seen, default=math.nan), math.nan if drop is None else drop
    )
    return [_panel(panel, heads, newest, base) for panel in _PANELS]


def _panel(panel: _Panel, heads: Sequence[Head], newest: AuditRecord, base: _Base) -> dict[str, Any]:
    values: list[Estimate] = [getattr(head, panel.field) for head in heads]
    limits = [
        (level, value)
        for level in _LEVELS
        if (option := limit_of(newest, panel.options.format(level))) is not None
        and math.isfinite(value := panel.limit(option, base))
    ]
    reference = [getattr(head, panel.reference).mean for head in heads] if panel.reference else []
    now, interval = _in_words(panel, values[-1])
    unit = "" if panel.share else f" {panel.unit}"
    beyond = "".join(f", {level} limit {_number_in_words(panel, value)}" for level, value in limits)
    step = heads[-1].step
    return {
        "key": panel.key,
        "title": panel.title,
        "unit": panel.unit,
        "share": panel.share,
        "worse": panel.worse,
        "steps": [head.step for head in heads],
        "mean": row(value.mean for value in values),
        "low": row(value.low for value in values),
        "high": row(value.high for value in values),
        "reference": row(reference) if panel.reference else None,
        "limits": [
            {"level": level, "value": number(value), "says": _number_in_words(panel, value)} for level, value in limits
        ],
        "reach": _reach(panel, values, [value for _, value in limits], reference),
        "now": now,
        "interval": interval,
        "note": panel.moves(base) if limits else "",
        "says": f"{panel.title}: {now}{unit} at step {step}{beyond}",
    }


def _number_in_words(panel: _Panel, value: float | None) -> str:
    return percent(value) if panel.share else figure(value, signed=panel.signed)


def _in_words(panel: _Panel, value: Estimate) -> tuple[str, str]:
    if math.isnan(value.mean):
        return "not known", ""
    if not (math.isfinite(value.low) and math.isfinite(value.high)):
        return _number_in_words(panel, value.mean), ""
    low, high = _number_in_words(panel, value.low), _number_in_words(panel, value.high)
    return _number_in_words(panel, value.mean), f"{low} to {high}"


def _reach(
    panel: _Panel, values: Sequence[Estimate], limits: Sequence[float], reference: Sequence[float]
) -> list[float | None]:
    """The ends of the axis: the data with their intervals, zero, and all limits with some room beyond them."""
    ends = [end for value in values for end in (value.mean, value.low, value.high)]
    drawn = [end for end in (*ends, *limits, *reference) if math.isfinite(end)]
    if panel.key == "accuracy":
        drawn += [0.0, 1.0]
    elif not panel.share:
        drawn.append(0.0)
    if not drawn:
        return [0.0, 1.0]
    low, high = min(drawn), max(drawn)
    room = _ROOM * ((high - low) or 0.1)
    ends_of_axis = (low - room, high + room)
    if panel.key == "kl":
        ends_of_axis = (-0.03 * (high - low or 0.1), high + room)
    return [number(end) for end in ends_of_axis]


def training_curves(log: Sequence[LogRow]) -> list[dict[str, Any]]:
    """The trainer's own curves, to be drawn thin: what a look at the training log alone would show.

    Returns:
        Of each column that was logged ``column``, ``title``, ``steps`` and ``values``, at most :data:`MOST_LOGGED` points;
        ``not_finite``, place → what stands there in place of a number (the value is None); ``now``, the last in words, and
        its ``step``.
    """
    curves = []
    for column, title in LOGGED:
        points = [(logged.step, logged.logs[column]) for logged in log if column in logged.logs]
        if points:
            thin = thinned_points(points)
            curves.append(
                {
                    "column": column,
                    "title": title,
                    "steps": [step for step, _ in thin],
                    "values": row(value for _, value in thin),
                    "not_finite": {
                        str(place): logged_figure(value)
                        for place, (_, value) in enumerate(thin)
                        if not math.isfinite(value)
                    },
                    "now": logged_figure(points[-1][1], signed=column == "rewards/margins"),
                    "step": points[-1][0],
                }
            )
    return curves


def thinned_points(points: Sequence[tuple[int, float]], most: int = MOST_LOGGED) -> list[tuple[int, float]]:
    """At most so many points: of each stretch the least and the largest stay, so that no spike is lost; both ends stay too.

    Of a stretch in which a number is not finite, the first of these stays in place of the least.

    Example:
        >>> thinned_points([(step, 9.0 if step == 7 else 0.0) for step in range(100)], 10)[1:3]
        [(7, 9.0), (20, 0.0)]
    """
    if len(points) <= most:
        return list(points)
    stretches = max((most - 2) // 2, 1)
    kept = {0, len(points) - 1}
    for stretch in range(stretches):
        begin, end = stretch * len(points) // stretches, (stretch + 1) * len(points) // stretches
        places = [place for place in range(begin, end) if math.isfinite(points[place][1])]
        broken = [place for place in range(begin, end) if not math.isfinite(points[place][1])]
        kept |= {*broken[:1], *sorted(places, key=lambda place: points[place][1])[-1:]}
        if not broken:
            kept.add(min(places, key=lambda place: points[place][1]))
    return [points[place] for place in sorted(kept)]
