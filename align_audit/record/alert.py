"""An alert: an event with a life (opened, worse, open, resolved), as records store it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align_audit.record.schema import Part

AlertLevel = Literal["info", "warning", "error"]
AlertEvent = Literal["opened", "worse", "open", "resolved"]


class Alert(Part):
    """A finding about the run: what was seen, against what, where, why it matters and what to try.

    An alert has a life: it is opened, may get worse, stays open at later audits, and is resolved. One cause is one alert:
    rules that see the same thing are its ``signals``.
    """

    rule: str
    cause: str = ""
    """What several rules have in common; empty in records of versions before it."""
    level: AlertLevel
    event: AlertEvent = "opened"
    """What happened to it at this audit; ``open``: nothing new."""
    step: int
    since: int | None = None
    """The step at which it was opened; None in records of versions before it."""
    seen_since: int | None = None
    """The step from which on what opened it was seen at each look: a rule that is patient, or cools down, has seen it before it
    opens. None in records of versions before it."""
    looks: int = 1
    """Audits in a row, up to this one, at which it was seen."""
    signals: list[str] = Field(default_factory=list)
    """Other rules that say the same at this audit."""
    probe_name: str | None = None
    """The probe set it was seen on, where that has a name."""
    layers: list[int] = Field(default_factory=list)
    value: float
    baseline: float | None = None
    threshold: float | None = None
    message: str
    """What is seen; of an alert that is not seen at this audit, that it is not, and its ``observation``."""
    suggestion: str
    observation: str = ""
    """What was seen at the audit that saw it last, where this one does not; empty: ``message`` is that of this audit."""
    observed_at: int | None = None
    """The step of that audit; None: this one saw it, or it is not known."""
    clean_step: int | None = None
    """The last audit before it was seen at which no warning and no error was open."""
    checkpoint: str | None = None
    """The newest checkpoint from no later than that which still existed, as a folder's name."""
    command: str | None = None
    """What goes back to it."""
    remedy: str = ""
    """What its rule says to do, to which ``suggestion`` adds where to go back to, and the knob."""
    knob: str | None = None
    """The learning rate and beta as they are, and as they should be."""
