"""A stored run that shows itself: in a line, as the table that training ends with, and in pictures.

Reading a run needs nothing of this (:mod:`align_audit.record.run`); who works in a notebook or a prompt looks at it here.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from align_audit.errors import listed, plain, quoted
from align_audit.options.rules import did_you_mean
from align_audit.record.course import present_course
from align_audit.record.run import AuditRun as StoredRun
from align_audit.writers.closing_table import closing
from align_audit.writers.words import to_draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from align_audit.writers.plots.gallery import Picture

_WIDTH = 100
"""Characters of a line of :meth:`AuditRun.summary`."""


class AuditRun(StoredRun):
    """A stored run, read-only: its records, alerts and failures, their table, and its pictures.

    Example:
        >>> run = AuditRun.load("runs/dpo")                         # doctest: +SKIP
        >>> print(run.summary())                                    # doctest: +SKIP
        >>> run.records[-1].margins.shift.mean                      # doctest: +SKIP
        3.2
        >>> run.to_pandas(layers=True).query("step == 100")         # doctest: +SKIP
        >>> run.select("harmless").plot.depth_trace()               # doctest: +SKIP
    """

    @property
    def plot(self) -> Plots:
        """The pictures of the run by name: ``run.plot.depth_trace()`` gives a ``matplotlib.figure.Figure``."""
        return Plots(self)

    def summary(self) -> str:
        """What training ends with: a row for each audited step, what broke or did not fit, and the latest healthy audit.

        Of a run without an audit, its status and the reason for it.
        """
        from rich.console import Console

        said = closing(self, self.checkpoints)
        if not said:
            return plain(f"{self.status}: {self.status.reason}")
        file = io.StringIO()
        console = Console(file=file, width=_WIDTH, color_system=None, highlight=False)
        for part in said:
            console.print(part, soft_wrap=True)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def _repr_html_(self) -> str:
        said = closing(self, self.checkpoints)
        title = f"<p><b>{html.escape(repr(self))}</b><br>{html.escape(plain(self.status.reason))}</p>"
        return title + "".join(part.html() for part in said)


class Plots:
    """Every picture of a run, as a function of its name; ``dir()`` lists them.

    Each draws from the records alone, of the course that the run is on, and gives a ``matplotlib.figure.Figure`` that belongs
    to no window. Of several probe sets none is drawn: :meth:`AuditRun.select` narrows a run to one.
    """

    def __init__(self, run: StoredRun) -> None:
        self._run = run

    def __dir__(self) -> Iterable[str]:
        return sorted([*super().__dir__(), *self._pictures()])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        pictures = self._pictures()
        if name not in pictures:
            near = did_you_mean(name, list(pictures))
            raise AttributeError(f"no picture {quoted(name)}{near}; the pictures of this run are {listed(pictures)}")
        picture = pictures[name]

        def draw() -> Figure:
            return picture.draw(to_draw(present_course(self._run.records)))

        draw.__name__ = name
        draw.__doc__ = f"Draw {name.replace('_', ' ')} of this run."
        return draw

    def __repr__(self) -> str:
        return f"<pictures of a run: {listed(self._pictures())}>"

    def _pictures(self) -> dict[str, Picture]:
        from align_audit.writers.plots.gallery import PICTURES, pictures_of

        course = present_course(self._run.records)
        return pictures_of(course) if course else dict(PICTURES)
