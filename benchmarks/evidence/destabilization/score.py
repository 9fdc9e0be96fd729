"""``score``: what each set of rules says of the stored runs: recall, false alarms, lead, misses by name, and curves."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import binomtest

from destabilization.curves import Dials, Point, best_at, curves
from destabilization.packages import package_rules
from destabilization.picture import draw
from destabilization.rules import AUDIT_RULES, RuleSet
from destabilization.stored import DATA, StoredRun
from destabilization.verdicts import Groups, median_leads, share, summary, verdicts

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
    parser.add_argument("--jobs", type=int, default=1, help="processes that make the curves")
    parser.add_argument("--picture", type=Path, help="with --curves: also draw them there (PNG)")
    parser.add_argument("--write", type=Path, help="also put the tables into this document, between its marks")
    parser.add_argument("--json", type=Path, help="also write all of it there")


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
    dials = Dials(options.split, options.data)
    groups, rivals = dials.groups, dials.rivals
    packages, absent = package_rules()
    sets = [*AUDIT_RULES, *rivals, *packages]
    summaries = [summary(groups, rules) for rules in sets]
    print_setting(options.split, groups, absent)
    print_summaries(summaries)
    print_kinds(groups, [*AUDIT_RULES[:2], *rivals[-2:]])
    print_names(summaries)
    result: dict[str, Any] = {"split": options.split, "summaries": summaries}
    if options.curves:
        result["curves"] = curves(dials, options.jobs)
        print_curves(result["curves"], len(groups.healthy))
        if options.picture is not None:
            draw(result["curves"], [rules.name for rules in [*AUDIT_RULES, *rivals[-3:]]], options.picture)
    print_fates(dials.runs)
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


def print_curves(drawn: dict[str, list[Point]], healthy: int) -> None:
    """Recall in time and lead at equal shares of false alarms."""
    print(f"### At equal shares of false alarms, of {healthy} healthy runs: caught in time, caught, median lead\n")
    words: Callable[[Point | None], str] = lambda point: (  # noqa: E731
        "" if point is None else f"{point['in_time']}, {point['caught']}, {lead_words(point)}"
    )
    rows = [[name, *(words(best_at(points, rate)) for rate in RATES)] for name, points in drawn.items()]
    table(["rules", *(f"at most {rate:.0%}" for rate in RATES)], rows)
