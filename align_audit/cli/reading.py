"""Commands that read stored runs: no model is loaded, and nothing in the runs changes."""

from __future__ import annotations

import json
import shlex
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_audit.cli.console import standard_output
from align_audit.cli.options import check_page, complain
from align_audit.errors import ConfigurationError, RecordError, first_line, listed, plain
from align_audit.files import write_atomically
from align_audit.models.folders import near_path
from align_audit.record.checkpoint_names import step_of

if TYPE_CHECKING:
    from align_audit.record.run import AuditRun


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Output directories of runs, or their logs; at least two.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the reason of what is not known.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the comparison as a page, too: one HTML file, with the runs' curves over each other."),
    ] = None,
) -> None:
    """Compare runs: who is healthy, and what each has paid for the same margin.

    They are read at the last step that all have audited, and where their reward margins are equal, by straight lines between
    audits. Differences are to the first run; they have intervals where both were audited on the same pairs.

    Exit status: 0; 2 where there is nothing to compare.

    Example: align-audit compare runs/dpo-a runs/dpo-b --report comparison.html
    """
    if len(runs) < 2:
        inside = _runs_inside(runs[0], "compare")
        raise ConfigurationError(inside or f"expected at least two runs to compare, found {listed(runs)}; name another")
    if report is not None:
        check_page("--report", report)
    from align_audit.cli.intervals import interval
    from align_audit.record.compare import Side, by_probes
    from align_audit.record.compare import compare as compared
    from align_audit.writers.comparison import ComparisonTable, comparison_values, short_names

    stored = [load_run(path, "compare") for path in runs]
    names = short_names([str(_called(run)) for run in stored])
    comparisons = {
        probes: compared([Side(name, run) for name, run in zip(names, narrowed, strict=True)], interval)
        for probes, narrowed in by_probes(stored, names).items()
    }
    if as_json:
        values = {probes: comparison_values(each) for probes, each in comparisons.items()}
        single = next(iter(values.values()))
        typer.echo(json.dumps(single if len(values) == 1 else {"probes": values}, indent=1))
    else:
        several = len(comparisons) > 1
        _print(ComparisonTable(each, f"Probes {name!r}" if several else "") for name, each in comparisons.items())
    if report is not None:
        size = _comparison_page(stored, names, report)
        typer.echo(f"the comparison as a page is {plain(report)} ({size / 1e6:.1f} MB)", err=as_json)


def _comparison_page(runs: list[AuditRun], names: list[str], path: Path) -> int:
    """Write it, and return its size in bytes."""
    from align_audit.cli.intervals import interval
    from align_audit.writers.web.comparison_data import comparison_page_data
    from align_audit.writers.web.page import COMPARISON, page
    from align_audit.writers.web.report_writer import written_page

    return written_page(
        page(comparison_page_data(runs, names, interval), COMPARISON), path, "the comparison", "--report"
    )


def card(
    run: Annotated[Path, typer.Argument(help="Output directory of a run, or its log.")],
    write: Annotated[
        Path | None,
        typer.Option(
            help="Write the section into this README.md (or that of this folder) instead: in place of the one that is there, "
            "or at the end."
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(help="The audited step; by default N of a checkpoint-N that is written to, else the last."),
    ] = None,
) -> None:
    """Print a model-card section in Markdown: status, figures with intervals, where with its evidence, versions and hashes.

    It stands between markers. --write leaves everything outside of them as it was, byte for byte.

    Exit status: 0; 2 where there is no such audit, or the file cannot be written.

    Example: align-audit card runs/dpo --write runs/dpo/checkpoint-500/README.md
    """
    from align_audit.record.checkpoint_names import as_called
    from align_audit.writers.model_card import model_card, with_section

    stored = load_run(run, "card")
    checkpoints = stored.checkpoints
    if write is None:
        typer.echo(model_card(stored, step, checkpoints))
        return
    page = write / "README.md" if write.is_dir() else write
    numbered = step_of(page.parent)
    if step is None and numbered:
        step = numbered
        checkpoints[step] = as_called(page.parent).name
    section = model_card(stored, step, checkpoints)
    _write_page(page, lambda text: with_section(text, section))
    typer.echo(f"the section is in {plain(page)}")


def load_run(path: Path, command: str) -> AuditRun:
    """A stored run. What its log holds of damaged lines is said on stderr.

    Args:
        command: of ``align-audit`` that wants it.

    Raises:
        RecordError: no run is there (with the runs in the folder, or the nearest name that there is), or it was written by a
            newer align_audit.
    """
    from align_audit.record.run import AuditRun

    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            run = AuditRun.load(path)
        except RecordError as error:
            raise RecordError(_runs_inside(path, command) or f"{error}{near_path(path)}") from None
    for each in noted:
        complain(str(each.message))
    return run


_MOST_RUNS = 10
"""Runs of a folder that are named."""


def _runs_inside(path: Path, command: str) -> str:
    """What to type of the runs in a folder that is none itself, a line for each; empty where there are none, or it is a run."""
    from align_audit.record.log import output_dir_of
    from align_audit.record.places import log_folders

    runs = [output_dir_of(log) for log in log_folders(path)]
    if not runs or log_folders(path, 0):
        return ""
    count = "a run" if len(runs) == 1 else f"{len(runs)} runs"
    words = f"{plain(path)} is no run itself, and holds {count}; expected "
    words += "at least two of them, or one and another" if command == "compare" else "one"
    typed = [shlex.quote(str(run)) for run in runs]
    if command == "compare":
        # Each beside the first: what is compared are differences to it.
        typed = [f"{typed[0]} {each}" for each in typed[1:]] or [f"{typed[0]} ANOTHER"]
    lines = [f"  align-audit {command} {plain(each)}" for each in typed[:_MOST_RUNS]]
    more = [f"  and {len(typed) - _MOST_RUNS} more"] if len(typed) > _MOST_RUNS else []
    return "\n".join([f"{words}:", *lines, *more])


def _write_page(page: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file, whole or not at all; one that is not there yet is made. Its mode stays, and a link stays one."""
    target = page.resolve()
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        text = target.read_bytes() if mode is not None else b""
        changed = change(text)
        if changed != text:
            write_atomically(target, changed)
            if mode is not None:
                target.chmod(mode)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {plain(page)}: {first_line(error)}; expected a README.md in a folder that exists"
        ) from None


def _called(run: AuditRun) -> Path:
    """What a run is called by: the folder that it was trained into, and which of those that began there."""
    folder = run.output_dir.resolve()
    return folder / run.directory.resolve().name if run.is_set_aside else folder


def _print(renderables: Any) -> None:
    console = standard_output()
    for renderable in renderables:
        console.print(renderable, soft_wrap=not console.is_terminal)
