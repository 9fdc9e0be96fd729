"""A measurement is added in one file and one line: what it reads, walks, keeps and says is then part of every audit."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from align_audit import AuditConfig, AuditRecord
from align_audit.auditing import full
from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons, RecordedBatch
from align_audit.auditing.measurements.patching import constant
from align_audit.auditing.session.accumulators import PerPair, State
from align_audit.models.replay import Stream
from tests.helpers.audits import QUICK_GENERATIONS, audited
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


@dataclass
class HalfwayState(State):
    halfway: PerPair
    largest: PerPair


class Halfway(Measurement):
    """The reference's last stream moved half of the way to the policy's; and the largest entry of the difference."""

    name: ClassVar[str | None] = "halfway"
    state: HalfwayState

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        pairs = len(self.session.pairs)
        self.state = HalfwayState(PerPair(pairs), PerPair(pairs))

    def read(self, recorded: RecordedBatch) -> None:
        last = self.session.num_layers - 1
        moved = (recorded.policy.after(last) - recorded.reference.after(last)).abs().amax(-1)
        moved = moved.masked_fill(~recorded.batch.position_mask("all"), 0.0).amax(-1)
        largest = torch.zeros(recorded.batch.num_pairs, dtype=moved.dtype)
        largest.scatter_reduce_(0, recorded.batch.row_pair, moved, "amax")
        self.state.largest.put(recorded.batch, largest)

    def streams(self, recorded: RecordedBatch) -> Iterator[Stream]:
        last = self.session.num_layers - 1
        half = torch.lerp(recorded.reference.after(last), recorded.policy.after(last), 0.5)
        yield Stream("half", last, constant(half))

    def store(self, key: Hashable, recorded: RecordedBatch, effect: torch.Tensor) -> None:
        self.state.halfway.put(recorded.batch, effect)

    def part(self) -> tuple[Any, Reasons]:
        mean = self.estimates.mean(self.state.halfway.values)
        unknown = {"of_nothing": math.nan, "by_layer": [1.0, math.inf]}
        return {"effect": mean.mean, **unknown}, {"of_nothing": "there is nothing to take it of"}


def settings(**changes: Any) -> AuditConfig:
    return AuditConfig.from_dict(
        {
            "statistics": {"bootstrap_resamples": 100}, "spinal": {"enabled": False}, "low_rank": {"enabled": False},
            "localization": {"enabled": False}, "generations": QUICK_GENERATIONS, **changes,
        }
    )  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[AuditRecord, dict[str, np.ndarray], Any, Any]:
    reference = tiny_model("llama")
    policy = perturbed(reference)
    # In the same batches: others round otherwise on some processors.
    plain = audited(policy, reference, random_pairs(6), settings(batch_tokens=60))[0]
    monkeypatch.setattr(full, "MEASUREMENTS", [*full.MEASUREMENTS, Halfway])
    record, arrays = audited(policy, reference, random_pairs(6), settings(batch_tokens=60))
    assert record.margins == plain.margins, "the others are as they were"
    return record, arrays, policy, reference


def test_its_part_and_its_reasons_stand_in_the_record(measured: Any) -> None:
    record, arrays, *_ = measured
    assert record.extra["halfway"]["effect"] == pytest.approx(arrays["per_pair.halfway"].mean())
    assert record.extra["halfway"]["of_nothing"] is None
    assert record.extra["halfway"]["by_layer"] == [1.0, None]
    assert record.reasons["halfway.of_nothing"] == "there is nothing to take it of"
    assert AuditRecord.from_json(record.to_json()).extra == record.extra


def test_what_it_walks_is_a_run_of_the_model_itself(measured: Any) -> None:
    """Its stream through the reference's norm and head, computed plainly, one pair at a time."""
    _, arrays, policy, reference = measured
    for place, pair in enumerate(random_pairs(6).pairs):
        margins = []
        for share in (0.5, 0.0):
            logps = []
            for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
                tokens = torch.tensor([ids])
                tops: list[torch.Tensor] = []
                for model in (policy, reference):
                    handle = model.model.layers[-1].register_forward_hook(
                        lambda m, a, output, tops=tops: tops.append(output)
                    )
                    model(tokens)
                    handle.remove()
                with torch.no_grad():
                    logits = reference.lm_head(reference.model.norm(torch.lerp(tops[1], tops[0], share)))
                logp = logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[start - 1 :]
                logps.append(float(logp.sum()))
            margins.append(logps[0] - logps[1])
        assert arrays["per_pair.halfway"][place] == pytest.approx(margins[0] - margins[1], abs=1e-5)


def test_what_it_keeps_of_each_pair_does_not_depend_on_batches(measured: Any) -> None:
    _, arrays, policy, reference = measured
    assert np.isfinite(arrays["per_pair.largest"]).all() and (arrays["per_pair.largest"] > 0).all()
    _, whole = audited(policy, reference, random_pairs(6), settings(batch_tokens=10**4))
    np.testing.assert_allclose(whole["per_pair.largest"], arrays["per_pair.largest"], rtol=1e-6)
