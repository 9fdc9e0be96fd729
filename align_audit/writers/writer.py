"""What a writer is, and how all writers of a run are told of it: one after the other, whatever breaks in one.

A new writer is a class with the methods of :class:`Writer` in a file of its own, and a line in
:data:`align_audit.writers.registry.WRITERS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from align_audit.errors import named, pass_exit_on
from align_audit.options.trackers import TrackerName
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.run import AuditRun
from align_audit.record.training_log import LogRow

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

_ANYTHING = (Exception, SystemExit)
"""What must not leave a writer: a library that asks the process to end (rich does, when nobody reads its output any more)
ends no audit and no training. A keyboard interrupt is the user's, and passes."""


class Writer(Protocol):
    """Shows a run as it goes. It is told of every audit of every probe set, on the first process of a run only."""

    name: str
    """Where it writes, in words: "could not write step 20 to …"."""

    def start(self, run: AuditRun) -> None:
        """Before the first audit. ``run`` holds what was audited before, where a run is resumed.

        Raises:
            ConfigurationError: it cannot write; nothing begins then.
        """

    def record(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        """One audit. ``history`` holds those of the whole run, of all probe sets, in any order, with this one or without."""

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        """One alert of an audit, which it was told of before."""

    def close(self) -> None:
        """After the last audit. It is told of nothing more."""


@runtime_checkable
class ShowsFailures(Protocol):
    """A writer that shows audits that broke, too: silence must not look like health."""

    def failure(self) -> None:
        """An audit broke, and its failure is in the log."""


@runtime_checkable
class ChecksFirst(Protocol):
    """A writer that can say in advance that it could not write."""

    def check(self) -> None:
        """Find out, without any effect, what :meth:`Writer.start` would refuse.

        Raises:
            ConfigurationError: it could not write.
        """


def _no_writer() -> None:
    return None


@dataclass(frozen=True)
class Surroundings:
    """Where a run is written, as far as writers have to know."""

    output_dir: Path
    probe_names: tuple[str | None, ...] = (None,)
    """Of all sets that will be audited; None for the one without a name."""
    trainers_tensorboard: Callable[[], SummaryWriter | None] = _no_writer
    """Gives the summary writer that the trainer's own curves go through, None where it has none or has closed it."""
    on_alert: Callable[[Alert, AuditRecord], object] | None = None
    """A user's function that is to be told of alerts."""
    training_log: Callable[[], Sequence[LogRow]] = tuple
    """Gives what the trainer has logged so far, by step."""
    checkpoints: Mapping[int, str] | None = None
    """Step → name of the saved checkpoints that are audited; None: they come as training goes on."""
    trackers: tuple[TrackerName, ...] = ()
    """Those that the trainer reports to."""


class Writers:
    """All writers of a run, as one: each is told of everything, one after the other.

    What breaks in one of them costs no record, and not what the next one shows: it is said on the error log, once a step.
    Only :meth:`start` raises.
    """

    def __init__(self, writers: Iterable[Writer] = ()) -> None:
        self._writers = list(writers)
        self._said: set[object] = set()

    def check(self) -> None:
        """Before anything is opened or moved: see :meth:`ChecksFirst.check`.

        Raises:
            ConfigurationError: one of them could not write.
        """
        for writer in self._writers:
            if isinstance(writer, ChecksFirst):
                writer.check()

    def start(self, run: AuditRun) -> None:
        """Before the first audit: see :meth:`Writer.start`.

        Raises:
            ConfigurationError: one of them cannot write. Those that had started are closed.
        """
        for place, writer in enumerate(self._writers):
            try:
                writer.start(run)
            except BaseException:
                Writers(self._writers[:place]).close()
                raise

    def record(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        """One audit: see :meth:`Writer.record`."""
        self._each(lambda writer: writer.record(record, history), f"write step {record.step} to")

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        """One alert of an audit: see :meth:`Writer.alert`."""
        self._each(lambda writer: writer.alert(alert, record), f"write step {record.step} to")

    def failure(self) -> None:
        """An audit broke, and its failure is in the log: those that show failures are told."""
        self._each(lambda writer: writer.failure() if isinstance(writer, ShowsFailures) else None, "show a failure in")

    def close(self) -> None:
        """After the last audit: see :meth:`Writer.close`. There are no writers then."""
        self._each(lambda writer: writer.close(), "close")
        self._writers = []

    def _each(self, tell: Callable[[Writer], None], what: str) -> None:
        for writer in self._writers:
            try:
                tell(writer)
            except _ANYTHING as error:
                pass_exit_on(error)
                self._say(f"align_audit could not {what} {writer.name}: {named(error)}", writer, error)

    def _say(self, words: str, writer: Writer, error: BaseException) -> None:
        """Once; with the traceback the first time that this kind of error comes from this writer."""
        kind = (writer.name, type(error))
        if words not in self._said:
            logger.error("%s", words, exc_info=None if kind in self._said else error)
        self._said |= {words, kind}
