"""FSDP2: weights spread over processes are brought together a layer at a time, and training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import assert_a_layer_at_a_time, assert_found_alone, lines
from tests.helpers.audits import QUICK_LASSO

pytestmark = pytest.mark.distributed

AUDIT: dict[str, Any] = {
    "max_pairs": 9,
    "patching": {"noise_draws": 1, "exact_pairs": 8},
    "low_rank": {"enabled": True, "layers": [1], "ranks": [1, 2], "random_draws": 1},
    "spinal": {"enabled": True, "max_rows": 40},
    "schedule": {"every_n_steps": 1, "before_training": False},
}
EVERYTHING: dict[str, Any] = {
    **AUDIT,
    "schedule": {"every_n_steps": 1},
    "localization": {"enabled": True, **QUICK_LASSO},
    "sites": [{"site": "head"}, {"site": "mlp_output", "estimator": "control_variate"}],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "made": {"audit": EVERYTHING, "trainer": {}},
    "made, kept": {"engine": "fsdp2 kept"},
    "passed": {"mode": "ref_model passed"},
    "new adapter": {"mode": "new adapter", "audit": EVERYTHING},
    "pretrained adapter": {"mode": "pretrained adapter"},
    "sync": {"mode": "sync", "trainer": {"save_strategy": "no", "ref_model_sync_steps": 1}},
    "bf16": {"mode": "bf16"},
    "no checkpointing": {"trainer": {"save_strategy": "no", "gradient_checkpointing": False}},
    "after evaluation": {
        "engine": "fsdp2 kept",
        "trainer": {"eval_strategy": "steps", "eval_steps": 1},
        "audit": {**AUDIT, "schedule": {"on_evaluate": True, "before_training": False}},
    },
}
_USUAL = {"engine": "fsdp2", "probes": 10, "alone": True, "audit": AUDIT, "trainer": {"save_strategy": "no"}}


def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for name, setting in SETTINGS.items():
        case = {**_USUAL, **setting}
        case["trainer"] = {"max_steps": 2, **case["trainer"]}
        cases[f"{name} plain"] = {**case, "audit": None, "alone": False}
        cases[name] = case
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("fsdp2")
    return folder, launch(folder, CASES)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_engine_really_ran(ran: Any, setting: str) -> None:
    for case in (setting, f"{setting} plain"):
        for said in ran[1][case]:
            assert "error" not in said, said["error"]
            assert said["engine"].startswith("FSDP")
            assert said["spread"] > 10
            assert said["reference"].startswith("FSDP") or "adapter" in setting


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_the_same_bits(ran: Any, setting: str) -> None:
    for without, with_ours in zip(ran[1][f"{setting} plain"], ran[1][setting], strict=True):
        assert with_ours["weights"] == without["weights"]
        assert with_ours["losses"] == without["losses"]
        assert len(without["losses"]) > 2


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_step_is_recorded_once(ran: Any, setting: str) -> None:
    assert lines(ran[0], setting, "failures.jsonl") == []
    at_start = SETTINGS[setting].get("audit") is EVERYTHING
    assert [line["step"] for line in lines(ran[0], setting, "records.jsonl")] == [*([0] if at_start else []), 1, 2]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_last_record_is_what_one_process_finds_in_the_gathered_weights(ran: Any, setting: str) -> None:
    rounded = ("provenance.policy_hash", "provenance.reference_hash", "provenance.parameter_dtype")
    # In half precision the weights themselves are rounded first.
    assert_found_alone(ran[0], setting, rounded if setting == "bf16" else ())


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_is_left_behind(ran: Any, setting: str) -> None:
    for said in ran[1][setting]:
        assert said["looks"] == 2
        assert said["left"] == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_layer_at_a_time_is_whole(ran: Any, setting: str) -> None:
    assert_a_layer_at_a_time(ran[1][setting])
