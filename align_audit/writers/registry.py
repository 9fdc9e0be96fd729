"""Which writers there are. A new one is a file of its own, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from align_audit.config import AuditConfig
from align_audit.options.trackers import TRACKER_NAMES
from align_audit.writers.messages import LogLines, Told
from align_audit.writers.tensorboard import TensorBoard
from align_audit.writers.terminal import Terminal
from align_audit.writers.trackers.writer import maker
from align_audit.writers.web.report_writer import Report
from align_audit.writers.webhook import Webhook
from align_audit.writers.writer import Surroundings, Writer, Writers

Maker = Callable[[AuditConfig, Surroundings], Writer | None]

_TRACKERS: list[Maker] = [maker(name) for name in TRACKER_NAMES]

WRITERS: list[Maker] = [
    TensorBoard.of,
    Report.of,
    Terminal.of,
    LogLines.of,
    Told.of,
    Webhook.of,
    # They send the report: whatever writes it stands before them.
    *_TRACKERS,
]
"""Each makes a writer for a run, or none where the configuration asks for none. They are told in this order."""


OF_SAVED: list[Maker] = [make for make in WRITERS if make not in (TensorBoard.of, *_TRACKERS)]
"""Those of audits of saved checkpoints, which have pictures of their own, and no trainer that reports to a tracker."""


def writers_for(config: AuditConfig, surroundings: Surroundings, makers: Sequence[Maker] | None = None) -> Writers:
    """The writers of a run that is configured so; nothing is opened before :meth:`Writers.start`.

    Args:
        makers: None: :data:`WRITERS`.
    """
    made = (make(config, surroundings) for make in (WRITERS if makers is None else makers))
    return Writers(writer for writer in made if writer is not None)
