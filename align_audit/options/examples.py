"""How much of the probe pairs' text an audit keeps."""

from __future__ import annotations

from pydantic import Field

from align_audit.options.part import Part


class ExamplesConfig(Part):
    """Pairs that are kept as text beside the records (``record/pair_texts.py``), so that a report can show what changed.

    With ``pairs`` 0 no text leaves the data set: nothing that an audit writes holds any then.
    """

    pairs: int = Field(default=3, ge=0)
    """So many pairs whose preference margin lost most, and as many that gained most: of each the end of its prompt and the
    first 160 tokens of both completions."""
