"""What audits would cost in a run: some are timed, and the schedule is played through with their times."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from align_audit.auditing.audit import run_audit
from align_audit.auditing.costs.foresight import full_per_look, more_memory
from align_audit.auditing.measurements.lens_walk import PORTION, SHARE
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.memory import MemoryMeter
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from align_audit.errors import counted
from align_audit.measures.row_sample import rows_that_give
from align_audit.models.reference import Reference
from align_audit.monitoring.doctor_plan import Check, Plan
from align_audit.monitoring.forecast import Costs, Forecast, PlannedSteps, forecast
from align_audit.monitoring.plain_step import StepOptions, seconds_per_pair
from align_audit.options.schedule import ScheduleConfig
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditKind
from align_audit.writers.words import duration

TIMED_PAIRS = 8
"""Pairs that audits are timed on; what more of them take follows from their tokens (see :func:`in_proportion`)."""
_MOST_STEPS = 200_000
"""Steps that are played through; longer runs are judged by so many."""

Autocast = Callable[[], AbstractContextManager[Any]]


def numerics(plan: Plan, policy: nn.Module) -> Autocast:
    """Makes the context that the planned trainer computes in."""
    if plan.mixed_precision is None:
        return contextlib.nullcontext
    device, dtype = next(policy.parameters()).device.type, getattr(torch, plan.mixed_precision)
    return lambda: torch.autocast(device, dtype=dtype)


def training_seconds(
    plan: Plan,
    config: AuditConfig,
    policy: nn.Module,
    reference: Reference,
    sets: Mapping[str | None, ProbeSet],
) -> float:
    """Seconds of training on one pair (see :func:`seconds_per_pair`), on some of the probe pairs."""
    options = StepOptions(plan.lora, plan.gradient_checkpointing, plan.beta, numerics(plan, policy))
    return seconds_per_pair(policy, reference.model(), _timed_pairs(sets, config).pairs, options)


def cost_checks(
    plan: Plan,
    config: AuditConfig,
    pair: float,
    models: OpenModels,
    sets: Mapping[str | None, ProbeSet],
    tell: Callable[[str], None],
) -> Iterator[Check]:
    """A look and a full audit, timed; and what the schedule makes of them.

    Args:
        pair: seconds of training on one.
    """
    quiet, cache, meter = config.model_copy(update={"progress": False}), ReferenceCache(), MemoryMeter(models.device)
    tell("timing a look at all pairs")
    for name, probes in sets.items():
        _timed(models, probes, quiet, "health", cache, name)  # computes the reference's side, once a run
    health = sum(_timed(models, probes, quiet, "health", cache, name) for name, probes in sets.items())
    timed = _timed_pairs(sets, config)
    tell(f"timing a full audit of {counted(len(timed), 'pair')}")
    share = timed.num_tokens / sum(probes.num_tokens for probes in sets.values())
    rows = _transport_rows(models, timed, quiet, share * len(sets))
    proportionate = in_proportion(quiet, [len(probes) for probes in sets.values()], share, rows)
    full = _timed(models, timed, proportionate, "full", ReferenceCache()) / share
    meter.sample()
    pairs = sum(len(probes) for probes in sets.values())
    said = [
        f"on {pairs} pairs a look takes about {duration(health)} ({health / pair:.0f} training pairs)",
        f"a full audit {duration(full)} ({full / pair:.0f} training pairs)",
        f"which takes {meter.peak / 2**20:.0f} MiB beside the models on {counted(len(timed), 'pair')}",
    ]
    largest = max(sets.values(), key=len)
    more = more_memory(models, timed, largest, config) if len(largest) > len(timed) else 0
    if more:
        said.append(
            f"about {(meter.peak + more) / 2**20:.0f} MiB on {len(largest)}, whose token rows are kept meanwhile"
        )
    yield Check("cost", "green", ", ".join(said))
    if plan.max_steps is None:
        yield Check(
            "schedule",
            "yellow",
            "how long the run is was not said",
            "--steps, or the training script's arguments after --",
        )
        return
    steps = PlannedSteps(min(plan.max_steps, _MOST_STEPS), plan.save_steps, plan.eval_steps)
    costs = Costs(pair * plan.pairs_per_step, health, full)
    per_look = full_per_look(models, sets.values(), config, first=False)
    schedule = schedule_check(forecast(config, steps, costs, models.num_layers, per_look), config, steps)
    if plan.max_steps > _MOST_STEPS:
        words = f"{schedule.observation} (judged by the first {_MOST_STEPS:,} of {plan.max_steps:,} steps)"
        schedule = replace(schedule, observation=words)
    yield schedule


def in_proportion(config: AuditConfig, pairs: Sequence[int], share: float, rows: int | None) -> AuditConfig:
    """Settings by which an audit of a share of the pairs takes that share of the time: numbers of pairs and rows that are taken
    of however many there are shrink with it.

    Args:
        pairs: of each probe set.
        share: in (0, 1], of all their tokens.
        rows: on how many transport is measured in each set, where it draws them as it needs; None: not known.
    """
    if share >= 1.0:
        return config

    def reduced(limit: int) -> int:
        return max(2, round(share * sum(min(limit, count) for count in pairs)))

    patching, spinal = config.patching, config.spinal
    fewer: dict[str, Any] = {"control_pairs": reduced(patching.control_pairs)}
    if isinstance(patching.exact_pairs, int):
        fewer["exact_pairs"] = reduced(patching.exact_pairs)
    asked = rows if spinal.transport_rows == "auto" else spinal.transport_rows
    drawn = asked if isinstance(asked, str | None) else max(2, round(share * len(pairs) * asked))
    changed = {"max_rows": max(32, round(share * len(pairs) * spinal.max_rows)), "transport_rows": drawn or "auto"}
    # Copied, not validated: a part of what may be asked for can be less than may be.
    prompts = {"prompts": reduced(config.generations.prompts)}
    sites = [
        site if site.pairs is None else site.model_copy(update={"pairs": reduced(site.pairs)}) for site in config.sites
    ]
    return config.model_copy(
        update={
            "patching": patching.model_copy(update=fewer),
            "spinal": spinal.model_copy(update=changed),
            "generations": config.generations.model_copy(update=prompts),
            "sites": tuple(sites),
        }
    )


def _transport_rows(models: OpenModels, timed: ProbeSet, config: AuditConfig, share: float) -> int | None:
    """On how many rows transport will be measured in a probe set of which the timed pairs are a share; None: as many as there
    are, or as the settings say.

    Args:
        share: of the tokens of a set of average size.
    """
    if not config.spinal.enabled or config.spinal.transport_rows != "auto" or share >= 1.0:
        return None
    off = {
        name: getattr(config, name).model_copy(update={"enabled": False})
        for name in ("patching", "low_rank", "localization", "generations")
    }
    first = {"transport_rows": PORTION, "gradient_concentration": False}
    pilot = config.model_copy(update=off | {"sites": (), "spinal": config.spinal.model_copy(update=first)})
    spinal = run_audit(models, AuditRequest(timed, pilot), ReferenceCache()).record.spinal
    if spinal is None or spinal.transport_rows is None:
        return None
    traces = (spinal.policy, spinal.reference)
    means = np.concatenate([trace.transport for trace in traces])
    errors = np.concatenate([trace.transport_stderr for trace in traces])
    there = round(spinal.rows_available / share)
    rows = rows_that_give(means, errors, spinal.transport_rows, spinal.rows_available, there, SHARE)
    return None if rows is None else min(-(-rows // PORTION) * PORTION, there, config.spinal.max_rows)


def schedule_check(run: Forecast, config: AuditConfig, steps: PlannedSteps) -> Check:
    """What a run's schedule comes to, and which option to change where that is too little or too much."""
    first = "never" if run.first_look is None else f"step {run.first_look}"
    looks, full = run.count("health"), run.count("full")
    observation = (
        f"first look at the trained policy: {first}; {counted(looks, 'look')} and {counted(full, 'full audit')} in "
        f"{counted(steps.max_steps, 'step')}, about {duration(run.audit_seconds)}, {run.share:.1%} of the run"
    )
    if run.left_out:
        observation += f"; {counted(len(run.left_out), 'checkpoint')} without an audit, for lack of budget"
    if run.first_look is None:
        return Check("schedule", "yellow", observation, _how_to_look(config.schedule, steps))
    if config.budget is not None and run.share > 1.5 * config.budget:
        return Check(
            "schedule",
            "yellow",
            f"{observation}: the audits that are made whatever they cost go beyond the budget of {config.budget:.0%}",
            "nothing, if the run is a short one; else fewer pairs (max_pairs)",
        )
    if not run.count("full"):
        return _no_full_audit(observation, config.schedule, steps)
    return Check("schedule", "green", observation)


def _how_to_look(schedule: ScheduleConfig, steps: PlannedSteps) -> str:
    """What to change where the trained policy is never audited."""
    if schedule.health:
        return (
            f"set schedule.first_health ({schedule.first_health}) to fewer steps than the run has ({steps.max_steps})"
        )
    return f"switch schedule.health on, which is off{_also_off(schedule, steps)}"


def _no_full_audit(observation: str, schedule: ScheduleConfig, steps: PlannedSteps) -> Check:
    if _asks_for_full(schedule, steps):
        return Check(
            "schedule",
            "yellow",
            f"{observation}: no full audit fits, but where a look finds an error",
            "a larger budget, or fewer pairs (max_pairs)",
        )
    after = "unless a look warns" if schedule.escalate and schedule.health else "and a look that warns asks for none"
    return Check(
        "schedule",
        "yellow",
        f"{observation}: nothing asks for a full audit, {after}",
        f"switch schedule.on_last_step on, which is off{_also_off(schedule, steps, 'on_last_step')}",
    )


def _asks_for_full(schedule: ScheduleConfig, steps: PlannedSteps) -> bool:
    saves, evaluates = schedule.on_save and bool(steps.save_steps), schedule.on_evaluate and bool(steps.eval_steps)
    return saves or evaluates or schedule.on_last_step or schedule.before_training or bool(schedule.every_n_steps)


def _also_off(schedule: ScheduleConfig, steps: PlannedSteps, said: str = "health") -> str:
    """The other switches that could make an audit of the trained policy, each with why it makes none."""
    off = [f"schedule.{name}" for name in ("on_save", "on_last_step") if not getattr(schedule, name) and name != said]
    words = f" ({', '.join(off)} off too)" if off else ""
    return words + (", or save checkpoints: the run saves none" if schedule.on_save and not steps.save_steps else "")


def _timed_pairs(sets: Mapping[str | None, ProbeSet], config: AuditConfig) -> ProbeSet:
    """Some pairs of the largest set."""
    return max(sets.values(), key=lambda probes: probes.num_tokens).subsample(TIMED_PAIRS, config.seed)


def _timed(
    models: OpenModels,
    probes: ProbeSet,
    config: AuditConfig,
    kind: AuditKind,
    cache: ReferenceCache,
    name: str | None = None,
) -> float:
    began = time.perf_counter()
    run_audit(models, AuditRequest(probes, config, kind=kind, probe_name=name), cache)
    return time.perf_counter() - began
