"""Checkpoints of a training, as its folder shows them: which are complete, which are being written, which are gone.

``transformers.Trainer`` writes the weights, the configuration, the optimizer and, last, ``trainer_state.json``
(``Trainer._save_checkpoint``). A checkpoint is complete where that file is there, whole and not older than the weights; one
that has none (``save_pretrained``), or that was copied in another order, where nothing of it has changed for some seconds.
In both cases every safetensors file is as long as its header says, and every shard is there. Nothing here loads a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_audit.errors import counted
from align_audit.models.folders import shards_in
from align_audit.record.checkpoint_names import by_step, checkpoint_step

STATE = "trainer_state.json"
"""What the trainer writes last."""
SETTLED = 5.0
"""Seconds without a change after which a checkpoint without (or with an older) trainer state is taken for complete."""

MAY_BE_WRITTEN = "it may still be written"
"""What a checkpoint lacks that has just changed, and whose trainer has not said that it is whole."""
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLED = re.compile(r"(pytorch_|adapter_)model.*\.bin")
_CONFIGURATIONS = ("config.json", "adapter_config.json")
_LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header that its format allows."""

_Files = dict[str, tuple[int, int]]
"""Size and time of change (in nanoseconds) of each file, by its path inside the checkpoint."""


@dataclass(frozen=True)
class _Seen:
    """What a folder held when it was last seen to change, and when that was."""

    files: _Files
    since: float
    lack: str | None
    state: dict[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint at one look.

    Attributes:
        lack: why it is not complete, as a clause; None: it is.
        quiet: seconds since something of it was last seen to change.
        signature: of names, sizes and times of the files that its model is read from; equal as long as none is written.
        written: when the last of these was written, in seconds since 1970 by the clock of the file system.
        state: what its trainer wrote of training; empty where that is not there.
    """

    step: int
    folder: Path
    lack: str | None
    quiet: float
    signature: str
    written: float
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ends_training(self) -> bool:
        """Does its trainer say that this was the last step?"""
        step, last = self.state.get("global_step"), self.state.get("max_steps")
        return isinstance(step, int) and isinstance(last, int) and 0 < last <= step

    def changed(self) -> bool:
        """Has its model been written to, or removed, since this look?"""
        files = _files(self.folder)
        return files is None or _signature(files) != self.signature


class Arrivals:
    """The checkpoints in the folder of one training, looked at again and again.

    Args:
        run: the training's output directory.
        settled: see :data:`SETTLED`.
        clock: tells seconds that pass.
    """

    def __init__(self, run: Path, *, settled: float = SETTLED, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self._settled = settled
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        """By folder."""

    def look(self) -> list[Checkpoint]:
        """Those that are there now, by step; of two that say the same step, the one that a trainer calls so.

        Raises:
            OSError: the folder cannot be read.
        """
        names = {entry.name for entry in os.scandir(self.run) if checkpoint_step(entry.name)}
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}
        seen = [look for name in names if (look := self._look_at(self.run / name)) is not None]
        called = by_step(each.folder.name for each in seen)
        meant = [each for each in seen if each.folder.name == called[each.step]]
        return sorted(meant, key=lambda checkpoint: checkpoint.step)

    def _look_at(self, folder: Path) -> Checkpoint | None:
        step, files = checkpoint_step(folder.name), _files(folder)
        if not step or not files:
            return None  # gone, or not begun
        now = self._clock()
        seen = self._seen.get(folder.name)
        if seen is None or seen.files != files:
            # Read only where something has changed: many checkpoints on a slow disk are looked at often.
            seen = self._seen[folder.name] = _Seen(files, now, _lack(folder, files), _state(folder))
        quiet, lack = now - seen.since, seen.lack
        if lack is None and quiet < self._settled and not _closed_by_state(files, seen.state):
            lack = MAY_BE_WRITTEN
        written = max((changed for _, changed in _of_model(files).values()), default=0) / 1e9
        return Checkpoint(step, folder, lack, quiet, _signature(files), written, seen.state or {})


def _closed_by_state(files: _Files, state: Mapping[str, Any] | None) -> bool:
    """Did the trainer finish it: is its last file there, whole, and not older than what the model is read from?"""
    # A state that was written since the files were looked at is of the next look.
    if state is None or STATE not in files or not any(name in files for name in _CONFIGURATIONS) or not _weights(files):
        return False
    return files[STATE][1] >= max(changed for _, changed in _of_model(files).values())


def _files(folder: Path) -> _Files | None:
    """Every file of a checkpoint and of the folders in it; None: there is no such folder, or it goes away under this look."""
    files: _Files = {}
    try:
        for place in (folder, *(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())):
            for entry in os.scandir(place):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    files[Path(entry.path).relative_to(folder).as_posix()] = status.st_size, status.st_mtime_ns
    except OSError:
        return None
    return files


def _weights(files: _Files) -> list[str]:
    return [name for name in files if name.endswith(".safetensors") or _PICKLED.fullmatch(Path(name).name)]


def _of_model(files: _Files) -> _Files:
    """The files that a model is read from, without what else lies in a checkpoint (optimizer, random states, cards)."""
    names = {*_weights(files), *(name for name in files if name.endswith((".index.json", *_CONFIGURATIONS)))}
    return {name: files[name] for name in names}


def _signature(files: _Files) -> str:
    return hashlib.blake2b(repr(sorted(_of_model(files).items())).encode(), digest_size=8).hexdigest()


def _state(folder: Path) -> dict[str, Any] | None:
    """What the trainer wrote last; None: it is not there, or half there."""
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


# --- what is missing --------------------------------------------------------------------------------------------------


def _lack(folder: Path, files: _Files) -> str | None:
    """What a checkpoint lacks of the files that its model is read from, as a clause; None: nothing."""
    if not _weights(files) and (shards := shards_in(folder)) is not None:
        return shards
    if not any(name in files for name in _CONFIGURATIONS):
        return "it has no config.json and no adapter_config.json"
    if STATE in files and _state(folder) is None:
        return f"its {STATE} is not whole"
    weights = _weights(files)
    if not weights:
        return "it has no weights"
    missing = sorted({*_shards_by_index(folder, files), *_shards_by_name(files)} - set(files))
    if missing:
        return f"{missing[0]} is missing" + (
            f", and {counted(len(missing) - 1, 'more shard')}" if len(missing) > 1 else ""
        )
    torn = (name for name in weights if name.endswith(".safetensors") and not _is_whole(folder / name))
    return next((f"{name} is not as long as its header says" for name in torn), None)


def _shards_by_index(folder: Path, files: _Files) -> set[str]:
    """The files that an index names; the index itself where it cannot be read yet."""
    shards: set[str] = set()
    for name in files:
        if name.endswith(".index.json"):
            try:
                named = json.loads((folder / name).read_bytes())["weight_map"].values()
                shards.update(Path(name).with_name(str(each)).as_posix() for each in named)
            except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
                shards.add(f"{name} (whole)")
    return shards


def _shards_by_name(files: _Files) -> set[str]:
    """All files of a series of which one is there: ``model-00001-of-00003.safetensors``; and the index that lists them."""
    shards: set[str] = set()
    for name in files:
        if match := _SHARD.fullmatch(name):
            stem, _, count = match.groups()
            shards.update(f"{stem}-{place:05d}-of-{count}.safetensors" for place in range(1, int(count) + 1))
            shards.add(f"{stem}.safetensors.index.json")
    return shards


def _is_whole(path: Path) -> bool:
    """Is a safetensors file as long as its header says?"""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _LONGEST_HEADER:
                return False
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return bool(size == 8 + length + max(ends, default=0))
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return False
