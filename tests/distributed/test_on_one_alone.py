"""What happens on one rank only, and ends no audit: all ranks go on with the same layers, and nobody waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import lines

pytestmark = pytest.mark.distributed

AUDIT: dict[str, Any] = {
    "schedule": {"every_n_steps": 1}, "batch_tokens": 100, "max_pairs": 8, "generations": {"prompts": 3, "max_new_tokens": 8},
}  # fmt: skip
PLANTED: dict[int, tuple[str, str, str | None]] = {
    1: ("stray", "error", None),
    2: ("continuation", "error", "on another process"),
    3: ("continuation", "memory", None),
}
"""By the step of the audit: where, what, and what the record then says of continuations; on the second rank."""
_USUAL: dict[str, Any] = {"engine": "fsdp2", "trainer": {"save_strategy": "no"}}
CASES: dict[str, dict[str, Any]] = {
    "plain": _USUAL,
    "audited": {**_USUAL, "audit": AUDIT},
    "planted": {
        **_USUAL, "audit": AUDIT,
        "plants": [
            {"where": where, "kind": kind, "rank": 1, "audit_number": step + 1}
            for step, (where, kind, _) in PLANTED.items()
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, launch(folder, CASES)


@pytest.mark.parametrize("case", [name for name in CASES if name != "plain"])
def test_training_is_the_same_bits_and_nobody_waits(ran: Any, case: str) -> None:
    for without, audited in zip(ran[1]["plain"], ran[1][case], strict=True):
        assert "hung" not in audited
        assert "error" not in audited, audited["error"]
        assert audited["weights"] == without["weights"]
        assert audited["left"] == []
    assert lines(ran[0], case, "failures.jsonl") == []
    assert [line["step"] for line in lines(ran[0], case, "records.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("step", range(5))
def test_continuations_are_what_they_are_without_it_or_say_why_not(ran: Any, step: int) -> None:
    said = PLANTED[step][2] if step in PLANTED else None
    line, plain = (lines(ran[0], case, "records.jsonl")[step] for case in ("planted", "audited"))
    if said is not None:
        assert line["generations"] is None
        assert line["reasons"]["generations"] == f"generate() failed {said}"
    else:
        assert line["generations"]["length"] == plain["generations"]["length"]
