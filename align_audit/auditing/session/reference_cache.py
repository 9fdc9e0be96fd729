"""What depends on the reference alone, kept for a run: computed once, found again by the next audit and after a resume.

Its depth trace, what health audits compare with (in memory only), and (where asked for) its streams and gradients of
probe batches, which attribution needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from align_audit.auditing.session.kept import KeptReference
from align_audit.errors import first_line, plain
from align_audit.files import is_file_here, is_folder_here, is_old, remove_abandoned, write_atomically
from align_audit.models.precision import float32_products
from align_audit.probes.batches import PairBatch
from align_audit.record.audit_record import METHODS_VERSION, DepthTrace

if TYPE_CHECKING:
    from align_audit.auditing.session.walk import Session

logger = logging.getLogger(__name__)

_FREE = 0.5
"""Share of a disk's free space that a batch may take at most."""
_BATCH = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16}\.safetensors")
"""Names of kept batches: digests of the weights, of all else the tensors depend on, and of the layout."""
_WORKING = re.compile(r"tmp[a-z0-9_]{8}")
"""Names of the folders in which a batch is written, as ``tempfile.mkdtemp`` gives them."""
_COMPLETE = "batch.safetensors"


class ReferenceTrace(BaseModel):
    """The reference's depth trace, and why a number in it is NaN (path within the trace → reason).

    Attributes:
        distances: by ascending key of the rows, those of each row that has walked up the layers: radians.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    key: list[str]
    methods_version: int
    trace: DepthTrace
    reasons: dict[str, str]
    distances: list[list[float]]

    @classmethod
    def of(cls, key: tuple[str, ...], trace: DepthTrace, reasons: dict[str, str], distances: list[list[float]]) -> Self:
        """As the methods of today give it."""
        return cls(key=list(key), methods_version=METHODS_VERSION, trace=trace, reasons=reasons, distances=distances)


class ReferenceCache:
    """Depth traces of references by what they depend on: weights, probes, settings, dtype. In memory, and on disk.

    A reference that moves (``sync_ref_model``) has another weight hash, so its old trace would never be found again, and is
    forgotten.

    Args:
        directory: where traces are also kept as files; None: in memory only.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        # Absolute now: the working directory may change while the run goes on.
        self.directory = Path(os.path.abspath(directory)) if directory is not None else None
        if self.directory is not None:
            with contextlib.suppress(OSError):
                remove_abandoned(self.directory)
        self._traces: dict[tuple[str, ...], ReferenceTrace] = {}
        self._kept: dict[str | None, KeptReference] = {}

    def kept(self, probe_name: str | None, key: tuple[str, ...]) -> KeptReference:
        """What is kept in memory for a probe set; what was kept under another key is forgotten."""
        if probe_name not in self._kept or self._kept[probe_name].key != key:
            self._kept[probe_name] = KeptReference(key)
        return self._kept[probe_name]

    def get(self, key: tuple[str, ...]) -> ReferenceTrace | None:
        """What was put under ``key``, in this process or an earlier one; None when there is nothing, or nothing sound."""
        if key not in self._traces and self.directory is not None:
            path = self._path(self.directory, key)
            try:
                stored = ReferenceTrace.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                return None
            except (OSError, ValidationError) as error:
                logger.warning(
                    "%s cannot be used (%s); the reference is measured again", plain(path), first_line(error)
                )
                return None
            if stored.key == list(key) and stored.methods_version == METHODS_VERSION:
                self._traces[key] = stored
        return self._traces.get(key)

    def put(self, kept: ReferenceTrace) -> None:
        """Keep a trace under its key, whose first word is the hash of the weights: that of other weights, the same else, is
        forgotten. A disk that refuses it costs the next process some time, and nothing else."""
        key = tuple(kept.key)
        for outdated in [each for each in self._traces if each != key and each[1:] == key[1:]]:
            del self._traces[outdated]
            if self.directory is not None:
                with contextlib.suppress(OSError):
                    self._path(self.directory, outdated).unlink(missing_ok=True)
        self._traces[key] = kept
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path(self.directory, key), kept.model_dump_json().encode())
            except OSError as error:
                place = plain(self.directory)
                logger.warning("align_audit could not keep the reference's trace in %s: %s", place, first_line(error))

    @staticmethod
    def _path(directory: Path, key: tuple[str, ...]) -> Path:
        digest = hashlib.blake2b(json.dumps([METHODS_VERSION, *key]).encode(), digest_size=8).hexdigest()
        return directory / f"reference-{digest}.json"


class ReferenceStreams:
    """Tensors by batch, each batch a file: written once, read by every later audit of the same reference and probes.

    A file is found again only for the same weights, pairs, way of computing and layout. Opening the store for other weights
    removes what is there for these probes of those before: a reference that moves does not fill the disk. A file that
    cannot be read, or a disk that refuses one, costs the work once more, and nothing else.

    Args:
        directory: under which a folder for these probes is made when the first file is written.
        probes: hash of the probe pairs.
        weights: hash of the reference's.
        computed: whatever else the tensors depend on.
        device: where tensors are wanted.
        read: False: nothing is found, and everything written anew.
    """

    def __init__(
        self, directory: Path, probes: str, weights: str, computed: str, device: torch.device, *, read: bool = True
    ) -> None:
        self._folder, self._device, self._read = directory / f"streams-{_digest(probes)}", device, read
        self._key = json.dumps([METHODS_VERSION, str(device), probes, weights, computed])
        self._weights = f"{_digest(weights)}-"
        self._prefix = f"{self._weights}{_digest(self._key)}-"
        self._refused = False
        self._used: set[str] = set()
        with contextlib.suppress(OSError):
            self._remove_outdated()

    @classmethod
    def of(
        cls, session: Session, directory: Path, *, probes: str, weights: str, configuration: str, read: bool
    ) -> Self:
        """The store for a session's reference and pairs, as this process computes them.

        Args:
            configuration: hash of what the reference computes with beside its parameters.
        """
        reference = session.models.reference
        # Whatever may change a last bit: kept streams are compared with those of a policy that may be the same model.
        computed = {
            "build": configuration,
            "anatomy": repr(reference.anatomy),
            "dtype": str(reference.compute_dtype),
            "shared": session.shared,
            "embedding": session.config.patching.embedding,
            "threads": torch.get_num_threads(),
            "by": computed_by(session.device),
        }
        return cls(directory, probes, weights, json.dumps(computed), session.device, read=read)

    def get(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """What was put for this batch, by name; empty when there is nothing, or nothing that can be read."""
        if not self._read:
            return {}
        path = self._path(batch)
        try:
            with safe_open(path, framework="pt", device=str(self._device)) as file:
                if (file.metadata() or {}).get("key") == self._key:
                    self._used.add(path.name)
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:  # nothing was put yet
            return {}
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be used (%s); the reference is computed again", plain(path), first_line(error))
        return {}

    def put(self, batch: PairBatch, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep these tensors for this batch, whole or not at all."""
        if self._refused:
            return
        size = sum(tensor.nbytes for tensor in tensors.values())
        working = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if size > _FREE * shutil.disk_usage(self._folder).free:
                raise OSError(f"a batch takes {size / 2**30:.2f} GiB, more than half of what is free on this disk")
            working = tempfile.mkdtemp(dir=self._folder)
            complete = os.path.join(working, _COMPLETE)
            save_file(_apart(tensors), complete, {"key": self._key})
            os.replace(complete, self._path(batch))
            self._used.add(self._path(batch).name)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise  # for the audit, which goes on with a smaller batch
            self._refused = True
            logger.warning(
                "align_audit could not keep the reference's streams in %s: %s; it computes them at every audit",
                plain(self._folder),
                first_line(error),
            )
        finally:
            if working is not None:
                shutil.rmtree(working, ignore_errors=True)

    def forget_the_rest(self) -> None:
        """Remove what this audit had no use for: batches of pairs that now go together otherwise."""
        with contextlib.suppress(OSError):
            for path in self._batches():
                if path.name.startswith(self._prefix) and path.name not in self._used:
                    path.unlink(missing_ok=True)

    def _remove_outdated(self) -> None:
        for path in self._batches():
            if not path.name.startswith(self._weights):
                path.unlink(missing_ok=True)
        if is_folder_here(self._folder):
            for path in self._folder.glob("tmp*"):
                if _WORKING.fullmatch(path.name) and is_folder_here(path) and is_old(path):
                    if is_file_here(path / _COMPLETE):
                        (path / _COMPLETE).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # somebody else's file is in it
                        path.rmdir()

    def _batches(self) -> list[Path]:
        """The files that a store wrote here, and nothing else: somebody's files may lie here, or links to them."""
        if not is_folder_here(self._folder):
            return []
        return [path for path in self._folder.iterdir() if _BATCH.fullmatch(path.name) and is_file_here(path)]

    def _path(self, batch: PairBatch) -> Path:
        layout = [list(batch.input_ids.shape), batch.pair_index.tolist()]
        return self._folder / f"{self._prefix}{_digest(json.dumps(layout))}.safetensors"


def computed_by(device: torch.device) -> str:
    """Libraries and device that numbers come from, which another version or another device may compute a little otherwise."""
    return json.dumps(
        {
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": float32_products(device.type),
        }
    )


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, no two of which share memory (a layer that does nothing hands on what it was given)."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        packed = tensor.contiguous()
        storage = packed.untyped_storage().data_ptr()
        separate[name] = packed.clone() if storage in seen else packed
        seen.add(storage)
    return separate


def _digest(words: str) -> str:
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
