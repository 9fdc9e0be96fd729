"""The report beside the log, written anew after each audit: ``<output_dir>/align_audit/report.html``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from align_audit.errors import ConfigurationError, first_line, plain
from align_audit.files import write_atomically
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import REPORT
from align_audit.record.run import AuditRun, run_so_far, with_this
from align_audit.record.training_log import LogRow
from align_audit.writers.web.page import page
from align_audit.writers.web.page_data import page_data

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.writers.writer import Surroundings


class Report:
    """Writes the page of a run whenever something was audited, an audit broke, or the run is over.

    A reader sees the page before or the new one, never a part. Of 50 audits of 32 layers a page takes a quarter of a
    second (``tests/writers/web/test_report_writer.py`` measures it).

    Args:
        training_log: gives what the trainer has logged so far.
        checkpoints: step → name, of those that are audited; None: those that lie in the run's folder.
    """

    name = "the report"

    def __init__(
        self, training_log: Callable[[], Sequence[LogRow]] = tuple, checkpoints: Mapping[int, str] | None = None
    ) -> None:
        self._training_log, self._checkpoints = training_log, checkpoints
        self._directory: Path | None = None
        self._history: Sequence[AuditRecord] = ()

    @classmethod
    def of(cls, config: AuditConfig, surroundings: Surroundings) -> Self | None:
        """Where the configuration does not switch it off."""
        return cls(surroundings.training_log, surroundings.checkpoints) if config.report else None

    def start(self, run: AuditRun) -> None:
        """Nothing is written before the first audit."""
        self._directory, self._history = run.directory, run.records

    def record(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        """Write the page with this audit."""
        self._history = with_this(history, record)
        self._write()

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        """The page of its audit has it."""

    def failure(self) -> None:
        """Write the page with the audit that broke."""
        self._write()

    def close(self) -> None:
        """Write it once more, with what was logged since the last audit; not where there was none."""
        if self._history:
            self._write()

    def _write(self) -> None:
        if self._directory is not None:
            run = run_so_far(self._directory, self._history, self._training_log())
            write_report(run, self._directory / REPORT, self._checkpoints)


def write_report(run: AuditRun, path: Path, checkpoints: Mapping[int, str] | None = None) -> int:
    """Write the page of a run, and return its size in bytes.

    Args:
        checkpoints: as of :func:`~align_audit.writers.web.page_data.page_data`.

    Raises:
        OSError: the disk refuses; an earlier page is as it was.
    """
    content = page(page_data(run, checkpoints=checkpoints))
    write_atomically(path, content)
    return len(content)


def report_of(
    output_dir: Path, path: Path | None = None, checkpoints: Mapping[int, str] | None = None
) -> tuple[AuditRun, Path, int]:
    """Write the page of a stored run, where no model is needed.

    Args:
        output_dir: of the run, its ``align_audit`` folder, or a ``records.jsonl`` file.
        path: of the page; None: ``report.html`` beside the log.
        checkpoints: as of :func:`~align_audit.writers.web.page_data.page_data`.

    Returns:
        The run, where its page is, and its size in bytes.

    Raises:
        RecordError: nothing there is a run log, or it was written by a newer align_audit.
        ConfigurationError: the page cannot be written there.
    """
    run = AuditRun.load(output_dir)
    return run, *page_of(run, path, checkpoints=checkpoints)


def page_of(
    run: AuditRun,
    path: Path | None = None,
    option: str = "--output",
    checkpoints: Mapping[int, str] | None = None,
) -> tuple[Path, int]:
    """The same of a run that was loaded: where its page is, and its size in bytes.

    Args:
        option: what names another path.
        checkpoints: as of :func:`~align_audit.writers.web.page_data.page_data`.

    Raises:
        ConfigurationError: the page cannot be written there.
    """
    place = run.directory / REPORT if path is None else path
    return place, written_page(page(page_data(run, checkpoints=checkpoints)), place, "the report", option)


def written_page(content: bytes, path: Path, what: str, option: str) -> int:
    """Write a page that somebody has asked for, and return its size in bytes.

    Raises:
        ConfigurationError: it cannot be written there; an earlier page is as it was.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {what} to {plain(path)}: {first_line(error)}; choose a file in a folder that exists and can be "
            f"written to, with {option}"
        ) from None
    return len(content)
