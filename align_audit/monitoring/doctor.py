"""Before training: would the audit work here, what would it cost, and what has to be changed first?

Each thing that a run depends on is tried for real, in the order in which it would fail, and is said in a line.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from align_audit.auditing.check import check_audit
from align_audit.auditing.probe_files import read_probes
from align_audit.auditing.session.memory import out_of_memory
from align_audit.auditing.session.open_models import OpenModels
from align_audit.config import AuditConfig
from align_audit.errors import (
    AlignAuditError,
    AuditMemoryError,
    ConfigurationError,
    ReferenceUnavailableError,
    SiteError,
    named,
)
from align_audit.measures.resampling import LEAST_GROUPS
from align_audit.models.find_sites import find_sites
from align_audit.models.loading import base_of, check_place, load_model
from align_audit.models.pickles import refuse_pickles
from align_audit.models.reference import Reference, resolve_reference
from align_audit.monitoring.doctor_costs import TIMED_PAIRS, cost_checks, numerics, training_seconds
from align_audit.monitoring.doctor_place import log_check, not_tried, place_checks, stored_in, texts_kept, versions
from align_audit.monitoring.doctor_plan import Check, Level, Plan
from align_audit.probes.pairs import ProbeSet, remedy_of
from align_audit.record.finding import CLAIMED_FROM

_NUDGE = 0.02
"""How far the policy that is timed is moved from its start, as a share of each weight's spread: of equal models an audit has
less to do."""

_MUCH_DROPPED, _MOST_DROPPED = 0.1, 0.5
"""Shares of the pairs that were met beyond which the rest may no longer stand for the data, and beyond which it does not."""


def examine(plan: Plan, config: AuditConfig, tell: Callable[[str], None] = lambda _: None) -> Iterator[Check]:
    """Try everything, one thing after the other; what depends on something that is red is not tried.

    Args:
        tell: is given what is done next, where that takes a while.
    """
    yield versions()
    stored = stored_in(plan)
    yield from place_checks(plan, config, stored)
    yield from not_tried(plan)
    if not plan.allow_pickle:
        try:
            refuse_pickles([plan.model, *([plan.reference] if plan.reference is not None else [])])
        except AlignAuditError as error:
            yield Check("model", "red", str(error), "save it again with save_pretrained, or pass --allow-pickle")
            return
    if plan.reference is not None:
        try:
            check_place(plan.reference)
        except AlignAuditError as error:
            yield _refusal(error)
            return
    tell("opening the model")
    try:
        policy = _policy(plan)
    except AlignAuditError as error:
        yield Check("model", "red", str(error), "name a folder or hub name that AutoModelForCausalLM can load")
        return
    yield Check("model", "green", _described(policy))
    try:
        sets = _probe_sets(plan, config)
    except AlignAuditError as error:
        yield Check("probes", "red", str(error), "give --probes a file of held-out preference pairs")
        return
    for name, probes in sets.items():
        yield probes_check(name, probes)
    yield texts_kept(config)
    yield from log_check(plan, config, policy, sets, stored)
    yield from _with_models(plan, config, policy, sets, tell)


def verdict(checks: list[Check]) -> Check | None:
    """The one thing to change first; None: nothing has to be changed."""
    return next((check for check in checks if check.level == "red"), None)


def _with_models(
    plan: Plan,
    config: AuditConfig,
    policy: nn.Module,
    sets: Mapping[str | None, ProbeSet],
    tell: Callable[[str], None],
) -> Iterator[Check]:
    autocast = numerics(plan, policy)
    tell("looking for the reference, and between the layers")
    try:
        reference, said = _reference(plan, policy)
        yield said
        # As a run begins; what it refuses breaks what is tried below, on a CUDA device beyond repair.
        check_audit(policy, reference, sets.values(), config, autocast=autocast)
        with OpenModels(policy, reference, autocast=autocast, keep_loaded=True) as models:
            models.open()
            yield Check(
                "layers", "green", f"{models.num_layers} decoder layers; replaying them reproduces the model's logits"
            )
            yield _sites(models)
        _move(policy)
        tell(f"timing training on {TIMED_PAIRS} pairs")
        pair = training_seconds(plan, config, policy, reference, sets)
        with OpenModels(policy, reference, autocast=autocast, keep_loaded=True) as models:
            yield from cost_checks(plan, config, pair, models.open(), sets, tell)
    except AlignAuditError as error:
        yield _no_memory(error, plan) if isinstance(error, AuditMemoryError) else _refusal(error)
    except Exception as error:
        if out_of_memory(error):
            yield _no_memory(error, plan)
            return
        yield Check(
            "audit",
            "red",
            f"an audit broke: {named(error)}",
            "report it, with the traceback of `align-audit run` on this model",
        )


def _no_memory(error: BaseException, plan: Plan) -> Check:
    """That there was no room for it here, where two whole models are held; a run with adapters holds one."""
    fix = "shorter pairs (--max-length), fewer rows (spinal.max_rows in --config), or try it on the CPU (--device cpu)"
    if plan.lora:
        words = (
            f"{named(error)}: it could not be tried. It takes two whole models here, and a run with adapters has one"
        )
        return Check("memory", "yellow", words, fix)
    return Check("memory", "red", named(error), fix)


def _refusal(error: AlignAuditError) -> Check:
    """What a run would not begin with."""
    if isinstance(error, ReferenceUnavailableError):
        return Check("reference", "red", str(error), "name the model that training starts from with --reference")
    if isinstance(error, SiteError):
        return Check("sites", "red", str(error), "change `sites` in the audit's options (--config)")
    if isinstance(error, ConfigurationError):
        fix = "use the tokenizer of this model for its probes, or change the option that is named"
        return Check("probes", "red", str(error), fix)
    fix = "pass anatomy= to the callback, which says where the layers are (docs/guides/models.md)"
    return Check("layers", "red", str(error), fix)


# --- models and pairs -------------------------------------------------------------------------------------------------


def _policy(plan: Plan) -> nn.Module:
    return load_model(
        plan.model,
        dtype=plan.dtype,
        device=plan.device,
        attention=plan.attention,
        trust_remote_code=plan.trust_remote_code,
        base=plan.reference,
        revision=plan.revision,
    )


def _probe_sets(plan: Plan, config: AuditConfig) -> dict[str | None, ProbeSet]:
    return read_probes(
        plan.probes,
        [Path(plan.model)],
        plan.reference,
        config,
        trust_remote_code=plan.trust_remote_code,
        revision=plan.revision,
        max_length=plan.max_length,
        truncation_mode=plan.truncation_mode,
    )


def _described(model: nn.Module) -> str:
    count = sum(weight.numel() for weight in model.parameters())
    weight = next(model.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    return f"{type(model).__name__}, {size} parameters in {dtype} on {weight.device.type}"


def _reference(plan: Plan, policy: nn.Module) -> tuple[Reference, Check]:
    """What the policy will be compared with: a model that was named, else the model as training starts from it."""
    if plan.reference is not None and base_of(Path(plan.model)) is None:
        resolved = resolve_reference(policy, plan.reference, trust_remote_code=plan.trust_remote_code, stream=False)
        model = resolved.model()
        return Reference(resolved.source, model=model), Check("reference", "green", resolved.source)
    start = copy.deepcopy(policy)
    how = "its adapters switched off" if plan.lora else "a copy of the model as it starts (the trainer's ref_model)"
    return Reference("the model as training starts", model=start), Check("reference", "green", how)


@torch.no_grad()
def _move(policy: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in policy.parameters():
        if weight.is_floating_point() and weight.numel() > 1:
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_((noise * weight.float().std().cpu() * _NUDGE).to(weight))


def probes_check(name: str | None, probes: ProbeSet) -> Check:
    """Whether the pairs are enough for what audits claim, and stand for the data that they are of."""
    title = "probes" if name is None else f"probes {name}"
    said, fixes = [probes.summary()], []
    dropped = sum(probes.dropped.values())
    share = dropped / (dropped + len(probes))
    if share > _MUCH_DROPPED:
        reason = max(probes.dropped, key=lambda each: probes.dropped[each])
        said.append(f"{share * 100:.0f} % of the pairs were dropped, most for: {reason}")
        fixes.append(remedy_of(reason, probes.max_length))
    if probes.groups < LEAST_GROUPS:
        said.append(f"With {probes.groups} independent pairs no interval is made, and alerts go by means")
    elif probes.groups < CLAIMED_FROM:
        said.append(f"A localization is claimed from {CLAIMED_FROM} independent pairs on")
    if probes.groups < CLAIMED_FROM:
        fixes.append(f"give {CLAIMED_FROM} held-out pairs of different prompts, or more")
    level: Level = "red" if share > _MOST_DROPPED else "yellow" if fixes else "green"
    return Check(title, level, ". ".join(said), "; ".join(fixes))


def _sites(models: OpenModels) -> Check:
    with models.as_reference() as replay:
        sites = find_sites(replay)
    kinds = [set(layer.kinds) for layer in sites.layers]
    everywhere = sorted(set.intersection(*kinds))
    some = sorted(set.union(*kinds) - set(everywhere))
    words = ", ".join(kind.replace("_", " ") for kind in everywhere) or "none in all layers"
    if some:
        words += f"; in some layers {', '.join(kind.replace('_', ' ') for kind in some)}"
    if not everywhere and not some:
        return Check(
            "sites", "yellow", "no site below the residual stream was found", "leave `sites` out of the options"
        )
    return Check("sites", "green", f"below the residual stream: {words}")


__all__ = ["Check", "Plan", "examine", "probes_check", "verdict"]
