"""The reference's streams and gradients of probe batches on disk: what attribution needs of it, computed once a run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from align_audit.batches import PairBatch
from align_audit.record import METHODS_VERSION

logger = logging.getLogger(__name__)

_FREE = 0.5
"""Share of a disk's free space that a batch may take at most."""


class ReferenceStreams:
    """Tensors by batch, each batch a file: written once, read by every later audit of the same reference and probes.

    A file is found again only for the same weights, pairs, settings and layout. Opening the store for another reference
    removes what is there for these probes of the one before: a reference that moves does not fill the disk. A file that
    cannot be read, or a disk that refuses one, costs the work once more, and nothing else.

    Args:
        directory: where files are kept; made when the first is written.
        probes: hash of the probe pairs.
        reference: whatever else the tensors depend on, the weights' hash first.
        device: where tensors are wanted.
    """

    def __init__(self, directory: Path, probes: str, reference: tuple[str, ...], device: torch.device) -> None:
        self._directory, self._device = directory, device
        self._key = json.dumps([METHODS_VERSION, torch.__version__, device.type, probes, *reference])
        family = f"streams-{_digest(probes)}-"
        self._prefix = f"{family}{_digest(self._key)}-"
        self._full = False
        if directory.is_dir():
            for path in directory.glob(f"{family}*"):
                if not path.name.startswith(self._prefix):
                    path.unlink(missing_ok=True)

    def get(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """What was put for this batch, by name; empty when there is nothing, or nothing sound."""
        path = self._path(batch)
        try:
            with safe_open(path, framework="pt", device=str(self._device)) as file:
                if file.metadata().get("key") == self._key:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            pass
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be used (%s); the reference is computed again", path, error)
        return {}

    def put(self, batch: PairBatch, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep these tensors for this batch, whole or not at all."""
        if self._full:
            return
        size = sum(tensor.nbytes for tensor in tensors.values())
        temporary = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if size > _FREE * shutil.disk_usage(self._directory).free:
                raise OSError(f"a batch takes {size / 2**30:.2f} GiB, more than half of what is free on this disk")
            handle, temporary = tempfile.mkstemp(dir=self._directory, prefix=self._prefix, suffix=".tmp")
            os.close(handle)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"key": self._key})
            os.replace(temporary, self._path(batch))
        except (OSError, SafetensorError) as error:
            self._full = True
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            logger.warning(
                "align_audit could not keep the reference's streams in %s: %s; it computes them at every audit",
                self._directory,
                error,
            )

    def _path(self, batch: PairBatch) -> Path:
        layout = [list(batch.input_ids.shape), batch.pair_index.tolist()]
        return self._directory / f"{self._prefix}{_digest(json.dumps(layout))}.safetensors"


def _digest(words: str) -> str:
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
