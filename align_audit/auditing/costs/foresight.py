"""What the counts say of an audit before there was one, of the models and probe sets of a run."""

from __future__ import annotations

from collections.abc import Iterable

from align_audit.auditing.costs.counting import count
from align_audit.auditing.costs.job import Job
from align_audit.auditing.costs.memory import foresee_memory
from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.costs.work import total
from align_audit.auditing.session.memory import usual_working_bytes
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.room import Room
from align_audit.config import AuditConfig
from align_audit.errors import AnatomyError, ConfigurationError
from align_audit.probes.pairs import ProbeSet


def job_on(models: OpenModels, probes: ProbeSet, config: AuditConfig) -> Job:
    """An audit of these models on a probe set, as this process and those that it shares the work with would make it.

    Raises:
        AnatomyError: what a model of its kind costs is not counted.
        ConfigurationError: nor what these options ask for.
    """
    device, asked = next(models.policy_model.parameters()).device, config.working_memory_mb
    room = Room(device.type, usual_working_bytes(device) if asked is None else asked * 2**20)
    shared = config.share_prompts and probes.truncation_mode != "keep_end"
    ranks, spread = models.ranks.size, models.spread
    return Job.on(
        ModelShape.of(models.policy_model), probes.pairs, config, room, shared=shared, ranks=ranks, spread=spread
    )


def full_per_look(models: OpenModels, sets: Iterable[ProbeSet], config: AuditConfig, *, first: bool) -> float | None:
    """How many times the matrix products of a look are those of a full audit, on all sets; None: they are not counted here.

    A look's seconds, times this, are rather too many for a full audit than too few: more of a look is none of these products.

    Args:
        first: the look was the first of a run, which computes the reference's side too.
    """
    full = looks = 0
    try:
        for probes in sets:
            job = job_on(models, probes, config)
            full += total(count(job, "full", first=False).values()).flops(job.shape)
            looks += total(count(job, "health", first=first).values()).flops(job.shape)
    except (AnatomyError, ConfigurationError):
        return None
    return full / looks


def more_memory(models: OpenModels, timed: ProbeSet, probes: ProbeSet, config: AuditConfig) -> int | None:
    """Bytes by which a full audit of all pairs takes more than one of some of them, which was measured; None: not counted.

    Streams are the same for any number of pairs; token rows of all layers are more.
    """
    try:
        few, all_pairs = (foresee_memory(job_on(models, each, config), "full") for each in (timed, probes))
    except (AnatomyError, ConfigurationError):
        return None
    grown = all_pairs.host - few.host
    if next(models.policy_model.parameters()).device.type == "cpu":  # what is made where the models are is made here
        grown += all_pairs.spectrum - few.spectrum
    return max(0, grown)
