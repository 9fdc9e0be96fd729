"""Before training: would the audit work here, what would it cost, and what has to be changed first?

Each thing that a run depends on is tried for real, in the order in which it would fail, and is said in a line.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from torch import nn

from align_audit.auditing.audit import run_audit
from align_audit.auditing.probe_files import read_probes
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.memory import MemoryMeter
from align_audit.auditing.session.open_models import OpenModels, check_vocabulary
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError, ConfigurationError, ReferenceUnavailableError, first_line, named
from align_audit.measures.resampling import LEAST_GROUPS
from align_audit.models.find_sites import find_sites
from align_audit.models.loading import base_of, load_model
from align_audit.models.reference import Reference, resolve_reference
from align_audit.monitoring.forecast import Costs, Forecast, PlannedSteps, forecast
from align_audit.monitoring.plain_step import StepOptions, seconds_per_pair
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditKind
from align_audit.record.finding import CLAIMED_FROM
from align_audit.record.log import FOLDER, RECORDS

Level = Literal["green", "yellow", "red"]

_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""What ``report_to`` may name, and the package that it needs."""
_TIMED_PAIRS = 8
"""Pairs that audits are timed on; what more of them take follows from their tokens."""
_NUDGE = 0.02
"""How far the policy that is timed is moved from its start, as a share of each weight's spread: of equal models an audit has
less to do."""
_ROOM = 2**30
"""Bytes that a run's log, pictures and arrays never come near."""
_MOST_STEPS = 200_000
"""Steps that are played through; longer runs are judged by so many."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        level: ``green``: as it should be. ``yellow``: works, but. ``red``: audits, or training, would not work.
        found: what there is, in a sentence.
        fix: what to do about it; empty where nothing is to be done.
    """

    name: str
    level: Level
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Plan:
    """The training that is planned, as far as it is known.

    Attributes:
        model: a folder or hub name: what training starts from.
        probes: where the pairs are, or several sets by name.
        reference: a folder or hub name; None: what the trainer takes, which is the model as it starts.
        max_steps: optimizer steps; None: not known, and no share of the run is foreseen.
        pairs_per_step: of an optimizer step, on one process.
        save_steps, eval_steps: None: never.
        output_dir: where the run writes; None: not known.
        report_to: the trackers, by the names that ``report_to`` takes.
        lora: adapters are trained, not the model.
    """

    model: str
    probes: str | Path | Mapping[str, str | Path]
    reference: str | None = None
    max_steps: int | None = None
    pairs_per_step: int = 8
    save_steps: int | None = 500
    eval_steps: int | None = None
    output_dir: Path | None = None
    report_to: tuple[str, ...] = ()
    lora: bool = False
    gradient_checkpointing: bool = True
    beta: float = 0.1
    device: str = "cpu"
    dtype: str | None = None
    trust_remote_code: bool = False


def examine(plan: Plan, config: AuditConfig, tell: Callable[[str], None] = lambda _: None) -> Iterator[Check]:
    """Try everything, one thing after the other; what depends on something that is red is not tried.

    Args:
        tell: is given what is done next, where that takes a while.
    """
    yield _versions()
    yield from _output(plan)
    tell("opening the model")
    try:
        policy = load_model(
            plan.model,
            dtype=plan.dtype,
            device=plan.device,
            trust_remote_code=plan.trust_remote_code,
            base=plan.reference,
        )
    except AlignAuditError as error:
        yield Check("model", "red", str(error), "name a folder or hub name that AutoModelForCausalLM can load")
        return
    yield Check("model", "green", _described(policy))
    try:
        sets = read_probes(
            plan.probes, [Path(plan.model)], plan.reference, config, trust_remote_code=plan.trust_remote_code
        )
    except AlignAuditError as error:
        yield Check("probes", "red", str(error), "give --probes a file of held-out preference pairs")
        return
    for name, probes in sets.items():
        yield _pairs(name, probes)
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
    tell("looking for the reference, and between the layers")
    try:
        reference, said = _reference(plan, policy)
        yield said
        _move(policy)
        tell(f"timing training on {_TIMED_PAIRS} pairs")
        pair = _training_seconds(plan, config, policy, reference, sets)
        tell("looking between the layers")
        models = OpenModels(policy, reference, keep_loaded=True)
        with models.open():
            for probes in sets.values():
                check_vocabulary(probes.pairs, models)
            yield Check(
                "layers", "green", f"{models.num_layers} decoder layers; replaying them reproduces the model's logits"
            )
            yield _sites(models)
            yield from _costs(plan, config, pair, models, sets, tell)
    except AlignAuditError as error:
        name = "reference" if isinstance(error, ReferenceUnavailableError) else "layers"
        yield Check(name, "red", str(error), _fix_of(error))
    except Exception as error:
        yield Check(
            "audit",
            "red",
            f"an audit broke: {named(error)}",
            "report it, with the traceback of `align-audit run` on this model",
        )


def _fix_of(error: AlignAuditError) -> str:
    if isinstance(error, ReferenceUnavailableError):
        return "name the model that training starts from with --reference"
    if isinstance(error, ConfigurationError):
        return "use the tokenizer of this model for its probes, or change the option that is named"
    return "pass anatomy= to the callback, which says where the layers are (docs/guides/models.md)"


# --- what needs no model ----------------------------------------------------------------------------------------------


def _versions() -> Check:
    """Are the packages there are those that align_audit says it works with?"""
    odd, said = [], [f"Python {platform.python_version()}"]
    for text in importlib.metadata.requires("align-audit") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            odd.append(f"{wanted.name} is not installed")
            continue
        if wanted.name in ("torch", "transformers", "trl", "peft"):
            said.append(f"{wanted.name} {version}")
        if not wanted.specifier.contains(version, prereleases=True):
            odd.append(f"{wanted.name} {version} is outside {wanted.specifier}")
    if odd:
        return Check(
            "versions", "red", "; ".join(odd), "pip install --upgrade align-audit, which brings the right ones"
        )
    return Check("versions", "green", ", ".join(said))


def _output(plan: Plan) -> Iterator[Check]:
    """Can the run write where it means to, and do its trackers exist?"""
    if plan.output_dir is not None:
        yield _folder(plan.output_dir)
    for name in plan.report_to:
        if name in ("none", "all"):
            continue
        package = _TRACKERS.get(name)
        if package is None:
            yield Check("trackers", "yellow", f"{name} gets the trainer's curves, but none of the audit's")
        elif importlib.util.find_spec(package) is None:
            yield Check("trackers", "red", f"report_to names {name}, which is not installed", f"pip install {package}")
        else:
            yield Check("trackers", "green", f"the audit writes to {name} beside the trainer's curves")


def _folder(folder: Path) -> Check:
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    where = f"{folder / FOLDER / RECORDS}"
    try:
        place.joinpath(f".align_audit-{time.time_ns()}").touch(exist_ok=False)
    except OSError as error:
        return Check("output", "red", f"cannot write to {place}: {first_line(error)}", "choose another output_dir")
    for left in place.glob(".align_audit-*"):
        left.unlink(missing_ok=True)
    free = shutil.disk_usage(place).free
    if free < _ROOM:
        return Check(
            "output", "yellow", f"{free / 2**20:.0f} MiB are free at {place}", "make room: checkpoints need more"
        )
    if (folder / FOLDER / RECORDS).exists():
        return Check(
            "output",
            "yellow",
            f"{folder} holds the audits of an earlier run, which are moved aside when training begins from step 0",
            "choose another output_dir, or resume that run",
        )
    return Check("output", "green", f"records go to {where} ({free / 2**30:.0f} GiB free)")


# --- models and pairs -------------------------------------------------------------------------------------------------


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


def _pairs(name: str | None, probes: ProbeSet) -> Check:
    title = "probes" if name is None else f"probes {name}"
    if probes.groups < LEAST_GROUPS:
        return Check(
            title,
            "yellow",
            f"{probes.summary()}. With {probes.groups} independent pairs no interval is made, and alerts go by means",
            f"give {CLAIMED_FROM} held-out pairs of different prompts, or more",
        )
    if probes.groups < CLAIMED_FROM:
        return Check(
            title,
            "yellow",
            f"{probes.summary()}. A localization is claimed from {CLAIMED_FROM} independent pairs on",
            f"give {CLAIMED_FROM} held-out pairs of different prompts, or more",
        )
    return Check(title, "green", probes.summary())


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


# --- costs ------------------------------------------------------------------------------------------------------------


def _costs(
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
    tell(f"timing a full audit of {len(timed)} pairs")
    full = _timed(models, timed, quiet, "full", ReferenceCache())
    meter.sample()
    full *= sum(probes.num_tokens for probes in sets.values()) / timed.num_tokens
    pairs = sum(len(probes) for probes in sets.values())
    said = [
        f"on {pairs} pairs a look takes about {_seconds(health)} ({health / pair:.0f} training pairs)",
        f"a full audit {_seconds(full)} ({full / pair:.0f} training pairs)",
        f"which takes {meter.peak / 2**20:.0f} MiB beside the models on {len(timed)} pairs",
    ]
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
    yield _schedule(forecast(config, steps, costs, models.num_layers), config, steps)


def _timed_pairs(sets: Mapping[str | None, ProbeSet], config: AuditConfig) -> ProbeSet:
    """Some pairs of the largest set."""
    return max(sets.values(), key=lambda probes: probes.num_tokens).subsample(_TIMED_PAIRS, config.seed)


def _training_seconds(
    plan: Plan, config: AuditConfig, policy: nn.Module, reference: Reference, sets: Mapping[str | None, ProbeSet]
) -> float:
    options = StepOptions(plan.lora, plan.gradient_checkpointing, plan.beta)
    return seconds_per_pair(policy, reference.model(), _timed_pairs(sets, config).pairs, options)


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


def _schedule(run: Forecast, config: AuditConfig, steps: PlannedSteps) -> Check:
    first = "never" if run.first_look is None else f"step {run.first_look}"
    found = (
        f"first look at the trained policy: {first}; {run.count('health')} looks and {run.count('full')} full audits in "
        f"{steps.max_steps} steps, about {_seconds(run.audit_seconds)}, {run.share:.1%} of the run"
    )
    if run.first_look is None:
        return Check("schedule", "yellow", found, "set schedule.first_health to fewer steps than the run has")
    if config.budget is not None and run.share > 1.5 * config.budget:
        return Check(
            "schedule",
            "yellow",
            f"{found}: the looks that are made whatever they cost go beyond the budget of {config.budget:.0%}",
            "nothing, if the run is a short one; else fewer pairs (max_pairs)",
        )
    if not run.count("full"):
        return Check(
            "schedule",
            "yellow",
            f"{found}: no full audit fits, unless a look warns",
            "a larger budget, or fewer pairs (max_pairs)",
        )
    return Check("schedule", "green", found)


def _seconds(value: float) -> str:
    if value < 10:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


__all__ = ["Check", "Plan", "examine", "verdict"]
