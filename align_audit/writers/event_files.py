"""TensorBoard's event files on disk: where this process writes them, and which tags they hold already.

A file is a row of records: eight bytes of length, four of checksum, the event, four of checksum. One that a kill cut off ends
before its last record does.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from align_audit.writers.scalars import ROOT

SUFFIX = ".align_audit"
"""What the names of event files end with that are not the trainer's."""

_PICTURE = 2**15
"""Bytes of an event from which on it is a picture, which is passed over unread."""
_LARGEST = 2**30
"""Bytes of an event beyond which its length is damage."""


class TagsWritten:
    """The tags of curves and texts that event files hold, by step, of what this package writes.

    Of what is complete only the tag that ends it is remembered: there are hundreds of others.

    Args:
        last: the end of the tag that is written last below a root at a step, such as ``/controls/text_summary``.
    """

    def __init__(self, last: str) -> None:
        self._last = last
        self._at: dict[int, dict[str, float]] = {}
        """Step → tag → the latest time it was written for."""

    def read(self, path: Path) -> None:
        """Add what a file holds, as far as it can be read."""
        for step, time, tag in _tags(path):
            tags = self._at.setdefault(step, {})
            tags[tag] = max(time, tags.get(tag, time))
            if tag.endswith(self._last):
                root = tag.removesuffix(self._last)
                rest = {name: at for name, at in tags.items() if not name.startswith(f"{root}/")}
                self._at[step] = {**rest, tag: tags[tag]}

    def complete(self, root: str, step: int, since: float) -> bool:
        """Whether all curves and texts of a step were written below this root, at or after a time.

        What is older is another run's, in the same folder.
        """
        return self._at.get(step, {}).get(root + self._last, -math.inf) >= since

    def at(self, step: int, since: float) -> Collection[str]:
        """The tags of a step that is not complete, written at or after a time."""
        return {tag for tag, time in self._at.get(step, {}).items() if time >= since}


def event_files(output_dir: Path) -> list[Path]:
    """Every event file below ``output_dir`` and below the logging directory that the environment names, the oldest first.

    What is there no more is none: a link that leads nowhere, as a client leaves them, or a file that is deleted meanwhile.
    """
    roots = [output_dir]
    if logging_dir := os.environ.get("TENSORBOARD_LOGGING_DIR"):
        roots.append(Path(logging_dir).expanduser())
    written: dict[Path, int] = {}
    for root in filter(Path.is_dir, roots):
        for path in root.rglob("events.out.tfevents.*"):
            with contextlib.suppress(OSError):
                written[path] = path.stat().st_mtime_ns
    return sorted(written, key=lambda path: (written[path], path.name))


def find_event_folder(output_dir: Path) -> Path | None:
    """The folder of the newest event file that this process has written, not counting this package's own.

    The writer names its files ``events.out.tfevents.<time>.<host>.<process id>.<counter>``.
    """
    # In containers every run may have the same process id, and each has a host name of its own.
    of_this_process = f".{socket.gethostname()}.{os.getpid()}."
    files = [
        path for path in event_files(output_dir) if of_this_process in path.name and not path.name.endswith(SUFFIX)
    ]
    return files[-1].parent if files else None


def _tags(path: Path) -> Iterator[tuple[int, float, str]]:
    """(step, time, tag) of every value of ours in a file."""
    from tensorboard.compat.proto.event_pb2 import Event

    # Most events of a trainer are not ours: their bytes tell.
    root = ROOT.encode()
    for data in _events(path):
        if root not in data:
            continue
        try:
            event = Event.FromString(data)
        except Exception:  # protobuf's own error, of whichever implementation: a damaged record
            continue
        for value in event.summary.value:
            if value.tag.startswith((f"{ROOT}/", f"{ROOT} ")):
                yield event.step, event.wall_time, value.tag


def _events(path: Path) -> Iterator[bytes]:
    """The events of a file that are no pictures, undecoded, up to the first that is cut off."""
    try:
        with path.open("rb") as file:
            while len(head := file.read(12)) == 12:
                (length,) = struct.unpack("<Q", head[:8])
                if length > _LARGEST:
                    return
                if length >= _PICTURE:
                    file.seek(length + 4, os.SEEK_CUR)
                    continue
                data = file.read(length)
                if len(data) < length or len(file.read(4)) < 4:
                    return
                yield data
    except OSError:
        return
