"""What *Alignment is Localized* and *SPINAL* claim, on DPO runs of a model at hand: as they state it, and as controls allow it.

    python benchmarks/evidence/replication --model PATH          # run, then write
    python benchmarks/evidence/replication run --model PATH --seeds 0 1 2 --runs healthy null ruined
    python benchmarks/evidence/replication write                 # docs/replication.md, of all stored runs
    python benchmarks/evidence/replication notebook              # docs/replication.ipynb, of one stored run

What is trained, audited and stored, and how a claim is judged: ``README.md`` beside this file.
"""

import argparse
import importlib
import sys
from pathlib import Path

# Run as a folder, this file's own folder is on the path, and not the one that the package lies in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COMMANDS = {
    "run": "train and audit what is missing, and store each run as soon as it ends",
    "write": "write the page of all stored runs",
    "notebook": "write the executed notebook of one stored run",
}


def main() -> None:
    arguments = sys.argv[1:]
    parser = argparse.ArgumentParser(
        prog="replication", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="command", required=True)
    options = {}
    for name, summary in COMMANDS.items():
        options[name] = parts.add_parser(name, help=summary, description=summary)
        importlib.import_module(f"replication.{name}").add_options(options[name])
    both = not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"))
    chosen = parser.parse_args(["run", *arguments] if both else arguments)
    importlib.import_module(f"replication.{chosen.command}").main(chosen)
    if both:
        importlib.import_module("replication.write").main(options["write"].parse_args(["--data", str(chosen.data)]))


if __name__ == "__main__":
    main()
