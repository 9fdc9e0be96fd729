"""The audits of a stored run: its weights are opened one after the other, and audited as the callback would have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align_audit.auditing.audit import run_audit
from align_audit.auditing.previous import PreviousAudit
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from align_audit.models.reference import Reference
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditKind, AuditRecord, Occasion
from destabilization.kinds import Case
from destabilization.looks import audit_options, kept_steps, looks
from destabilization.models import MAX_LENGTH, load, texts
from destabilization.training import WEIGHTS, load_weights

KINDS: tuple[AuditKind, ...] = ("health", "full")
SOURCE = "the trainer's ref_model"


def audits_file(kind: AuditKind) -> str:
    """Where the records of one kind lie in the folder of a run."""
    return f"{kind}.jsonl"


def audit_run(case: Case, folder: Path, kind: AuditKind) -> None:
    """Audit what :func:`destabilization.training.train` left in ``folder``; all records are written at once, at the end."""
    steps = sorted(kept_steps(case)) if kind == "health" else looks(case).full
    lines = [record.model_dump_json() for record in _audits(case, folder, kind, steps)]
    (folder / audits_file(kind)).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _audits(case: Case, folder: Path, kind: AuditKind, steps: Sequence[int]) -> Iterator[AuditRecord]:
    kept: dict[str, dict[str, str]] = json.loads((folder / WEIGHTS).read_text(encoding="utf-8"))
    settings = case.settings
    policy, tokenizer = load(settings.model)
    model, _ = load(settings.model)
    config = AuditConfig.from_dict(audit_options(case, full=kind == "full"))
    probes = ProbeSet.from_dataset(
        texts(settings.model, case.seed, 1).probes, tokenizer, max_pairs=config.max_pairs, max_length=MAX_LENGTH
    )
    cache, previous, loaded = ReferenceCache(), PreviousAudit(), ""
    for step in steps:
        weights = kept[str(step)]
        load_weights(policy, folder, weights["policy"])
        if weights["reference"] != loaded:
            loaded = weights["reference"]
            load_weights(model, folder, loaded)
        request = AuditRequest(
            probes,
            config,
            step,
            kind=kind,
            at_start=step == 0,
            beta=settings.beta,
            last_sync_step=_last_sync(settings.sync_every, step),
            previous=previous,
        )
        with OpenModels(policy, Reference(SOURCE, model=model)) as models:
            result = run_audit(models, request, cache)
        previous = result.left
        yield result.record.model_copy(update={"occasion": Occasion(reason=_reason(step, kind, case.steps))})


def _reason(step: int, kind: AuditKind, steps: int) -> str:
    if step == 0:
        return "before training"
    if step == steps:
        return "the last step"
    return "a look" if kind == "health" else "asked for"


def _last_sync(every: int | None, step: int) -> int | None:
    """The step of the last synchronization that an audit after ``step`` sees."""
    if every is None or step < every:
        return None
    return step // every * every


def read_records(folder: Path, kind: AuditKind) -> list[dict[str, Any]]:
    """The stored records of one kind, as plain values; none where they were not made."""
    path = folder / audits_file(kind)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
