"""Is a saved checkpoint what its run's own log says of it? Reference, policy and pairs, compared with what was recorded.

A checkpoint's files say where it came from. A base that was replaced or moved, a folder that a later run wrote over, pairs of
another file: all of them give numbers that look like the run's and are not. The log beside the checkpoint holds the hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from align_audit.errors import ReferenceUnavailableError, plain
from align_audit.models.reference import Reference
from align_audit.models.weights.guises import policy_is, reference_is
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditRecord, Verdict
from align_audit.record.recorded import RecordedAudit, RecordedRun, runs_beside, step_saved

_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True)
class Check:
    """What one comparison came to, and why."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Origin:
    """What the log beside a checkpoint says of what is audited.

    Attributes:
        probes: by the name of the set.
    """

    reference: Check
    policy: Check
    probes: Mapping[str | None, Check] = field(default_factory=dict)

    def differences(self) -> list[str]:
        """What is not as the run recorded it, a sentence each."""
        checks = [self.reference, self.policy, *self.probes.values()]
        return [check.reason for check in checks if check.verdict == "failed"]

    def noted(self, record: AuditRecord) -> AuditRecord:
        """The record with what was compared: under ``extra["origin"]``, and of the reference in ``reference_check``."""
        checks = {
            "reference": self.reference,
            "policy": self.policy,
            "probes": self.probes[record.provenance.probe_name],
        }
        said: dict[str, Any] = {
            name: {"verdict": check.verdict, "reason": check.reason} for name, check in checks.items()
        }
        reference = record.reference_check
        decided = self.reference.verdict == "failed" or (
            self.reference.verdict == "passed" and reference.verdict == "not_run"
        )
        if decided:
            reference = reference.model_copy(
                update={"verdict": self.reference.verdict, "reason": self.reference.reason}
            )
        return record.model_copy(update={"reference_check": reference, "extra": {**record.extra, "origin": said}})


def check_origin(
    folder: Path,
    step: int | None,
    policy: nn.Module,
    reference: Reference,
    hashes: tuple[str, str],
    probe_sets: Mapping[Any, ProbeSet],
    *,
    named: bool,
    tell: Callable[[str], None],
) -> Origin | None:
    """Compare what is about to be audited with the log beside the checkpoint; None where there is no log.

    Args:
        folder: of the checkpoint.
        step: of the audit, where the checkpoint's files do not say when it was saved; None: not known either.
        hashes: of the weights of policy and reference.
        named: the user named the reference, and did not leave it to the checkpoint's files.
        tell: is given a line for each thing that is not as recorded.

    Raises:
        ReferenceUnavailableError: the checkpoint's files lead to another reference than the run's.
    """
    runs = runs_beside(folder)
    if not runs:
        return None
    saved = step_saved(folder)
    step = step if saved is None else saved
    trained = _Trained(folder, step, runs, policy, reference, hashes)
    checked = trained.check_reference()
    if checked.verdict == "failed" and not named:
        raise ReferenceUnavailableError(
            f"{checked.reason}. The base that the checkpoint names was probably replaced or moved, or was quantized in "
            "training, as it is not here: put it back, or name a reference (--reference; in Python `reference`) to audit "
            "against that one all the same"
        )
    origin = Origin(checked, trained.check_policy(), trained.check_probes(probe_sets))
    for words in origin.differences():
        tell(words)
    return origin


class _Trained:
    """A checkpoint beside the logs of the runs that may have saved it."""

    def __init__(
        self,
        folder: Path,
        step: int | None,
        runs: list[RecordedRun],
        policy: nn.Module,
        reference: Reference,
        hashes: tuple[str, str],
    ) -> None:
        self._folder, self._step, self._runs = folder, step, runs
        self._policy, self._reference, self._hashes = policy, reference, hashes
        self._name = plain(folder.name)
        self._log = plain(runs[0].path)
        # The one whose policy this is; else the present one, where it audited this step.
        self._owner = next((run for run in runs if self._is_policy_of(run)), None)

    def _of_step(self, run: RecordedRun) -> Iterable[RecordedAudit]:
        return run.audits if self._step is None else run.at(self._step)

    def _is_policy_of(self, run: RecordedRun) -> bool:
        recorded = {audit.policy_hash for audit in self._of_step(run)}
        return self._hashes[0] in recorded or (bool(recorded) and policy_is(recorded, self._policy))

    def check_policy(self) -> Check:
        """Is it what the run had at that step?"""
        if self._owner is not None:
            return Check("passed", f"its weights are those that {plain(self._owner.path)} names")
        recorded = [] if self._step is None else self._runs[0].at(self._step)
        if not recorded:
            return Check("not_run", f"{self._log} holds no audit of the step that {self._name} was saved at")
        if self._narrower(recorded):
            return Check("not_run", self._cannot_tell("the policy", recorded))
        return Check(
            "failed",
            f"{self._name} does not hold the policy that its run had at step {self._step}: {self._log} names the weights "
            f"{recorded[-1].policy_hash}, found {self._hashes[0]}; it was written over by another run, changed, or its "
            "base was",
        )

    def check_reference(self) -> Check:
        """Is it the one that the run was audited against?"""
        if self._owner is not None:
            runs = [self._owner]
        else:
            runs = self._runs[:1] if self._step is not None and self._runs[0].at(self._step) else self._runs
        recorded = {hashed for run in runs for hashed in run.references(self._step)}
        if not recorded:
            return Check("not_run", f"{self._log} does not say which reference there was at step {self._step}")
        log = plain(runs[0].path)
        if self._hashes[1] in recorded or reference_is(
            recorded, self._reference.model(), self._policy, shares_weights=self._reference.shares_weights
        ):
            return Check("passed", f"its weights are those that {log} names")
        audits = [audit for run in runs for audit in run.audits]
        if self._narrower(audits):
            return Check("not_run", self._cannot_tell("the reference", audits))
        return Check(
            "failed",
            f"{self._name}: this reference ({self._reference.source}) is not the one that its run was audited against: "
            f"{log} names the weights {', '.join(sorted(recorded))}, found {self._hashes[1]}",
        )

    def check_probes(self, sets: Mapping[Any, ProbeSet]) -> dict[str | None, Check]:
        """Are these pairs that the run was audited on? By name of the set."""
        runs = self._runs if self._owner is None else [self._owner]
        recorded = {audit.probe_hash: audit.probe_source for run in runs for audit in run.audits}
        checks: dict[str | None, Check] = {}
        for name, probes in sets.items():
            if probes.content_hash in recorded:
                checks[name] = Check("passed", f"the run was audited on these pairs too ({self._log})")
                continue
            sources = plain(", ".join(sorted(set(recorded.values()))), 200)
            on = "the probes" if name is None else f"the probes {name!r}"
            checks[name] = Check(
                "failed",
                f"{self._name}: {on} (from {probes.source}) are other pairs than its run was audited on (from {sources}; "
                f"{self._log}), so its numbers do not continue the run's; the same file, seed, max_pairs and max_length give "
                "the same pairs",
            )
        return checks

    def _dtype(self) -> str:
        weight = next(parameter for parameter in self._policy.parameters() if parameter.is_floating_point())
        return str(weight.dtype).removeprefix("torch.")

    def _narrower(self, audits: Iterable[RecordedAudit]) -> bool:
        """Whether what was recorded can have had bits that this dtype has not."""
        now = self._dtype()
        return any(
            audit.parameter_dtype != now and _BITS.get(audit.parameter_dtype, 0) >= _BITS.get(now, 64)
            for audit in audits
        )

    def _cannot_tell(self, what: str, audits: Iterable[RecordedAudit]) -> str:
        kinds = ", ".join(sorted({audit.parameter_dtype for audit in audits}))
        return f"{what} is read in {self._dtype()} and was recorded in {kinds}, so that its hash does not tell ({self._log})"
