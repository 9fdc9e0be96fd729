"""What a rule sees: the look to judge, the looks before it on the same pairs, the trainer's log, and the limits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from statistics import median

from align_audit.alerts.curves import TrainerLog
from align_audit.config import AlertConfig
from align_audit.options.rules import LIMITS, RULE_OF, Level, Limit, Rule, Source, Weight
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import by_path
from align_audit.record.open_alerts import is_serious
from align_audit.record.stored_records import Head, chosen, heads_of

FURTHEST = 8
"""Audits that are looked back over for one with a certain part: each that is looked at has to be parsed."""
_IN_FULL: tuple[Source, ...] = ("patching", "localization", "low_rank", "spinal")
"""Parts that full audits have and others do not."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What a rule of the trainer's log sees.

    Attributes:
        step: that is judged.
        log: the trainer's, up to the step.
        max_steps: of the run; None: not known.
        eased: options of limits that are eased, because an alert that went by them is open.
    """

    step: int
    config: AlertConfig
    log: TrainerLog = field(default_factory=TrainerLog)
    max_steps: int | None = None
    eased: frozenset[str] = frozenset()

    def limit(self, option: str) -> float:
        """The value of a limit, eased where an alert that went by it is open."""
        value: float = getattr(self.config, option)
        return LIMITS[option].eased(value, self.config.hysteresis) if option in self.eased else value

    @property
    def begun_at(self) -> float:
        """The step from which on something should have been learned."""
        if self.max_steps is None:
            return self.config.never_started_steps
        return self.config.never_started_share * self.max_steps

    @property
    def half_way(self) -> bool:
        """Has the run gone so far that what it learns should be seen on the probes?"""
        share, steps = self.config.nothing_learned_share, self.config.nothing_learned_steps
        return self.step >= (steps if self.max_steps is None else share * self.max_steps)

    @property
    def begun(self) -> bool:
        """Has the run gone far enough for something to have been learned?"""
        return self.step >= self.begun_at


@dataclass(frozen=True, kw_only=True)
class History(View):
    """What a rule sees of one probe set.

    Attributes:
        record: the audit to judge.
        earlier: those of earlier steps on the same pairs, oldest first.
        course: those of the run on whatever pairs, by step; empty: ``earlier`` are all.
    """

    record: AuditRecord
    earlier: Sequence[AuditRecord] = ()
    course: Sequence[AuditRecord] = ()

    @property
    def preceding(self) -> Sequence[AuditRecord]:
        """Those of earlier steps on whatever pairs, oldest first: what does not depend on pairs is compared with these."""
        return chosen(self.course, lambda head: head.step < self.step) if self.course else self.earlier

    @property
    def healthy(self) -> Sequence[AuditRecord]:
        """Earlier audits of the trained policy against this reference at which no warning was open: the run's own baseline."""
        reference = self.record.provenance.reference_hash
        return chosen(
            self.earlier,
            lambda head: (
                head.step > 0
                and head.judged
                and head.reference_hash == reference
                and not any(map(is_serious, head.alerts))
            ),
        )

    def baseline(self, value: Callable[[AuditRecord], float], source: Source = "margins") -> float | None:
        """Median of ``value`` over the first healthy audits, or None before there are enough of them.

        Args:
            source: the part of a record that ``value`` reads.
        """
        needed = self.config.baseline_audits
        healthy = self.healthy
        if source in _IN_FULL:
            healthy = chosen(healthy, lambda head: head.kind == "full")
        # No more than these: each record that is looked at has to be parsed.
        finite = (number for record in healthy[:FURTHEST] if math.isfinite(number := value(record)))
        first = list(islice(finite, needed))
        return median(first) if len(first) == needed else None

    @cached_property
    def heads(self) -> list[Head]:
        """Of the audits before, against this reference and of the trained policy."""
        reference = self.record.provenance.reference_hash
        return [head for head in heads_of(self.earlier) if head.step > 0 and head.reference_hash == reference]

    def at(self, record: AuditRecord) -> History:
        """What was to be seen at one of the audits before. The trainer's log ends at its step."""
        earlier = chosen(self.earlier, lambda head: head.step < record.step)
        log = self.log.until(record.step)
        return replace(self, step=record.step, record=record, earlier=earlier, log=log, eased=frozenset())

    def last(self, source: Source) -> History | None:
        """The look before this one that has a part; None: there is none, or none of the last few has it."""
        earlier = chosen(self.earlier, lambda head: head.kind == "full") if source in _IN_FULL else self.earlier
        for record in reversed(earlier[-FURTHEST:]):
            if record.step < self.step and measured(record, source):
                return self.at(record)
        return None


def measured(record: AuditRecord, source: Source) -> bool:
    """Has a record the part that a rule reads?"""
    if source == "generations":
        return record.generations is not None
    if source == "patching":
        return record.patching is not None
    if source == "localization":
        return record.localization is not None
    if source == "low_rank":
        return bool(record.low_rank.get("shift"))
    if source == "spinal":
        return record.spinal is not None
    return True


def knows(history: History, rule: Rule) -> bool:
    """Is every number that a rule reads known at a look? Of several under one name (of layers, say) one has to be."""
    numbers = by_path(history.record)
    for read in rule.reads:
        # One number, or all of a sequence.
        path = re.compile(re.escape(read).replace(r"\*", "[^.]+") + r"(\.\d+)*")
        values = [number.value for name, number in numbers.items() if path.fullmatch(name)]
        if values and all(value is None or math.isnan(value) for value in values):
            return False
    return True


@dataclass(frozen=True)
class Sign:
    """What one rule saw at one look.

    Attributes:
        level: the limit that the value lies beyond.
        limit, baseline: in the unit of the value, so that they can be drawn together.
        step: of the look it was seen at; earlier than the one to judge where that has not measured it.
        held: looks in a row, up to this one, at which it was seen, as far as was looked back.
        since: the step of the first of these.
        error_looks: of them, the last ones in a row at which it lay beyond the limit of an error.
        few: it goes by a mean without an interval, which is of so many: "6 pairs", "4 prompts".
        witness: this time it opens nothing alone, though its rule may.
    """

    rule: Rule
    level: Level
    value: float
    message: str
    suggestion: str
    limit: float | None = None
    baseline: float | None = None
    layers: Sequence[int] = ()
    step: int = -1
    held: int = 1
    since: int = -1
    error_looks: int = 0
    probe_name: str | None = None
    few: str | None = None
    witness: bool = False

    @property
    def weight(self) -> Weight:
        """What it counts for: what its rule does, unless it is a witness this time."""
        return "witness" if self.witness else self.rule.weight

    @property
    def words(self) -> str:
        """The message, with what has to be known beside it."""
        words = self.message
        if self.limit is not None:
            # As the value is told: a share of a few per cent beside a limit of 0.65 is read twice.
            in_per_cent = any(_has(words, f"{self.value:{form}}") for form in (".0%", ".1%"))
            limit = f"{100 * self.limit:.3g}%" if in_per_cent else f"{self.limit:.3g}"
            if not _has(words, limit):
                words += f" The limit is {limit}."
        if self.few is not None:
            words += f" (Of {self.few}, too few for an interval: this goes by the mean alone.)"
        return words if self.probe_name is None else f"On the probes {self.probe_name!r}: {words}"


def _has(words: str, number: str) -> bool:
    """Does a number stand in words, and not as a part of another one?"""
    return re.search(rf"(?<![\d.]){re.escape(number)}(?!\.?\d)", words) is not None


Detector = Callable[[History], Sign | None]
"""What computes a rule of a record: a pure function of a history."""
LogDetector = Callable[[View], Sign | None]
"""What computes a rule of the trainer's log."""


def least(value: Estimate) -> float:
    """Where the interval begins; the mean where there are too few pairs for one, so that a ruined model is not passed over."""
    return value.mean if math.isnan(value.low) else value.low


def most(value: Estimate) -> float:
    """Where the interval ends, or the mean."""
    return value.mean if math.isnan(value.high) else value.high


def beyond(view: View, value: float, *options: str) -> Limit | None:
    """The limit of the highest level among these options that a value lies beyond; None where it is beyond none, or NaN.

    A rule that may give a warning at most has no limit of an error.
    """
    for option in sorted(options, key=lambda option: LIMITS[option].level != "error"):
        limit, at = LIMITS[option], view.limit(option)
        if limit.level == "error" and not view.config.may_be_error(RULE_OF[option]):
            continue
        if value > at if limit.direction == "above" else value < at:
            return limit
    return None


def level_of(limit: Limit) -> Level:
    """What lies beyond a limit."""
    assert limit.level is not None, f"{limit.option} is no limit of a level"
    return limit.level
