"""What cannot be known is NaN with a reason: no NaN in any record goes unexplained, and storing loses none of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from align_audit import AuditConfig, AuditRecord, audit
from align_audit.record.estimate import Estimate
from tests.helpers.audits import QUICK_GENERATIONS
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


def unexplained(record: AuditRecord) -> list[str]:
    """Dotted paths of NaNs that neither an estimate's own reason nor ``record.reasons`` explains."""

    def walk(value: Any, path: str) -> Iterator[str]:
        if isinstance(value, Estimate):
            if any(math.isnan(number) for number in (value.mean, value.low, value.high)) and not value.reason:
                yield path
        elif isinstance(value, BaseModel):
            for name in type(value).model_fields:
                yield from walk(getattr(value, name), f"{path}.{name}" if path else name)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}")
        elif isinstance(value, list):
            for place, item in enumerate(value):
                yield from walk(item, f"{path}.{place}")
        elif isinstance(value, float) and math.isnan(value):
            parts = path.split(".")
            if not any(".".join(parts[:length]) in record.reasons for length in range(1, len(parts) + 1)):
                yield path

    return list(walk(record, ""))


def records() -> Iterator[tuple[str, AuditRecord]]:
    reference = tiny_model("llama", dtype=torch.float32)
    policy = perturbed(reference, 0.05)
    everything = AuditConfig.from_dict(
        {
            "statistics": {"bootstrap_resamples": 100}, "low_rank": {"ranks": [1, 2]}, "generations": QUICK_GENERATIONS,
        }
    )  # fmt: skip
    yield "usual", audit(policy, reference, random_pairs(12), everything)
    yield "one pair", audit(policy, reference, random_pairs(1), everything)
    yield "two pairs", audit(policy, reference, random_pairs(2), everything)
    yield "equal weights", audit(perturbed(reference, 0.0), reference, random_pairs(4), everything)
    broken = perturbed(reference, 0.05)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    yield "NaN weights", audit(broken, reference, random_pairs(12), everything)
    off = {"patching": {"enabled": False}, "localization": {"enabled": False}, "spinal": {"enabled": False}}
    yield "all off", audit(policy, reference, random_pairs(4), AuditConfig.from_dict(off))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_nan_is_explained_and_survives_storing(tmp_path: Path) -> None:
    seen = 0
    for name, record in records():
        assert unexplained(record) == [], name
        path = tmp_path / f"{name}.json"
        record.save(path)
        loaded = AuditRecord.load(path)
        assert loaded.to_json() == record.to_json(), name
        seen += record.to_json().count('"NaN"')
        for part in ("patching", "localization", "spinal"):
            assert getattr(record, part) is not None or part in record.reasons, (name, part)
    assert seen > 50


def test_the_check_itself_finds_an_unexplained_nan() -> None:
    _, record = next(records())
    assert record.spinal is not None
    bare = record.model_copy(update={"spinal": record.spinal.model_copy(update={"score": math.nan}), "reasons": {}})
    assert "spinal.score" in unexplained(bare)
