"""What a folder holds that a model could be read from, told by the names in it; nothing is loaded for it."""

from __future__ import annotations

import itertools
from pathlib import Path

from align_audit.errors import listed, plain

CONFIGURATIONS = ("config.json", "adapter_config.json")
"""Of a saved model, and of an adapter."""
_LOOKED_AT = 1000
"""Entries of a folder that are looked at for models."""


def is_folder(path: Path) -> bool:
    """Is there a folder? What can be no path at all (a name that is too long) is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def holds_model(folder: Path) -> bool:
    """Is a saved model, or an adapter, right in this folder?"""
    return any((folder / name).is_file() for name in CONFIGURATIONS)


def models_in(folder: Path) -> list[str]:
    """The names of the folders in a folder that hold a model; none where it cannot be read."""
    try:
        entries = sorted(itertools.islice(folder.iterdir(), _LOOKED_AT))
    except OSError:
        return []
    return [entry.name for entry in entries if holds_model(entry)]


def lack_of_model(folder: Path) -> str | None:
    """What is there in place of a model, as a clause with the folder's name before it; None: it holds one.

    Example:
        >>> import tempfile
        >>> lack_of_model(Path(tempfile.mkdtemp())).partition(" holds ")[2]
        'no config.json and no adapter_config.json'
    """
    if holds_model(folder):
        return None
    words = f"{plain(folder)} holds no config.json and no adapter_config.json"
    inside = models_in(folder)
    return f"{words}; the models in it are {listed(inside)}: name one of them" if inside else words
