"""What is too large for a line of a log: files in a folder of their own for each step, and what they are called."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from align_audit.errors import RecordError, first_line, listed, plain, quoted
from align_audit.record.audit_record import AuditRecord
from align_audit.record.pair_texts import PairTexts, read_pair_texts
from align_audit.record.stored_records import Head

if TYPE_CHECKING:
    import numpy as np


def arrays_name(probe_name: str | None, name: str = "arrays") -> str:
    """What a set's arrays are called in a step's folder.

    Example:
        >>> arrays_name(None), arrays_name("helpful")
        ('arrays', 'arrays-helpful')
    """
    return name if probe_name is None else f"{name}-{probe_name}"


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step}"


def arrays_path(folder: Path, name: str) -> Path:
    return folder / f"{_plain_name(name)}.safetensors"


def texts_path(folder: Path, probe_name: str | None) -> Path:
    return folder / f"{_plain_name(arrays_name(probe_name, 'texts'))}.json"


def _plain_name(name: str) -> str:
    if not name or Path(name).name != name or name == "..":
        raise ValueError(f"expected a plain name such as 'pairs' for a file of a step, found {quoted(name)}")
    return name


def load_arrays(directory: Path, step: int, name: str) -> dict[str, np.ndarray]:
    """What :meth:`RunLog.save_arrays` wrote into a log's folder.

    Raises:
        RecordError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = arrays_path(step_path(directory, step), name)
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise RecordError(f"cannot read the arrays {plain(path)}: no such file; {_there(directory, step)}") from None
    except (OSError, SafetensorError) as error:
        raise RecordError(f"cannot read the arrays {plain(path)}: {first_line(error)}") from None


def _there(directory: Path, step: int) -> str:
    """Which arrays a log holds of a step, or of which steps it holds any."""
    of_step = sorted(path.stem for path in step_path(directory, step).glob("*.safetensors"))
    if of_step:
        return f"of that step there are {listed(of_step)}"
    folders = (path.parent.name.removeprefix("step-") for path in directory.glob("step-*/*.safetensors"))
    steps = sorted({int(name) for name in folders if name.isdecimal()})
    return f"there are some of the steps {listed(steps)}" if steps else "there are none of any step"


def texts_exist(directory: Path, head: Head) -> bool:
    """Does the file of :meth:`RunLog.save_texts` lie in a log's folder, of an audit of this step and probe set?"""
    try:
        return texts_path(step_path(directory, head.step), head.probe_name).is_file()
    except (ValueError, OSError):
        return False


def load_texts(directory: Path, record: AuditRecord) -> PairTexts | None:
    """What :meth:`RunLog.save_texts` wrote into a log's folder: see :func:`read_pair_texts`."""
    try:
        path = texts_path(step_path(directory, record.step), record.provenance.probe_name)
    except ValueError as error:  # a record that was made elsewhere
        warnings.warn(f"what changed in text is left out: {error}", stacklevel=3)
        return None
    return read_pair_texts(path, record)
