"""The engine against plain hooks and against each tool that is installed, on one job: time, memory, numbers.

    python benchmarks/engine --json engine.json
    python benchmarks/engine --layers 4 --pairs 4 --sweeps layers ranks --repeats 1
    python benchmarks/engine --model PATH --pairs 8 --pairs-per-batch 1 --contenders hooks nnsight-skip align_audit --repeats 1
    python benchmarks/engine --peer-python nnterp=venvs/nnterp/bin/python --peer-python pyvene=venvs/pyvene/bin/python
    python benchmarks/engine --scaling
    python benchmarks/engine --profile
    python benchmarks/engine --device cuda --dtype bfloat16 --layers 16 --width 2048 --pairs 32 --pairs-per-batch 8

The job (``engine/job.py``): a randomly initialized Llama, or a pretrained model, and a policy near it; real preference pairs
where the data is present. ``layers`` patches the policy's stream into the reference at each layer, ``ranks`` its projection on
the top 1, 2, 4, 8 and 16 directions of the shift at each layer, ``audit`` is a whole audit at default settings (beside the
layer sweep with hooks of the same pairs, ``layers`` has to run too). Contenders, and how each is written:
``engine/contenders/``.

Each run is a process of its own; what is timed starts after imports, loading, wrapping and a warm-up on one pair. Repeats
are interleaved: all contenders once, then all again. CPU seconds are the process's user and system time; memory is the
peak of resident memory above what the models take. With ``--device cuda`` wall seconds are compared instead, until the
device has finished, and memory is what torch allocates there; all contenders take their turns in this process, each with
models of its own, because starting and loading would cost more time of the device than the sweeps.
In the rank sweep the peers are *given* the bases; align_audit fits its own and also runs the layer sweep, all of it in
its time.

Peers: ``pip install 'align-audit[peers]'`` brings nnsight, TransformerLens and pyvene. nnterp 1.3 does not import with
nnsight 0.8, so it needs an environment of its own: ``python -m venv v``, ``v/bin/pip install torch nnterp 'nnsight<0.8'
safetensors``, and here ``--peer-python nnterp=v/bin/python``. The same option takes any other contender elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engine import flops
from engine.bench import Bench, Timing, machine
from engine.contenders import CONTENDERS
from engine.contenders.common import PAIRS_PER_BATCH
from engine.job import RANKS, JobSpec, make_job
from engine.scaling import scaling
from engine.worker import SWEEPS

SIZES = ("layers", "width", "vocab")
"""Of a randomly initialized model."""


def main() -> None:
    options = _options()
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    pythons = dict(text.split("=", 1) for text in options.peer_python)
    unknown = sorted({*pythons, *options.contenders} - set(CONTENDERS))
    if unknown:
        raise SystemExit(f"unknown contenders {unknown}; there are {sorted(CONTENDERS)}")
    # nnsight's two ways of patching share an installation.
    if "nnsight" in pythons:
        pythons.setdefault("nnsight-skip", pythons["nnsight"])
    bench = Bench(options.threads, pythons, say, options.device)
    if options.scaling:
        report = scaling(bench, options.repeats, options.dtype)
    else:
        job = dict(
            pairs=options.pairs, max_tokens=options.max_tokens, dtype=options.dtype, ranks=RANKS, device=options.device,
            pairs_per_batch=options.pairs_per_batch,
        )  # fmt: skip
        if options.model is not None:
            spec = JobSpec.of_model(options.model, **job)
        else:
            sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
            spec = JobSpec(**sizes, **job)
        report = _profile(bench, spec, options) if options.profile else _compare(bench, spec, options)
    report = {"machine": machine(options.threads, options.device), **report}
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument(
        "--model", type=Path, help="folder of a pretrained model and its tokenizer, instead of these three"
    )
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu (default), or a CUDA device")
    parser.add_argument("--pairs-per-batch", type=int, default=PAIRS_PER_BATCH, help="of hooks and the peers")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=["layers"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--no-baseline", action="store_true", help="with the audit: do not run the layer sweep with hooks beside it"
    )
    parser.add_argument("--scaling", action="store_true", help="cost against layers, pairs, length and ranks")
    parser.add_argument(
        "--profile", action="store_true", help="where align_audit's time goes, at the first of --sweeps"
    )
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    odd = [f"--{name}" for name in (*SIZES, "scaling") if getattr(options, name)]
    if options.model is not None and odd:
        parser.error(f"--model says the sizes itself; leave out {', '.join(odd)}")
    return options


# -- comparison ------------------------------------------------------------------------------------------------------


def _compare(bench: Bench, spec: JobSpec, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        job = make_job(spec, with_bases="ranks" in options.sweeps)
        bench.store(job, folder)
        plan = [
            (name, sweep)
            for sweep in options.sweeps
            for name in options.contenders
            if sweep != "audit" or name == "align_audit"
        ]
        if "audit" in options.sweeps and ("hooks", "layers") not in plan and not options.no_baseline:
            plan.insert(0, ("hooks", "layers"))
        timings = bench.measure(folder, plan, options.repeats)
        rates = flops.matmul_rates(flops.Shape.of(spec), spec.dtype, options.threads, spec.device)
    lengths = [len(side) for pair in job.pairs for side in pair.sides]
    found = machine(options.threads, options.device)
    where = f"{found['device']} beside {found['processor']}" if "device" in found else found["processor"]
    print(
        f"{where}, {options.threads} threads; {spec.title}, "
        f"{spec.dtype}; {len(job.pairs)} pairs ({job.pair_source}) of "
        f"{min(lengths)} to {max(lengths)} tokens; median of {options.repeats} (min–max)"
    )
    rows = []
    for sweep in dict.fromkeys(sweep for _, sweep in plan):
        rows += _print_sweep(sweep, spec, timings)
    counted = _print_flops(spec, job.pairs, timings, rates)
    return {
        "job": {**asdict(spec), "pair_source": job.pair_source, "lengths": lengths},
        "rows": rows,
        "flops": counted,
        "matmul_rates": rates,
    }


def _print_sweep(sweep: str, spec: JobSpec, timings: dict[tuple[str, str], Timing]) -> list[dict[str, Any]]:
    hooks = timings.get(("hooks", "layers" if sweep == "audit" else sweep))
    ours = timings.get(("align_audit", sweep))
    titles = {
        "layers": "layer sweep",
        "ranks": f"rank sweep, ranks {', '.join(map(str, spec.ranks))} at every layer",
        "audit": "full audit at default settings (against the layer sweep with hooks)",
    }
    print(f"\n{titles[sweep]}")
    print(
        f"{'contender':<17}{'version':<12}{'dtype':<9}{spec.clock + ' s':>22}{'wall s':>9}{'peak MiB':>10}"
        f"{'hooks/it':>9}{'it/ours':>9}{'max diff':>11}{'relative':>10}"
    )
    rows = []
    for (name, which), timing in timings.items():
        if which != sweep:
            continue
        needs = CONTENDERS[name].needs
        version = timing.versions.get(needs[0] if needs else "torch", "")
        row: dict[str, Any] = {"sweep": sweep, "contender": name, "versions": timing.versions, "dtype": spec.dtype}
        head = f"{name:<17}{version.split('+')[0]:<12}{spec.dtype:<9}"
        if timing.problem is not None:
            rows.append({**row, "problem": timing.problem})
            print(head + f"  {timing.problem}")
            continue
        took = median(timing.seconds)
        row |= {
            "cpu_seconds": timing.cpu,
            "wall_seconds": timing.wall,
            "peak_bytes": timing.peak,
            "speedup_over_hooks": median(hooks.seconds) / took if hooks is not None and hooks.seconds else None,
            "times_ours": took / median(ours.seconds) if ours is not None and ours.seconds else None,
            "max_difference": None,
            "max_relative_difference": None,
            "facts": timing.facts,
        }
        if hooks is not None and hooks.effects is not None and timing.effects is not None:
            # An audit's effects are the layer sweep's, whatever else it does.
            row |= _difference(timing.effects, hooks.effects, hooks.logps)
        rows.append(row)
        spread = f"{took:.2f} ({min(timing.seconds):.2f}–{max(timing.seconds):.2f})"
        print(
            head
            + f"{spread:>22}{median(timing.wall):>9.2f}{max(timing.peak) / 2**20:>10.0f}"
            + f"{_number(row['speedup_over_hooks'], '.2f'):>9}{_number(row['times_ours'], '.2f'):>9}"
            + f"{_number(row['max_difference'], '.1e'):>11}{_number(row['max_relative_difference'], '.1e'):>10}"
        )
    return rows


def _difference(effects: np.ndarray, expected: np.ndarray, logps: np.ndarray | None) -> dict[str, float]:
    """Largest difference in nats, and largest in parts of the pair's summed |log p|."""
    gap = np.abs(effects - expected).reshape(len(effects), -1).max(axis=1)
    scale = np.abs(logps).sum(axis=1) if logps is not None else np.full(len(gap), np.nan)
    return {"max_difference": float(gap.max()), "max_relative_difference": float((gap / scale).max())}


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _print_flops(
    spec: JobSpec, pairs: list[Any], timings: dict[tuple[str, str], Timing], rates: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    shape = flops.Shape.of(spec)
    unit, measured = spec.clock, {"CPU": "gflops_per_cpu_second", "wall": "gflops_wall"}[spec.clock]
    print("\nmatrix products: what is needed, and what is reached")
    counted = []
    for sweep, runs in (("layers", 1), ("ranks", len(spec.ranks))):
        hooks, ours = timings.get(("hooks", sweep)), timings.get(("align_audit", sweep))
        if hooks is None and ours is None:
            continue
        as_run = flops.hooks_sweep(shape, pairs, runs, spec.pairs_per_batch)
        floor = flops.floor_sweep(shape, pairs, runs)
        with_embedding = flops.floor_sweep(shape, pairs, runs, embedding=True)
        entry: dict[str, Any] = {
            "sweep": sweep,
            "hooks": {**asdict(as_run), "total": as_run.total},
            "floor": {**asdict(floor), "total": floor.total},
            "floor_with_embedding": {**asdict(with_embedding), "total": with_embedding.total},
            "floor_ratio": as_run.total / floor.total,
        }
        print(
            f"{sweep}: hooks {as_run.total / 1e12:.2f} TFLOP as run, floor {floor.total / 1e12:.2f}: ratio "
            f"{as_run.total / floor.total:.2f} ({as_run.total / with_embedding.total:.2f} where the patch below layer 0 is "
            "computed too)"
        )
        for name, timing, needed in (("hooks", hooks, as_run), ("align_audit", ours, floor)):
            if timing is not None and timing.seconds:
                reached = needed.total / median(timing.seconds) / 1e9
                entry[f"{name}_gflop_per_cpu_second"] = needed.total / median(timing.cpu) / 1e9
                entry[f"{name}_gflop_per_wall_second"] = needed.total / median(timing.wall) / 1e9
                print(
                    f"  {name}: {reached:.1f} GFLOP per {unit} second of {'what it runs' if name == 'hooks' else 'its floor'}"
                )
        if hooks is not None and ours is not None and hooks.seconds and ours.seconds:
            entry["achieved_ratio"] = median(hooks.seconds) / median(ours.seconds)
            print(f"  achieved ratio of {unit} time: {entry['achieved_ratio']:.2f}")
        counted.append(entry)
    print(f"the machine, torch.nn.functional.linear (GFLOP per {unit} second):")
    rows = sorted({rate["rows"] for rate in rates})
    print(f"  {'rows':<16}" + "".join(f"{count:>8}" for count in rows))
    for product in dict.fromkeys(rate["product"] for rate in rates):
        found = {rate["rows"]: rate[measured] for rate in rates if rate["product"] == product}
        print(f"  {product:<16}" + "".join(f"{found[count]:>8.1f}" for count in rows))
    return counted


# -- profile ---------------------------------------------------------------------------------------------------------


def _profile(bench: Bench, spec: JobSpec, options: argparse.Namespace) -> dict[str, Any]:
    sweep = options.sweeps[0]
    with tempfile.TemporaryDirectory() as place:
        bench.store(make_job(spec, with_bases=sweep == "ranks"), Path(place))
        table = bench.profile(Path(place), "align_audit", sweep)
    print(f"align_audit, {sweep}: where the time goes")
    for row in table:
        longest = ", ".join(f"{name.removeprefix('aten::')} {took:.2f}" for name, took in row["longest"].items())
        print(f"  {row['group']:<20}{row['seconds']:>8.2f} s {row['share']:>6.1%}  {longest}")
    return {"job": asdict(spec), "sweep": sweep, "profile": table}
