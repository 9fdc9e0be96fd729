"""Runs contenders on one job, each in a process of its own, and keeps what they report."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine import worker
from engine.job import Job
from engine.worker import MARK

WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Timing:
    """All repeats of one contender at one sweep, and what it computed."""

    contender: str
    sweep: str
    versions: dict[str, str] = field(default_factory=dict)
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    device: str = "cpu"
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    effects: np.ndarray | None = None
    logps: np.ndarray | None = None

    @property
    def seconds(self) -> list[float]:
        """What contenders are compared by: CPU time, and on an accelerator the time that passed."""
        return self.cpu if self.device == "cpu" else self.wall


class Bench:
    """Runs workers on one job and keeps what they report."""

    def __init__(self, threads: int, pythons: dict[str, str], say: Callable[[str], None], device: str = "cpu") -> None:
        self.threads, self.pythons, self.say, self.device = threads, pythons, say, device

    def installed(self, name: str) -> tuple[dict[str, str], str | None]:
        """(versions, None), or why the contender cannot run."""
        report, problem = self._worker(name, ["--probe"])
        if problem is not None:
            return {}, problem
        missing = report["missing"]
        return report["versions"], f"not installed: {', '.join(missing)}" if missing else None

    def store(self, job: Job, folder: Path) -> None:
        """Write the job for the workers and let go of its models: a device has room for the contenders' then."""
        job.save(folder, weights=self.device == "cpu" or bool(self.pythons))
        job.policy = job.reference = job.bases = None

    def measure(self, folder: Path, plan: Sequence[tuple[str, str]], repeats: int) -> dict[tuple[str, str], Timing]:
        """Interleaved: every (contender, sweep) of ``plan`` once, then again; on an accelerator one contender after another."""
        timings = {key: Timing(*key, device=self.device) for key in plan}
        names = list(dict.fromkeys(name for name, _ in plan))
        for name in names:
            versions, problem = self.installed(name)
            for key in plan:
                if key[0] == name:
                    timings[key].versions, timings[key].problem = versions, problem
        if self.device == "cpu":
            for repeat in range(repeats):
                for timing in timings.values():
                    self._run(folder, [timing], 1, f"{repeat + 1}/{repeats}")
        else:
            for name in names:
                self._run(folder, [timing for timing in timings.values() if timing.contender == name], repeats, "all")
        return timings

    def profile(self, folder: Path, name: str, sweep: str) -> list[dict[str, Any]]:
        """Where the time of one run goes."""
        with tempfile.TemporaryDirectory() as place:
            report, problem = self._worker(name, self._arguments(folder, [sweep], Path(place), "--profile"))
        if problem is not None:
            raise SystemExit(problem)
        (run,) = report["runs"]
        if "problem" in run:
            raise SystemExit(run["problem"])
        return run["profile"]

    def _run(self, folder: Path, timings: Sequence[Timing], repeats: int, turn: str) -> None:
        """The sweeps of one contender, in one process."""
        open_ones = {timing.sweep: timing for timing in timings if timing.problem is None}
        if not open_ones:
            return
        name = timings[0].contender
        with tempfile.TemporaryDirectory() as place:
            more = ["--repeats", str(repeats)]
            report, problem = self._worker(name, self._arguments(folder, [*open_ones], Path(place), *more))
            for run in report.get("runs", []):
                timing = open_ones[run["sweep"]]
                if "problem" in run:
                    timing.problem = run["problem"]
                    continue
                timing.cpu.append(run["cpu"])
                timing.wall.append(run["wall"])
                timing.peak.append(run["peak_bytes"])
                timing.facts = {**run["facts"], "peak_from": run["peak_from"]}
            for sweep, timing in open_ones.items():
                timing.problem = timing.problem or problem
                state = timing.problem or f"{timing.seconds[-1]:.1f} {'CPU' if self.device == 'cpu' else 'wall'} s"
                self.say(f"  {turn} {sweep} {name}: {state}")
                if timing.problem is None:
                    with np.load(Path(place) / f"{sweep}.npz") as arrays:
                        timing.effects, timing.logps = arrays["effects"], arrays["logps"]

    def _arguments(self, folder: Path, sweeps: Sequence[str], out: Path, *more: str) -> list[str]:
        fixed = ["--job", str(folder), "--sweeps", *sweeps, "--out", str(out), "--threads", str(self.threads)]
        return [*fixed, *more]

    def _worker(self, name: str, arguments: list[str]) -> tuple[dict[str, Any], str | None]:
        if self.device != "cpu" and name not in self.pythons:
            return self._here(["--contender", name, *arguments])
        python = self.pythons.get(name, sys.executable)
        threads = str(self.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # On a busy machine a thread that spins while it waits for the other burns CPU seconds that are nobody's work.
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
        }
        command = [python, str(WORKER), "--contender", name, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        except OSError as error:
            return {}, f"cannot run {python}: {error}"
        for line in reversed(done.stdout.splitlines()):
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK)), None
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {}, f"failed: {last}"

    @staticmethod
    def _here(arguments: list[str]) -> tuple[dict[str, Any], str | None]:
        """As a worker does it, in this process. A contender that breaks must not take the others' figures with it."""
        import torch

        problem = None
        report: dict[str, Any] = {}
        try:
            report = worker.perform(arguments)
        except Exception as error:
            traceback.print_exc()
            problem = f"failed: {type(error).__name__}: {error}"
        gc.collect()  # a wrapped model is full of cycles, and the next contender's models need its room
        torch.cuda.empty_cache()
        return report, problem


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    found = {"processor": model, "cores": os.cpu_count(), "threads": threads, "python": platform.python_version()}
    if device != "cpu":
        import torch

        found["device"] = torch.cuda.get_device_name(device)
    return found
