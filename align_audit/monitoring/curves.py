"""The run's TensorBoard curves, beside the trainer's own, for as long as its writer is open and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from align_audit.record.audit_record import AuditRecord
from align_audit.writers.locate import open_tensorboard
from align_audit.writers.tensorboard import TensorBoardWriter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Writes records through the trainer's summary writer, or through one of its own where there is none.

    Args:
        summary_writer: the trainer's; None: there is none in reach.
        output_dir: of the run; says where the trainer's curves are, and where to write when it draws none.
        images: draw pictures too.
        probe_names: of all sets that will be written.

    Raises:
        OSError: no event file can be made there.
    """

    def __init__(
        self, summary_writer: SummaryWriter | None, output_dir: str, *, images: bool, probe_names: Sequence[str | None]
    ) -> None:
        self._output_dir = output_dir
        self._belongs_to_trainer = summary_writer is not None
        self._close: Callable[[], None]
        opened, self._close = open_tensorboard(summary_writer, output_dir)
        self._writer = TensorBoardWriter(opened, images=images, probe_names=probe_names)
        self._trainer_closed = False

    def trainer_closed(self) -> None:
        """The trainer has closed its writer: what is still to be written goes to a file of our own beside it."""
        self._trainer_closed = self._belongs_to_trainer

    def write(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        """Write one audit at its step; ``history``: those of the run."""
        if self._trainer_closed:
            opened, self._close = open_tensorboard(None, self._output_dir)
            self._writer.redirect(opened)
            self._trainer_closed = self._belongs_to_trainer = False
        self._writer.write(record, history)

    def close(self) -> None:
        """Close what was opened here; the trainer's writer is not."""
        self._close()
