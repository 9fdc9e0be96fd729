"""Sparse localization: which layers' distances predict the pairs' shifts, and how concentrated the effect is (METHODS §3)."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons, RecordedBatch
from align_audit.auditing.measurements.patching import Patching
from align_audit.auditing.session.accumulators import PerPair, State
from align_audit.auditing.session.estimates import floats
from align_audit.measures.localization import center_of_mass, lasso_localization, normalized_entropy
from align_audit.measures.margin import sum_by_pair
from align_audit.measures.patching import PatchSummary
from align_audit.record import audit_record


@dataclass
class LocalizationState(State):
    """``features``: [N, L] RMS over a pair's prediction positions of ‖h_l(π) − h_l(ρ)‖₂."""

    features: PerPair


class Localization(Measurement):
    """LASSO over layers, and the concentration of the block transplants."""

    name: ClassVar[str | None] = "localization"
    state: LocalizationState

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        self.state = LocalizationState(PerPair(len(self.session.pairs), self.session.num_layers))
        self._part: tuple[audit_record.Localization | None, Reasons] | None = None
        if self.config.localization.enabled:
            # Before anything is measured: where memory runs short during an audit, a library can no longer be loaded.
            importlib.import_module("sklearn.linear_model")

    def read(self, recorded: RecordedBatch) -> None:
        """RMS over a pair's prediction positions of ‖h_l(π) − h_l(ρ)‖₂."""
        if not self.config.localization.enabled:
            return
        batch = recorded.batch
        tokens = torch.bincount(batch.pair, minlength=batch.num_pairs).double()
        for layer in range(self.session.num_layers):
            policy = recorded.policy.after(layer)[batch.row, batch.position]
            reference = recorded.reference.after(layer)[batch.row, batch.position]
            squares = (policy.double() - reference.double()).square().sum(-1)
            pooled = sum_by_pair(squares, batch.pair, batch.side, batch.num_pairs).sum(0)
            self.state.features.put(batch, (pooled / tokens).sqrt(), layer)

    def part(self) -> tuple[audit_record.Localization | None, Reasons]:
        """METHODS §3; None, with a reason, where it is off or has no target. Fitted once."""
        if self._part is None:
            self._part = self._fitted()
        return self._part

    def _fitted(self) -> tuple[audit_record.Localization | None, Reasons]:
        config, patching = self.config.localization, self.task[Patching]
        if not config.enabled:
            return None, {"": "switched off (localization.enabled)"}
        summary, reasons = patching.summary, {}
        target, pairs = self.task[Behaviour].shift, np.arange(len(self.session.pairs))
        if config.target == "effect":
            if summary is None or summary.peak_layer is None:
                return None, {"": "target 'effect' needs a peak layer, and there is none"}
            target, pairs = patching.effect(summary.peak_layer), self.session.exact_pairs
        fit = lasso_localization(
            self.state.features.values[pairs],
            target[pairs],
            folds=config.folds,
            resamples=config.selection_resamples,
            permutations=config.permutations,
            seed=self.estimates.seed,
            groups=self.session.groups[pairs],
        )
        if fit.reason is not None:
            for name in (
                "lasso_coefficients", "lasso_lambda", "cv_r2", "selection_frequency", "null_selection_frequency",
                "null_cv_r2",
            ):  # fmt: skip
                reasons[name] = fit.reason
        center, spread, why = self._concentration(summary)
        return audit_record.Localization(
            target=config.target,
            lasso_coefficients=floats(fit.coefficients),
            lasso_lambda=fit.alpha,
            cv_r2=fit.cv_r2,
            selected_layers=[int(layer) for layer in fit.selected],
            selection_frequency=floats(fit.selection_frequency),
            null_selection_frequency=floats(fit.null_selection_frequency),
            null_cv_r2=floats(fit.null_cv_r2),
            center_of_mass=center,
            entropy=spread,
        ), reasons | why

    def _concentration(self, summary: PatchSummary | None) -> tuple[float, float, Reasons]:
        """Centre of mass and normalized entropy of the block transplants, each in [0, 1], and why one is NaN."""
        if summary is None:
            reason: str | None = "patching is switched off, so there are no block transplants"
        elif not self.config.patching.transplants:
            reason = "block transplants are switched off (patching.transplants)"
        else:
            # In the direction of the shift: of a policy that moved towards rejected, what moved it there.
            blocks = self.task[Patching].direction * np.array([interval.mean for interval in summary.block_transplant])
            reason = None if np.isfinite(blocks).all() else "a block transplant is not finite"
        if reason is not None:
            return math.nan, math.nan, {"center_of_mass": reason, "entropy": reason}
        weights = np.maximum(blocks, 0.0)
        center, no_center = center_of_mass(weights)
        spread, no_spread = normalized_entropy(weights)
        reasons = {
            name: why for name, why in (("entropy", no_spread), ("center_of_mass", no_center)) if why is not None
        }
        if no_center is not None:
            reasons.setdefault("entropy", no_center)
        return center, spread, reasons
