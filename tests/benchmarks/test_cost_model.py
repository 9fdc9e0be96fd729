"""The cost model's prices: seconds are counts times prices, and what is foreseen of many GPUs is as it should be."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest

from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.costs.work import NAMES, Work

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "cost"
SHAPE = ModelShape(8, 64, 64, 32, 1000, 40_000, 40_128, 64_000, 4)


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """Of the command, which stand beside each other in its folder."""
    present = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in ("prices", "accelerators", "scale", "scale_text")}
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - present:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def at_one(prices: ModuleType, **changed: float):
    """Every unit for one second, but for some."""
    return replace(prices.Prices(*(1.0 for _ in fields(prices.Prices))), audit=0.0, **changed)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "spared"])
def test_every_unit_has_a_price(modules: dict[str, ModuleType], name: str) -> None:
    prices = modules["prices"]
    spent = sum(prices.seconds({"patching": Work(**{name: 1000})}, SHAPE, at_one(prices)).values())
    free = replace(at_one(prices), **{each.name: 0.0 for each in fields(prices.Prices)})
    assert spent >= 1000
    assert sum(prices.seconds({"patching": Work(**{name: 1000})}, SHAPE, free).values()) == 0.0


def test_what_the_last_layer_spares_costs_nothing(modules: dict[str, ModuleType]) -> None:
    prices = modules["prices"]
    price = at_one(prices)
    whole, trimmed = (prices.seconds({"patching": Work(tokens=10, spared=spared)}, SHAPE, price) for spared in (0, 4))
    assert whole["patching"] - trimmed["patching"] == 4 * SHAPE.spared_flops


def test_the_mean_of_two_calibrations_is_of_every_price(modules: dict[str, ModuleType]) -> None:
    prices = modules["prices"]
    mean = prices.between(at_one(prices), at_one(prices, call=3.0))
    assert (mean.call, mean.fit, mean.audit) == (2.0, 1.0, 0.0)


def test_more_gpus_take_less_time_and_spread_weights_bring_messages(modules: dict[str, ModuleType]) -> None:
    scale, devices = modules["scale"], modules["accelerators"].ACCELERATORS
    host = replace(at_one(modules["prices"]), **{each.name: 1e-12 for each in fields(modules["prices"].Prices)})
    shape = scale.shape_of("1B")
    assert shape.weights == pytest.approx(1.24e9, rel=0.01)
    one, eight = (scale.foresee(shape, devices[0], gpus, "full", host) for gpus in (1, 8))
    slower = scale.foresee(shape, devices[1], 1, "full", host)
    assert eight.seconds < one.seconds < slower.seconds
    assert one.parts["messages"] == 0.0 < eight.parts["messages"]
    assert eight.device > one.device, "what lies outside of the layers is whole beside the shards"
    assert 0 < one.share < 1


def test_what_was_measured_stays_where_only_predictions_are_made_again(modules: dict[str, ModuleType]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    words, host = modules["scale_text"], at_one(modules["prices"])
    again = words.predicted_again(text, host)
    measured = text.partition(words.MEASURED)[2].partition(words.PREDICTED)[0]
    assert "| job | foreseen, CPU s | measured | off by |" in measured
    assert again.partition(words.MEASURED)[2].partition(words.PREDICTED)[0].strip() == measured.strip()
    with pytest.raises(ValueError, match="expected a document with the headings"):
        words.predicted_again("# Another", host)


def test_errors_are_shares_of_what_was_measured(modules: dict[str, ModuleType]) -> None:
    scale = modules["scale"]
    results = [
        {"title": "a job", "foreseen": [1.0], "measured": [2.0]},
        {"title": "two ranks", "foreseen": [3.0, 1.2], "measured": [3.0, 1.0]},
    ]
    assert scale.largest_error(results) == 0.5
    assert scale.comparison(results).splitlines()[2:] == [
        "| a job | 1.00 | 2.00 | -50% |",
        "| two ranks: rank 0 | 3.00 | 3.00 | +0% |",
        "| two ranks: rank 1 | 1.20 | 1.00 | +20% |",
    ]
