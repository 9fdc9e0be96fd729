"""What a run keeps of its reference: bounded, of the batches of the last look, and of models that are built as they were."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from align_audit.auditing.audit import run_audit
from align_audit.auditing.provenance import kept_under
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session import kept as module
from align_audit.auditing.session.kept import KeptReference, rows_key
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from align_audit.measures import margin
from align_audit.measures.margin import token_readout
from align_audit.models.reference import resolve_reference
from align_audit.probes.batches import PairBatch, make_batch
from align_audit.record.audit_record import AuditRecord
from tests.helpers.audits import QUICK
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

PAIRS = random_pairs(6).pairs
BATCHES = [make_batch(PAIRS[first : first + 2], [first, first + 1], 0) for first in (0, 2, 4)]


def rows_of(batch: PairBatch) -> torch.Tensor:
    return torch.full((len(batch.row), 8), float(batch.pair_index[0]))


def test_rows_beyond_the_bound_are_made_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", sum(rows_of(batch).nbytes for batch in BATCHES[:2]))
    kept, made = KeptReference(()), []
    for _ in range(2):
        for batch in BATCHES:
            rows = kept.rows(batch, lambda batch=batch: made.append(rows_key(batch)) or rows_of(batch))
            assert torch.equal(rows, rows_of(batch))
        assert kept.kept_bytes <= module.KEPT_BYTES
    assert made == [*map(rows_key, BATCHES), rows_key(BATCHES[2])]
    for batch in BATCHES:
        kept.keep_readout(
            batch, token_readout(torch.zeros(len(batch.row), 4), torch.zeros(len(batch.row), dtype=torch.long))
        )
    assert [kept.readout(batch) is None for batch in BATCHES] == [False, False, True], "as long as its rows"
    kept.forget_rows_but({rows_key(BATCHES[1])})
    assert [kept.has_rows(batch) for batch in BATCHES] == [False, True, False]
    assert [kept.readout(batch) is None for batch in BATCHES] == [True, False, True]
    kept.forget_rows(BATCHES[1])
    assert kept.readout(BATCHES[1]) is None


def look(policy: torch.nn.Module, reference: torch.nn.Module, cache: ReferenceCache, tokens: int) -> AuditRecord:
    config = AuditConfig.from_dict({**QUICK, "batch_tokens": tokens})
    with OpenModels(policy, resolve_reference(policy, reference)) as models:
        return run_audit(models, AuditRequest(random_pairs(6), config, kind="health"), cache).record


def test_logits_are_kept_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, of batches whose rows are kept, and never more than the bound; none of an accelerator."""
    kept, made = KeptReference(()), []

    def logits(batch: PairBatch, block: slice, device: str = "cpu") -> torch.Tensor:
        def make() -> torch.Tensor:
            made.append((rows_key(batch), block.start))
            return torch.full((2, 4), float(block.start), device=device)

        return kept.logits(batch, block, make)

    monkeypatch.setattr(module, "KEPT_LOGIT_BYTES", 3 * 2 * 4 * 4)
    first, second, third = BATCHES
    for batch in (first, second):
        kept.rows(batch, lambda batch=batch: rows_of(batch))
    asked = [(batch, slice(start, start + 2)) for batch in (first, second) for start in (0, 2)]
    for _ in range(2):
        for batch, block in asked:
            assert torch.equal(logits(batch, block), torch.full((2, 4), float(block.start)))
    last = (rows_key(second), 2)
    assert made == [(rows_key(batch), block.start) for batch, block in asked] + [last], "three fit"
    assert kept.kept_logit_bytes == module.KEPT_LOGIT_BYTES
    kept.forget_rows_but({rows_key(second)})
    made.clear()
    for _ in range(2):
        logits(third, slice(0, 2))  # whose rows are not kept
        logits(second, slice(4, 6), "meta")
    assert len(made) == 4
    logits(second, slice(0, 2))
    assert len(made) == 4
    kept.forget_rows(second)
    assert kept.kept_logit_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_reference_says_is_read_once_and_is_the_same_to_the_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tiny_model("llama", dtype=dtype)
    policy, cache, read = perturbed(reference), ReferenceCache(), []
    heads: list[int] = []
    reference.lm_head.register_forward_hook(lambda *_: heads.append(1))
    real = margin._read
    monkeypatch.setattr(margin, "_read", lambda *asked: read.append(1) or real(*asked))
    first = look(policy, reference, cache, 400)
    both = len(read)
    heads.clear()
    again = look(policy, reference, cache, 400)
    known = len(heads)
    assert 0 < 2 * (len(read) - both) == both
    assert again.margins == first.margins
    monkeypatch.setattr(module, "KEPT_LOGIT_BYTES", 0)
    bare = ReferenceCache()
    look(policy, reference, bare, 400)
    heads.clear()
    assert look(policy, reference, bare, 400).margins == first.margins
    assert known < len(heads), "its logits are kept too"
    monkeypatch.undo()
    other = perturbed(reference, 0.3)
    assert look(other, reference, cache, 400).margins == look(other, reference, ReferenceCache(), 400).margins


def test_a_look_lets_go_of_batches_that_are_none_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after running out of memory, from where on batches are smaller."""
    reference = tiny_model("llama", dtype=torch.float32)
    policy, cache = perturbed(reference), ReferenceCache()
    kept: list[KeptReference] = []
    real = ReferenceCache.kept
    monkeypatch.setattr(ReferenceCache, "kept", lambda *asked: kept.append(real(*asked)) or kept[-1])
    look(policy, reference, cache, 400)
    size, layouts = kept[-1].kept_bytes, set(kept[-1]._rows)
    look(policy, reference, cache, 60)
    assert kept[0] is kept[1]
    assert not layouts >= set(kept[-1]._rows), "in smaller batches"
    assert kept[-1].kept_bytes == size > 0, "each pair once"


def test_what_is_kept_is_found_again_after_the_policy_was_saved(tmp_path: Path) -> None:
    """Saving writes the class of a model that was made from a configuration into it: that is no other way of building it."""
    reference = tiny_model("llama", dtype=torch.float32)
    policy, cache = perturbed(reference), ReferenceCache()
    policy.config.architectures = None
    first, second = (look(policy, reference, cache, 400).cost.forward_equivalents for _ in range(2))
    policy.save_pretrained(tmp_path)
    assert policy.config.architectures, "or this shows nothing"
    assert look(policy, reference, cache, 400).cost.forward_equivalents == second < first


def test_what_is_kept_depends_on_how_the_policy_is_built() -> None:
    """Whether a prompt may be computed once is tried on it too; what its weights are is no matter."""
    reference = tiny_model("llama", dtype=torch.float32)
    request = AuditRequest(random_pairs(2), AuditConfig())

    def key(policy: torch.nn.Module) -> tuple[str, ...]:
        with OpenModels(policy, resolve_reference(policy, reference)) as models:
            return kept_under(models.open(), request)

    first = key(perturbed(reference, 0.1))
    assert key(perturbed(reference, 0.2)) == first
    scaled = copy.deepcopy(reference)
    scaled.config.rms_norm_eps *= 2
    scaled.set_attn_implementation("eager")
    assert key(scaled) != first
