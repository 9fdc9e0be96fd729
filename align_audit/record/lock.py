"""One run, one log: a lock on its file, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]


class FileLock:
    """A lock on a file, held until the last reference to this object is gone.

    Attributes:
        identity: device and inode of the file that is locked.
        path: the path it was locked by, absolute.
    """

    def __init__(self, descriptor: int | None, identity: tuple[int, int], path: Path) -> None:
        self.identity, self.path = identity, path
        self._close = None if descriptor is None else weakref.finalize(self, os.close, descriptor)

    def forget(self) -> None:
        """Close this process's handle; another process that shares it keeps the lock."""
        if self._close is not None:
            self._close()


_held: weakref.WeakValueDictionary[tuple[int, int], FileLock] = weakref.WeakValueDictionary()
"""Locks of this process by file: a second log of the same run, as a second ``train()`` opens it, shares them."""


def identity_of(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def lock(path: Path) -> FileLock:
    """Lock a file (an absolute path), made when absent, against other processes.

    A file system that has no locks lets everybody go on.

    Raises:
        BlockingIOError: another living process holds it.
        OSError: the file cannot be made or opened for writing.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        held = _held.get(identity)
        if held is None and fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Some network file systems give one file another inode at every look: then the holder is this process.
                held = next((holder for holder in list(_held.values()) if holder.path == path), None)
                if held is None:
                    raise
            except OSError:  # no locks here
                pass
    except BaseException:
        os.close(descriptor)
        raise
    if held is not None or fcntl is None:
        os.close(descriptor)
    if held is not None:
        return held
    # Without locks nothing is held open: Windows would neither move the log aside then, nor remove it.
    taken = _held[identity] = FileLock(None if fcntl is None else descriptor, identity, path)
    return taken


def is_held_elsewhere(path: Path) -> bool:
    """Does another living process hold the lock of a file? Nothing is made, and nothing stays locked.

    Raises:
        OSError: the file is there and cannot be opened.
    """
    identity = identity_of(path)
    if fcntl is None or identity is None or identity in _held:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # A shared lock: those who only ask do not meet each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        pass
    finally:
        os.close(descriptor)
    return False


def _forget_in_child() -> None:
    # A forked worker that outlives its parent would go on holding the parent's lock.
    for held in list(_held.values()):
        held.forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
