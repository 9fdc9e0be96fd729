"""Several processes decide together: they save, stop, fail and refuse on all ranks or on none, and nobody waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import lines

pytestmark = pytest.mark.distributed

# Any movement at all is above this limit, so the first audit of a trained policy raises an alert.
_AT_ONCE: dict[str, Any] = {"rules": {"at_once": {"signal": "margins.kl", "above": 1e-9, "level": "error"}}}
_BY_STEP = {"schedule": {"every_n_steps": 1}, "patching": {"enabled": False}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "audited": {"audit": {}},
    "lora plain": {"mode": "new adapter"},
    "lora audited": {"audit": {}, "mode": "new adapter"},
    "stop": {"audit": {**_BY_STEP, "alerts": {"action": "stop", **_AT_ONCE}}},
    "save": {"audit": {**_BY_STEP, "alerts": {"action": "save", **_AT_ONCE}}, "trainer": {"save_strategy": "no"}},
    "log on 0": {
        "audit": {"schedule": {"escalate": False}, "alerts": {"rules": {"planted": {"signal": "loss", "above": 1e6}}}},
        "log_on": 0,
    },
    "log after its audit": {
        "audit": {
            "schedule": {"escalate": False, "first_health": 2},
            "alerts": {"rules": {"planted": {"signal": "loss", "above": -1.0}}},
        },
        "trainer": {"save_strategy": "no", "logging_steps": 2},
    },
    "left out": {"audit": {"budget": 1e-6, "schedule": {"last_step_seconds": 0.0}, "alerts": {"enabled": False}}},
    "broken on 0": {"audit": {}, "break_on": 0},
    "broken on 1": {"audit": {}, "break_on": 1},
    "broken on 1, strict": {"audit": {"strict": True}, "break_on": 1},
    "refused on 1": {"audit": {}, "refuse_on": 1},
    "other options on 1": {"audit": {}, "config_on": 1},
    "other pairs on 1": {"audit": {}, "probes": 6, "pairs_on": 1},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("together")
    return folder, launch(folder, CASES)


def test_nobody_waits_for_ever(ran: Any) -> None:
    hung = [(name, rank) for name, ranks in ran[1].items() for rank, said in enumerate(ranks) if "hung" in said]
    assert hung == []


@pytest.mark.parametrize("kind", ["", "lora "])
def test_training_is_the_same_bits_under_ddp(ran: Any, kind: str) -> None:
    plain, audited = ran[1][f"{kind}plain"], ran[1][f"{kind}audited"]
    assert all(said["distributed"] == "DistributedType.MULTI_CPU" for said in (*plain, *audited))
    assert all(said["engine"] == "DistributedDataParallel" for said in (*plain, *audited))
    for without, with_ours in zip(plain, audited, strict=True):
        assert with_ours["weights"] == without["weights"]
        assert with_ours["losses"] == without["losses"]
        assert len(without["losses"]) > 2


def test_each_step_is_recorded_once(ran: Any) -> None:
    assert [line["step"] for line in lines(ran[0], "audited", "records.jsonl")] == [0, 2, 4]
    assert lines(ran[0], "audited", "failures.jsonl") == []


def test_an_alert_stops_training_on_every_rank(ran: Any) -> None:
    assert [said["step"] for said in ran[1]["stop"]] == [1, 1]
    assert [said["stop"] for said in ran[1]["stop"]] == [True, True]
    assert (ran[0] / "stop" / "run" / "checkpoint-1").is_dir()


def test_an_alert_saves_on_every_rank(ran: Any) -> None:
    assert [said["step"] for said in ran[1]["save"]] == [4, 4]
    assert (ran[0] / "save" / "run" / "checkpoint-1").is_dir()


def test_a_log_on_one_rank_alone_is_looked_at_and_nobody_waits(ran: Any) -> None:
    """Under ``is_world_process_zero``: the event of that log comes on no other rank."""
    for without, audited in zip(ran[1]["plain"], ran[1]["log on 0"], strict=True):
        assert "error" not in audited, audited["error"]
        assert audited["weights"] == without["weights"]
    assert lines(ran[0], "log on 0", "failures.jsonl") == []
    looks = [(line["step"], line["kind"]) for line in lines(ran[0], "log on 0", "records.jsonl")]
    assert looks == [(0, "full"), (1, "health"), (2, "full"), (4, "full")]
    look = lines(ran[0], "log on 0", "records.jsonl")[1]
    assert look["occasion"]["reason"].startswith("the training log: ")


def test_a_log_that_came_after_the_audit_of_its_step_is_looked_at_on_every_rank(ran: Any) -> None:
    """At the next step, which all of them know of although the first one alone reads the log."""
    for without, audited in zip(ran[1]["plain"], ran[1]["log after its audit"], strict=True):
        assert "error" not in audited, audited["error"]
        assert audited["weights"] == without["weights"]
    looks = [(line["step"], line["kind"]) for line in lines(ran[0], "log after its audit", "records.jsonl")]
    assert looks == [(0, "full"), (2, "health"), (3, "health"), (4, "full")]
    assert lines(ran[0], "log after its audit", "records.jsonl")[2]["occasion"]["reason"].startswith(
        "the training log: "
    )


def test_a_checkpoint_without_room_is_left_out_on_every_rank(ran: Any) -> None:
    """The first one's clocks say so; the others audit nothing either, and train on."""
    for without, audited in zip(ran[1]["plain"], ran[1]["left out"], strict=True):
        assert "error" not in audited, audited["error"]
        assert audited["weights"] == without["weights"]
        assert audited["losses"] == without["losses"]
    assert (ran[0] / "left out" / "run" / "checkpoint-2").is_dir()
    looks = [(line["step"], line["kind"]) for line in lines(ran[0], "left out", "records.jsonl")]
    assert looks == [(0, "health"), (4, "health")]
    assert lines(ran[0], "left out", "failures.jsonl") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_what_breaks_on_one_rank_is_recorded_and_training_is_the_same(ran: Any, rank: int) -> None:
    plain, broken = ran[1]["plain"], ran[1][f"broken on {rank}"]
    assert [said["weights"] for said in broken] == [said["weights"] for said in plain]
    failures = lines(ran[0], f"broken on {rank}", "failures.jsonl")
    assert [line["step"] for line in failures] == [0, 2, 4]
    assert all("planted" in line["error"] for line in failures)
    assert all(line["error"].startswith("On rank 1:") == (rank == 1) for line in failures)


def test_strict_raises_on_every_rank(ran: Any) -> None:
    first, second = ran[1]["broken on 1, strict"]
    assert (second["kind"], second["words"]) == ("ValueError", "planted")
    assert (first["kind"], first["words"]) == ("AlignAuditError", "the audit broke on rank 1: ValueError: planted")


def test_a_refusal_on_one_rank_is_one_on_all(ran: Any) -> None:
    first, second = ran[1]["refused on 1"]
    assert second["kind"] == "ProbeError"
    assert "no-such-file.jsonl" in second["words"]
    assert first["kind"] == "ConfigurationError"
    assert "on rank 1 ProbeError" in first["words"]


def test_ranks_with_different_pairs_are_refused(ran: Any) -> None:
    """They share the pairs among them: numbers of different ones would be put together in silence."""
    for said in ran[1]["other pairs on 1"]:
        assert said["kind"] == "ConfigurationError"
        assert "rank 1 audits other probe pairs than rank 0" in said["words"]
        assert "seed" in said["words"]


def test_ranks_with_different_options_are_refused(ran: Any) -> None:
    for said in ran[1]["other options on 1"]:
        assert said["kind"] == "ConfigurationError"
        assert "rank 1" in said["words"]
        assert "seed" in said["words"]
