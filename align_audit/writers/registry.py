"""Which writers there are. A new one is a file of its own, and a line here."""

from __future__ import annotations

from collections.abc import Callable

from align_audit.config import AuditConfig
from align_audit.writers.tensorboard import TensorBoard
from align_audit.writers.terminal import Terminal
from align_audit.writers.writer import Surroundings, Writer, Writers

WRITERS: list[Callable[[AuditConfig, Surroundings], Writer | None]] = [
    TensorBoard.of,
    Terminal.of,
]
"""Each makes a writer for a run, or none where the configuration asks for none. They are told in this order."""


def writers_for(config: AuditConfig, surroundings: Surroundings) -> Writers:
    """The writers of a run that is configured so; nothing is opened before :meth:`Writers.start`."""
    made = (make(config, surroundings) for make in WRITERS)
    return Writers(writer for writer in made if writer is not None)
