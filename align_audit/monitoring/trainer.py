"""What the trainer says: the one place that knows TRL's and transformers' trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboard_writer_of(trainer: Any) -> SummaryWriter | None:
    """The summary writer that the trainer's own curves go through; None where it has none, or there is no trainer."""
    if trainer is None:
        return None
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            return callback.tb_writer
    return None
