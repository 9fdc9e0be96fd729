"""``score``: what each set of rules says of the stored runs: recall, false alarms, lead, misses by name, and curves."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import binomtest

from destabilization.packages import package_rules
from destabilization.picture import draw
from destabilization.rivals import LAXNESS, rival_rules
from destabilization.rules import AUDIT_RULES, Raised, RuleSet, alarms
from destabilization.stored import DATA, StoredRun, load

IN_TIME = 2
"""Looks after the line within which an alarm of it counts as in time."""
BEGIN, END = "<!-- measured: the command score writes what stands here -->", "<!-- end of measured -->"
RATES = (0.0, 0.02, 0.05, 0.1)
"""Shares of healthy runs with an alarm, at which rule sets are compared."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--split", choices=["tuning", "scoring"], default="scoring")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the packed files")
    parser.add_argument(
        "--curves", action="store_true", help="also at other limits: recall and lead at equal false alarms"
    )
    parser.add_argument("--picture", type=Path, help="with --curves: also draw them there (PNG)")
    parser.add_argument("--write", type=Path, help="also put the tables into this document, between its marks")
    parser.add_argument("--json", type=Path, help="also write all of it there")


@dataclass(frozen=True)
class Groups:
    """Runs by what became of them.

    Attributes:
        healthy: without a fault, and fine: an alarm is false.
        harmed: ruined or wasted, with a fault or without: an alarm is due.
        worn: a warning may be, and is not counted.
        unharmed: with a fault that did nothing: an alarm is neither false nor due.
    """

    healthy: list[StoredRun]
    harmed: list[StoredRun]
    worn: list[StoredRun]
    unharmed: list[StoredRun]

    @classmethod
    def of(cls, runs: Sequence[StoredRun]) -> Groups:
        """By measurement: a kind's name plays no part."""

        def of_fate(*fates: str) -> list[StoredRun]:
            return [run for run in runs if run.outcome.fate in fates]

        fine = of_fate("healthy")
        return cls(
            [run for run in fine if not run.faulty],
            of_fate("ruined", "wasted"),
            of_fate("worn"),
            [run for run in fine if run.faulty],
        )


@dataclass(frozen=True)
class Verdict:
    """What a rule set says of one run.

    Attributes:
        warned, failed: step of the first alarm of any level, and of the first error; None where there is none.
        lead: steps from the first alarm to the line; negative where it came later. None without either.
        in_time: the alarm came before the line or within two looks after it.
    """

    run: StoredRun
    raised: list[Raised]

    @property
    def warned(self) -> int | None:
        return min((raised.step for raised in self.raised), default=None)

    @property
    def failed(self) -> int | None:
        return min((raised.step for raised in self.raised if raised.level == "error"), default=None)

    @property
    def lead(self) -> int | None:
        since, warned = self.run.outcome.since, self.warned
        return None if since is None or warned is None else since - warned

    @property
    def lead_share(self) -> float | None:
        """The lead as a share of the run."""
        return None if self.lead is None else self.lead / self.run.steps

    @property
    def in_time(self) -> bool:
        since, warned = self.run.outcome.since, self.warned
        if since is None or warned is None:
            return False
        later = [step for step in self.run.looks if step > since]
        return warned <= (later[: IN_TIME + 1] or [self.run.steps])[-1]


def verdicts(runs: Sequence[StoredRun], rules: RuleSet, laxness: float = 1.0) -> list[Verdict]:
    """What a rule set says of each run."""
    return [Verdict(run, alarms(run, rules, laxness)) for run in runs]


def share(count: int, of: int) -> str:
    """Count, number and Wilson's 95 % interval; "none" of none.

    Example:
        >>> share(0, 60)
        '0 of 60 (0 to 6 %)'
    """
    if of == 0:
        return "none"
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return f"{count} of {of} ({100 * interval.low:.0f} to {100 * interval.high:.0f} %)"


def summary(groups: Groups, rules: RuleSet, laxness: float = 1.0) -> dict[str, Any]:
    """The figures of one rule set."""
    healthy, harmed = verdicts(groups.healthy, rules, laxness), verdicts(groups.harmed, rules, laxness)
    return {
        "rules": rules.name,
        "false_warnings": sum(verdict.warned is not None for verdict in healthy),
        "false_errors": sum(verdict.failed is not None for verdict in healthy),
        "healthy": len(healthy),
        "caught": sum(verdict.warned is not None for verdict in harmed),
        "caught_by_error": sum(verdict.failed is not None for verdict in harmed),
        "in_time": sum(verdict.in_time for verdict in harmed),
        "harmed": len(harmed),
        **median_leads(harmed),
        "missed": [verdict.run.name for verdict in harmed if verdict.warned is None],
        "disturbed": {
            verdict.run.name: sorted({raised.rule for raised in verdict.raised})
            for verdict in healthy
            if verdict.raised
        },
    }


def median_leads(said: Sequence[Verdict]) -> dict[str, float | None]:
    """The median lead in steps and as a share of the run, of the runs that were told of; None where none was."""
    leads = [verdict.lead for verdict in said if verdict.lead is not None]
    shares = [verdict.lead_share for verdict in said if verdict.lead_share is not None]
    return {
        "median_lead": median(leads) if leads else None,
        "median_lead_share": median(shares) if shares else None,
    }


def main(options: argparse.Namespace) -> None:
    """Print the tables, and write them where asked."""
    print_and_write(options, report, BEGIN, END)


def print_and_write(
    options: argparse.Namespace, report: Callable[[argparse.Namespace], Any], begin: str, end: str
) -> None:
    """What a report prints, printed and put between its marks of a document, and its figures as JSON; each where asked."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = report(options)
    print(printed.getvalue())
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.write is not None:
        write_section(options.write, printed.getvalue(), begin, end)


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Score the split, print every table, and draw; the figures."""
    runs = load(options.split, options.data)
    groups = Groups.of(runs)
    packages, absent = package_rules()
    rivals = rival_rules(Groups.of(load("tuning", options.data)).healthy)
    sets = [*AUDIT_RULES, *rivals, *packages]
    summaries = [summary(groups, rules) for rules in sets]
    print_setting(options.split, groups, absent)
    print_summaries(summaries)
    print_kinds(groups, [*AUDIT_RULES[:2], *rivals[-2:]])
    print_names(summaries)
    result: dict[str, Any] = {"split": options.split, "summaries": summaries}
    if options.curves:
        dialled = [*AUDIT_RULES, *rivals]
        result["curves"] = {rules.name: curve(groups, rules) for rules in dialled}
        print_curves(result["curves"], len(groups.healthy))
        if options.picture is not None:
            draw(result["curves"], [rules.name for rules in [*AUDIT_RULES, *rivals[-2:]]], options.picture)
    print_fates(runs)
    return result


def write_section(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put the tables between the marks of a document, at its end where it has none."""
    document = path.read_text(encoding="utf-8")
    head, _, rest = document.partition(begin)
    tail = rest.partition(end)[2].strip()
    after = f"\n{tail}\n" if tail else ""
    path.write_text(f"{head.rstrip()}\n\n{begin}\n{text.strip()}\n{end}\n{after}", encoding="utf-8")


def print_setting(split: str, groups: Groups, absent: Sequence[str]) -> None:
    """Of what the figures are, and what they cannot show."""
    healthy, harmed = len(groups.healthy), len(groups.harmed)
    made = f"{platform.system()}, Python {platform.python_version()}, {datetime.date.today()}"
    print("## Measured on real runs\n")
    print(
        f"Made by `python benchmarks/evidence/destabilization score` ({made}) from the stored runs of the {split} split:\n"
        f"{healthy} healthy ones, {harmed} that were ruined or wasted, {len(groups.worn)} worn, {len(groups.unharmed)} whose "
        "fault did nothing.\nFates are measured without the audit. How runs, lines and counts came about says\n"
        "`benchmarks/evidence/destabilization/README.md`. Intervals are Wilson's at 95 %."
    )
    audited = [sum(bool(run.full) for run in side) for side in (groups.harmed, groups.healthy)]
    print(
        f"Full audits were made in {audited[0]} of the harmed runs and in {audited[1]} of the healthy ones: elsewhere\n"
        f"*{AUDIT_RULES[-1].name}* sees what looks and log show."
    )
    if healthy:
        most = binomtest(0, healthy).proportion_ci(method="wilson").high
        print(f"No false alarm in {healthy} healthy runs would still allow {most:.0%}.")
    if absent:
        print(f"Not installed, and so in no table: {', '.join(absent)}.")
    print()


def curve(groups: Groups, rules: RuleSet) -> list[dict[str, Any]]:
    """The figures at each laxness, strictest first."""
    kept = ("false_warnings", "healthy", "caught", "in_time", "harmed", "median_lead", "median_lead_share")
    return [
        {"laxness": laxness} | {name: figures[name] for name in kept}
        for laxness in LAXNESS
        for figures in [summary(groups, rules, laxness)]
    ]


def best_at(points: Sequence[dict[str, Any]], rate: float) -> dict[str, Any] | None:
    """The point that catches most in time among those with at most that share of false alarms."""
    allowed = [point for point in points if point["false_warnings"] <= rate * point["healthy"]]
    return max(
        allowed,
        key=lambda point: (
            point["in_time"],
            point["caught"],
            -math.inf if point["median_lead_share"] is None else point["median_lead_share"],
        ),
        default=None,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def print_fates(runs: Sequence[StoredRun]) -> None:
    """What became of the runs of each kind."""
    print("### What became of the runs\n")
    kinds: dict[tuple[str, str, str], list[StoredRun]] = {}
    for run in runs:
        kinds.setdefault((run.group, run.kind, run.model), []).append(run)

    def count(members: Sequence[StoredRun], fate: str) -> int | str:
        return sum(run.outcome.fate == fate for run in members) or ""

    fates = ("healthy", "worn", "ruined", "wasted")
    rows: list[list[Any]] = [
        [group, kind, model, *(count(members, fate) for fate in fates)]
        for (group, kind, model), members in kinds.items()
    ]
    rows.sort(key=lambda row: row[:3])
    rows.append(["all", "", "", *(count(runs, fate) for fate in fates)])
    table(["meant to be", "kind", "model", *fates], rows)


def print_summaries(summaries: Sequence[dict[str, Any]]) -> None:
    """One row for each rule set."""
    print("### Every set of rules\n")
    rows = [
        [
            figures["rules"],
            share(figures["false_warnings"], figures["healthy"]),
            share(figures["false_errors"], figures["healthy"]),
            share(figures["caught"], figures["harmed"]),
            share(figures["in_time"], figures["harmed"]),
            figures["caught_by_error"],
            lead_words(figures),
        ]
        for figures in summaries
    ]
    head = ["rules", "healthy with an alarm", "with an error", "caught", "in time", "by an error", "median lead"]
    table(head, rows)


def lead_words(figures: dict[str, Any]) -> str:
    """A median lead in steps and as a share of the run."""
    steps, share_of_run = figures["median_lead"], figures["median_lead_share"]
    return "" if steps is None else f"{steps:+.0f} ({share_of_run:+.0%})"


def print_kinds(groups: Groups, sets: Sequence[RuleSet]) -> None:
    """Of each kind that was harmed: how many were caught, and the median lead."""
    print("### Kind by kind: caught, and the median lead in steps\n")
    kinds: dict[tuple[str, str], list[StoredRun]] = {}
    for run in groups.harmed:
        kinds.setdefault((run.group, run.kind), []).append(run)
    rows = []
    for (group, kind), runs in sorted(kinds.items()):
        line = median(run.outcome.since or 0 for run in runs)
        row: list[Any] = [group, kind, len(runs), f"{line:.0f} of {runs[0].steps}"]
        for rules in sets:
            said = verdicts(runs, rules)
            caught = sum(verdict.lead is not None for verdict in said)
            row.append(f"{caught}, {lead_words(median_leads(said))}" if caught else "0")
        rows.append(row)
    table(["group", "kind", "runs", "line at", *(rules.name for rules in sets)], rows)


def print_names(summaries: Sequence[dict[str, Any]]) -> None:
    """Misses and false alarms of the package's rules, one by one."""
    print("### Misses and false alarms by name\n")
    for figures in summaries[: len(AUDIT_RULES)]:
        print(f"{figures['rules']}: missed {', '.join(figures['missed']) or 'none'}.")
        for name, rules in figures["disturbed"].items():
            print(f"- {name}: {', '.join(rules)}")
        print()


def print_curves(curves: dict[str, list[dict[str, Any]]], healthy: int) -> None:
    """Recall in time and lead at equal shares of false alarms."""
    print(f"### At equal shares of false alarms, of {healthy} healthy runs: caught in time, caught, median lead\n")
    words: Callable[[dict[str, Any] | None], str] = lambda point: (  # noqa: E731
        "" if point is None else f"{point['in_time']}, {point['caught']}, {lead_words(point)}"
    )
    rows = [[name, *(words(best_at(points, rate)) for rate in RATES)] for name, points in curves.items()]
    table(["rules", *(f"at most {rate:.0%}" for rate in RATES)], rows)
