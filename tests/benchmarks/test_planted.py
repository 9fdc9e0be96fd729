"""The planting benchmark, on one planting of each kind that needs no other base; and what its tables count."""

from __future__ import annotations

from typing import Any

import planted
import pytest


@pytest.fixture(scope="module")
def bench() -> planted.Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "PROBE_PAIRS", 16)
        return planted.Bench("llama", None)


def test_planting_and_probe_pairs_are_apart(bench: planted.Bench) -> None:
    completions = [{pair.chosen_ids[pair.chosen_start :] for pair in pairs} for pairs in (bench.planting, bench.probes)]
    assert not completions[0] & completions[1]


def test_a_planted_layer_is_found(bench: planted.Bench) -> None:
    row = planted.plant_a_layer(bench, 0)
    assert row["found"]
    assert row["ratio"] > planted.CLEAR
    assert max(range(6), key=lambda layer: row["block_transplant"][layer]) == row["layers"][0]


def test_a_planted_rank_is_found(bench: planted.Bench) -> None:
    row = planted.plant_a_rank(bench, 3)  # rank 2
    assert row["rank"] == 2
    assert row["found"]
    assert row["effect_fraction"][row["ranks"].index(2)] == pytest.approx(1.0, abs=1e-3)
    assert abs(row["effect_fraction"][0] - 1.0) > 0.02


def test_shares_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert planted.share(19, 20) == " 19 of  20   95.0%  [76.4%, 99.1%]"  # Wilson (1927), as in any table
    assert planted.share(0, 0) == "none"
    rows: list[dict[str, Any]] = [
        {
            "kind": "layer",
            "family": "llama",
            "distraction": 4.0,
            "ratio": ratio,
            "found": ratio > 1.2,
            "layers": [1],
            "standing_out": [1],
        }
        for ratio in (0.4, 1.4, 3.0, 9.0)
    ]
    planted.report(rows)
    said = capsys.readouterr().out
    assert "clear (≥ 2)" in said
    assert "2 of   2  100.0%" in said
    assert "missed at ratios: 0.40" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "number"),
    [(planted.plant_a_window, 0), (planted.plant_a_site, 0), (planted.plant_a_site, 3), (planted.plant_a_head, 0)],
)
def test_planted_windows_sites_and_heads_are_measured(bench: planted.Bench, plant: Any, number: int) -> None:
    row = plant(bench, number)
    assert row["ratio"] > 0
    assert row["largest"][0] in {"block", "attention_output", "mlp_output", "head"}
    assert row["found"] or row["ratio"] < planted.CLEAR
