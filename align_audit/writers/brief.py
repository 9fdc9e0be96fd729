"""An audit in a line while all is well, and in five when it is not: is it broken, since when, what to do, and where.

::

    align_audit step 40  HEALTHY  chosen +0.01, KL 0.04 (limit 0.35), tokens 82 %, reward margin +0.5   4.1 s
    align_audit step 20  ERROR  the policy is leaving its language   6.5 s
      chosen answers  −5.40 nats/token, less likely (limit −0.6)   next tokens right  40 % (reference 82 %)
      KL to reference  9.40 nats/token (limit 0.7)                 reward margin  +7.90 (training log: +4.90)
      where  peak at layer 0, 31 % of the gain, not localized      evidence  4 of 5 controls (not split half)
      do     last clean audit: step 0; no checkpoint from then was kept. Learning rate 0.003 → 0.0006 or lower
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align_audit.options.rules import NO_WAY_BACK
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.writers.standing import (
    Standing,
    evidence_in_words,
    figure,
    logged_figure,
    percent,
    where_in_words,
)
from align_audit.writers.styled import RED, STATUS_STYLES, Part, text_of
from align_audit.writers.words import pairs_in_words

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_APART = 3
"""Blanks between two things that stand in a line."""

Cell = tuple[Part, ...]
Line = tuple[Cell, ...]
"""What stands side by side where there is room, and below each other where there is not."""


@dataclass(frozen=True)
class Brief:
    """A rich renderable. Off a terminal no line is broken, so that a search in a log finds all of it."""

    head: tuple[Part, ...]
    lines: tuple[Line, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        def text(parts: Sequence[Part]) -> Any:
            words: Text = text_of(parts, options)
            if not options.is_terminal:
                words.no_wrap, words.overflow = True, "ignore"
            return words

        room = max(options.max_width - 2, 10)
        first, *rest = text(self.head).wrap(console, room) if options.is_terminal else [text(self.head)]
        yield first
        yield from (Padding(line, (0, 0, 0, 2), expand=False) for line in rest)
        column = max((_length(line[0]) for line in self.lines if len(line) > 1), default=0) + _APART
        for line in self.lines:
            fits = len(line) > 1 and (not options.is_terminal or column + _length(line[1]) <= room)
            for cell in [_beside(line, column)] if fits else line:
                yield (
                    Padding(text(cell), (0, 0, 0, 2), expand=False)
                    if options.is_terminal
                    else text((("  ", ""), *cell))
                )


def brief(standing: Standing) -> Brief:
    """What a screen says of an audit first."""
    word = standing.status.word
    if word == "HEALTHY":
        return Brief(_head(standing, _at_start(standing) or figures_in_words(standing)))
    return Brief(
        _head(standing, standing.headline()),
        (
            (_chosen(standing), _tokens(standing)),
            (_kl(standing), _margin(standing)),
            (_where(standing), _evidence(standing)),
            (_cell("do   ", what_to_do(standing)),),
        ),
    )


def brief_of_more(standing: Standing) -> Brief:
    """What a full audit adds to the health audit of the same step: where, and with what evidence."""
    where, evidence = _where(standing), _evidence(standing)
    took = (f"{' ' * _APART}{standing.record.cost.seconds:.1f} s", "dim")
    return Brief((*_name(standing.record), ("  ", ""), *where, (" " * _APART, ""), *evidence, took))


def _length(cell: Cell) -> int:
    return sum(len(words) for words, _ in cell)


def _beside(line: Line, column: int) -> Cell:
    """Two cells in one, the second at a column."""
    first, second = line
    return (*first, (" " * (column - _length(first)), ""), *second)


# --- one line ---------------------------------------------------------------------------------------------------------


def _name(record: AuditRecord) -> tuple[Part, ...]:
    name = record.provenance.probe_name
    return (f"align_audit step {record.step}", "bold"), ("" if name is None else f" on {name!r}", "")


def _head(standing: Standing, words: str) -> tuple[Part, ...]:
    word = standing.status.word
    style = RED if word == "BLIND" and standing.broken else STATUS_STYLES[word]
    took = f"{' ' * _APART}{standing.record.cost.seconds:.1f} s"
    return (*_name(standing.record), ("  ", ""), (word, style), (f"  {words}", ""), (took, "dim"))


def _at_start(standing: Standing) -> str | None:
    """Of an audit before training, in which there is nothing to compare yet; None: of any other."""
    record = standing.record
    if record.step != 0 or not record.reference_check.same_weights:
        return None
    words = f"policy and reference are equal before training: {pairs_in_words(record)}"
    return f"{words}, tokens {percent(record.margins.token_accuracy.mean)}"


def figures_in_words(standing: Standing) -> str:
    """``chosen +0.01, KL 0.04 (limit 0.35), tokens 82 %, reward margin +0.50``."""
    margins, limit = standing.record.margins, standing.limit("kl")
    kl = f"KL {figure(margins.kl.mean)}" + ("" if limit is None else f" (limit {limit:.3g})")
    return ", ".join(
        (
            f"chosen {figure(margins.chosen_logp_change_per_token.mean, signed=True)}",
            kl,
            f"tokens {percent(margins.token_accuracy.mean)}",
            _margin_in_words(standing),
        )
    )


def _margin_in_words(standing: Standing) -> str:
    margin = standing.reward_margin
    if margin is None:
        return f"margin shift {figure(standing.record.margins.shift.mean, signed=True)} nats"
    return f"reward margin {figure(margin, signed=True)}"


# --- five lines -------------------------------------------------------------------------------------------------------


def _cell(label: str, words: str, style: str = "") -> Cell:
    return (label, "bold"), (f"  {words}", style)


def _style(standing: Standing, beyond: bool) -> str:
    """The colour of a figure beyond its limit."""
    return STATUS_STYLES[standing.status.word] if beyond and standing.status.word in ("WATCH", "ERROR") else ""


def _chosen(standing: Standing) -> Cell:
    change, limit = standing.record.margins.chosen_logp_change_per_token.mean, standing.limit("chosen_drop")
    words = figure(change, signed=True) + (" nats/token" if math.isfinite(change) else "")
    if abs(change) >= 0.01:
        words += ", less likely" if change < 0 else ", more likely"
    beyond = limit is not None and change < -limit
    return _cell(
        "chosen answers", words + ("" if limit is None else f" (limit −{limit:.3g})"), _style(standing, beyond)
    )


def _tokens(standing: Standing) -> Cell:
    margins = standing.record.margins
    now, reference = percent(margins.token_accuracy.mean), percent(margins.reference_token_accuracy.mean)
    return _cell("next tokens right", f"{now} (reference {reference})")


def _kl(standing: Standing) -> Cell:
    limit = standing.limit("kl")
    kl = standing.record.margins.kl.mean
    beyond = limit is not None and kl > limit
    words = figure(kl) + (" nats/token" if math.isfinite(kl) else "")
    words += "" if limit is None else f" (limit {limit:.3g})"
    return _cell("KL to reference", words, _style(standing, beyond))


def _margin(standing: Standing) -> Cell:
    margin, logged = standing.reward_margin, standing.logged
    if margin is None:
        return _cell("margin shift", f"{figure(standing.record.margins.shift.mean, signed=True)} nats")
    words = figure(margin, signed=True)
    if logged is not None:
        at = "" if logged.step == standing.record.step else f" at step {logged.step}"
        words += f" (training log{at}: {logged_figure(standing.logged_margin, signed=True)})"
    return _cell("reward margin", words)


def _where(standing: Standing) -> Cell:
    return _cell("where", where_in_words(standing.full, standing.record.step))


def _evidence(standing: Standing) -> Cell:
    words = evidence_in_words(standing.full)
    if standing.full is not None and standing.broken:
        return _cell("evidence", f"{words}: the identity control failed", RED)
    return _cell("evidence", words)


# --- what to do -------------------------------------------------------------------------------------------------------


def what_to_do(standing: Standing, command: bool = True) -> str:
    """The next step, in a line: where to go back to, and the knob. The alert itself says it in whole.

    Args:
        command: with that which goes back; False: it is shown beside.
    """
    if standing.status.word == "BLIND" or (alert := standing.worst) is None:
        return standing.status.advice or "nothing to do"
    knob = alert.knob or (alert.remedy or alert.suggestion).split(". ")[0]
    steps = ". ".join(words for words in (_back(alert, command), knob.rstrip(".")) if words)
    occasion = standing.record.occasion
    if alert.looks == 0 and steps and occasion is not None and occasion.next_step is not None:
        return f"wait for the next look, which ends this if it does not see it either; else {steps}"
    return steps


def _back(alert: Alert, command: bool) -> str:
    if alert.cause == "" or alert.cause in NO_WAY_BACK:
        return ""
    if alert.clean_step is None:
        # What nothing was advised of is no fault of the training: an audit of saved checkpoints was given a wrong reference.
        return "" if alert.cause == "reference" and not alert.remedy else "no clean audit before it"
    clean = f"last clean audit: step {alert.clean_step}"
    if alert.checkpoint is None and alert.clean_step == 0:
        return f"{clean}, before training; start again from that model"
    if alert.checkpoint is None:
        return f"{clean}; no checkpoint from then or before was kept (save_steps, save_total_limit)"
    go = (alert.command if command else None) or alert.checkpoint
    when = "go back" if alert.level == "error" else "should it become an error, go back"
    return f"{clean}; {when} to {alert.checkpoint}" + (f": {go}" if go != alert.checkpoint else "")
