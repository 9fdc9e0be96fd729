"""What happens on one rank only, and ends no audit: all ranks go on with the same layers, and nobody waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import lines

pytestmark = pytest.mark.distributed

AUDIT: dict[str, Any] = {
    "schedule": {"every_n_steps": 2}, "batch_tokens": 100, "max_pairs": 8, "generations": {"prompts": 3, "max_new_tokens": 8},
}  # fmt: skip
PLANTED: dict[str, tuple[str, str, str | None]] = {
    "a replay strays": ("stray", "error", None),
    "a continuation breaks": ("continuation", "error", "on another process"),
    "memory of a continuation": ("continuation", "memory", None),
}
"""Where, what, and what the record then says of continuations; on the second rank, in the second audit."""
CASES: dict[str, dict[str, Any]] = {
    "plain": {"engine": "fsdp2"},
    "audited": {"engine": "fsdp2", "audit": AUDIT},
    **{
        name: {"engine": "fsdp2", "audit": AUDIT, "plant": {"where": where, "kind": kind, "rank": 1}}
        for name, (where, kind, _) in PLANTED.items()
    },
}


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
    assert [line["step"] for line in lines(ran[0], case, "records.jsonl")] == [0, 2, 4]


@pytest.mark.parametrize("case", PLANTED)
def test_continuations_are_what_they_are_without_it_or_say_why_not(ran: Any, case: str) -> None:
    said = PLANTED[case][2]
    for line, plain in zip(
        lines(ran[0], case, "records.jsonl"), lines(ran[0], "audited", "records.jsonl"), strict=True
    ):
        if said is not None and line["step"] == 2:
            assert line["generations"] is None
            assert line["reasons"]["generations"] == f"generate() failed {said}"
        else:
            assert line["generations"]["length"] == plain["generations"]["length"]
