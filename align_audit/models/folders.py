"""What a folder holds that a model could be read from, told by the names in it; nothing is loaded for it."""

from __future__ import annotations

import itertools
import re
from difflib import get_close_matches
from pathlib import Path

from align_audit.errors import listed, plain

CONFIGURATIONS = ("config.json", "adapter_config.json")
"""Of a saved model, and of an adapter."""
_LOOKED_AT = 1000
"""Entries of a folder that are looked at for models, or for names."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_WEIGHTS = ("*.safetensors", "*.bin")
_ENGINES_SHARDS = {
    "pytorch_model_fsdp_*": "`accelerate merge-weights` makes weights of them, and FULL_STATE_DICT has models saved",
    "global_step*": "zero_to_fp32.py makes weights of them, and stage3_gather_16bit_weights_on_model_save has models saved",
}
"""What engines call their shards, and how a model is had."""


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
    if (shards := shards_in(folder)) is not None:
        return f"{plain(folder)} holds no model: {shards}"
    words = f"{plain(folder)} holds no config.json and no adapter_config.json"
    inside = models_in(folder)
    return f"{words}; the models in it are {listed(inside)}: name one of them" if inside else words


def shards_in(folder: Path) -> str | None:
    """Weights that an engine has saved in parts, which only the engine reads, in a clause; None: there are none."""
    for pattern, merge in _ENGINES_SHARDS.items():
        for inside in sorted(folder.glob(pattern)):
            return f"its weights are in the shards of {plain(inside.name)}, of the engine that trained it; {merge}"
    return None


def can_be_hub_name(text: str) -> bool:
    """Whether a text can be the name of a model on the hub: a word, or two with a slash between. Else it is a path.

    Example:
        >>> can_be_hub_name("gpt2"), can_be_hub_name("someone/model"), can_be_hub_name("runs/dpo/base")
        (True, True, False)
    """
    return _HUB_NAME.fullmatch(text) is not None


def holds_weights(folder: Path) -> bool:
    """Are there files that the weights of a model, or of an adapter, could be in?"""
    return any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def near_path(path: Path) -> str:
    """``" (did you mean runs/dpo?)"`` of a path that is not there; empty where nothing in its folder is called alike."""
    try:
        if path.exists():
            return ""
        names = [entry.name for entry in itertools.islice(path.parent.iterdir(), _LOOKED_AT)]
    except (OSError, ValueError):  # no such folder either, or no path at all
        return ""
    near = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f" (did you mean {plain(path.parent / near[0])}?)" if near else ""
