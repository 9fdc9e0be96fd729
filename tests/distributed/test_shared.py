"""Processes share the probe pairs: numbers per pair are those of one process bit by bit, whatever the pairs and the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from align_audit import AuditRun
from align_audit.record.pair_texts import PairTexts
from tests.distributed.launch import launch
from tests.distributed.reading import MADE_ELSEWHERE, differing, lines
from tests.helpers.audits import QUICK_LASSO

pytestmark = pytest.mark.distributed

LAST_ONLY = {"before_training": False}
AUDIT: dict[str, Any] = {
    "schedule": LAST_ONLY,
    "batch_tokens": 100,
    "max_pairs": 16,
    "patching": {"noise_draws": 2, "control_pairs": 8},
    "low_rank": {"enabled": True, "layers": [1], "ranks": [1, 2], "random_draws": 1},
    "spinal": {"enabled": True, "max_rows": 60},
}
STEPS = 2
SITES = [{"site": "mlp_output", "estimator": "control_variate", "pairs": 8}, {"site": "block", "width": 2}]
LAYERS = {"low_rank": {**AUDIT["low_rank"], "layers": "all"}}
SITUATIONS: dict[str, dict[str, Any]] = {
    "uneven": {"probes": 13, "audit": {**AUDIT, "localization": {"enabled": True, **QUICK_LASSO}}},
    "one pair": {
        "probes": 1,
        "audit": {"schedule": LAST_ONLY, "patching": {"noise_draws": 1}, "spinal": {"enabled": True}},
    },
    "twelve": {
        "probes": 15,
        "audit": {**AUDIT, **LAYERS, "sites": SITES, "patching": {"exact_pairs": 12, "control_pairs": 8}},
    },
    "auto": {
        "probes": 16,
        "audit": {
            **AUDIT,
            "patching": {"exact_pairs": "auto", "equivalent_pairs": 14, "control_pairs": 8},
            "spinal": {"enabled": True, "transport_rows": "auto"},
        },
        "portion": 16,
    },
    "two sets": {"probes": {"long": [8, 19], "short": [19, 24]}, "audit": AUDIT},
    "frozen": {"probes": 9, "audit": AUDIT, "frozen": True},
    "on three": {"probes": 13, "audit": AUDIT, "ranks": 3},
}
CASES = {
    f"{engine}, {name}": {
        "engine": engine,
        "alone": True,
        "trainer": {"save_strategy": "no", "max_steps": STEPS},
        **situation,
    }
    for engine in ("ddp", "fsdp2")
    for name, situation in SITUATIONS.items()
}
SUMMED = {"low_rank.": 1e-9, "controls.random_subspace": 1e-9}
"""What is made of sums over all rows, which are added up in another order."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("shared")
    return folder, launch(folder, CASES)


def _sets(case: str) -> dict[str | None, str]:
    """By name of a probe set: what its files alone are called."""
    names = CASES[case]["probes"]
    return {None: "alone"} if isinstance(names, int) else {name: f"alone-{name}" for name in names}


@pytest.mark.parametrize("case", CASES)
def test_the_record_is_what_one_process_finds(ran: Any, case: str) -> None:
    assert len(ran[1][case]) == CASES[case].get("ranks", 2)
    for said in ran[1][case]:
        assert "error" not in said and "hung" not in said, said
    assert lines(ran[0], case, "failures.jsonl") == []
    records = [line for line in lines(ran[0], case, "records.jsonl") if line["step"] == STEPS]
    assert len(records) == len(_sets(case))
    for record in records:
        name = _sets(case)[record["provenance"]["probe_name"]]
        alone = json.loads((ran[0] / case / f"{name}.json").read_text())
        assert differing(record, alone, MADE_ELSEWHERE, SUMMED) == []


@pytest.mark.parametrize("case", CASES)
def test_numbers_per_pair_are_the_same_bits(ran: Any, case: str) -> None:
    files = sorted((ran[0] / case / "run" / "align_audit" / f"step-{STEPS}").glob("*.safetensors"))
    assert len(files) == len(_sets(case))
    for path in files:
        name = next(name for key, name in _sets(case).items() if key is None or key in path.name)
        here, alone = load_file(path), np.load(ran[0] / case / f"{name}.npz")
        assert sorted(here) == sorted(alone.files)
        for key, values in here.items():
            if "low_rank" in key or "subspace" in key:
                np.testing.assert_allclose(values, alone[key], rtol=1e-7, atol=1e-9, err_msg=key)
            else:
                np.testing.assert_array_equal(values, alone[key], err_msg=key)
        assert any(key.startswith("per_pair.") for key in here)


@pytest.mark.parametrize("case", CASES)
def test_what_changed_in_text_is_what_one_process_finds(ran: Any, case: str) -> None:
    run = AuditRun.load(ran[0] / case / "run")
    for record in (record for record in run.records if record.step == STEPS):
        here = run.pair_texts(record)
        alone = PairTexts.load(ran[0] / case / f"{_sets(case)[record.provenance.probe_name]}.texts.json")
        assert here is not None
        assert here.lost + here.gained != []
        assert (here.lost, here.gained) == (alone.lost, alone.gained)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_rows_travel_in_more_than_one_portion(ran: Any, engine: str) -> None:
    """So that the processes take turns of them, and decide together how many are drawn."""
    spinal = lines(ran[0], f"{engine}, auto", "records.jsonl")[-1]["spinal"]
    assert SITUATIONS["auto"]["portion"] * 2 < spinal["transport_rows"] < spinal["rows_available"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_work_of_all_processes_is_what_is_counted_in_advance(ran: Any, engine: str) -> None:
    for case in (f"{engine}, uneven", f"{engine}, two sets"):
        for name, file in _sets(case).items():
            records = lines(ran[0], case, "records.jsonl")
            record = next(each for each in reversed(records) if each["provenance"]["probe_name"] == name)
            counted = json.loads((ran[0] / case / f"{file}.counted.json").read_text())
            assert record["cost"]["forward_equivalents"] == counted["forwards"]


def test_layers_are_brought_together_about_as_often_as_is_counted(ran: Any) -> None:
    """How often it is while a model is opened and tried goes by what is found there."""
    case = "fsdp2, uneven"
    counted = json.loads((ran[0] / case / "alone.counted.json").read_text())["gathers"]
    for said in ran[1][case]:
        policy, reference = said["held"][-2:]
        assert sum(counted.values()) == pytest.approx(policy["gathers"] + reference["gathers"], rel=0.05)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_work_is_shared(ran: Any, engine: str) -> None:
    """Each layer is brought together for a turn of batches, and not for each of them."""
    for case in (f"{engine}, uneven", f"{engine}, twelve"):
        record = lines(ran[0], case, "records.jsonl")[-1]
        alone = json.loads((ran[0] / case / "alone.json").read_text())
        share = record["cost"]["forward_equivalents"] / alone["cost"]["forward_equivalents"]
        assert 0.95 < share < (1.15 if engine == "ddp" else 1.6), "all processes' work together"
