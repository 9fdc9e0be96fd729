"""Run training jobs on several processes that are forked from one, so that a case costs seconds and not its imports.

The first ``launch`` starts ``python -m tests.distributed.launch``; that imports, then forks the ranks of two cases at a
time, for every later ``launch`` too. A case that does not end in time is killed, and its result says so: a deadlock is a
failed test, not a hung one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS = float(os.environ.get("ALIGN_AUDIT_TEST_SECONDS", "120"))
"""For one case. Processes that wait for each other wait half an hour."""
AT_ONCE = 2
"""Cases."""


def launch(folder: Path, cases: dict[str, dict[str, Any]], size: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Run each case on ``size`` processes, or on as many as its ``ranks`` say.

    Returns:
        results by case and rank: what ``jobs.run`` returned, or ``{"error": traceback}``, or ``{"hung": True}``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    process, words = _launcher()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # what it said is told below
        print(json.dumps([str(folder), size]), file=process.stdin, flush=True)
    results = folder / "results.json"
    while not results.is_file():
        if process.poll() is not None:
            words.seek(0)
            raise AssertionError(f"the launcher ended: {words.read()[-8000:]}")
        time.sleep(0.05)
    return json.loads(results.read_text(encoding="utf-8"))


@functools.cache
def _launcher() -> tuple[subprocess.Popen[str], Any]:
    """The process that ranks are forked from, and the file of what it says; it ends with this one."""
    words = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (closed at the exit)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.launch"],
        stdin=subprocess.PIPE, stdout=words, stderr=words, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip

    def end() -> None:
        process.communicate()  # closes its input, which ends it
        words.close()

    atexit.register(end)
    return process, words


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _rank(folder: Path, rank: int, size: int, port: int, case: dict[str, Any]) -> None:
    """A forked process: never returns."""
    result: dict[str, Any]
    try:
        with (folder / f"output-{rank}.txt").open("w", encoding="utf-8") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        from tests.distributed.engines import become_rank

        become_rank(rank, size, port, case.get("engine", "ddp"))
        result = importlib.import_module(f"tests.distributed.{case.get('job', 'jobs')}").run(folder, rank, case)
    except BaseException as error:
        result = {"error": traceback.format_exc(), "kind": type(error).__name__, "words": str(error)}
    (folder / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)


class _Running:
    """A case whose ranks have been forked."""

    def __init__(self, folder: Path, size: int, case: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        self._folder, self._size = folder, size
        self._limit = time.monotonic() + SECONDS
        port = _free_port()
        self._left = set()
        for rank in range(size):
            process = os.fork()
            if process == 0:
                _rank(folder, rank, size, port, case)
            self._left.add(process)

    def ended(self) -> bool:
        """Whether every rank has, by itself or, past its time, killed."""
        self._left -= {process for process in self._left if os.waitpid(process, os.WNOHANG)[0]}
        if time.monotonic() > self._limit:
            for process in self._left:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            self._left.clear()
        return not self._left

    def results(self) -> list[dict[str, Any]]:
        paths = [self._folder / f"result-{rank}.json" for rank in range(self._size)]
        return [json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"hung": True} for path in paths]


def _run(folder: Path, size: int, cases: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What came of each. While ranks of one wait for each other, those of another compute."""
    results: dict[str, list[dict[str, Any]]] = {}
    waiting, running = list(cases), dict[str, _Running]()
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name = waiting.pop(0)
            running[name] = _Running(folder / name, cases[name].get("ranks", size), cases[name])
        for name in [name for name, case in running.items() if case.ended()]:
            results[name] = running.pop(name).results()
        time.sleep(0.02)
    return results


def _warm_up() -> None:
    """Do once what every rank of every case would do anew: imports, and tables that libraries make at their first use."""
    import scipy.stats  # noqa: F401
    import torch
    import torch.distributed.algorithms.ddp_comm_hooks
    import torch.distributed.checkpoint.state_dict
    from transformers import AutoModelForCausalLM

    import tests.distributed.jobs  # noqa: F401
    from tests.helpers.dpo import saved_model

    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_pretrained(saved_model(Path(folder)), dtype=torch.float32)


def main() -> None:
    """Run every case of the ``cases.json`` of each folder that a line of the standard input names, with a number of ranks."""
    _warm_up()
    # Every rank collects garbage, and would look through all that was imported, and copy its pages.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        name, size = json.loads(line)
        folder = Path(name)
        cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        results = _run(folder, size, cases)
        written = folder / "results.part"
        written.write_text(json.dumps(results), encoding="utf-8")
        written.rename(folder / "results.json")


if __name__ == "__main__":
    main()
