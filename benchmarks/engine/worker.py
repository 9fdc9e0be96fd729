"""One contender, one sweep, one process: loads a job, warms up, measures, writes what it found.

Run by ``main.py`` under any interpreter that has torch, transformers, numpy and safetensors. Imports, loading and what a
tool does to wrap a model are not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import resource
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = ("layers", "ranks", "audit")
MARK = "RESULT "


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--contender", required=True)
    parser.add_argument("--probe", action="store_true", help="only say which versions are installed")
    parser.add_argument("--job", type=Path)
    parser.add_argument("--sweep", choices=SWEEPS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from engine.contenders import CONTENDERS

    entry = CONTENDERS[options.contender]
    if entry.needs == ("align-audit",):
        # This checkout, not whichever one is installed; the tools of others see nothing of it.
        sys.path.insert(0, str(ROOT))
    found = versions(entry.needs)
    if options.probe:
        print(MARK + json.dumps({"versions": found, "missing": [name for name in entry.needs if name not in found]}))
        return
    measured = run(entry, options.job, options.sweep, options.out, options.threads, options.profile)
    print(MARK + json.dumps({"versions": found, **measured}))


def versions(needs: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of what matters to a timing."""
    found = {}
    for name in (*needs, "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def run(entry: Any, folder: Path, sweep: str, out: Path, threads: int, profile: bool) -> dict[str, Any]:
    """Measure; write ``effects`` and ``logps`` to ``out``."""
    import numpy as np
    import torch

    from engine.job import load_job

    torch.set_num_threads(threads)
    job = load_job(folder)
    contender = entry.load()(job.policy, job.reference)
    work = {
        "layers": lambda pairs: contender.layer_sweep(pairs),
        "ranks": lambda pairs: contender.rank_sweep(pairs, job.bases, job.spec.ranks, job.halves),
        "audit": lambda pairs: contender.full_audit(pairs),
    }[sweep]
    # The longest pair first: libraries make their pools and pick their kernels once.
    contender.layer_sweep([max(job.pairs, key=lambda pair: sum(map(len, pair.sides)))])
    measure = Measurement()
    if profile:
        from engine.profiling import profiled

        result, table = profiled(lambda: work(job.pairs), job.spec)
        measured: dict[str, Any] = {"profile": table}
    else:
        with measure:
            result = work(job.pairs)
        measured = asdict(measure)
    np.savez(out, effects=result.effects, logps=result.logps)
    return {**measured, "facts": result.facts}


@dataclass
class Measurement:
    """CPU and wall seconds of a ``with`` block, and its peak resident memory above what was resident before."""

    cpu: float = 0.0
    user: float = 0.0
    system: float = 0.0
    wall: float = 0.0
    peak_bytes: int = 0
    peak_from: str = field(default="")

    def __enter__(self) -> Measurement:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            # What the warm-up left in the allocator would otherwise hide the first megabytes.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._peak = _PeakMemory()
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.wall = time.perf_counter() - self._began
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.user = usage.ru_utime - self._usage.ru_utime
        self.system = usage.ru_stime - self._usage.ru_stime
        self.cpu = self.user + self.system
        self.peak_bytes, self.peak_from = self._peak.stop()


class _PeakMemory:
    """Peak resident memory since it was made. The kernel's own high-water mark costs nothing; else a thread samples."""

    def __init__(self) -> None:
        self._start = _status("VmRSS")
        self._sampled = self._start
        self._done = threading.Event()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self._watcher = None
        except OSError:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def stop(self) -> tuple[int, str]:
        if self._watcher is None:
            return _status("VmHWM") - self._start, "high-water mark"
        self._done.set()
        self._watcher.join()
        return self._sampled - self._start, "sampled every 5 ms"

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._sampled = max(self._sampled, _status("VmRSS"))


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none (not Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
