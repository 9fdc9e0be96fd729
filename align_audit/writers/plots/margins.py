"""Margins and the behavioural side-channel over a run, with its alerts.

See :mod:`align_audit.writers.plots.gallery` for what all pictures have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import is_unknown, why_unknown
from align_audit.writers.plots.canvas import (
    BLUE,
    GREEN,
    GREY,
    LEVEL_MARKS,
    ORANGE,
    PALE,
    RED,
    UNKNOWN,
    Notes,
    bars,
    draw_band,
    frame,
    hatch,
    styled,
)
from align_audit.writers.words import titled, to_draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_MARGIN_PANELS: tuple[tuple[str, tuple[tuple[str, str, str, str, str], ...]], ...] = (
    ("margin shift\n(nats)", (("shift", "margin shift", BLUE, "-", "o"),)),
    (
        "log-prob. change\n(nats per token)",
        (
            ("chosen_logp_change_per_token", "chosen", BLUE, "-", "o"),
            ("rejected_logp_change_per_token", "rejected", ORANGE, "-", "s"),
        ),
    ),
    ("KL(policy ‖ reference)\n(nats per token)", (("kl", "KL", BLUE, "-", "o"),)),
    (
        "share",
        (
            ("accuracy", "pairs with a margin shift > 0", BLUE, "-", "o"),
            ("ranking_accuracy", "pairs with a margin > 0", ORANGE, "-", "s"),
            ("token_accuracy", "next tokens right", GREEN, "-", "^"),
            ("reference_token_accuracy", "next tokens right, reference", GREEN, ":", ""),
        ),
    ),
)
"""Label of the axis, then field, legend, colour, line and mark of each curve."""


@styled
def margins_over_steps(records: Sequence[AuditRecord]) -> Figure:
    """Margin shift, log-probability changes, KL and accuracy over a run, with its alerts.

    Raises:
        ValueError: there are no records.
    """
    records = to_draw(records)
    if len(records) == 1:
        return _margins_once(records[0])
    steps = [record.step for record in records]
    alerts = [alert for record in records for alert in record.alerts if alert.event != "resolved"]
    first: dict[str, int] = {}
    for alert in alerts:
        first.setdefault(alert.rule, alert.step)
    rules = list(first)
    errors = {
        rule: min(alert.step for alert in alerts if alert.rule == rule and alert.level == "error")
        for rule in rules
        if any(alert.rule == rule and alert.level == "error" for alert in alerts)
    }
    read = "A margin that grows while the chosen log-probability falls and KL climbs is bought with damage. " + (
        "Bands are bootstrap intervals; a red line marks the first error of an alert rule."
        if errors
        else "Bands are bootstrap intervals."
    )
    notes = Notes()
    for _, series in _MARGIN_PANELS:
        for name, legend, *_ in series:
            for record in records:
                if is_unknown(getattr(record.margins, name)):
                    why = why_unknown(record, f"margins.{name}", getattr(record.margins, name))
                    notes.unknown(legend, record.step, why)
    strip = 0.25 + 0.2 * len(rules) if rules else 0.0
    title = titled("Margins and behaviour on the probe pairs, against the reference", records[-1])
    body, figure = frame(9.0, 7.4 + strip, title, read, footers=notes.lines("step"))
    heights = [strip] * bool(rules) + [1.8, 1.8, 1.8, 1.8]
    column = list(body.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    if rules:
        _draw_alerts(column.pop(0), alerts, rules)
    for axes, (label, series) in zip(column, _MARGIN_PANELS, strict=True):
        axes.axhline(0.5 if label == "share" else 0.0, color=GREY, linewidth=0.8, zorder=1)
        unknown: set[int] = set()
        for name, legend, colour, line, mark in series:
            estimates = [getattr(record.margins, name) for record in records]
            draw_band(axes, steps, estimates, colour, legend, line, mark)
            unknown |= {index for index, estimate in enumerate(estimates) if is_unknown(estimate)}
        hatch(axes, steps, sorted(unknown))
        axes.set_ylabel(label)
        if len(series) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        for step in set(errors.values()):
            axes.axvline(step, color=RED, linewidth=1.2, alpha=0.6, zorder=0)
    column[3].set_ylim(-0.03, 1.03)
    column[3].set_xlabel("training step")
    spread = max(steps) - min(steps)
    column[3].set_xlim(min(steps) - 0.03 * spread, max(steps) + 0.03 * spread)
    return figure


_PANELS_ONCE: tuple[tuple[str, float, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "nats",
        0.0,
        (
            ("shift", "margin shift", BLUE),
            ("policy", "margin, policy", BLUE),
            ("reference", "margin, reference", ORANGE),
        ),
    ),
    (
        "nats per token",
        0.0,
        (
            ("chosen_logp_change_per_token", "log-prob. change, chosen", BLUE),
            ("rejected_logp_change_per_token", "log-prob. change, rejected", BLUE),
            ("kl", "KL(policy ‖ reference)", BLUE),
            ("entropy", "entropy, policy", BLUE),
            ("reference_entropy", "entropy, reference", ORANGE),
        ),
    ),
    (
        "share",
        0.5,
        (
            ("accuracy", "pairs with a margin shift > 0", BLUE),
            ("ranking_accuracy", "pairs with a margin > 0", BLUE),
            ("token_accuracy", "next tokens right, policy", BLUE),
            ("reference_token_accuracy", "next tokens right, reference", ORANGE),
        ),
    ),
)
"""Unit and what is no change, then field, name and colour of each estimate."""


def _margins_once(record: AuditRecord) -> Figure:
    """One audit: every estimate as a point with its interval, one panel for each unit."""
    notes = Notes()
    for _, _, rows in _PANELS_ONCE:
        for name, label, _ in rows:
            if is_unknown(getattr(record.margins, name)):
                notes.unknown(label, None, why_unknown(record, f"margins.{name}", getattr(record.margins, name)))
    warnings = [
        f"Alert ({alert.level}) {alert.rule}: {alert.message}"
        for alert in record.alerts
        if alert.level != "info" and alert.event != "resolved"
    ]
    body, figure = frame(
        9.0,
        0.6 * len(_PANELS_ONCE) + 0.24 * sum(len(rows) for _, _, rows in _PANELS_ONCE),
        titled(f"Step {record.step}. Margins and behaviour on the probe pairs, against the reference", record),
        "A margin that grew while the chosen log-probability fell and KL climbed was bought with damage. Points are "
        "means over pairs with their bootstrap intervals, the reference's own in orange.",
        warnings,
        notes.lines("step"),
    )
    column = body.subplots(len(_PANELS_ONCE), 1, height_ratios=[1.2 + len(rows) for _, _, rows in _PANELS_ONCE])
    for axes, (unit, no_change, rows) in zip(column, _PANELS_ONCE, strict=True):
        axes.axvline(no_change, color=GREY, linewidth=0.8, zorder=1)
        for row, (name, _, colour) in enumerate(rows):
            _draw_point(axes, row, getattr(record.margins, name), colour)
        axes.set_yticks(range(len(rows)), [label for _, label, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(unit)
        if unit == "share":
            axes.set_xlim(-0.02, 1.02)
    return figure


def _draw_point(axes: Axes, row: int, estimate: Estimate, colour: str) -> None:
    """An estimate with its interval in a row, its number at the right; hatched where it is not known."""
    if is_unknown(estimate):
        axes.axhspan(row - 0.4, row + 0.4, facecolor=UNKNOWN, edgecolor="#a8a8a8", hatch="////", linewidth=0)
        return
    axes.errorbar([estimate.mean], [row], xerr=bars([estimate]), color=colour, marker="o", capsize=3, zorder=3)
    axes.annotate(f"{estimate.mean:.3g}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)


def _draw_alerts(axes: Axes, alerts: Sequence[Alert], rules: Sequence[str]) -> None:
    for level, (mark, colour) in LEVEL_MARKS.items():
        of_level = [alert for alert in alerts if alert.level == level]
        if of_level:
            axes.scatter(
                [alert.step for alert in of_level],
                [rules.index(alert.rule) for alert in of_level],
                marker=mark,
                color=colour,
                s=32,
                linewidths=0,
                label=level,
                zorder=3,
            )
    for row in range(len(rules)):
        axes.axhline(row, color=PALE, linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rules)), rules)
    axes.set_ylim(len(rules) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", bottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title("alerts", loc="left", fontsize=8.5, fontweight="bold", pad=3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
