"""Runs on disk whose records say what the values of their pairs give, made in milliseconds with no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align_audit.measures.statistics import mean_interval, share_interval
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.record.log import RunLog
from tests.helpers.alert_cases import with_margins, with_part
from tests.helpers.make_record import make_record

PAIRS = 64
BETA = 0.1


def _estimate(values: np.ndarray, share: bool = False) -> Estimate:
    interval = share_interval(values) if share else mean_interval(values)
    return Estimate(mean=interval.mean, low=interval.low, high=interval.high)


def values_of_pairs(shift: float, kl: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays as an audit keeps them: a mean margin shift and a mean KL that differ from pair to pair."""
    rng = np.random.default_rng(seed)
    reference = -40.0 - 5.0 * rng.random(PAIRS)
    moved = shift * (0.5 + rng.random(PAIRS)) if shift else np.zeros(PAIRS)
    values = {
        "reference_chosen_logp": reference,
        "reference_rejected_logp": reference - 1.0,
        "chosen_logp": reference + 0.25 * moved,
        "rejected_logp": reference - 1.0 - 0.75 * moved,
        "chosen_tokens": np.full(PAIRS, 20.0),
        "kl": kl * (0.5 + rng.random(PAIRS)),
        "entropy": 1.5 + rng.random(PAIRS),
        "reference_entropy": 1.5 + rng.random(PAIRS),
        "token_accuracy": 0.6 + 0.3 * rng.random(PAIRS),
    }
    return {f"per_pair.{name}": array for name, array in values.items()}


def record_of(step: int, arrays: dict[str, np.ndarray], beta: float | None = BETA, **parts: Any) -> AuditRecord:
    """A record that says of these pairs what an audit would; where the policy was changed is made up."""
    pairs = {name.removeprefix("per_pair."): array for name, array in arrays.items()}
    shift = (pairs["chosen_logp"] - pairs["rejected_logp"]) - (
        pairs["reference_chosen_logp"] - pairs["reference_rejected_logp"]
    )
    change = pairs["chosen_logp"] - pairs["reference_chosen_logp"]
    record = with_margins(
        make_record(step, alerts=[], **parts),
        shift=_estimate(shift),
        accuracy=_estimate((shift > 0).astype(float), share=True),
        chosen_logp_change_per_token=_estimate(change / pairs["chosen_tokens"]),
        kl=_estimate(pairs["kl"]),
        entropy=_estimate(pairs["entropy"]),
        reference_entropy=_estimate(pairs["reference_entropy"]),
        token_accuracy=_estimate(pairs["token_accuracy"]),
    )
    created = f"2026-01-01T00:00:{step % 60:02}+00:00"
    return with_part(record, "provenance", beta=beta, pairs=PAIRS, groups=PAIRS, created=created)


def store(folder: Path, records: Sequence[AuditRecord], arrays: Sequence[dict[str, np.ndarray]] = ()) -> Path:
    """The log of a run with these records, and the arrays of each step."""
    log = RunLog(folder)
    for record in records:
        log.append(record)
    for record, values in zip(records, arrays, strict=False):
        log.save_arrays(record.step, "arrays", values)
    log.close()
    return folder


def store_path(
    folder: Path, margins: Sequence[float], kls: Sequence[float], every: int = 10, seed: int = 0, **parts: Any
) -> Path:
    """A run that was audited at 0, ``every``, …: reward margins, and KL in nats per token, at those steps."""
    arrays = [
        values_of_pairs(margin / BETA, kl, seed + place)
        for place, (margin, kl) in enumerate(zip(margins, kls, strict=True))
    ]
    records = [record_of(every * place, values, **parts) for place, values in enumerate(arrays)]
    return store(folder, records, arrays)
