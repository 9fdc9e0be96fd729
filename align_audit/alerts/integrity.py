"""Is what is measured a measurement? Numbers that overflow, and a reference that is not what it should be."""

from __future__ import annotations

import math
from collections import deque
from itertools import takewhile

from align_audit.alerts.history import History, Sign
from align_audit.options.rules import BY_NAME
from align_audit.record.stored_records import heads_of

_SHARED = (
    "Check for parameters that policy and reference share and that train: biases of a LoRA configuration, "
    "modules_to_save, or one model object passed as both"
)
_RESUMED = (
    "A run that was resumed begins with its first reference again: TRL saves none that was synchronized. In any other: "
)


def non_finite(history: History) -> Sign | None:
    """A model's margins on the probes are NaN or infinite."""
    margins = history.record.margins
    broken = [
        (name, value)
        for name, value in (("policy", margins.policy), ("reference", margins.reference))
        if not math.isfinite(value.mean)
    ]
    if not broken:
        return None
    what = " ".join(
        f"The {name}'s preference margin is {value.mean}: {value.reason or 'not a finite number'}."
        for name, value in broken
    )
    return Sign(
        BY_NAME["non_finite"],
        "error",
        broken[0][1].mean,
        f"{what} Weights or activations have overflowed; nothing measured on them means anything.",
        "Stop and restart from the last checkpoint with finite weights, with a lower learning rate, gradient clipping "
        "(max_grad_norm), or bf16 instead of fp16",
    )


_IN_TRAINING = (
    "Pass the model that training starts from as ref_model (or as reference=), or initialize the adapter with "
    "init_lora_weights=True and bias='none'"
)
_OF_SAVED = "Name the model that training started from as the reference: --reference, or reference= in Python"


def reference_mismatch(history: History) -> Sign | None:
    """The reference is not the policy's starting point, or not the one the trainer uses.

    That is compared before the first step: what failed there holds for as long as the reference is the same.
    """
    check = history.record.reference_check
    if check.verdict == "not_run" and history.preceding:
        first, reference = history.preceding[0], history.record.provenance.reference_hash
        check = first.reference_check if first.provenance.reference_hash == reference else check
    if check.verdict != "failed":
        return None
    value = check.precomputed_margin_difference
    return Sign(
        BY_NAME["reference_mismatch"],
        "error",
        math.nan if value is None else value,
        f"Wrong reference ({check.source}): {check.reason}.",
        _IN_TRAINING if history.record.occasion is not None else _OF_SAVED,
    )


def reference_changed(history: History) -> Sign | None:
    """The reference's weights are not those they were, and no synchronization explains it.

    It is compared with the first audit since the last synchronization: a reference that moved once stays another one.
    """
    record, audits = history.record, history.preceding
    head = next(iter(heads_of(audits)), None)
    if head is None:
        return None
    reference, synchronized = record.provenance.reference_hash, record.reference_check.last_sync_step
    if synchronized is not None:
        # Audits before it are of another reference by right.
        since = takewhile(lambda audit: audit.reference_check.last_sync_step == synchronized, reversed(audits))
        first_since = deque(since, maxlen=1)
        if not first_since:
            return None
        head = heads_of(list(first_since))[0]
    if head.reference_hash == reference:
        return None
    return Sign(
        BY_NAME["reference_changed"],
        "error",
        math.nan,
        f"The reference ({record.reference_check.source}) is not the one of step {head.step}: its weights changed from "
        f"{head.reference_hash} to {reference}, and no synchronization did it. Margins of the two steps have different zero "
        "points, in the training log too.",
        _RESUMED + _SHARED if synchronized is not None else _SHARED,
    )
