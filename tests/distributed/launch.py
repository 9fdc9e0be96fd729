"""Run training jobs on several processes that are forked from one, so that a case costs seconds and not its imports.

``launch`` starts ``python -m tests.distributed.launch`` once; that imports, then forks the ranks of one case after the
other. A case that does not end in time is killed, and its result says so: a deadlock is a failed test, not a hung one.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS = float(os.environ.get("ALIGN_AUDIT_TEST_SECONDS", "120"))
"""For one case. Processes that wait for each other wait half an hour."""


def launch(folder: Path, cases: dict[str, dict[str, Any]], size: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Results by case and rank: what ``jobs.run`` returned, or ``{"error": traceback}``, or ``{"hung": True}``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.launch", str(folder), str(size)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    results = folder / "results.json"
    assert results.is_file(), done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(results.read_text(encoding="utf-8"))


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
        from tests.distributed.jobs import run

        become_rank(rank, size, port, case.get("engine", "ddp"))
        result = run(folder, rank, case)
    except BaseException as error:
        result = {"error": traceback.format_exc(), "kind": type(error).__name__, "words": str(error)}
    (folder / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)


def _case(folder: Path, size: int, case: dict[str, Any]) -> list[dict[str, Any]]:
    folder.mkdir(parents=True)
    port = _free_port()
    processes = []
    for rank in range(size):
        process = os.fork()
        if process == 0:
            _rank(folder, rank, size, port, case)
        processes.append(process)
    limit = time.monotonic() + SECONDS
    left = set(processes)
    while left and time.monotonic() < limit:
        left -= {process for process in left if os.waitpid(process, os.WNOHANG)[0]}
        time.sleep(0.02)
    for process in left:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    results = []
    for rank in range(size):
        path = folder / f"result-{rank}.json"
        results.append(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"hung": True})
    return results


def main() -> None:
    """Run every case of a folder's ``cases.json``."""
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    import align_audit.monitoring.callback  # noqa: F401  (once, for all ranks of all cases)
    import tests.distributed.jobs  # noqa: F401

    # Every rank collects garbage, and would look through all that was imported, and copy its pages.
    gc.freeze()
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    results = {name: _case(folder / name, size, case) for name, case in cases.items()}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
