"""DeepSpeed ZeRO-3: weights spread over processes are brought together a layer at a time, and training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import assert_a_layer_at_a_time, assert_found_alone, lines

pytestmark = pytest.mark.distributed
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: run `make test-deepspeed`")

AUDIT: dict[str, Any] = {
    "max_pairs": 5,
    "patching": {"noise_draws": 1},
    "schedule": {"every_n_steps": 2},
}
EVERYTHING: dict[str, Any] = {
    **AUDIT,
    "low_rank": {"enabled": True, "layers": [1], "ranks": [1], "random_draws": 1},
    "spinal": {"enabled": True, "max_rows": 40},
    "sites": [{"site": "head"}],
    "generations": {"prompts": 2, "max_new_tokens": 8},
}
_USUAL: dict[str, Any] = {
    "engine": "zero3",
    "probes": 6,
    "audit": AUDIT,
    "trainer": {"save_strategy": "no", "eval_strategy": "no", "gradient_checkpointing": True},
    # Biases of odd length end in padding on the second process.
    "shape": {"mlp_bias": True, "intermediate_size": 47},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "made": {"audit": EVERYTHING},
    # Cut as it is loaded, and not when training begins.
    "by name": {"mode": "model by name"},
    # The engine keeps what is small whole: norms and biases.
    "passed": {"mode": "ref_model passed", "zero": {"stage3_param_persistence_threshold": 50}},
    "new adapter": {"mode": "new adapter", "audit": EVERYTHING},
    # Without biases: DeepSpeed's linear function adds one in a step of its own, and rounds once more than torch's.
    "bf16": {"mode": "bf16", "shape": {}},
    "no checkpointing": {
        "trainer": {"save_strategy": "no", "gradient_checkpointing": False, "eval_strategy": "steps", "eval_steps": 2},
        "audit": {**AUDIT, "schedule": {"on_evaluate": True}},
    },
    "sync": {"mode": "sync"},
    "read from disk": {"reference": "path"},
}
# Any movement at all is above this limit, so the first audit of a trained policy raises an alert.
_AT_ONCE: dict[str, Any] = {"rules": {"at_once": {"signal": "margins.kl", "above": 1e-9, "level": "error"}}}
ODD: dict[str, dict[str, Any]] = {
    "stop": {
        "audit": {"schedule": {"every_n_steps": 1}, "patching": {"enabled": False}, "alerts": {"action": "stop", **_AT_ONCE}},
    },
    "broken": {"audit": AUDIT, "plants": [{"where": "layer", "kind": "error", "rank": 1, "audit_number": 2}]},
    "hpz": {"zero": {"zero_hpz_partition_size": 2}},
    "offloaded": {"zero": {"offload_param": {"device": "cpu"}}},
}  # fmt: skip


def _plain(setting: str) -> str:
    """The same training without the callback."""
    return "made plain" if setting == "read from disk" else f"{setting} plain"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("zero3")
    cases: dict[str, dict[str, Any]] = {}
    for name, setting in SETTINGS.items():
        if _plain(name) == f"{name} plain":
            cases[_plain(name)] = {**_USUAL, **setting, "audit": None}
        cases[name] = {**_USUAL, **setting, "alone": True}
    for name, odd in ODD.items():
        cases[name] = {**_USUAL, **odd}
    cases["weights"] = {"engine": "zero3", "job": "zero3_weights"}
    return folder, launch(folder, cases)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_engine_really_ran(ran: Any, setting: str) -> None:
    for case in (setting, _plain(setting)):
        for said in ran[1][case]:
            assert "error" not in said and "hung" not in said, said
            assert said["engine"] == "DeepSpeedEngine"
            assert said["distributed"] == "DistributedType.DEEPSPEED"
            assert said["spread"] > 10
            assert said["reference"] == ("NoneType" if setting == "new adapter" else "DeepSpeedEngine")
            assert said["coordinators"] == 1
            assert (said["available"] > 0) == (setting == "passed")


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_the_same_bits(ran: Any, setting: str) -> None:
    for without, audited in zip(ran[1][_plain(setting)], ran[1][setting], strict=True):
        assert audited["weights"] == without["weights"]
        assert audited["losses"] == without["losses"]
        assert len(without["losses"]) > 2


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_step_is_recorded_once(ran: Any, setting: str) -> None:
    assert lines(ran[0], setting, "failures.jsonl") == []
    assert [line["step"] for line in lines(ran[0], setting, "records.jsonl")] == [0, 2, 4]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_last_record_is_what_one_process_finds_in_the_gathered_weights(ran: Any, setting: str) -> None:
    assert_found_alone(ran[0], setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_is_left_behind(ran: Any, setting: str) -> None:
    for said in ran[1][setting]:
        assert said["looks"] == 4
        assert said["left"] == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_layer_at_a_time_is_whole(ran: Any, setting: str) -> None:
    assert_a_layer_at_a_time(ran[1][setting])


def test_an_alert_stops_training_on_every_rank(ran: Any) -> None:
    assert [said.get("step") for said in ran[1]["stop"]] == [1, 1], ran[1]["stop"]
    assert [said["stop"] for said in ran[1]["stop"]] == [True, True]
    assert (ran[0] / "stop" / "run" / "checkpoint-1").is_dir()


def test_what_breaks_on_one_rank_is_recorded_once_and_training_is_the_same(ran: Any) -> None:
    for without, broken in zip(ran[1]["made plain"], ran[1]["broken"], strict=True):
        assert "error" not in broken and "hung" not in broken, broken
        assert broken["weights"] == without["weights"]
        assert broken["losses"] == without["losses"]
        assert broken["left"] == []
    (failure,) = lines(ran[0], "broken", "failures.jsonl")
    assert failure["step"] == 2
    assert failure["error"].startswith("On rank 1:")
    assert "planted" in failure["error"]
    assert [line["step"] for line in lines(ran[0], "broken", "records.jsonl")] == [0, 2, 4]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("hpz", "DeepSpeed ZeRO-3 with a second partition inside of each node (hpZ of ZeRO++)"),
        ("offloaded", "DeepSpeed ZeRO-3 with its parameters offloaded"),
    ],
)
def test_what_an_audit_cannot_follow_is_refused_on_every_rank(ran: Any, case: str, words: str) -> None:
    for said in ran[1][case]:
        assert said.get("kind") == "ConfigurationError", said
        assert f"spread over processes ({words})" in said["words"]
        assert "\n" not in said["words"]
    assert lines(ran[0], case, "records.jsonl") == []


@pytest.fixture(scope="module")
def weights(ran: Any) -> list[dict[str, Any]]:
    for seen in ran[1]["weights"]:
        assert "error" not in seen and "hung" not in seen, seen
    return ran[1]["weights"]


def test_weights_have_one_hash_cut_or_not(weights: list[dict[str, Any]]) -> None:
    for seen in weights:
        assert seen["padded"] > 0
        assert seen["unwrapped"]
        assert seen["begins alike"]
        assert seen["moved"]
        assert seen["goes on alike"]
        assert seen["written to, alike"]


def test_a_cut_model_replays_as_a_plain_one_and_is_given_back(weights: list[dict[str, Any]]) -> None:
    for seen in weights:
        assert seen["same layers"]
        assert seen["same streams"]
        assert seen["same logits"]
        assert seen["pointwise"][0] == seen["pointwise"][1] > 0
        assert seen["held"] == [3]
        assert (seen["hooks"], seen["hooks after"] > 50) == (0, True)
        assert seen["left"]
        assert "broke" not in seen
        assert seen["left after an error"]


def test_a_model_is_loaded_whole_beside_a_trainer_that_cuts_what_is_loaded(weights: list[dict[str, Any]]) -> None:
    for seen in weights:
        assert seen["loading"] == {"inside": False, "outside": True, "as before": True}


def test_settings_that_change_weights_are_known(weights: list[dict[str, Any]]) -> None:
    for seen in weights:
        assert seen["settings"] == {
            "nothing": None,
            "quantized": "with quantized weights (ZeRO++)",
            "quantized, frozen": "with quantized weights (ZeRO++)",
            "disk": "with its parameters offloaded",
            "groups": "with weights cut inside of groups (MiCS)",
            "gradients": None,
            "autocast": "with DeepSpeed's own autocast",
        }
