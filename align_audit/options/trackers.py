"""Which trackers a run writes to: the option ``trackers``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from align_audit.errors import quoted
from align_audit.options.rules import did_you_mean

TrackerName = Literal["wandb", "mlflow", "trackio"]
TRACKER_NAMES: tuple[TrackerName, ...] = get_args(TrackerName)
"""As ``report_to`` of the training arguments names them."""

_CHOICES = ("auto", "off", *TRACKER_NAMES)


def read_trackers(value: Any) -> Any:
    """The option as it is kept: ``auto``, ``off``, or some names; one alone is a choice of one.

    YAML reads ``off`` as false, which is ``off`` again.

    Raises:
        ValueError: a name that is none of these; it says which is nearest.

    Example:
        >>> read_trackers("wandb"), read_trackers(["mlflow", "wandb"]), read_trackers(False)
        (('wandb',), ('mlflow', 'wandb'), 'off')
    """
    if value is False:
        return "off"
    if value in ("auto", "off"):
        return value
    names = [value] if isinstance(value, str) else value
    expected = f"expected auto, off, or some of {', '.join(TRACKER_NAMES)}"
    if not isinstance(names, list | tuple):
        raise ValueError(expected)
    for name in names:
        if name not in TRACKER_NAMES:
            which = "" if name is value else f"; {quoted(name)} is none of them"
            raise ValueError(expected + which + (did_you_mean(name, list(_CHOICES)) if isinstance(name, str) else ""))
    return tuple(dict.fromkeys(names))


TrackerChoice = Annotated[Literal["auto", "off"] | tuple[TrackerName, ...], BeforeValidator(read_trackers)]
"""The trackers that are written to, of those that the trainer reports to: all of them, none, or these."""
