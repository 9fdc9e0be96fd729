"""``align-audit watch``: a screen over many runs; or, with ``--probes``, a side process that audits a run's checkpoints."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from align_audit.cli.options import (
    ConfigOption,
    DtypeOption,
    MaxLengthOption,
    ReferenceOption,
    TrustOption,
    complain,
    device_option,
    dtype_option,
    note_reference,
    read_arguments,
    settings,
)
from align_audit.errors import ConfigurationError, plain

FoldersArgument = Annotated[
    list[Path],
    typer.Argument(help="Runs, or folders that hold runs. With --probes: the output directory of one training."),
]
ProbesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Preference pairs: audit this run's checkpoints on them as they appear. As in `align-audit run`."
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option(help="Whose align_audit folder the log goes to; by default the run's own.")
]
MaxPairsOption = Annotated[int | None, typer.Option(help="Probe pairs to draw.")]
SideDeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; by default what there is.")]
IdleOption = Annotated[float | None, typer.Option(min=0, help="End after so many minutes without anything new (60).")]
EveryOption = Annotated[
    float | None, typer.Option(min=0.1, max=86400, help="Seconds between looks (2; with --probes 10).")
]
OnceOption = Annotated[
    bool, typer.Option("--once", help="Print the table once; exit status 1 where a run is in ERROR.")
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="One JSON object a run, a line each; without --once again whenever it changes."),
]
ExecOption = Annotated[
    str | None,
    typer.Option(
        "--exec",
        help="Run this for each alert that opens or gets worse, with ALIGN_AUDIT_RUN, _RULE, _LEVEL, _STEP and "
        "_MESSAGE in its environment.",
    ),
]


def watch(
    folders: FoldersArgument,
    probes: ProbesOption = None,
    reference: ReferenceOption = None,
    output: OutputOption = None,
    config: ConfigOption = None,
    max_pairs: MaxPairsOption = None,
    max_length: MaxLengthOption = None,
    device: SideDeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    idle: IdleOption = None,
    every: EveryOption = None,
    once: OnceOption = False,
    as_json: JsonOption = False,
    command: ExecOption = None,
) -> None:
    """Look at many runs in one table, or audit the checkpoints of one run beside its training.

    The table has a row for each run, red first: status, since which step, the course of chosen log-probability and KL (nats
    per token), age of the last audit; below it the newest alert and what to do. With --once the exit status is 1 where a run
    is in ERROR, and 2 where there is no run.

    With --probes it is a side process: it audits the checkpoints of a training that has no callback, on any machine that sees
    its folder, as they appear, oldest first, into RUN/align_audit. It can be stopped or killed at any moment, and goes on
    where it was. It ends when training has ended (exit status 1 where a checkpoint could not be audited) or nothing new came
    for --idle minutes.

    Examples:

    align-audit watch runs --once --json

    align-audit watch runs --exec ./notify.sh

    align-audit watch runs/dpo --probes held-out.jsonl --reference base-model --device cuda:1
    """
    of_screen = {"--once": once or None, "--json": as_json or None, "--exec": command}
    of_audits = {
        "--reference": reference, "--output": output, "--config": config, "--max-pairs": max_pairs,
        "--max-length": max_length, "--device": device, "--dtype": dtype,
        "--trust-remote-code": trust_remote_code or None, "--idle": idle,
    }  # fmt: skip
    if not probes:
        _refuse_given("--probes, which makes it a side process", of_audits)
        _look(folders, every, once=once, as_json=as_json, command=command)
    _refuse_given("no --probes: it is of the screen over runs", of_screen)
    options = {"config": config, "max_pairs": max_pairs, "max_length": max_length}
    _audit_as_they_appear(
        folders,
        read_arguments(probes),
        options,
        every=10.0 if every is None else every,
        idle=60.0 * (60.0 if idle is None else idle),
        reference=reference,
        output=output,
        device="auto" if device is None else device,
        dtype=dtype_option(dtype),
        trust_remote_code=trust_remote_code,
    )


def _look(folders: list[Path], every: float | None, **given: Any) -> NoReturn:
    from align_audit.cli.watch_screen import look_at_runs

    raise typer.Exit(look_at_runs(folders, every=2.0 if every is None else every, tell=complain, **given))


def _refuse_given(needed: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigurationError(f"{name} needs {needed}")


def _audit_as_they_appear(folders: list[Path], probes: Any, options: dict[str, Any], device: str, **given: Any) -> None:
    if len(folders) > 1:
        raise ConfigurationError(
            f"found {len(folders)} folders; with --probes expected one, the output directory of a training: start one for each"
        )
    config = settings(**options)
    note_reference(given["reference"], folders[0])
    with _termination_interrupts():
        try:
            from align_audit.monitoring.watch import (
                watch_checkpoints,
            )  # loads torch: after what can be refused without it

            end = watch_checkpoints(
                folders[0],
                probes=probes,
                config=config,
                device=device_option(device),
                say=_say,
                tell=complain,
                **given,
            )
        except KeyboardInterrupt:  # before the first look
            _say("stopped")
            return
    counts = ((end.audited, "audited"), (end.in_log, "in the log already"), (end.broken, "passed over"))
    done = ", ".join(f"{len(folders)} {what}" for folders, what in counts if folders)
    _say(f"{end.reason}; checkpoints: {done or 'none'}")
    if end.broken and not end.interrupted:
        raise typer.Exit(1)


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM is a keyboard interrupt inside: whatever stops the process, it ends as one that is finished with."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _say(words: str) -> None:
    typer.echo(f"align-audit: {plain(words)}")
