"""``tune``: what other values of one option of the alert rules would have said of the tuning split, and of no other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

from align_audit.config import AlertConfig
from align_audit.errors import ConfigurationError
from destabilization.rules import RuleSet, align_audit_rules
from destabilization.score import Groups, verdicts
from destabilization.stored import DATA, load


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("option", help="an option of AlertConfig, such as kl_warning")
    parser.add_argument("values", type=float, nargs="+", help="what to try, beside the default")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the packed files")
    parser.add_argument("--level", choices=["warning", "error"], default="warning", help="alarms of this level and up")


def main(options: argparse.Namespace) -> None:
    """Print a line a value: false alarms, what is caught and in time, and the kinds whose first alarm moved."""
    if options.option not in AlertConfig.model_fields:
        sys.exit(f"AlertConfig has no option {options.option}; it has {', '.join(AlertConfig.model_fields)}")
    groups = Groups.of(load("tuning", options.data))
    usual: dict[str, int | None] = {}
    for value in (None, *options.values):
        try:
            config = AlertConfig() if value is None else AlertConfig(**{options.option: value})
        except ConfigurationError as error:
            sys.exit(str(error))
        rules = RuleSet("", align_audit_rules(log=True, full=False, config=config))

        def first(verdict: object, level: str = options.level) -> int | None:
            return getattr(verdict, "warned" if level == "warning" else "failed")

        healthy, harmed = verdicts(groups.healthy, rules), verdicts(groups.harmed, rules)
        alarms = {verdict.run.name: first(verdict) for verdict in (*healthy, *harmed)}
        leads = [verdict.lead for verdict in harmed if verdict.lead is not None]
        said = "default" if value is None else f"{value:g}"
        print(
            f"{options.option} {said}: false {sum(first(v) is not None for v in healthy)} of {len(healthy)}, caught "
            f"{sum(first(v) is not None for v in harmed)} and in time {sum(v.in_time for v in harmed)} of {len(harmed)}, "
            f"median lead {median(leads) if leads else float('nan'):+g}"
        )
        if value is None:
            usual = alarms
        for name, step in alarms.items():
            if step != usual[name]:
                print(f"    {name}: step {usual[name]} → {step}")
