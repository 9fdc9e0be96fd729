"""What breaks on one rank only: all of them leave the audit at one place, it is recorded once, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import lines

pytestmark = pytest.mark.distributed

AUDIT: dict[str, Any] = {"schedule": {"every_n_steps": 2}, "batch_tokens": 100, "max_pairs": 8}
BROKEN: dict[str, tuple[str, str, int]] = {
    "layer on 0": ("layer", "error", 0),
    "layer on 1": ("layer", "error", 1),
    "head on 0": ("head", "error", 0),
    "head on 1": ("head", "error", 1),
    "log": ("log", "disk", 0),
    "writer": ("writer", "disk", 0),
}
"""Where, what and on which rank; in the second audit."""


def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for engine in ("ddp", "fsdp2"):
        cases[f"{engine}, plain"] = {"engine": engine}
        cases[f"{engine}, audited"] = {"engine": engine, "audit": AUDIT}

        def planted(where: str, kind: str, rank: int, engine: str = engine, **more: Any) -> dict[str, Any]:
            return {"engine": engine, "audit": {**AUDIT, **more}, "plant": {"where": where, "kind": kind, "rank": rank}}

        for name, fault in BROKEN.items():
            cases[f"{engine}, {name}"] = planted(*fault)
        for rank in (0, 1):
            cases[f"{engine}, set-up on {rank}"] = planted("set-up", "error", rank)
            cases[f"{engine}, memory on {rank}"] = planted("layer", "memory", rank)
            cases[f"{engine}, strict on {rank}"] = planted("layer", "error", rank, strict=True)
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("failures")
    return folder, launch(folder, CASES)


def test_nobody_waits_for_ever(ran: Any) -> None:
    hung = [(name, rank) for name, ranks in ran[1].items() for rank, said in enumerate(ranks) if "hung" in said]
    assert hung == []


@pytest.mark.parametrize("case", [name for name in CASES if "strict" not in name and "plain" not in name])
def test_training_is_the_same_bits(ran: Any, case: str) -> None:
    plain = ran[1][case.partition(", ")[0] + ", plain"]
    for without, with_ours in zip(plain, ran[1][case], strict=True):
        assert "error" not in with_ours, with_ours["error"]
        assert with_ours["weights"] == without["weights"]
        assert with_ours["losses"] == without["losses"]
        assert with_ours["left"] == []


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", BROKEN)
def test_it_is_recorded_once_and_the_next_audit_works(ran: Any, engine: str, name: str) -> None:
    where, _, rank = BROKEN[name]
    (failure,) = lines(ran[0], f"{engine}, {name}", "failures.jsonl")
    assert failure["step"] == 2
    assert "planted" in failure["error"]
    assert failure["error"].startswith("On rank 1:") == (rank == 1)
    steps = [line["step"] for line in lines(ran[0], f"{engine}, {name}", "records.jsonl")]
    assert steps == ([0, 2, 4] if where == "writer" else [0, 4])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_check_before_training_that_breaks_is_no_refusal(ran: Any, engine: str, rank: int) -> None:
    case = f"{engine}, set-up on {rank}"
    assert [line["step"] for line in lines(ran[0], case, "records.jsonl")] == [0, 2, 4]
    assert lines(ran[0], case, "failures.jsonl") == []


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_strict_raises_on_every_rank(ran: Any, engine: str, rank: int) -> None:
    said = ran[1][f"{engine}, strict on {rank}"]
    assert (said[rank]["kind"], said[rank]["words"]) == ("ValueError", "planted")
    assert said[1 - rank]["kind"] == "AlignAuditError"
    assert said[1 - rank]["words"] == f"the audit broke on rank {rank}: ValueError: planted"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_runs_out_of_memory_all_go_on_with_half_the_batch(ran: Any, engine: str, rank: int) -> None:
    case = f"{engine}, memory on {rank}"
    assert lines(ran[0], case, "failures.jsonl") == []
    halved, whole = (lines(ran[0], name, "records.jsonl") for name in (case, f"{engine}, audited"))
    assert [record["step"] for record in halved] == [0, 2, 4]
    for name in ("shift", "policy", "kl"):
        assert halved[1]["margins"][name]["mean"] == pytest.approx(whole[1]["margins"][name]["mean"], rel=1e-5)
    for one, other in zip(halved[1]["patching"]["effect"], whole[1]["patching"]["effect"], strict=True):
        assert one["mean"] == pytest.approx(other["mean"], rel=1e-4)
    for other_rank in (0, 1):
        output = (ran[0] / case / f"output-{other_rank}.txt").read_text()
        assert "it goes on with half the batch" in output
