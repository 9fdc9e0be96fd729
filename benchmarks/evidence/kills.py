"""Runs that are killed at moments nobody chose, and go on: is anything in the log doubled, lost or different in the end?

    python benchmarks/evidence/kills.py                  # 100 SIGKILLs, about ten minutes on one core
    python benchmarks/evidence/kills.py --kills 20 --seed 3

Each run is a small DPO training with an audit at every step and a checkpoint at every second, in a process of its own that
gets SIGKILL at a moment drawn evenly over the time that a whole run takes; the script is then run again, from the last
checkpoint where there is one, until it comes to its end. Its log is compared with that of a run that nobody killed: the steps
of the records, every number, text and reason in them, the alerts, the trainer's own log, what the arrays hold; and so are the
final weights. Left out are dates, seconds, memory, versions, what audits had cost until then, and what the trainer itself
counts anew when it is resumed.

A kill inside a checkpoint's own writing leaves a folder that the trainer cannot resume from, with this package or without it:
it is removed, as its user would do, and counted. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reliability_runs as runs

STEPS = 8
_MANY = 50
"""A run that comes to no end after so many tries: something else is wrong."""
_LEFT_OUT = {"created", "versions", "cost", "occasion", "time"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many processes are killed (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    runs.STEPS = STEPS
    runs.parts()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        straight = Path(place) / "straight"
        began = time.perf_counter()
        status, _ = _script(straight, None)
        lasts = time.perf_counter() - began
        assert status == 0, "the run that nobody kills does not end"
        expected = _held(straight)
        print(
            f"a run of {STEPS} steps that nobody kills takes {lasts:.1f} s and leaves {len(expected)} things to compare"
        )
        killed, torn, tries, wrong = 0, 0, collections.Counter[int](), []
        number = 0
        while killed < options.kills:
            number += 1
            output = Path(place) / f"run-{number}"
            of_run = 0
            for _ in range(_MANY):
                after = moments.uniform(0, 1.1 * lasts) if killed < options.kills else None
                status, words = _script(output, after)
                if status == -signal.SIGKILL:
                    killed, of_run = killed + 1, of_run + 1
                elif status == 0:
                    break
                else:
                    torn += 1
                    _remove_last_checkpoint(output, words)
            else:
                raise RuntimeError(f"run {number} does not come to an end")
            tries[of_run] += 1
            differing = list(_differences(expected, _held(output)))
            wrong.extend(f"run {number}, killed {of_run} times: {line}" for line in differing)
            print(
                f"run {number}: killed {of_run} times, {'as the other' if not differing else differing[0]}", flush=True
            )
            shutil.rmtree(output)
    times = ", ".join(f"{count} of them {kills} times" for kills, count in sorted(tries.items()))
    print(f"{killed} kills in {number} runs ({times}); {torn} left a checkpoint half written")
    print(
        "every log and all final weights are those of the run that nobody killed"
        if not wrong
        else "\n".join(wrong[:20])
    )
    return bool(wrong)


def _script(output: Path, after: float | None) -> tuple[int, str]:
    """The script in a process of its own, killed after so many seconds (None: never): its exit status, and what broke it."""
    said = output.with_suffix(".txt")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            resume = any(output.glob("checkpoint-*"))
            trained = runs.train(output, resume=resume)
            if trained.raised is not None:
                raise trained.raised
            status = 0
        except BaseException:
            said.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(status)
    if after is not None:
        ends = time.perf_counter() + after
        while time.perf_counter() < ends:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8") if said.exists() else ""
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8") if said.exists() else ""


def _remove_last_checkpoint(output: Path, words: str) -> None:
    """What a user does who reads that the last checkpoint cannot be loaded."""
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not checkpoints or "align_audit/" in words.split("transformers/trainer.py")[-1]:
        raise RuntimeError(f"a run ended by itself, not for its checkpoint:\n{words}")
    shutil.rmtree(checkpoints[-1])


# -- what a run leaves ---------------------------------------------------------------------------------------------------


def _held(output: Path) -> dict[str, Any]:
    """Everything that is compared, by a path."""
    from safetensors.numpy import load_file

    from align_audit import AuditRun

    run = AuditRun.load(output)
    held: dict[str, Any] = {"steps": [record.step for record in run.records], "failures": len(run.failures)}
    for record in run.records:
        held.update(_leaves(record.model_dump(), f"step {record.step}"))
    held["alerts"] = sorted((alert.step, alert.rule, alert.level, alert.message) for alert in run.alerts)
    for entry, line in enumerate(_training_log(run)):
        held[f"training log, line {entry}"] = line
    arrays = sorted((output / "align_audit").glob("step-*/*.safetensors"))
    assert len(arrays) >= len(run.records)
    for path in arrays:
        for name, values in load_file(path).items():
            held[f"{path.parent.name}/{path.name}: {name}"] = values.tobytes()
    weights = load_file(output / "final" / "model.safetensors")
    held.update({f"final {name}": value.tobytes() for name, value in weights.items()})
    return held


def _training_log(run: Any) -> list[Any]:
    """The course that the trainer's log says: of steps that were trained again, what was logged last."""
    # Counted anew, or averaged, by the trainer from where a process begins; seconds.
    of_a_process = ("num_tokens", "train_", "total_flos")
    course = [
        (row.step, {name: value for name, value in row.logs.items() if not name.startswith(of_a_process)})
        for row in run.training_log
    ]
    return [entry for entry in course if entry[1]]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in _LEFT_OUT and not name.startswith("cost."):  # reasons stand under the paths of their numbers
                yield from _leaves(item, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _leaves(item, f"{path}.{place}")
    else:
        yield path, value


def _differences(expected: dict[str, Any], held: dict[str, Any]) -> Iterator[str]:
    for path in expected.keys() | held.keys():
        if path not in held:
            yield f"{path} is lost"
        elif path not in expected:
            yield f"{path} is new: {held[path]!r:.200}"
        elif held[path] != expected[path] and not (held[path] != held[path] and expected[path] != expected[path]):
            yield f"{path} is {held[path]!r:.200}, not {expected[path]!r:.200}"


if __name__ == "__main__":
    sys.exit(main())
