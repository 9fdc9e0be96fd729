"""What breaks on one rank only: all of them leave the audit at one place, it is recorded once, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import lines

pytestmark = pytest.mark.distributed

AUDIT: dict[str, Any] = {"batch_tokens": 100, "max_pairs": 8}
STEPS = 8
BROKEN: dict[str, tuple[str, str, int, int]] = {
    "layer on 0": ("layer", "error", 0, 1),
    "head on 0": ("head", "error", 0, 3),
    "log": ("log", "disk", 0, 5),
    "writer": ("writer", "disk", 0, 7),
    "layer on 1": ("layer", "error", 1, 2),
    "head on 1": ("head", "error", 1, 6),
}
"""Where, what, on which rank and at which step: all of a rank in one run, with an audit without a fault behind each."""
EVERY = {0: 1, 1: 2}
"""How many steps from audit to audit, by the rank on which something breaks."""
MEMORY_AT = 4


def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for engine in ("ddp", "fsdp2"):

        def case(every: int, *faults: dict[str, Any], engine: str = engine, **more: Any) -> dict[str, Any]:
            schedule = {
                "every_n_steps": every, "before_training": every < MEMORY_AT,
                "first_health": STEPS + 1, "escalate": False,
            }  # fmt: skip
            return {
                "engine": engine, "trainer": TRAINER, "plants": faults, "audit": {**AUDIT, "schedule": schedule, **more},
            }  # fmt: skip

        cases[f"{engine}, plain"] = {"engine": engine, "trainer": TRAINER}
        cases[f"{engine}, audited"] = case(MEMORY_AT)
        for rank, every in EVERY.items():
            broken = [fault for fault in BROKEN.values() if fault[2] == rank]
            cases[f"{engine}, broken on {rank}"] = case(every, *(_fault(*fault, every) for fault in broken))
            cases[f"{engine}, memory on {rank}"] = case(
                MEMORY_AT, _fault("set-up", "error", 1 - rank), _fault("layer", "memory", rank)
            )
            cases[f"{engine}, strict on {rank}"] = case(1, _fault("layer", "error", rank, 1), strict=True)
    adapter = {"engine": "fsdp2", "mode": "new adapter", "trainer": {**TRAINER, "max_steps": 2}}
    cases["fsdp2 adapter, plain"] = adapter
    for rank in EVERY:
        plants = [_fault("set-up", "error", rank)]
        cases[f"fsdp2 adapter, set-up on {rank}"] = {**adapter, "plants": plants, "audit": AUDIT}
    return cases


def _fault(where: str, kind: str, rank: int, step: int = 0, every: int = 1) -> dict[str, Any]:
    return {"where": where, "kind": kind, "rank": rank, "audit_number": 1 + step // every}


TRAINER: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "no"}
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
    where, _, rank, step = BROKEN[name]
    case = f"{engine}, broken on {rank}"
    failures = lines(ran[0], case, "failures.jsonl")
    assert [line["step"] for line in failures] == [fault[3] for fault in BROKEN.values() if fault[2] == rank]
    (failure,) = (line for line in failures if line["step"] == step)
    assert "planted" in failure["error"]
    assert failure["error"].startswith("On rank 1:") == (rank == 1)
    every = EVERY[rank]
    near = {
        line["step"]: line["kind"] for line in lines(ran[0], case, "records.jsonl") if abs(line["step"] - step) <= every
    }
    # Where an audit broke there is a look; not where it was made, and the disk refused it or a writer broke.
    there = {"writer": {step: "full"}, "log": {}}.get(where, {step: "health"})
    assert near == {step - every: "full", **there, step + every: "full"}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_check_before_training_that_breaks_is_no_refusal(ran: Any, engine: str, rank: int) -> None:
    case = f"{engine}, memory on {1 - rank}"
    assert [line["step"] for line in lines(ran[0], case, "records.jsonl")] == [MEMORY_AT, STEPS]
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
    assert [record["step"] for record in halved] == [MEMORY_AT, STEPS]
    for name in ("shift", "policy", "kl"):
        assert halved[0]["margins"][name]["mean"] == pytest.approx(whole[0]["margins"][name]["mean"], rel=1e-5)
    for one, other in zip(halved[0]["patching"]["effect"], whole[0]["patching"]["effect"], strict=True):
        assert one["mean"] == pytest.approx(other["mean"], rel=1e-4)
    for other_rank in (0, 1):
        output = (ran[0] / case / f"output-{other_rank}.txt").read_text()
        assert "it goes on with half the batch" in output
