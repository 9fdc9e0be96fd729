"""Checkpoints whose weights are pickles: a pickle is a program, and opening a checkpoint should run none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from align_audit.errors import ReferenceUnavailableError, plain

_PAIRS = (("pytorch_model*.bin", "model*.safetensors"), ("adapter_model.bin", "adapter_model.safetensors"))
"""Weights as pickles, and what is read instead where it is there."""


def pickled_weights(folder: Path) -> str | None:
    """The name of a pickle that a saved model or adapter would be read from; None: there is none.

    Example:
        >>> pickled_weights(Path("runs/dpo/checkpoint-500")) is None
        True
    """
    for pickles, safe in _PAIRS:
        names = sorted(path.name for path in folder.glob(pickles))
        if names and not any(folder.glob(safe)):
            return names[0]
    return None


def refuse_pickles(folders: Iterable[str | Path]) -> None:
    """Refuse folders that would be read from pickles: of models and adapters, and of the bases that adapters name.

    Raises:
        ReferenceUnavailableError: one would be; the message says how to save it otherwise, and which option reads it anyway.
    """
    for folder in _with_bases(map(Path, folders)):
        name = pickled_weights(folder)
        if name is not None:
            raise ReferenceUnavailableError(
                f"the weights of {plain(folder)} are a pickle ({plain(name)}), which can run code when it is opened. Save the "
                "model again with save_pretrained, which writes safetensors, or pass --allow-pickle where you trust its author"
            )


def _with_bases(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        for place in (folder, folder / "ref"):
            yield place
            try:
                base = json.loads((place / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
            except (OSError, ValueError, AttributeError, RecursionError):
                continue  # no adapter, or a damaged one: loading it says so
            if isinstance(base, str) and base:
                yield Path(base)
