"""A run on the terminal: a line for each audit while all is well, five when not, each alert once, and a table at the end."""

from __future__ import annotations

import functools
import logging
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from align_audit.errors import named, without_secrets
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import FOLDER
from align_audit.record.run import AuditRun, run_so_far, with_this
from align_audit.record.training_log import LogRow
from align_audit.writers.alert_panel import alert_panel
from align_audit.writers.audit_table import summary_table
from align_audit.writers.brief import brief, brief_of_more
from align_audit.writers.closing_table import closing
from align_audit.writers.standing import Standing, standing_at
from align_audit.writers.trackers.writer import destinations

if TYPE_CHECKING:
    from rich.console import Console

    from align_audit.config import AuditConfig
    from align_audit.writers.writer import Surroundings


logger = logging.getLogger(__name__)


class Terminal:
    """Prints how the run stands at each audit, in whole what happens to its alerts, and a table over checkpoints at the end.

    Advice that several alerts of an audit share is printed with the last of them.

    Args:
        console: where to; None: standard output.
        verbose: print all that an audit measured, as a table.
        output_dir: of the run, for the table at the end; None: there is none.
        training_log: gives what the trainer has logged so far.
        checkpoints: step → name, of those that are audited; None: those that lie in ``output_dir`` at the end.
        destinations: gives the line that says where the run is written; None: it is not said.
    """

    name = "standard output"

    def __init__(
        self,
        console: Console | None = None,
        *,
        verbose: bool = False,
        output_dir: Path | None = None,
        training_log: Callable[[], Sequence[LogRow]] = tuple,
        checkpoints: Mapping[int, str] | None = None,
        destinations: Callable[[], str] | None = None,
    ) -> None:
        self._console = console
        self._verbose = verbose
        self._output_dir = output_dir
        self._training_log = training_log
        self._checkpoints = checkpoints
        self._destinations = destinations
        self._shown: dict[str | None, Standing] = {}
        """What was printed last, of each probe set."""
        self._history: Sequence[AuditRecord] = ()
        """Of the run, at the audit that came last, which is in it."""

    @classmethod
    def of(cls, config: AuditConfig, surroundings: Surroundings) -> Self:
        """On standard output, whatever the configuration. Where a training is written is said when it starts."""
        trains = surroundings.checkpoints is None
        return cls(
            verbose=config.verbose,
            output_dir=surroundings.output_dir,
            training_log=surroundings.training_log,
            checkpoints=surroundings.checkpoints,
            destinations=functools.partial(destinations, config, surroundings) if trains else None,
        )

    def start(self, run: AuditRun) -> None:
        """Print where the run is written. What breaks in that is logged: no run begins or ends by it."""
        if self._destinations is None:
            return
        from rich.text import Text

        try:
            self._print(Text(self._destinations()), whole_lines=True)
        except Exception as error:
            logger.error("align_audit could not print where it writes: %s", without_secrets(named(error)))

    def record(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        """Print how the run stands now."""
        standing = standing_at(record, history, self._training_log())
        shown = self._shown.get(record.provenance.probe_name)
        self._shown[record.provenance.probe_name] = standing
        self._history = with_this(history, record)
        if self._verbose:
            self._print(summary_table(record, standing.status))
        elif shown is not None and _adds_to(standing, shown):
            self._print(brief_of_more(standing), whole_lines=True)
        else:
            self._print(brief(standing), whole_lines=True)

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        """Print a warning or an error that has opened, got worse or is over. Info stands in the table."""
        if alert.level == "info" or alert.event == "open":
            return
        printed = [each for each in record.alerts if each.level != "info" and each.event not in ("open", "resolved")]
        last = max((place for place, each in enumerate(printed) if each == alert), default=len(printed))
        self._print(
            alert_panel(alert, advise=all(later.suggestion != alert.suggestion for later in printed[last + 1 :]))
        )

    def close(self) -> None:
        """Print the table, where anything was audited. Standard output is not ours to close."""
        if self._output_dir is None or not self._shown:
            return
        self._shown = {}
        run = run_so_far(self._output_dir / FOLDER, self._history, self._training_log())
        for part in closing(run, run.checkpoints if self._checkpoints is None else self._checkpoints):
            self._print(part, whole_lines=True)

    def _print(self, renderable: Any, whole_lines: bool = False) -> None:
        """``whole_lines``: off a terminal, what does not fit its width is not cut."""
        console = self._console or _standard_output()
        console.print(renderable, soft_wrap=whole_lines and not console.is_terminal)


def _adds_to(standing: Standing, shown: Standing) -> bool:
    """Is this the full audit that follows a health audit of the same step, and finds nothing else wrong?"""
    return (
        (standing.record.step, standing.record.kind, shown.record.kind) == (shown.record.step, "full", "health")
        and standing.status.word == shown.status.word
        and {alert.cause for alert in standing.alerts} <= {alert.cause for alert in shown.alerts}
    )


def _standard_output() -> Console:
    from rich.console import Console

    class Output(Console):
        """Whoever reads it may go away: that is an error like any other, and no reason to end the process."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError("nobody reads the standard output any more")

    _check_reader(sys.stdout)
    return Output(highlight=False)


def _check_reader(output: Any) -> None:
    """Find out before anything is written: what a broken pipe refuses stays in the stream's buffer, where it breaks
    the next thing that the training itself prints."""
    try:
        descriptor = output.fileno()
    except (AttributeError, OSError, ValueError):
        return  # a notebook's output, say: no pipe
    if hasattr(select, "poll"):
        asked = select.poll()
        asked.register(descriptor, 0)  # errors and hang-ups are reported without being asked for
        if any(event & (select.POLLERR | select.POLLNVAL) for _, event in asked.poll(0)):
            raise BrokenPipeError("nobody reads the standard output any more")


def progress_bar(total: int, description: str) -> Any:
    """A progress bar like the trainer's, gone when done: ``update(1)``, ``n``, ``close()``. Silent off a terminal."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, unit="batch", leave=False, dynamic_ncols=True, disable=None)
