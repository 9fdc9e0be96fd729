"""align_audit itself, through its audit, with only the sweep switched on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from engine.contenders.common import Pair, Result

ONLY_THE_SWEEP: dict[str, Any] = {
    "patching": {"reverse": False, "noise_draws": 0, "transplants": False, "embedding": False},
    "low_rank": {"enabled": False},
    "spinal": {"enabled": False, "gradient_concentration": False},
    "localization": {"enabled": False},
    "statistics": {"bootstrap_resamples": 100},
}


class AlignAudit:
    """``audit`` with the per-pair numbers that a record only has the means of."""

    def __init__(self, policy: Any, reference: Any) -> None:
        self.policy, self.reference = policy, reference
        self.num_layers: int = reference.config.num_hidden_layers

    def layer_sweep(self, pairs: Sequence[Pair]) -> Result:
        """Effects without column 0, the patch below layer 0, which the other contenders do not compute."""
        record, arrays = self._audit(pairs, ONLY_THE_SWEEP)
        return _result(record, arrays, arrays["per_pair.effect"][:, 1:])

    def rank_sweep(self, pairs: Sequence[Pair], bases: Tensor, ranks: Sequence[int], halves: np.ndarray) -> Result:
        """``bases`` and ``halves`` are not used: the audit fits its own, which is part of its time."""
        low_rank = {"layers": "all", "bases": ["shift"], "ranks": list(ranks), "random_draws": 0}
        record, arrays = self._audit(pairs, {**ONLY_THE_SWEEP, "low_rank": low_rank})
        effects = np.stack([arrays[f"per_pair.low_rank.shift.{layer}"] for layer in range(self.num_layers)], axis=1)
        return _result(record, arrays, effects)

    def full_audit(self, pairs: Sequence[Pair]) -> Result:
        """Everything, at default settings."""
        record, arrays = self._audit(pairs, {})
        return _result(record, arrays, arrays["per_pair.effect"][:, 1:])

    def _audit(self, pairs: Sequence[Pair], options: dict[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
        from align_audit.auditing.once import audit_once
        from align_audit.models.reference import resolve_reference

        reference = resolve_reference(self.policy, self.reference)
        result = audit_once(self.policy, reference, probe_set(pairs), settings(options))
        return result.record, result.arrays


def probe_set(pairs: Sequence[Pair]) -> Any:
    """The pairs as align_audit takes them."""
    from align_audit import ProbeSet

    rows = [
        {"prompt_ids": list(pair.prompt), "chosen_ids": list(pair.chosen), "rejected_ids": list(pair.rejected)}
        for pair in pairs
    ]
    probes = ProbeSet.from_dataset(rows, None, max_pairs=len(rows), max_length=None)
    if len(probes) != len(pairs):
        raise ValueError(f"align_audit took {len(probes)} of {len(pairs)} pairs: {probes.summary()}")
    return probes


def settings(options: dict[str, Any]) -> Any:
    """The configuration; where this version has no switch for the transplants it runs with them. No job continues texts."""
    from align_audit import AuditConfig
    from align_audit.config import PatchingConfig

    options = {name: dict(part) for name, part in options.items()}
    if "transplants" not in PatchingConfig.model_fields:
        options.get("patching", {}).pop("transplants", None)
    if "generations" in AuditConfig.model_fields:
        options.setdefault("generations", {"enabled": False})
    return AuditConfig.from_dict(options)


def _result(record: Any, arrays: dict[str, np.ndarray], effects: np.ndarray) -> Result:
    names = ("per_pair.reference_chosen_logp", "per_pair.reference_rejected_logp")
    logps = np.stack([arrays[name] for name in names], axis=1)
    return Result(effects, logps, {"forward_equivalents": record.cost.forward_equivalents})
