"""The ``align-audit`` command."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_audit import __version__
from align_audit.cli.doctor import doctor
from align_audit.cli.options import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    FailOnOption,
    GateOption,
    MaxLengthOption,
    PickleOption,
    ReferenceOption,
    ReportMayBeBare,
    ResumeOption,
    RunReportOption,
    StepOption,
    TrustOption,
    announce,
    bases_option,
    check_files,
    check_page,
    complain,
    demands_option,
    device_option,
    dtype_option,
    find_checkpoints,
    layers_option,
    left_out,
    note_reference,
    read_arguments,
    refuse,
    settings,
)
from align_audit.cli.reading import card, compare
from align_audit.cli.report import report
from align_audit.cli.watch import watch
from align_audit.errors import SHOWN, AlignAuditError, ConfigurationError, counted, first_line, listed, named, plain
from align_audit.models.pickles import refuse_pickles
from align_audit.record.checkpoint_names import LAST_STEP, as_called, step_of

if TYPE_CHECKING:
    from align_audit.cli.gates import Demands
    from align_audit.monitoring.checkpoints import SavedAudits

_UsageError: Any = typer.BadParameter.__bases__[0]
"""Of click, or of the copy of it that newer versions of typer bring along."""

_UNFORESEEN = 70
"""Exit status after an error that is none of ours (``EX_SOFTWARE`` of sysexits.h); 1 and 2 are said in each command's help."""
_INTERRUPTED = 130
"""After Ctrl+C, as of shells: 128 + SIGINT."""

_NO_PATH = (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP)
"""What the system says of a path that nothing can be made of: it is too long, or forbidden, or links lead in a circle."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What it says of a disk, or a user's part of one, that is full."""
_HERE = Path(__file__).parents[1]
"""Where this package lies."""
_SHOWN_BY_PYTHON = warnings.showwarning

app = typer.Typer(
    name="align-audit",
    help="Watch what preference training does inside a language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"align-audit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Watch what preference training does inside a language model."""


app.command()(watch)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the two runs, their logs and pictures go.")] = Path(
        "align-audit-demo"
    ),
) -> None:
    """Train a small shipped model twice, offline on a CPU: once well, once to ruin, with the audit on.

    Example: align-audit demo --output align-audit-demo
    """
    from align_audit.lab.demo import run_demo

    run_demo(output)


@app.command(cls=ReportMayBeBare)
def run(
    checkpoint: Annotated[Path, typer.Argument(help="A saved model or adapter, or a folder of checkpoint-N folders.")],
    probes: Annotated[
        list[str],
        typer.Option(
            help="Preference pairs: .jsonl, .json (also .gz), .parquet, or a data set folder. As NAME=PATH, several times: "
            "probe sets that are audited side by side."
        ),
    ],
    reference: ReferenceOption = None,
    output: Annotated[Path, typer.Option(help="Where the record log and the pictures go.")] = Path("align-audit-run"),
    config: ConfigOption = None,
    max_pairs: Annotated[int | None, typer.Option(help="Probe pairs to draw.")] = None,
    max_length: MaxLengthOption = None,
    step: StepOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
    fail_on: FailOnOption = None,
    gate: GateOption = None,
    resume: ResumeOption = True,
    report: RunReportOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print all that an audit measured.")] = False,
) -> None:
    """Audit saved checkpoints against their reference.

    Exit status: 0; 1 where one of several checkpoints could not be audited (it is named on stderr, the others are audited);
    2 where nothing could be audited, an option is wrong, or a checkpoint broke a --gate or --fail-on, also by not being
    audited; 70 after an error of another kind.

    Example: align-audit run runs/dpo/checkpoint-500 --reference base-model --probes held-out.jsonl
    """
    steps = _steps(checkpoint, step)
    demands = demands_option(gate, fail_on)
    sets = read_arguments(probes)
    check_files(sets, config, reference)
    if report:
        check_page("--report", Path(report))
    options = settings(config, max_pairs, max_length, verbose=verbose)
    _check_models([*steps], reference, allow_pickle=allow_pickle)
    from align_audit.monitoring.checkpoints import audit_saved  # loads torch: after what can be refused without it

    began = time.perf_counter()
    audits = audit_saved(
        steps,
        reference,
        sets,
        options,
        output,
        device_option(device),
        dtype=dtype_option(dtype),
        trust_remote_code=trust_remote_code,
        tell=complain,
        on_turn=announce if options.progress and len(steps) > 1 else None,
        fresh=not resume,
    )
    _conclude(audits, len(steps), output, time.perf_counter() - began)
    _say_report(output, report)
    raise typer.Exit(_status(audits, steps, demands, output))


def _steps(checkpoint: Path, step: int | None) -> dict[Path, int]:
    """The checkpoints that are meant, each with its step."""
    folders = find_checkpoints(checkpoint)
    if step is not None and len(folders) > 1:
        raise ConfigurationError(
            f"--step names one step, and {plain(checkpoint)} holds {len(folders)} checkpoints; leave it out"
        )
    if step is not None and step > LAST_STEP:
        raise ConfigurationError(f"--step: expected at most {LAST_STEP}; found {step}")
    if folders != [checkpoint]:
        for name in left_out(checkpoint, folders):
            complain(f"{name} is left out, since its name says no step; to audit it, name it, with --step")
    return {folder: step if step is not None else step_of(folder) for folder in folders}


def _check_models(folders: list[Path], reference: str | None, *, allow_pickle: bool) -> None:
    """Say, or refuse, what their folders tell of the models before any is loaded."""
    note_reference(reference, as_called(folders[0]).parent)
    if not allow_pickle:
        refuse_pickles([*folders, *([reference] if reference is not None else [])])


def _status(audits: SavedAudits, steps: Mapping[Path, int], demands: Demands | None, output: Path) -> int:
    """The exit status after audits; what broke a demand is said."""
    if demands is not None:
        names = {number: folder.name for folder, number in steps.items()}
        not_audited = [folder.name for folder in audits.broken]
        if broken := demands.broken(audits.records, output, names, not_audited):
            for words in broken:
                complain(words)
            return 2
    return 1 if audits.broken else 0


@app.command()
def transfer(
    policy: Annotated[Path, typer.Argument(help="A saved model or adapter.")],
    probes: Annotated[
        list[str],
        typer.Option(help="NAME=PATH of preference pairs, at least two times; files as in `align-audit run`."),
    ],
    reference: ReferenceOption = None,
    layer: Annotated[
        str | None, typer.Option(help="N, several as N,M, all, or auto: those that each set would choose by itself.")
    ] = None,
    basis: Annotated[str | None, typer.Option(help="shift, activation or both.")] = None,
    output: Annotated[Path, typer.Option(help="Where the record and the pictures go.")] = Path("align-audit-transfer"),
    config: ConfigOption = None,
    max_pairs: Annotated[int | None, typer.Option(help="Probe pairs to draw from each set.")] = None,
    max_length: MaxLengthOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Patch the subspaces fitted on one probe set on the pairs of another: does what was learned on one carry the other?

    Example: align-audit transfer runs/dpo/checkpoint-500 --reference base-model
    --probes harmless=harmless.jsonl --probes helpful=helpful.jsonl --layer auto --basis shift
    """
    folder = _one_policy(policy)
    sets = _several_sets(probes)
    check_files(sets, config, reference)
    _check_models([folder], reference, allow_pickle=allow_pickle)
    low_rank = {"layers": layers_option(layer), "bases": bases_option(basis)}
    options = settings(config, max_pairs, max_length, {name: value for name, value in low_rank.items() if value})
    _make_folder(output)
    from align_audit.monitoring.checkpoints import transfer_saved  # loads torch: after what can be refused without it
    from align_audit.writers.plots.transfer import save_transfer
    from align_audit.writers.transfer_terminal import print_transfer

    began = time.perf_counter()
    record = transfer_saved(
        folder,
        reference,
        sets,
        options,
        step_of(folder),
        device_option(device),
        dtype=dtype_option(dtype),
        trust_remote_code=trust_remote_code,
        tell=complain,
    )
    record.save(output / "transfer.json")
    print_transfer(record)
    pictures = _drawn(lambda: save_transfer(record, output / "pictures"))
    typer.echo(f"transfer in {time.perf_counter() - began:.0f} s; the record is {output / 'transfer.json'}")
    for path in pictures.values():
        typer.echo(f"  {path}")


def _one_policy(path: Path) -> Path:
    folders = find_checkpoints(path)
    if len(folders) > 1:
        raise ConfigurationError(
            f"{plain(path)} holds {len(folders)} checkpoints, and a transfer is of one policy; choose one, such as "
            f"{plain(folders[-1])}"
        )
    return folders[0]


def _several_sets(probes: list[str]) -> dict[str, Path]:
    sets = read_arguments(probes)
    if isinstance(sets, Path) or len(sets) < 2:
        raise ConfigurationError(
            f"a transfer is between at least two probe sets; found {listed(probes)}. Expected name=path for each, such as "
            "--probes harmless=a.jsonl --probes helpful=b.jsonl"
        )
    return sets


def _make_folder(output: Path) -> None:
    """Find out now, and not after minutes of work, whether there can be one."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {plain(output)}: {first_line(error)}; choose another --output"
        ) from None


app.command()(compare)
app.command()(card)
app.command()(doctor)
app.command()(report)


def _conclude(audits: SavedAudits, checkpoints: int, output: Path, seconds: float) -> None:
    """Say what was audited, what an earlier start had audited already, and where all of it is."""
    from align_audit.writers.plots.gallery import save_all

    pictures = _drawn(lambda: save_all(audits.records, output / "pictures"))
    count = counted(audits.made, "audit")
    typer.echo(f"{count} in {seconds:.0f} s; the log is {output / 'align_audit' / 'records.jsonl'}")
    if audits.in_log:
        verb, them = ("is", "it") if len(audits.in_log) == 1 else ("are", "them")
        count = f"{len(audits.in_log)} of {counted(checkpoints, 'checkpoint')}"
        typer.echo(f"{count} {verb} in the log already; --fresh audits {them} again")
    for path in pictures.values():
        typer.echo(f"  {path}")


def _drawn(draw: Callable[[], dict[str, Path]]) -> dict[str, Path]:
    """What was drawn, by name. A disk that takes no pictures takes nothing from what was measured, and it is said."""
    try:
        return draw()
    except OSError as error:
        complain(f"the pictures could not be written ({first_line(error)}); what they show is in the record")
        return {}


def _say_report(output: Path, page: str | None) -> None:
    """Write the page of all that the log holds now, and say where it is; where none is asked for, nothing."""
    if page is None:
        return
    from align_audit.writers.web.report_writer import page_of, report_of

    run, path, size = report_of(output)
    if page:
        path, size = page_of(run, Path(page), "--report")
    typer.echo(f"{run.status}: the report is {plain(path)} ({size / 1e6:.1f} MB)")


def main() -> None:
    """Entry point: our own errors, and wrong arguments, are messages of a line, not tracebacks; other errors are both."""
    _print_what_there_is()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=UserWarning, module=r"align_audit\b")
            warnings.showwarning = _warn
            status = app(prog_name="align-audit", standalone_mode=False)
    except AlignAuditError as error:
        refuse(str(error))
        status = 2
    except _UsageError as error:
        status = _told(error)
    except typer.Abort:
        status = _INTERRUPTED
    except OSError as error:
        status = _of_system(error)
    except Exception as error:
        status = _unforeseen(error)
    if status == _INTERRUPTED:  # typer makes a status of Ctrl+C, and says nothing
        complain("interrupted")
    sys.exit(status if isinstance(status, int) else 0)


def _of_system(error: OSError) -> int:
    """What the system refused: a path, room on a disk, or something else."""
    if error.errno in _NO_PATH and error.filename is not None:
        return _no_path(error)
    if error.errno in _NO_ROOM:
        where = "what is printed" if error.filename is None else plain(os.fsdecode(error.filename), SHOWN)
        refuse(f"{where} could not be written whole: {error.strerror}. Make room there, and start again")
        return _UNFORESEEN
    return _unforeseen(error)


def _no_path(error: OSError) -> int:
    """Whatever wanted to read or write there, what is wrong is the path."""
    path = plain(os.fsdecode(error.filename), SHOWN)
    refuse(f"{path}: {error.strerror}; expected a path that this process can use: choose another, or free this one")
    return 2


def _unforeseen(error: Exception) -> int:
    complain("".join(traceback.format_exception(error)).rstrip())
    refuse(f"{named(error)}. This was not foreseen: free what it names, or report it with the lines above")
    return _UNFORESEEN


def _print_what_there_is() -> None:
    """A character that a terminal's or a file's encoding does not have ends no command: a question mark stands for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any, **kwargs: Any
) -> None:
    """Say our own warnings as all else is said, without the line of our code that gave them; others as Python does."""
    if category is UserWarning and Path(filename).is_relative_to(_HERE):
        complain(str(message))
    else:
        _SHOWN_BY_PYTHON(message, category, filename, lineno, *more, **kwargs)


def _told(error: Any) -> int:
    """Say what is wrong with the arguments, and where to look; the help itself where there were none."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        path = "align-audit" if error.ctx is None else error.ctx.command_path
        refuse(f"{' '.join(error.format_message().split()).rstrip('.')}; see {path} --help")
    return int(error.exit_code)


if __name__ == "__main__":
    main()
