"""The cost model: what an audit takes, counted from a configuration and priced for a machine.

    python benchmarks/cost/model.py --calibrate --layers 12 --width 512 --vocabulary 32000   # this machine's prices, < 1 min
    python benchmarks/cost/model.py --compare                        # against measured jobs: a table, half an hour
    python benchmarks/cost/model.py --compare --write docs/scale.md  # and the document, with models that are too large for it
    python benchmarks/cost/model.py --write docs/scale.md            # what it predicts alone: after a change of what is counted

The counts are the package's (:mod:`align_audit.auditing.costs`). Prices are measured here, on the code that an audit runs and
on no audit, or are published figures of accelerators times a stated share (``accelerators.py``), which nobody has measured.
Seconds are CPU seconds of one-thread processes: a machine that is shared with other work changes these least. Of each job the
shortest of some repeats is taken, and the calibration is made before and after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from calibration import calibrate, float64_prices
from jobs import JobSpec
from measuring import compared
from prices import Prices
from scale import comparison, largest_error
from scale_text import document, predicted_again

JOBS = (
    JobSpec(4, 128, 1_000, 24),
    JobSpec(12, 128, 1_000, 24),
    JobSpec(24, 128, 1_000, 8),
    JobSpec(12, 256, 8_000, 8),
    JobSpec(4, 512, 32_000, 8),
    JobSpec(4, 256, 128_000, 8),
    JobSpec(4, 128, 32_000, 64),
    JobSpec(4, 256, 32_000, 64, kind="later look"),
    JobSpec(12, 512, 32_000, 24, kind="first look"),
    JobSpec(4, 256, 8_000, 24, ranks=2),
    JobSpec(12, 128, 32_000, 24, ranks=2, kind="first look"),
)
"""What the model is compared on: layers, width, vocabulary, pairs, kind of audit and processes vary."""
HOST = JobSpec(12, 512, 8_000, 24)
HOST_WIDTH = 2048
"""At what shape, and of matrices how wide, the host's prices are measured for large models."""


def run_jobs(jobs: Sequence[JobSpec], repeats: int, kept: Path | None) -> list[dict[str, Any]]:
    """Each in a process of its own.

    Args:
        kept: a file that is written after each job; what it holds of these jobs already is not measured again.
    """
    earlier = json.loads(kept.read_text(encoding="utf-8")) if kept is not None and kept.is_file() else []
    measured = {result["title"]: result for result in earlier}
    for spec in jobs:
        if spec.title in measured:
            continue
        command = [sys.executable, __file__, "--repeats", str(repeats), "--job", json.dumps(dataclasses.asdict(spec))]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise SystemExit(f"{spec.title} broke:\n{ran.stderr[-4000:]}")
        measured[spec.title] = json.loads(ran.stdout.splitlines()[-1])
        print(comparison([measured[spec.title]]).splitlines()[-1], flush=True)
        if kept is not None:
            kept.write_text(json.dumps(list(measured.values())), encoding="utf-8")
    return [measured[spec.title] for spec in jobs]


def host_prices() -> Prices:
    """What runs in the host's memory beside an accelerator, as far as it is measured here."""
    return dataclasses.replace(calibrate(HOST), **float64_prices(HOST_WIDTH, HOST_WIDTH))


def job_of(text: str) -> JobSpec:
    """From what :func:`run_jobs` passes on."""
    values = json.loads(text)
    return JobSpec(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def main() -> None:
    """Calibrate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true", help="print this machine's prices at a model's shape")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--compare", action="store_true", help="measure the jobs, beside what is foreseen")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the comparison is kept, job by job, and read from")
    parser.add_argument(
        "--write", type=Path, help="the document; what was measured is kept without --compare or --json"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.job is not None:
        print(json.dumps(compared(job_of(options.job), options.repeats)))
        return
    if not (options.calibrate or options.compare or options.write):
        parser.error("found nothing to do; expected --calibrate, --compare or --write")
    if options.calibrate:
        spec = JobSpec(options.layers, options.width, options.vocabulary, options.pairs)
        print(json.dumps(dataclasses.asdict(calibrate(spec)), indent=2))
    results = run_jobs(JOBS, options.repeats, options.json) if options.compare else []
    if options.json is not None and not results:
        results = json.loads(options.json.read_text(encoding="utf-8"))
    if results:
        print(comparison(results))
        print(f"largest error {largest_error(results):.0%}")
    if options.write is not None:
        host = host_prices()
        earlier = "" if results else options.write.read_text(encoding="utf-8")
        text = document(results, JOBS, host) if results else predicted_again(earlier, host)
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
