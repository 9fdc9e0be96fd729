"""DeepSpeed ZeRO-3: weights partitioned over processes are brought together a layer at a time, and training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import MADE_ELSEWHERE, differing, lines

pytestmark = pytest.mark.distributed

AUDIT: dict[str, Any] = {
    "max_pairs": 9,
    "batch_tokens": 100,
    "patching": {"noise_draws": 2, "exact_pairs": 8},
    "low_rank": {"enabled": True, "layers": [1], "ranks": [1, 2], "random_draws": 1},
    "spinal": {"enabled": True, "max_rows": 40},
    "schedule": {"every_n_steps": 2},
}
_PLANT = {"where": "layer", "kind": "error", "rank": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "made": {},
    "passed": {"mode": "ref_model passed"},
    "new adapter": {"mode": "new adapter"},
    "pretrained adapter": {"mode": "pretrained adapter"},
    "sync": {"mode": "sync"},
    "no checkpointing": {"trainer": {"gradient_checkpointing": False}},
}
_USUAL: dict[str, Any] = {"engine": "zero3", "probes": 10, "alone": True, "audit": AUDIT}


def _cases() -> dict[str, dict[str, Any]]:
    cases = {}
    for name, setting in SETTINGS.items():
        cases[f"{name} plain"] = {**_USUAL, **setting, "audit": None, "alone": False}
        cases[name] = {**_USUAL, **setting}
    cases["broken"] = {**_USUAL, "alone": False, "plant": _PLANT}
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    pytest.importorskip(
        "deepspeed", reason="DeepSpeed is not installed: DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install deepspeed"
    )
    folder = tmp_path_factory.mktemp("zero3")
    return folder, launch(folder, CASES)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_engine_really_ran(ran: Any, setting: str) -> None:
    for case in (setting, f"{setting} plain"):
        for said in ran[1][case]:
            assert "error" not in said and "hung" not in said, said
            assert said["engine"] == "DeepSpeedEngine"
            assert said["spread"] > 10
            assert said["reference"] == "DeepSpeedEngine" or "adapter" in setting


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_the_same_bits(ran: Any, setting: str) -> None:
    for without, with_ours in zip(ran[1][f"{setting} plain"], ran[1][setting], strict=True):
        assert with_ours["weights"] == without["weights"]
        assert with_ours["losses"] == without["losses"]
        assert len(without["losses"]) > 2


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_last_record_is_what_one_process_finds_in_the_gathered_weights(ran: Any, setting: str) -> None:
    assert lines(ran[0], setting, "failures.jsonl") == []
    records = lines(ran[0], setting, "records.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4]
    alone = json.loads((ran[0] / setting / "alone.json").read_text())
    summed = {"low_rank.": 1e-9, "controls.random_subspace.": 1e-9}
    assert differing(records[-1], alone, MADE_ELSEWHERE, summed) == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_is_left_behind(ran: Any, setting: str) -> None:
    for said in ran[1][setting]:
        assert said["looks"] == 4
        assert said["left"] == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_layer_at_a_time_is_whole(ran: Any, setting: str) -> None:
    for said in ran[1][setting]:
        assert len(said["held"]) >= 3
        for held in said["held"]:
            assert held["gathers"] > 3
            assert held["most"] == held["outside"] + max(held["layers"])
            assert len(held["layers"]) == 3


def test_what_breaks_on_one_rank_is_recorded_and_training_is_the_same(ran: Any) -> None:
    for without, broken in zip(ran[1]["made plain"], ran[1]["broken"], strict=True):
        assert broken["weights"] == without["weights"]
    (failure,) = lines(ran[0], "broken", "failures.jsonl")
    assert failure["error"].startswith("On rank 1:")
    assert [record["step"] for record in lines(ran[0], "broken", "records.jsonl")] == [0, 4]
