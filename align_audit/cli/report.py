"""``align-audit report``: the page of a stored run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align_audit.cli.options import check_page
from align_audit.cli.reading import load_run
from align_audit.errors import counted, plain


def report(
    run: Annotated[
        Path, typer.Argument(help="The output folder of a run, its align_audit folder, or a records.jsonl file.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes; by default report.html beside the log.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Make the report of a stored run: one HTML file, from its log alone; no model is loaded.

    Example: align-audit report runs/dpo --open
    """
    from align_audit.writers.web.report_writer import page_of

    if output is not None:
        check_page("--output", output)
    stored = load_run(run, "report")
    path, size = page_of(stored, output)
    audits = len(stored.records)
    typer.echo(f"{stored.status}: the report of {counted(audits, 'audit')} is {plain(path)} ({size / 1e6:.1f} MB)")
    if open_page:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            typer.echo("no browser could be started here: open the file with one", err=True)
