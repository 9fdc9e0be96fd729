"""Arguments of ``align-audit run``, and what a refusal looks like."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any


def arguments(place: SimpleNamespace, checkpoint: Path, output: Path, *more: Any) -> list[Any]:
    return ["run", checkpoint, "--probes", place.probes, "--config", place.options, "--output", output, *more]


def refused(done: SimpleNamespace, *words: str) -> None:
    assert done.code == 2
    assert "Traceback" not in done.out + done.err
    # What comes before is the progress of loading.
    message = done.err[done.err.index("align-audit: error: ") :]
    for word in words:
        assert word in message
    assert "records.jsonl" not in done.out
