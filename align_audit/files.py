"""Writing a file whole or not at all, and removing what a killed process left of one."""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
import time
from pathlib import Path

ABANDONED = 3600.0
"""Seconds after which a file that was never finished belongs to a process that was killed."""

_TEMPORARY = re.compile(r".+\.[0-9a-f]{16}\.tmp")
_LONGEST_NAME = 255
"""Bytes of a file's name that common file systems take."""
_BINARY = getattr(os, "O_BINARY", 0)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whose folder exists: a reader sees the old file or the new one, never a part.

    The file's mode is the one that ``open`` gives to new files.

    Raises:
        OSError: the disk refuses; the old file is as it was, and nothing else is left behind.
    """
    ending = f".{secrets.token_hex(8)}.tmp"
    start = os.fsencode(path.name)[: _LONGEST_NAME - len(ending)]
    temporary = path.with_name(os.fsdecode(start) + ending)
    # Not tempfile.mkstemp, whose files nobody else may read, whatever the umask says.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_whole(path: Path, data: bytes, *, wait: bool = True) -> None:
    """Append whole lines to a file, made when absent.

    Where the file does not end with a newline (a torn line, or another program's), a new line is begun.

    Args:
        wait: until they are on disk. Without it the operating system has them: they outlive this process, not the machine.

    Raises:
        OSError: the disk refuses; the file is as long as it was.
    """
    # No Python buffer, whose rest would reach the file after it was cut back.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end:
            os.lseek(descriptor, end - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":
                data = b"\n" + data
        written = 0
        try:
            while written < len(data):
                written += os.write(descriptor, memoryview(data)[written:])
            if wait:
                os.fsync(descriptor)
        except BaseException:
            # A disk that ran full leaves half a line. What is behind it is somebody else's.
            if os.fstat(descriptor).st_size == end + written:
                os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def wait_until_on_disk(path: Path) -> None:
    """Wait until what was appended to a file is on disk.

    Raises:
        OSError: there is no such file, or the disk refuses.
    """
    descriptor = os.open(path, os.O_RDWR | _BINARY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_to_write(folder: Path) -> None:
    """Write something that nobody sees: permission bits do not tell (read-only mounts, quotas, root), only writing does.

    Raises:
        OSError: it takes no file.
    """
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\n")


def is_file_here(path: Path) -> bool:
    """Is this a regular file itself, and no link to one?"""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_folder_here(path: Path) -> bool:
    """Is this a folder itself, and no link to one?"""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left of :func:`write_atomically` in a folder: files an hour old, by their exact form."""
    if not is_folder_here(folder):
        return
    for path in folder.glob("*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and is_file_here(path) and is_old(path):
            path.unlink(missing_ok=True)


def is_old(path: Path) -> bool:
    """Has nothing been written to this for an hour?"""
    return time.time() - path.lstat().st_mtime > ABANDONED


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
