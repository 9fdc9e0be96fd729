"""Real DPO runs whose fate is measured without the audit, and what each set of alert rules says of them.

    python benchmarks/evidence/destabilization run --out runs --seeds 3 --budget-minutes 60
    python benchmarks/evidence/destabilization pack --out runs
    python benchmarks/evidence/destabilization score

What each command does, and what the numbers mean: ``README.md`` beside this file.
"""

import argparse
import importlib
import sys
from pathlib import Path

# Run as a folder, this file's own folder is on the path, and not the one that the package lies in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COMMANDS = {
    "run": "train, measure the truth and audit, where that is missing",
    "pack": "keep of finished runs what scoring needs, in one file a split",
    "tune": "print what other values of an option would have said of the tuning split",
    "score": "print what each set of rules says of the packed runs",
    "inside": "print what each signal knows of a run, and when",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="destabilization", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        part = parts.add_parser(name, help=summary, description=summary)
        importlib.import_module(f"destabilization.{name}").add_options(part)
    options = parser.parse_args()
    importlib.import_module(f"destabilization.{options.command}").main(options)


if __name__ == "__main__":
    main()
