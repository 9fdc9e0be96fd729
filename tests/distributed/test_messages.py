"""Processes tell each other small and large things; one that cannot leaves nobody waiting, and the next message arrives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.messages import LARGE

pytestmark = pytest.mark.distributed

VERBS = ("gather", "exchange", "share")
FAULTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "unsayable on 0": {"unsayable_on": 0},
    "unsayable on 1": {"unsayable_on": 1},
    "no room on 0": {"no_room_on": 0},
    "no room on 1": {"no_room_on": 1},
}
CASES = {
    f"{verb}, {fault}": {"job": "messages", "verb": verb, **options}
    for verb in VERBS
    for fault, options in FAULTS.items()
    # Of what is shared the first process alone is the source, and the others alone need room.
    if verb != "share" or fault not in ("unsayable on 1", "no room on 0")
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    ran = launch(Path(tmp_path_factory.mktemp("messages")), CASES)
    assert [rank for ranks in ran.values() for rank in ranks if "said" not in rank] == []
    return {case: [rank["said"] for rank in ranks] for case, ranks in ran.items()}


def arrived(case: str, rank: int) -> Any:
    if case.startswith("gather"):
        return [0, LARGE]
    if case.startswith("share"):
        return 0
    return [None, LARGE] if rank == 0 else [0, None]


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_arrives_and_what_cannot_be_said_keeps_nobody_waiting(said: Any, case: str) -> None:
    fault = case.partition(", ")[2]
    for rank in (0, 1):
        first, second = said[case][rank]
        assert second == arrived(case, rank), "the message after it arrives"
        if fault == "nothing":
            assert first == second
        elif fault.endswith(f"on {rank}"):
            assert first == "no memory"
        else:
            assert first == "another process ran out of memory"
