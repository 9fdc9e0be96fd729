"""The logit lens of all sampled rows walks up the layers in blocks: whatever a block is, the distances are the same."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align_audit import AuditConfig, audit
from align_audit.auditing.measurements import layer_spectra
from align_audit.auditing.measurements.lens_walk import LensWalk
from align_audit.measures.transport import fisher_rao_distance
from align_audit.models.replay import Replay
from align_audit.record.audit_record import AuditRecord
from tests.helpers.audits import QUICK_GENERATIONS
from tests.helpers.tiny import DEVICE, perturbed, random_pairs, tiny_model

pytestmark = pytest.mark.device

PAIRS = 6


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    reference = tiny_model("llama")
    return perturbed(reference), reference


def traced(policy: Any, reference: Any, **changes: Any) -> AuditRecord:
    off = {name: {"enabled": False} for name in ("patching", "low_rank", "localization")}
    return audit(
        policy,
        reference,
        random_pairs(PAIRS),
        AuditConfig.from_dict({**off, "generations": QUICK_GENERATIONS, **changes}),
    )


def plain_transport(model: Any) -> list[float]:
    """Mean Fisher–Rao distance between neighbouring layers over the distinct prediction positions, one sequence at a time."""
    steps: list[torch.Tensor] = []
    for pair in random_pairs(PAIRS).pairs:
        for side, (ids, start) in enumerate(
            ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start))
        ):
            kept: list[torch.Tensor] = []
            handles = [
                layer.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output[0]))
                for layer in model.model.layers
            ]
            with torch.no_grad():
                model(torch.tensor([ids], device=DEVICE), use_cache=False)
                for handle in handles:
                    handle.remove()
                # What both completions begin with is one row: its prefix is the same.
                read = [
                    at
                    for at in range(start - 1, len(ids) - 1)
                    if side == 0 or pair.chosen_ids[: at + 1] != ids[: at + 1]
                ]
                lens = [model.lm_head(model.model.norm(states[read])) for states in kept]
            steps.append(torch.stack([fisher_rao_distance(a, b) for a, b in itertools.pairwise(lens)], dim=1))
    return torch.cat(steps).mean(0).tolist()


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_transport_is_that_of_single_sequences(models: tuple[Any, Any], batch_tokens: int) -> None:
    record = traced(*models, batch_tokens=batch_tokens)
    for side, model in ((record.spinal.policy, models[0]), (record.spinal.reference, models[1])):
        assert side.transport == pytest.approx(plain_transport(model), rel=1e-5)


def test_a_block_that_does_not_fit_is_halved_until_it_does(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = traced(*models)
    refused: list[int] = []
    real = LensWalk._lens

    def refusing(self: LensWalk, replay: Replay, block: torch.Tensor, layer: int) -> torch.Tensor:
        if len(block) > 3:
            refused.append(len(block))
            raise MemoryError("no room for this block")
        return real(self, replay, block, layer)

    monkeypatch.setattr(LensWalk, "_lens", refusing)
    halved = traced(*models)
    assert len(refused) >= 2 and refused[0] > refused[1] > 3
    for one, other in ((halved.spinal.policy, whole.spinal.policy), (halved.spinal.reference, whole.spinal.reference)):
        assert one.transport == pytest.approx(other.transport, rel=1e-6)
        assert one.contraction == other.contraction
    assert halved.spinal.rows == whole.spinal.rows


@pytest.mark.parametrize("share_prompts", [True, False])
def test_gradients_take_each_prediction_entry_through_the_head_once(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, share_prompts: bool
) -> None:
    """One forward and one backward of norm and head, whichever way a pair is laid out; nothing else is differentiated there."""
    differentiated: list[int] = []
    real = Replay.head

    def counted(self: Replay, rows: torch.Tensor) -> torch.Tensor:
        if rows.requires_grad:
            differentiated.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(Replay, "head", counted)
    record = traced(*models, share_prompts=share_prompts)
    assert record.provenance.shared_prompts is share_prompts
    read = [
        len(pair.chosen_predictions) + len(pair.rejected_predictions) for pair in random_pairs(PAIRS).pairs
    ]  # all are control pairs
    assert sum(differentiated) == sum(read)


@pytest.mark.parametrize("words", ["CUDA out of memory.", "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"])
def test_a_spectrum_for_which_a_device_has_no_room_is_made_in_the_hosts_memory(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a library there says: what then fails in the host's memory is told as it is."""
    tried: list[str] = []

    def there(_: Any, pooled: torch.Tensor, *__: Any) -> str:
        tried.append(pooled.device.type)
        if pooled.device.type != "cpu":
            raise RuntimeError(words)
        return "fitted"

    monkeypatch.setattr(layer_spectra, "_fitted_there", there)
    freed: list[bool] = []
    session: Any = SimpleNamespace(free_memory=lambda: freed.append(True))
    for device, expected in (("meta", ["meta", "cpu"]), ("cpu", ["cpu"])):
        model: Any = SimpleNamespace(device=torch.device(device))
        tried.clear()
        assert layer_spectra.fitted(session, torch.ones(3, 2), model, (0.1, 0.9)) == "fitted"
        assert tried == expected
    assert freed == [True]
