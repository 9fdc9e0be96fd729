"""The two ways the demo trains its model: one that works, and one whose training log hides that it does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoRun:
    """What differs between the runs; the rest of their ``DPOConfig`` is the same."""

    name: str
    title: str
    learning_rate: float
    beta: float
    steps: int
    audit_every: int


HEALTHY = DemoRun("healthy", "a run that works", learning_rate=1e-4, beta=0.1, steps=60, audit_every=20)
RUINED = DemoRun("ruined", "a run that ruins its model", learning_rate=3e-3, beta=0.02, steps=40, audit_every=20)

TRAINING_PAIRS = 480
HELD_OUT_PAIRS = 64
AUDITED_PAIRS = 24
BATCH_SIZE = 8
SEED = 0
