"""DeepSpeed ZeRO-3: weights spread over processes are brought together a layer at a time, and training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import MADE_ELSEWHERE, differing, lines

pytestmark = pytest.mark.distributed

pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed: `make test-deepspeed` has an environment with it"
)

AUDIT: dict[str, Any] = {
    "max_pairs": 5,
    "low_rank": {"enabled": True, "layers": [1], "ranks": [1], "random_draws": 1},
    "spinal": {"enabled": True, "max_rows": 40},
    "sites": [{"site": "head"}],
    "schedule": {"every_n_steps": 2},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "made": {},
}
_USUAL = {"engine": "zero3", "probes": 6, "alone": True, "audit": AUDIT, "trainer": {"save_strategy": "no"}}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("zero3")
    cases: dict[str, dict[str, Any]] = {}
    for name, setting in SETTINGS.items():
        cases[f"{name} plain"] = {**_USUAL, **setting, "audit": None, "alone": False}
        cases[name] = {**_USUAL, **setting}
    return folder, launch(folder, cases)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_engine_really_ran(ran: Any, setting: str) -> None:
    for case in (setting, f"{setting} plain"):
        for said in ran[1][case]:
            assert "error" not in said and "hung" not in said, said
            assert said["engine"] == "DeepSpeedEngine"
            assert said["distributed"] == "DistributedType.DEEPSPEED"
            assert said["spread"] > 10
            assert said["reference"] == ("NoneType" if "adapter" in setting else "DeepSpeedEngine")


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_the_same_bits(ran: Any, setting: str) -> None:
    for without, audited in zip(ran[1][f"{setting} plain"], ran[1][setting], strict=True):
        assert audited["weights"] == without["weights"]
        assert audited["losses"] == without["losses"]
        assert len(without["losses"]) > 2


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_step_is_recorded_once(ran: Any, setting: str) -> None:
    assert lines(ran[0], setting, "failures.jsonl") == []
    assert [line["step"] for line in lines(ran[0], setting, "records.jsonl")] == [0, 2, 4]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_last_record_is_what_one_process_finds_in_the_gathered_weights(ran: Any, setting: str) -> None:
    here = lines(ran[0], setting, "records.jsonl")[-1]
    alone = json.loads((ran[0] / setting / "alone.json").read_text())
    # Sums of token rows are added up in another order.
    assert differing(here, alone, MADE_ELSEWHERE, {"low_rank.": 1e-9, "controls.random_subspace.": 1e-9}) == []
    assert here["patching"]["effect"][1]["mean"] not in (0.0, None)


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_is_left_behind(ran: Any, setting: str) -> None:
    for said in ran[1][setting]:
        assert said["looks"] == 4
        assert said["left"] == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_layer_at_a_time_is_whole(ran: Any, setting: str) -> None:
    """Beside what is outside of the layers: one of each model."""
    for said in ran[1][setting]:
        assert len(said["held"]) >= 3
        for held in said["held"]:
            assert held["gathers"] > 3
            assert held["most"] == held["outside"] + max(held["layers"])
            assert len(held["layers"]) == 3
