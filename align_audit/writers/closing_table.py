"""What a run ends with on a terminal: a table over its checkpoints, the latest healthy one, and what was left out."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from align_audit.errors import counted, listed, plain, plural
from align_audit.record.course import present_course
from align_audit.record.log import FAILURES, REPORT
from align_audit.record.numbers import span
from align_audit.record.run import AuditRun
from align_audit.record.status import Status
from align_audit.record.stored_records import heads_of
from align_audit.writers.latest_healthy import latest_healthy
from align_audit.writers.standing import Standing, figure, percent, standings_over, where_in_short
from align_audit.writers.styled import STATUS_STYLES, overflow_of, text_of
from align_audit.writers.words import cost_in_words, on_probes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

MOST_ROWS = 24
"""Rows of a table; of more, those at which the status changes stay, and the rest is thinned out evenly."""


@dataclass(frozen=True)
class _Table:
    """The audits of one probe set."""

    title: str
    rows: tuple[Standing, ...]
    left_out: int
    status: Status
    """Of the set now, which a failure since the last audit may have changed."""

    @property
    def _by_beta(self) -> bool:
        """Whether margins are shown in TRL's unit: β is known at every row."""
        return all(row.reward_margin is not None for row in self.rows)

    def _columns(self) -> tuple[str, ...]:
        unit = "margin" if self._by_beta else "shift (nats)"
        return "step", "status", "chosen", "KL", "tokens", "reward acc.", unit, "where"

    def _cells(self) -> Iterator[tuple[str, ...]]:
        """Of each row, in the order of the columns; the status is the second."""
        for row in self.rows:
            margins = row.record.margins
            margin = row.reward_margin if self._by_beta else margins.shift.mean
            same = row.record.reference_check.same_weights
            yield (
                str(row.record.step),
                self.status.word if row is self.rows[-1] else row.status.word,
                figure(margins.chosen_logp_change_per_token.mean, signed=True),
                figure(margins.kl.mean),
                percent(margins.token_accuracy.mean),
                percent(row.reward_accuracy.mean) if math.isfinite(row.reward_accuracy.mean) else "–",
                "–" if same else figure(margin, signed=True),
                where_in_short(row.full if row.full is not None and row.full.step == row.record.step else None),
            )

    def _rest(self) -> str:
        verb = "is" if self.left_out == 1 else "are"
        return f"{counted(self.left_out, 'more audit')} {verb} in the record log" if self.left_out else ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        def text(words: str, style: str = "") -> Any:
            return text_of([(words, style)], options)

        title = text(self.title, "bold")
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        *columns, where = self._columns()
        for name in columns:
            justify: Literal["left", "right"] = "left" if name == "status" else "right"
            table.add_column(name, justify=justify, no_wrap=True, overflow=overflow_of(options))
        table.add_column(where, overflow=overflow_of(options))
        for cells in self._cells():
            styles = ("", STATUS_STYLES[cells[1]], *[""] * (len(cells) - 2))
            table.add_row(*map(text, cells, styles))
        yield table
        if self._rest():
            yield text(self._rest(), "dim")

    def html(self) -> str:
        """As a table of a page; every text in it is escaped."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self._columns())
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(plain(cell))}</td>" for cell in cells) + "</tr>"
            for cells in self._cells()
        )
        rest = f"<p>{self._rest()}</p>" if self._rest() else ""
        caption = f"<caption>{html.escape(plain(self.title))}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{rest}"


@dataclass(frozen=True)
class _Line:
    """A sentence below the tables."""

    words: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = text_of([(self.words, self.style)], options)
        if not options.is_terminal:
            text.no_wrap, text.overflow = True, "ignore"
        yield text

    def html(self) -> str:
        """As a paragraph of a page, escaped."""
        return f"<p>{html.escape(plain(self.words))}</p>"


def closing(run: AuditRun, checkpoints: Mapping[int, str]) -> list[_Table | _Line]:
    """Rich renderables: a table for each probe set, what did not come through or did not fit, and the latest healthy audit.

    Args:
        checkpoints: step → name, of those that exist.
    """
    said: list[_Table | _Line] = []
    for name in run.probe_names:
        of_set = run.select(name)
        rows = _by_step(of_set)
        if not rows:  # the run went back to before the first of them
            continue
        shown = thinned(rows, checkpoints)
        title = f"align_audit{on_probes(rows[-1].record)}: {counted(rows[-1].record.provenance.pairs, 'pair')}, {_steps(rows)}"
        if not of_set.in_use:
            title += f"; the run goes on without this set since step {rows[-1].record.step}"
        said.append(_Table(title, tuple(shown), len(rows) - len(shown), of_set.status))
        if words := _on_other_pairs(rows):
            said.append(_Line(words))
    if not said:
        return []
    said += [_Line(words) for words in (_trained_on(run), _broken(run), _unaffordable(run, checkpoints)) if words]
    heads = heads_of(run.records)
    if any(head.occasion is not None and head.occasion.share_spent is not None for head in heads):
        said.append(_Line(cost_in_words(heads), "dim"))
    report = run.directory / REPORT
    end = f" · report: {plain(report)}" if report.is_file() else ""
    return [*said, _Line(f"latest healthy: {latest_healthy(run, checkpoints)}{end}", "bold")]


def _trained_on(run: AuditRun) -> str:
    """What figures of training pairs are worth; nothing where no set is known to be trained on."""
    if not any(record.provenance.probe_held_out is False for record in run.records[-1:]):
        return ""
    return "The policy is trained on these pairs: accuracy and margins look too good. Pass held-out ones (probes=...)"


def _by_step(run: AuditRun) -> list[Standing]:
    """How the run stood at each of its steps; a full audit counts for its step, where there was one."""
    return standings_over(present_course(run.records), run.training_log)


def _on_other_pairs(rows: Sequence[Standing]) -> str:
    """Which audits were made on other pairs than the last, as of a run that went on with other options."""
    last = rows[-1].record.provenance
    apart = [row.record for row in rows if row.record.provenance.probe_hash != last.probe_hash]
    if not apart:
        return ""
    pairs = sorted({record.provenance.pairs for record in apart})
    counts = "" if pairs == [last.pairs] else f" ({listed(map(str, pairs))}, not {last.pairs})"
    steps = f"{plural('step', len(apart))} {span([record.step for record in apart])}"
    return f"{steps}: audited on other pairs{counts} than the last, so that numbers differ by the pairs as well"


def _steps(rows: Sequence[Standing]) -> str:
    full = sum(row.record.kind == "full" for row in rows)
    return f"{counted(len(rows), 'step')} audited, {full} in full"


def thinned(rows: Sequence[Standing], checkpoints: Mapping[int, str], most: int = MOST_ROWS) -> list[Standing]:
    """At most so many rows: ends, changes of status and checkpoints first, then evenly."""
    if len(rows) <= most:
        return list(rows)
    changes = [place for place in range(1, len(rows)) if rows[place].status.word != rows[place - 1].status.word]
    saved = [place for place, row in enumerate(rows) if row.record.step in checkpoints]
    evenly = [round(place * (len(rows) - 1) / (most - 1)) for place in range(most)]
    kept: set[int] = set()
    for place in (0, len(rows) - 1, *changes, *reversed(saved), *evenly):
        if len(kept) < most:
            kept.add(place)
    return [rows[place] for place in sorted(kept)]


def _broken(run: AuditRun) -> str:
    if not run.failures:
        return ""
    steps = sorted({failure.step for failure in run.failures})
    count = len(run.failures)
    where = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    audits = "an audit" if count == 1 else counted(count, "audit")
    return f"{audits} broke at {where}: the tracebacks are in {plain(run.directory / FAILURES)}"


def _unaffordable(run: AuditRun, checkpoints: Mapping[int, str]) -> str:
    """Full audits that the budget had no room for, of steps that have none by now: what one takes, and how to get it."""
    heads = heads_of(present_course(run.records))
    full = {head.step for head in heads if head.kind == "full"}
    asked: dict[int, float] = {}
    for head in heads:
        seconds = None if head.occasion is None else head.occasion.unaffordable_seconds
        if seconds is not None and head.step not in full:
            asked[head.step] = seconds
    if not asked:
        return ""
    last = max(asked)
    takes = f" (about {asked[last]:.0f} s each)"
    audits = "a full audit" if len(asked) == 1 else counted(len(asked), "full audit")
    steps = f"{plural('step', len(asked))} {span(list(asked))}"
    afterwards = ""
    if last in checkpoints:
        folder = plain(run.output_dir / checkpoints[last])
        afterwards = (
            f", or afterwards: align-audit run {folder} --probes PAIRS (and --reference MODEL, if not an adapter)"
        )
    return (
        f"{audits} did not fit the budget{takes}: where the preference sits was not measured at {steps}. "
        f"To get it: AuditConfig(budget=None), or a larger budget{afterwards}"
    )
