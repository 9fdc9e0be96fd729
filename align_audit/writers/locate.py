"""Where a trainer's TensorBoard curves go, so that ours stand beside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_tensorboard(own: SummaryWriter | None, output_dir: str | Path) -> tuple[SummaryWriter, Callable[[], None]]:
    """A summary writer beside the trainer's curves, and how to close it.

    The trainer's ``own`` writer is used where it is at hand, and is not ours to close. Otherwise a second event file is
    opened in the folder this process already writes one to (TensorBoard shows the files of a folder as one run), and
    where there is none, in ``<output_dir>/align_audit/tensorboard``.
    """
    if own is not None:
        return own, lambda: None
    from torch.utils.tensorboard import SummaryWriter

    folder = find_event_folder(output_dir) or Path(output_dir) / "align_audit" / "tensorboard"
    writer = SummaryWriter(log_dir=str(folder), filename_suffix=".align_audit")
    return writer, writer.close


def find_event_folder(output_dir: str | Path) -> Path | None:
    """The folder of the newest event file this process has written below ``output_dir`` or the logging directory.

    The writer names its files ``events.out.tfevents.<time>.<host>.<process id>.<counter>``.
    """
    roots = [Path(output_dir)]
    if logging_dir := os.environ.get("TENSORBOARD_LOGGING_DIR"):
        roots.append(Path(logging_dir).expanduser())
    ours = f".{os.getpid()}."
    files = [
        file
        for root in roots
        if root.is_dir()
        for file in root.rglob("events.out.tfevents.*")
        if ours in file.name and not file.name.endswith(".align_audit")
    ]
    if not files:
        return None
    return max(files, key=lambda file: (file.stat().st_mtime_ns, file.name)).parent
