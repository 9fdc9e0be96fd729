"""An alert in whole on a terminal: what was seen and what to do, or that it is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align_audit.record.alert import Alert
from align_audit.record.numbers import is_unknown, span
from align_audit.writers.styled import LEVEL_STYLES, text_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class _AlertPanel:
    alert: Alert
    advise: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.console import Group
        from rich.panel import Panel

        alert, resolved = self.alert, self.alert.event == "resolved"
        style = "green" if resolved else LEVEL_STYLES[alert.level]
        parts = [text_of([(alert.message, "")], options)]
        if self.advise and not resolved:
            parts.append(text_of([("To do: ", "bold"), (alert.suggestion, "")], options))
            if alert.command is not None:
                parts.append(text_of([("Go back with: ", "bold"), (alert.command, "")], options))
        numbers = {"value": alert.value, "baseline": alert.baseline, "threshold": alert.threshold}
        given = [
            f"{name} {value:.3g}" for name, value in numbers.items() if value is not None and not is_unknown(value)
        ]
        if given:
            parts.append(text_of([(", ".join(given), "dim")], options))
        title = text_of([(_title(alert), style)], options)
        if options.is_terminal:
            yield Panel(Group(*parts), title=title, title_align="left", border_style=style)
        else:
            yield title
            for part in parts:
                for line in part.wrap(console, max(options.max_width - 2, 10)):
                    line.rstrip()
                    line.pad_left(2)
                    yield line


def alert_panel(alert: Alert, advise: bool = True) -> _AlertPanel:
    """A rich renderable: what an alert saw, and (``advise``) what to do; of a resolved one, that it is over."""
    return _AlertPanel(alert, advise)


def _title(alert: Alert) -> str:
    """``ERROR kl_out_of_bounds (step 20, layers 3–5)``, ``RESOLVED kl_out_of_bounds (step 60, warning since step 20)``."""
    details = [f"step {alert.step}"]
    since = f"since step {alert.since}" if alert.since is not None and alert.since != alert.step else ""
    if alert.event == "resolved":
        details.append(f"{alert.level} {since}".strip())
    elif alert.event == "worse":
        details.append(f"worse, {since}" if since else "worse")
    elif since:
        details.append(since)
    if alert.probe_name is not None:
        details.append(f"probes {alert.probe_name!r}")
    if alert.layers:
        details.append(f"layers {span(alert.layers)}")
    return f"{'RESOLVED' if alert.event == 'resolved' else alert.level.upper()} {alert.rule} ({', '.join(details)})"
