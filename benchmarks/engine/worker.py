"""One contender: loads a job, warms up, measures a sweep or several, writes what it found.

Run by ``bench.py`` as a process of its own, under any interpreter that has torch, transformers, numpy and safetensors; with a
CUDA device inside ``bench.py``'s. Imports, loading and what a tool does to wrap a model are not timed.
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
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = ("layers", "ranks", "audit")
MARK = "RESULT "


def main() -> None:
    print(MARK + json.dumps(perform(sys.argv[1:])))


def perform(arguments: list[str]) -> dict[str, Any]:
    """What the command line asks for, as the report that is printed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--contender", required=True)
    parser.add_argument("--probe", action="store_true", help="only say which versions are installed")
    parser.add_argument("--job", type=Path)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for one file of effects a sweep")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    from engine.contenders import CONTENDERS

    entry = CONTENDERS[options.contender]
    if entry.needs == ("align-audit",):
        # This checkout, not whichever one is installed; the tools of others see nothing of it.
        sys.path.insert(0, str(ROOT))
    found = versions(entry.needs)
    if options.probe:
        return {"versions": found, "missing": [name for name in entry.needs if name not in found]}
    return {"versions": found, "runs": run(entry, options)}


def versions(needs: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of what matters to a timing."""
    found = {}
    for name in (*needs, "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def run(entry: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every sweep, then all again; ``effects`` and ``logps`` go to ``SWEEP.npz`` in the folder ``out``."""
    import torch

    from engine.job import load_job

    torch.set_num_threads(options.threads)
    job = load_job(options.job)
    contender = entry.load()(job.policy, job.reference)
    contender.pairs_per_batch = job.spec.pairs_per_batch
    work = {
        "layers": lambda pairs: contender.layer_sweep(pairs),
        "ranks": lambda pairs: contender.rank_sweep(pairs, job.bases, job.spec.ranks, job.halves),
        "audit": lambda pairs: contender.full_audit(pairs),
    }
    # The longest pair first: libraries make their pools and pick their kernels once.
    contender.layer_sweep([max(job.pairs, key=lambda pair: sum(map(len, pair.sides)))])
    runs = []
    for sweep in [*options.sweeps] * options.repeats:
        try:
            runs.append(one_sweep(sweep, work[sweep], job, options))
        except Exception as error:  # what else was measured stays
            traceback.print_exc()
            runs.append({"sweep": sweep, "problem": f"failed: {type(error).__name__}: {error}"})
    return runs


def one_sweep(sweep: str, work: Callable[..., Any], job: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What one run took, and its effects in their file."""
    import numpy as np

    if options.profile:
        from engine.profiling import profiled

        result, table = profiled(lambda: work(job.pairs), job.spec)
        measured: dict[str, Any] = {"profile": table}
    else:
        measure = Measurement(device=job.spec.device)
        with measure:
            result = work(job.pairs)
        measured = asdict(measure)
    np.savez(options.out / f"{sweep}.npz", effects=result.effects, logps=result.logps)
    return {"sweep": sweep, **measured, "facts": result.facts}


@dataclass
class Measurement:
    """CPU and wall seconds of a ``with`` block, and its peak memory above what was taken before.

    Memory is the process's resident set, on an accelerator what is allocated there.
    """

    cpu: float = 0.0
    user: float = 0.0
    system: float = 0.0
    wall: float = 0.0
    peak_bytes: int = 0
    peak_from: str = field(default="")
    device: str = "cpu"

    def __enter__(self) -> Measurement:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            # What the warm-up left in the allocator would otherwise hide the first megabytes.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._peak = _PeakMemory() if self.device == "cpu" else _PeakOnDevice(self.device)
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device != "cpu":
            self._peak.wait()
        self.wall = time.perf_counter() - self._began
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.user = usage.ru_utime - self._usage.ru_utime
        self.system = usage.ru_stime - self._usage.ru_stime
        self.cpu = self.user + self.system
        self.peak_bytes, self.peak_from = self._peak.stop()


class _PeakOnDevice:
    """Peak of what torch has allocated on a CUDA device since it was made."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda, self._device = torch.cuda, device
        self.wait()
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats(device)
        self._start = self._cuda.memory_allocated(device)

    def wait(self) -> None:
        """Until everything that was launched has run."""
        self._cuda.synchronize(self._device)

    def stop(self) -> tuple[int, str]:
        return self._cuda.max_memory_allocated(self._device) - self._start, "torch.cuda.max_memory_allocated"


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
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
