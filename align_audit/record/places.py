"""Where logs lie: which folder is one, and which are in a folder of many runs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from align_audit.record.log import ALERTS, FAILURES, FOLDER, RECORDS, is_set_aside

DEPTH = 4
"""How many folders deep runs are looked for."""
_LOOKED_AT = 50
"""Lines of a file that are looked at for one of ours."""


def is_log(folder: Path) -> bool:
    """Is it the folder of a log? By its name; of any other (a copy), by a line in it: many programs write a ``failures.jsonl``.

    A run whose first audits all broke has a log of failures only; any of the three files makes a folder a log.
    """
    with contextlib.suppress(OSError):  # a folder that this user may not look into
        files = [folder / name for name in (RECORDS, ALERTS, FAILURES) if (folder / name).is_file()]
        called_so = Path(os.path.abspath(folder)).name == FOLDER or is_set_aside(folder)
        return bool(files) and (called_so or any(path.stat().st_size > 0 and holds_our_lines(path) for path in files))
    return False


def holds_our_lines(path: Path) -> bool:
    """Is one of the first lines of a file a record, an alert or a failure, of whatever version; or is it empty?

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        return any(_is_ours(line) for line in islice(file, _LOOKED_AT))


def _is_ours(line: bytes) -> bool:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "step" in values and bool({"schema_version", "error", "rule"} & set(values))


def log_folders(place: Path, depth: int = DEPTH) -> list[Path]:
    """The ``align_audit`` folders of the runs at a place: that of the run that it is, or of those in it, however deep.

    A link to a folder is followed where it leads to none that was looked into. Checkpoints are not; what cannot be read holds
    no runs.
    """
    if is_log(place):
        return [place]
    looked_into: set[str] = set()
    links: list[tuple[Path, int]] = []
    logs = list(_logs_in(place, depth, looked_into, links))
    # After all that is there itself: a link named `latest` leads to a run that has a name of its own.
    while links:
        links.sort()
        link, left = links.pop(0)
        logs += _logs_in(link, left, looked_into, links)
    return sorted(logs)


def _logs_in(place: Path, depth: int, looked_into: set[str], links: list[tuple[Path, int]]) -> Iterator[Path]:
    real = os.path.realpath(place)
    if real in looked_into:
        return
    looked_into.add(real)
    if is_log(place / FOLDER):
        yield place / FOLDER
    if depth == 0:
        return
    try:
        inside = [(entry.name, entry.is_symlink()) for entry in os.scandir(place) if entry.is_dir()]
    except OSError:
        return
    for name, is_link in inside:
        if name == FOLDER or name.startswith(("checkpoint-", ".")):
            continue
        if is_link:
            links.append((place / name, depth - 1))
        else:
            yield from _logs_in(place / name, depth - 1, looked_into, links)
