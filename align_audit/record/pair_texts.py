"""What changed in text: the pairs whose preference margin lost and gained most, token by token. It lies beside the log.

These are the only texts of a data set that an audit keeps (``examples.pairs`` 0 keeps none). They are foreign text, with
whatever markup and control characters the data holds: whoever shows them escapes them.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from align_audit.errors import RecordError, first_line, plain
from align_audit.record.audit_record import AuditRecord
from align_audit.record.schema import Part, Stored

CUT = "…"
"""Stands before a prompt of which only the end is kept."""


def _written(change: float) -> float | str | None:
    """As JSON has it: a word for what is infinite, null for what is not known."""
    return None if math.isnan(change) else change if math.isfinite(change) else "-Infinity"[change > 0 :]


Change = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(_written, when_used="json"),
]
"""In nats. NaN is null in the file; infinities are words."""


class TokenChange(Part):
    """A piece of a completion, and how much likelier it became.

    A piece is one token; or several, where it takes these to make a character (bytes of UTF-8) or anything visible.
    """

    text: str
    """The pieces of a completion joined are its text. A special token is shown by its name, one that no tokenizer names as
    ``⟨id 523⟩``."""
    change: Change
    """log π − log ρ of the tokens, nats, summed over those of the piece. NaN: it is not known, because both models give it
    probability 0 or nothing stands before it that could predict it."""


class PairText(Part):
    """One probe pair, its prompt, and both completions with their changes."""

    pair: int
    """Its position in the data set that the probes were drawn from (``ProbePair.index``)."""
    prompt: str
    """The end of it, 600 characters at most, behind :data:`CUT` where more stood before."""
    shift: Change
    """Δ of the preference margin, policy − reference, nats: the changes of all chosen tokens − those of all rejected ones."""
    chosen: list[TokenChange]
    """From its first token on, 160 tokens at most."""
    rejected: list[TokenChange]
    chosen_tokens: int | None = None
    """How many tokens the completion has, where only the first are in ``chosen``; None: all of them are."""
    rejected_tokens: int | None = None


class PairTexts(Stored):
    """What changed in text at one audit.

    A pair is in ``lost`` if its margin shift is negative and in ``gained`` if it is positive, so never in both, and either
    list may be shorter than ``examples.pairs``, or empty. The first of each has moved furthest. Pairs that moved equally far
    stand in an order made of their tokens.
    """

    noun: ClassVar[str] = "file of pair texts"
    newest: ClassVar[int] = 1
    telling: ClassVar[tuple[str, ...]] = ("schema_version", "lost", "gained")

    schema_version: Literal[1] = 1
    policy_hash: str = ""
    """Of which weights and pairs it speaks, as in the ``provenance`` of the record beside it."""
    reference_hash: str = ""
    probe_hash: str = ""
    lost: list[PairText] = Field(default_factory=list)
    gained: list[PairText] = Field(default_factory=list)

    def beside(self, record: AuditRecord) -> PairTexts:
        """The same, of the weights and pairs of this record."""
        return self.model_copy(update=_hashes(record))

    def is_of(self, record: AuditRecord) -> bool:
        """Are these texts of the weights and pairs of this record?"""
        return all(getattr(self, name) == value for name, value in _hashes(record).items())


def read_pair_texts(path: Path, record: AuditRecord) -> PairTexts | None:
    """What changed in text at an audit, from the file beside its record.

    Returns:
        None where there is no such file (an older log, ``examples.pairs`` 0), where it is of another audit of the same step
        (a resumed run took another course), and, with a warning, where it cannot be read.
    """
    try:
        texts = PairTexts.from_json(path.read_bytes(), plain(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecordError) as error:
        warnings.warn(f"what changed in text is left out: {_reason(error, path)}", stacklevel=3)
        return None
    return texts if texts.is_of(record) else None


def _reason(error: Exception, path: Path) -> str:
    return str(error) if isinstance(error, RecordError) else f"cannot read {plain(path)}: {first_line(error)}"


def _hashes(record: AuditRecord) -> dict[str, Any]:
    return {name: getattr(record.provenance, name) for name in ("policy_hash", "reference_hash", "probe_hash")}
