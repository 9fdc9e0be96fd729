"""Rules of the trainer's log on runs in which nothing changes, however few pairs make a step: chance is no alert."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from align_audit.alerts.curves import TrainerLog
from align_audit.alerts.detectors import LOG_DETECTORS
from align_audit.alerts.history import View
from align_audit.config import AlertConfig
from align_audit.options.rules import BY_NAME
from align_audit.record.training_log import LogRow

LOOKS = (5, 10, 20, 40, 80, 160, 320, 400)
STEPS = 1600
RUNS = 40
CONFIG = AlertConfig()


def logs(
    seed: int,
    pairs: int,
    every: int,
    last: int = LOOKS[-1],
    margin: float = 0.0,
    fall: Callable[[int], float] = lambda step: 1.0,
) -> list[LogRow]:
    """A log without evaluations; answers differ in length as people's do, and each step has pairs of its own.

    Args:
        pairs: of a step.
        every: steps of a row, which is a mean over them.
        margin: mean reward margin; single ones lie 0.3 around it.
        fall: step → factor on the chosen log-probabilities.
    """
    generator, rows = np.random.default_rng(seed), []
    for step in range(every, last + 1, every):
        count = pairs * every
        lengths = generator.lognormal(4.0, 0.7, count)
        chosen, margins = (
            lengths * generator.normal(-2.2, 0.3, count) * fall(step),
            generator.normal(margin, 0.3, count),
        )
        by_token = {"entropy": (2.2, 0.4), "mean_token_accuracy": (0.5, 0.08)}
        values = {
            name: np.average(generator.normal(*usual, count), weights=lengths) for name, usual in by_token.items()
        }
        values |= {
            "loss": np.log1p(np.exp(-margins)).mean(), "grad_norm": generator.lognormal(1.0, 0.5),
            "logps/chosen": chosen.mean(), "rewards/margins": margins.mean(), "rewards/accuracies": (margins > 0).mean(),
        }  # fmt: skip
        rows.append(LogRow(step, {name: float(value) for name, value in values.items()}))
    return rows


@functools.cache
def unchanging(pairs: int, every: int) -> list[list[LogRow]]:
    """Runs in which nothing happens."""
    return [logs(seed, pairs, every) for seed in range(RUNS)]


def seen_at(rule: str, rows: list[LogRow]) -> Iterator[bool]:
    """At each look: does the rule see anything?"""
    for look in LOOKS:
        log = TrainerLog(rows).until(look)
        yield (
            bool(log.rows) and LOG_DETECTORS[rule](View(step=look, config=CONFIG, log=log, max_steps=STEPS)) is not None
        )


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("pairs", [1, 2, 8])
@pytest.mark.parametrize("rule", LOG_DETECTORS)
def test_chance_is_no_alert(rule: str, pairs: int, every: int) -> None:
    """Seen at as many looks in a row as the rule's patience asks for, it would open a warning."""
    opened, patience = 0, BY_NAME[rule].patience
    for rows in unchanging(pairs, every):
        seen = list(seen_at(rule, rows))
        opened += any(all(seen[start : start + patience]) for start in range(len(seen) - patience + 1))
    assert opened <= 1, f"{opened} of {RUNS} runs"


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("pairs", [1, 2, 8])
def test_what_does_fall_is_seen_through_the_noise(pairs: int, every: int) -> None:
    """By one of the three looks after it fell: with a pair a step a single one misses it a quarter of the time."""
    found = {"log_chosen_falling": 0, "log_accuracy": 0}
    for seed in range(RUNS):
        rows = logs(seed, pairs, every, margin=-0.3, fall=lambda step: 1.0 if step <= 100 else 4.0)
        for rule in found:
            found[rule] += any(list(seen_at(rule, rows))[LOOKS.index(160) :])
    assert min(found.values()) >= 0.9 * RUNS, found
