"""``tune``: what other values of one option of the alert rules would have said of the tuning split, and of no other."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from align_audit.config import AlertConfig
from align_audit.errors import ConfigurationError
from destabilization.rules import RuleSet, align_audit_rules
from destabilization.stored import DATA, load
from destabilization.verdicts import Groups, Verdict, verdicts


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("option", help="an option of AlertConfig, such as kl_warning")
    parser.add_argument("values", type=float, nargs="+", help="what to try, beside the default")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the packed files")
    parser.add_argument(
        "--level",
        choices=["warning", "error"],
        default="warning",
        help="which alarms are counted; in time and lead are of the first of any",
    )


def main(options: argparse.Namespace) -> None:
    """Print a line a value: false alarms, what is caught and in time, and the kinds whose first alarm moved."""
    if options.option not in AlertConfig.model_fields:
        sys.exit(f"AlertConfig has no option {options.option}; it has {', '.join(AlertConfig.model_fields)}")
    groups = Groups.of(load("tuning", options.data))
    usual = _say(options, "default", AlertConfig(), groups)
    for value in options.values:
        try:
            config = AlertConfig(**{options.option: value})
        except ConfigurationError as error:
            sys.exit(str(error))
        for name, step in _say(options, f"{value:g}", config, groups).items():
            if step != usual[name]:
                print(f"    {name}: step {usual[name]} → {step}")


def _say(options: argparse.Namespace, value: str, config: AlertConfig, groups: Groups) -> dict[str, int | None]:
    """Print the line of one value; run → step of its first alarm."""
    rules = RuleSet("", align_audit_rules(log=True, full=False, config=config))
    healthy, harmed = verdicts(groups.healthy, rules), verdicts(groups.harmed, rules)
    steps = {each.run.name: each.failed if options.level == "error" else each.warned for each in (*healthy, *harmed)}

    def alarmed(of: Sequence[Verdict]) -> int:
        return sum(steps[each.run.name] is not None for each in of)

    leads = [each.lead for each in harmed if each.lead is not None]
    print(
        f"{options.option} {value}: false {alarmed(healthy)} of {len(healthy)}, caught {alarmed(harmed)} and in time "
        f"{sum(each.in_time for each in harmed)} of {len(harmed)}, median lead {median(leads) if leads else math.nan:+g}"
    )
    return steps
