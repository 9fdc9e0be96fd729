"""What a training does, what its log holds and what is said when something is taken away or breaks: fault × moment × outcome.

    python benchmarks/evidence/reliability.py                                   # the table, in some minutes on one core
    python benchmarks/evidence/reliability.py --write docs/reliability.md       # and the document
    python benchmarks/evidence/reliability.py --only SIGKILL                    # the rows with that word

Every row is a real DPO run of a tiny model, four steps with an audit at each and a checkpoint at every second, as a script
would do it: build, train, ``save_model``. The faults are real too: a disk of 2 MB that is full (which takes root), a mount that
became read-only, deleted folders, a pipe without a reader, signals that the process sends itself at that very place, and errors
that are raised at it. Losses of all steps and a hash of the final weights are compared with those of the same script without
the callback. After a signal the script is run again, and the row says what came of that.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import reliability_runs as runs
from reliability_runs import AT, STEPS, Now, Trained, at, once, raising, train

EVERY = list(range(STEPS + 1))
FORGED = '{"step": 1, "schema_'


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        around: given the log's folder, the trainer and where the run is, makes the context in which it trains.
        prepare: is done in the output directory before the script begins.
        disk: the log's folder is a small disk of its own.
        killed: the signal that ends the process.
    """

    fault: str
    moment: str
    around: Callable[[Path, Any, Now], Any] = lambda log, trainer, now: contextlib.nullcontext()
    prepare: Callable[[Path], Any] = lambda log: contextlib.nullcontext()
    disk: bool = False
    killed: int = 0


@dataclass
class Outcome:
    """What came of it, in words."""

    training: str
    log: str
    said: str

    @property
    def good(self) -> bool:
        """Training was what it is without the callback, or was refused before its first step."""
        wrong = (
            "OTHER BITS",
            "NOT SAVED",
            "not ended",
            "ends with RuntimeError",
            "ends with MemoryError",
            "ends with OSError",
        )
        return not any(words in self.training for words in wrong)


def placed(place: str, action: Callable[[Path], Callable[[], None]], step: int = AT) -> Callable[[Path, Any, Now], Any]:
    return lambda log, trainer, now: at(place, step, action(log), trainer, now)


def rows() -> Iterator[Row]:
    """All of them."""
    for name, make in (("an exception", partial(RuntimeError, "planted")), ("out of memory", MemoryError)):
        for place in runs.PLACES:
            yield Row(name, place, placed(place, lambda log, make=make: raising(make())))
    for place in (*list(runs.PLACES)[:2], *list(runs.PLACES)[3:9], "when a writer closes"):
        yield Row("SIGKILL", place, placed(place, lambda log: runs.signalled(signal.SIGKILL)), killed=signal.SIGKILL)
    for place in ("in a layer's call", "when the record is written"):
        yield Row("SIGTERM", place, placed(place, lambda log: runs.signalled(signal.SIGTERM)), killed=signal.SIGTERM)
    moments = (("before the first audit", 0), ("at an audit in the middle", AT), ("at the last audit", STEPS))
    for moment, step in moments:
        begins = partial(placed, "when an audit begins", step=step)
        yield Row("log's folder deleted", moment, begins(lambda log: once(runs.deleted(log))))
        yield Row("curves' folder deleted", moment, begins(lambda log: once(runs.deleted(log / "tensorboard"))))
        yield Row("log's disk full", moment, begins(lambda log: once(runs.filled(log))), disk=True)
        yield Row("log's folder read-only", moment, begins(lambda log: once(runs.read_only(log))), disk=True)
        yield Row("standard output without reader", moment, begins(lambda log: once(runs.unread)))
    yield Row("log's disk full", "before the script", prepare=lambda log: acted(runs.filled(log)), disk=True)
    yield Row("log's folder read-only", "before the script", prepare=lambda log: acted(runs.read_only(log)), disk=True)
    yield Row("a file in the place of the log's folder", "before the script", prepare=in_the_way)
    yield Row("another process writes the log", "before the script", prepare=held)
    yield Row("a torn line at the log's end", "before the script", prepare=torn)
    for error, place in (
        (SystemExit(1), "in a writer (TensorBoard)"),
        (KeyboardInterrupt("the user's"), "in a layer's call"),
    ):
        yield Row(type(error).__name__, place, placed(place, lambda log, error=error: raising(error)))


def acted(action: Callable[[], None]) -> Any:
    action()
    return contextlib.nullcontext()


def in_the_way(log: Path) -> Any:
    log.parent.mkdir()
    log.write_text("in the way")
    return contextlib.nullcontext()


def torn(log: Path) -> Any:
    log.mkdir(parents=True)
    (log / "records.jsonl").write_text(FORGED)
    return contextlib.nullcontext()


@contextlib.contextmanager
def held(log: Path) -> Iterator[None]:
    """A child that has the log open until the script has ended."""
    from align_audit.record.log import RunLog

    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        kept = RunLog(log.parent)  # its lock goes with it
        os.write(told, b"1")
        while kept is not None:
            signal.pause()
    os.read(ready, 1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def run_row(row: Row, plain: Trained) -> Outcome:
    """Do it, look, and where there was no training to the end do it again without the fault."""
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        output = Path(place) / "run"
        log = output / "align_audit"
        if row.disk:
            stack.enter_context(runs.small_disk(log))
        around = lambda trainer, now: row.around(log, trainer, now)  # noqa: E731
        with row.prepare(log):
            if row.killed:
                status = runs.in_child(lambda: train(output, around))
                trained = Trained(raised=None if status == -row.killed else RuntimeError(f"exit status {status}"))
            else:
                trained = train(output, around)
        if row.disk:
            runs.recovered(log)
        first = logged(output)
        if row.killed:
            return killed(row, output, plain, trained, first)
        return Outcome(ended(output, plain, trained), first, said(trained, place))


def logged(output: Path) -> str:
    """What can be read of the log."""
    import warnings

    from align_audit import AuditRun
    from align_audit.errors import RecordError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = AuditRun.load(output)
        except RecordError:
            return "none"
    steps = [record.step for record in run.records]
    lacking = [step for step in EVERY if step not in steps]
    held = "all audits" if not lacking else f"all audits but {', '.join(map(str, lacking))}" if steps else "no audit"
    assert len(steps) == len(set(steps))
    return held + (f"; {len(run.failures)} failure{'s' * (len(run.failures) > 1)}" if run.failures else "")


def same(trained: Trained, plain: Trained) -> bool:
    return trained.losses == plain.losses and trained.weights == plain.weights


def ended(output: Path, plain: Trained, trained: Trained) -> str:
    """What training did."""
    if trained.raised is not None:
        from align_audit.errors import AlignAuditError

        begun = "before the first step" if not trained.losses else f"after step {len(trained.losses)}"
        if isinstance(trained.raised, AlignAuditError):
            return f"refused {begun}"
        return f"ends with {type(trained.raised).__name__} {begun}"
    saved = (output / "final" / "model.safetensors").is_file()
    return ("same bits" if same(trained, plain) else "OTHER BITS") + (", saved" if saved else ", NOT SAVED")


def killed(row: Row, output: Path, plain: Trained, trained: Trained, first: str) -> Outcome:
    """After a signal: the script again, from its last checkpoint where there is one."""
    if trained.raised is not None:
        return Outcome(f"not ended by the signal: {trained.raised}", first, "")
    resume = bool(list(output.glob("checkpoint-*")))
    again = train(output, resume=resume)
    whole = Trained(plain.losses[-len(again.losses) :], plain.weights)
    how = "resumed" if resume else "begun again"
    words = f"ends there; {how}: {ended(output, whole, again)}"
    return Outcome(words, f"{first}; after that: {logged(output)}", said(again, str(output.parent)))


def said(trained: Trained, place: str) -> str:
    """The first of its messages; what it was refused with where there was a refusal."""
    words = [str(trained.raised)] if trained.raised is not None and str(trained.raised) else trained.said
    if not words:
        return "nothing"
    first = " ".join(words[0].replace(place, "…").split())
    more = f" (and {len(words) - 1} more)" if len(words) > 1 else ""
    return (first if len(first) < 170 else first[:167] + "…") + more


def merged(document: Path, table: list[tuple[Row, Outcome]]) -> list[tuple[Row, Outcome]]:
    """All rows in their order: those that were run, and of the others what the document says of them."""
    seen = {(row.fault, row.moment): outcome for row, outcome in table}
    if document.exists():
        for line in document.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if len(cells) == 5:
                seen.setdefault((cells[0], cells[1]), Outcome(*cells[2:]))
    return [(row, seen[key]) for row in rows() if (key := (row.fault, row.moment)) in seen]


def document(table: list[tuple[Row, Outcome]]) -> str:
    """The document, made of what was seen."""
    good = sum(outcome.good for _, outcome in table)
    command = "python benchmarks/evidence/reliability.py --write docs/reliability.md"
    where = f"{platform.system()}, Python {platform.python_version()}, {datetime.date.today()}"
    lines = [
        "# When something breaks, or is taken away",
        "",
        f"Made by `{command}` ({where}), whose source says how each row is made.",
        "",
        f"{len(table)} real DPO runs of a tiny model, {STEPS} steps with an audit at each. What happens happens at the audit "
        "of",
        f"step {AT}, where the table does not say otherwise. *Same bits*: the losses of all steps and the final weights are "
        "those of",
        "the same script without the callback. *Saved*: the script came to its `save_model()` after training.",
        "",
        f"In {good} of {len(table)} training was what it is without the callback, was refused before its first step, or was "
        "ended by a",
        "signal or by the user, and not by an audit.",
        "",
        "| what | when | training | log | said |",
        "|---|---|---|---|---|",
    ]
    for row, outcome in table:
        cells = (row.fault, row.moment, outcome.training, outcome.log, outcome.said)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the document there")
    parser.add_argument(
        "--only",
        default="",
        metavar="WORD",
        help="the rows whose fault or moment has this word; in FILE, the others stay",
    )
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        plain = train(Path(place) / "run", audited=False)
    assert plain.raised is None, plain.raised
    assert len(plain.losses) == STEPS
    table = []
    for row in rows():
        if arguments.only not in f"{row.fault} {row.moment}":
            continue
        try:
            outcome = run_row(row, plain)
        except PermissionError as error:
            outcome = Outcome("not tried: mounting takes root", "", str(error))
        table.append((row, outcome))
        print(f"{row.fault} | {row.moment} | {outcome.training} | {outcome.log} | {outcome.said}", flush=True)
    if arguments.write:
        arguments.write.write_text(document(merged(arguments.write, table)), encoding="utf-8")
    bad = [row for row, outcome in table if not outcome.good]
    print(f"{len(table)} rows, {len(bad)} in which an audit changed or ended training")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
