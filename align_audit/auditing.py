"""``audit``: compare a policy with its reference on probe pairs, once, and return what was found."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import torch
from torch import nn

from align_audit.audit_before import AuditBefore
from align_audit.batches import PairBatch
from align_audit.conductor.assemble import Assembler
from align_audit.conductor.choice import more_pairs
from align_audit.conductor.collect import Collected, Collector
from align_audit.conductor.lowrank import Fit, LowRankFindings, Reconstruction, TokenGrams
from align_audit.conductor.second import Look, MoreNoise, second_pass
from align_audit.conductor.session import Session, out_of_memory
from align_audit.conductor.site_curves import site_arrays, site_curves
from align_audit.conductor.sites import SiteCollector, SiteFindings
from align_audit.config import AuditConfig
from align_audit.errors import AuditMemoryError, ConfigurationError, ProbeError
from align_audit.models.anatomy import Anatomy
from align_audit.models.build import build_fingerprint
from align_audit.models.copied_layers import placed
from align_audit.models.guard import untouched
from align_audit.models.reference import Reference, load_policy, policy_fingerprint, resolve_reference
from align_audit.probe_names import check_names
from align_audit.record import AuditRecord, Cost, Provenance, ReferenceCheck
from align_audit.refcache import ReferenceCache, ReferenceTrace
from align_audit.refstreams import ReferenceStreams
from align_audit.verdict import find

if TYPE_CHECKING:
    from align_audit.measures.patching import PatchSummary
    from align_audit.probes import ProbeSet
    from align_audit.record import Patching, Spinal

_PACKAGES = ("align-audit", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "scipy")


@dataclass
class Context:
    """What a run keeps between audits, and what the caller knows that a model cannot say.

    Attributes:
        autocast: makes the context the trainer computes in.
        at_start: training has not begun, so policy and reference should compute the same.
        before: what the audit before left; replaced by each audit.
        reference_cache: depth traces of references already measured, by what they depend on.
        probe_name: what the run calls the probe set; None where it has only one, without a name.
        models: opened already, for several probe sets in turn; None: each audit opens them for itself.
    """

    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    anatomy: Anatomy | None = None
    at_start: bool = False
    beta: float | None = None
    last_sync_step: int | None = None
    compare_precomputed: bool = True
    before: AuditBefore = field(default_factory=AuditBefore)
    reference_cache: ReferenceCache = field(default_factory=ReferenceCache)
    progress: Callable[[int, str], Any] | None = None
    probe_name: str | None = None
    models: OpenModels | None = None


class OpenModels:
    """Policy and reference, opened by the first audit inside and kept open for those of other probe sets.

    Everything is let go of, and given back as it was, on leaving.
    """

    def __init__(self, policy: nn.Module, reference: Reference) -> None:
        self.policy = policy
        self.reference = reference
        self.hashes = ("", "")
        """Of policy and reference, once opened."""
        self._stack = contextlib.ExitStack()
        self._entered = False
        self._session: Session | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def session(self, probes: ProbeSet, config: AuditConfig, context: Context) -> Session:
        """Both models between their layers, over these pairs.

        Raises:
            ProbeError: there are no pairs.
        """
        if len(probes) == 0:
            raise ProbeError("the probe set is empty; expected at least one preference pair")
        if self._session is not None:
            return self._session.over(probes.pairs, probes.truncation_mode, context.before.attribution)
        if not self._entered:
            self._enter()
        session = Session(
            self.policy,
            self.reference,
            probes.pairs,
            config,
            autocast=context.autocast,
            anatomy=context.anatomy,
            pad_token_id=0,
            truncation_mode=probes.truncation_mode,
            before=context.before.attribution,
        )
        theirs = self.reference.fingerprint()  # first: a streamed reference holds no layer while the policy is read
        self.hashes = (policy_fingerprint(self.policy), theirs)
        self._session = session
        return session

    def _enter(self) -> None:
        stack = self._stack
        stack.callback(self.reference.release)
        models = [self.policy]
        with untouched(self.policy):  # loading a reference draws random numbers
            other = self.reference.model()
        if other is not self.policy:
            stack.enter_context(placed(other, next(self.policy.parameters()).device))
            models.append(other)
        stack.enter_context(untouched(*models))
        stack.enter_context(torch.no_grad())
        self._entered = True


@overload
def audit(
    policy: nn.Module | str | Path,
    reference: nn.Module | str | Path | None,
    probes: ProbeSet,
    config: AuditConfig | None = None,
    step: int = 0,
    *,
    anatomy: Anatomy | None = None,
) -> AuditRecord: ...
@overload
def audit(
    policy: nn.Module | str | Path,
    reference: nn.Module | str | Path | None,
    probes: Mapping[str, ProbeSet],
    config: AuditConfig | None = None,
    step: int = 0,
    *,
    anatomy: Anatomy | None = None,
) -> dict[str, AuditRecord]: ...
def audit(
    policy: nn.Module | str | Path,
    reference: nn.Module | str | Path | None,
    probes: ProbeSet | Mapping[str, ProbeSet],
    config: AuditConfig | None = None,
    step: int = 0,
    *,
    anatomy: Anatomy | None = None,
) -> AuditRecord | dict[str, AuditRecord]:
    """Audit one policy against its reference (METHODS §1–6).

    Args:
        policy: a causal LM, a PEFT model, or the path of either.
        reference: the same; None: the policy's ``"ref"`` adapter, else its adapters off, else its own source path.
        probes: preference pairs, tokenized as the trainer does; or several such sets by name, all audited with the
            models opened once.
        config: what to measure; defaults to all of it.
        step: the training step the record names.
        anatomy: where the decoder layers are, for a model in which they cannot be found.

    Returns:
        The record, or the records by name. Neither model, nor any random state, is changed.

    Raises:
        ConfigurationError: a name that cannot be one (see :mod:`align_audit.probe_names`).
        ReferenceUnavailableError: no reference can be had, or it does not fit the policy.
        AnatomyError: the model cannot be opened between its layers.
        ProbeError: there are no pairs.
    """
    if isinstance(probes, Mapping):
        check_names(probes)
    if not isinstance(policy, nn.Module):
        policy = load_policy(policy)
    resolved = resolve_reference(policy, reference)
    config, context = config or AuditConfig(), Context(anatomy=anatomy)
    if not isinstance(probes, Mapping):
        return run_audit(policy, resolved, probes, config, step, context)[0]
    with OpenModels(policy, resolved) as models:
        return {
            name: run_audit(policy, resolved, own, config, step, replace(context, probe_name=name, models=models))[0]
            for name, own in probes.items()
        }


def run_audit(
    policy: nn.Module, reference: Reference, probes: ProbeSet, config: AuditConfig, step: int, context: Context
) -> tuple[AuditRecord, dict[str, np.ndarray]]:
    """The audit itself; also returns what is too large for a record: per-pair numbers, and each subspace basis."""
    with memory_explained():
        return _run(policy, reference, probes, config, step, context)


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Running out of memory inside is an ``AuditMemoryError`` that says what there has to be room for."""
    try:
        yield
    except AuditMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise AuditMemoryError(
            f"the audit ran out of memory outside its batches ({str(error).splitlines()[0]}): while opening the models, or "
            "in what it keeps for all pairs. Expected room for the reference's weights, for spinal.max_rows token rows of "
            "every layer, and for two matrices of the model's width squared; lower spinal.max_rows, or free memory."
        ) from error


def _run(
    policy: nn.Module, reference: Reference, probes: ProbeSet, config: AuditConfig, step: int, context: Context
) -> tuple[AuditRecord, dict[str, np.ndarray]]:
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        models = context.models or stack.enter_context(OpenModels(policy, reference))
        session = models.session(probes, config, context)
        return _measure(session, reference, probes, step, context, models.hashes, began)


def _measure(
    session: Session,
    reference: Reference,
    probes: ProbeSet,
    step: int,
    context: Context,
    hashes: tuple[str, str],
    began: float,
) -> tuple[AuditRecord, dict[str, np.ndarray]]:
    config = session.config
    with session.as_reference() as replay:
        built = build_fingerprint(replay.model)
    trace_key = (
        hashes[1], built, probes.content_hash, config.spinal.model_dump_json(), str(config.seed),
        str(session.reference.compute_dtype),
    )  # fmt: skip
    low_rank = config.low_rank.enabled and config.patching.enabled
    again = config.patching.enabled and config.patching.noise_draws > 1
    sites = SiteCollector(session) if config.sites else None
    grams = _grams_beforehand(session) if low_rank else None
    batches = len(session.plan) * (1 + bool(low_rank or again) + bool(low_rank and grams is None))
    tick = ticker(context, batches + (sites.batches if sites is not None else 0))
    known = context.reference_cache.get(trace_key) if config.spinal.enabled else None
    kept = _kept_streams(session, probes, hashes[1], built, context)
    collector = Collector(session, reference_rows=known is None, kept=kept, token_grams=grams)

    def update(batch: PairBatch) -> None:
        collector.update(batch)
        tick()

    session.each_batch(update)
    _patch_more_pairs(session, collector)
    collector.trace()
    if kept is not None:
        kept.forget_the_rest()
    found = collector.found
    build = Assembler(found, config)
    margins = build.margins()
    patching, summary = build.patching()
    localization = build.localization(summary)
    looks: list[Look] = []
    reconstruction = _low_rank(session, build, patching, summary, grams, tick)
    if reconstruction is not None:
        looks.append(reconstruction)
    if summary is not None:
        looks.append(MoreNoise(session, found, summary.peak_layer))
    second_pass(session, found, looks, tick)
    finer = sites.measure(tick) if sites is not None else []
    findings = reconstruction.found if reconstruction is not None else None
    curves = build.low_rank(findings, context.before.subspaces) if findings is not None else {}
    if not curves and "low_rank" not in build.reasons and findings is None:
        build.reasons["low_rank"] = "switched off (low_rank.enabled, patching.enabled)"
    controls = build.controls(summary, findings, localization)
    spinal = _spinal(session, build, context.reference_cache, trace_key, known)
    session.meter.sample()
    record = AuditRecord(
        step=step,
        provenance=provenance_of(session, probes, hashes, context),
        reference_check=_check_reference(session, reference, build, probes, context),
        margins=margins,
        patching=patching,
        controls=controls,
        localization=localization,
        low_rank=curves,
        sites=site_curves(build, finer),
        spinal=spinal,
        cost=Cost(
            seconds=time.perf_counter() - began,
            peak_memory=session.meter.peak,
            forward_equivalents=session.forward_equivalents(),
        ),
        reasons=build.reasons,
    )
    record = record.model_copy(update={"finding": find(record)})
    spanned = dict(findings.bases) if findings is not None else context.before.subspaces
    context.before = AuditBefore(spanned, record.attribution)
    return record, _arrays(found, findings, finer)


def _spinal(
    session: Session, build: Assembler, cache: ReferenceCache, key: tuple[str, ...], known: ReferenceTrace | None
) -> Spinal | None:
    """METHODS §5; the reference's depth trace is ``known``, or kept in ``cache`` from now on. None where it is off."""
    if not session.config.spinal.enabled:
        build.reasons["spinal"] = "switched off (spinal.enabled)"
        return None
    epsilon, found = torch.finfo(session.policy.compute_dtype).eps, build.found
    ours, why = build.trace(found.policy_rows, found.policy_transport, epsilon)
    if known is None:
        known = cache.put(key, *build.trace(found.reference_rows, found.reference_transport, epsilon))
    build.reasons.update({f"spinal.policy.{path}": reason for path, reason in why.items()})
    build.reasons.update({f"spinal.reference.{path}": reason for path, reason in known.reasons.items()})
    return build.spinal(ours, known.trace)


def _kept_streams(
    session: Session, probes: ProbeSet, weights: str, built: str, context: Context
) -> ReferenceStreams | None:
    """Where the reference's streams of attributed pairs are kept; None where nobody asked, or no run keeps anything."""
    config, directory = session.config.patching, context.reference_cache.directory
    if not config.enabled or not config.keep_reference or directory is None:
        return None
    # Whatever may change a last bit: kept streams are compared with those of a policy that may be the same model.
    computed = {
        "build": built,
        "anatomy": repr(session.reference.anatomy),
        "dtype": str(session.reference.compute_dtype),
        "shared": session.shared,
        "embedding": config.embedding,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "device": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else session.device.type,
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }
    # Before training policy and reference must agree to the bit, so there nothing is taken on trust.
    return ReferenceStreams(
        directory, probes.content_hash, weights, json.dumps(computed), session.device, read=not context.at_start
    )


def _patch_more_pairs(session: Session, collector: Collector) -> None:
    """With ``exact_pairs`` "auto": where attribution explains too little, more pairs, at the layers that need them."""
    config, found = session.config, collector.found
    if not config.patching.enabled or config.patching.exact_pairs != "auto":
        return
    if len(session.pairs) <= config.patching.equivalent_pairs:
        warnings.warn(
            f"patching.exact_pairs 'auto' saves nothing here: there are {len(session.pairs)} probe pairs, and intervals as of "
            f"{config.patching.equivalent_pairs} (patching.equivalent_pairs) are wanted. Expected more pairs than that "
            "(max_pairs), which attribution makes cheap",
            stacklevel=2,
        )
    estimates, _ = Assembler(found, config).corrected_effects()
    choice = more_pairs(session.choice, found.per_pair["effect"][:, 1:], estimates, config.patching.equivalent_pairs)
    session.take_choice(choice)
    wanting = [
        place
        for place, layers in enumerate(choice.layers_of())
        if np.isnan(found.per_pair["effect"][place, [layer + 1 for layer in layers if layer >= 0]]).any()
    ]
    if wanting:
        session.each_batch(collector.patch_missing, wanting)


def _low_rank(
    session: Session,
    build: Assembler,
    patching: Patching | None,
    summary: PatchSummary | None,
    grams: TokenGrams | None,
    tick: Callable[[], None],
) -> Reconstruction | None:
    """Subspaces fitted at the layers asked for; None, with a reason, where there is nothing to reconstruct.

    Args:
        grams: gathered in the first pass; None: they were not.
    """
    config = session.config.low_rank
    if not config.enabled or patching is None or summary is None:
        return None
    if len(session.pairs) < 2:
        build.reasons["low_rank"] = "cross-fitting needs two halves: at least 2 pairs, found 1"
        return None
    layers = layers_to_reconstruct(session, summary)
    if not layers:
        build.reasons["low_rank"] = f"no layer to reconstruct: {summary.peak_reason}"
        return None
    if grams is None:
        grams = TokenGrams(session, layers)
        grams.gather(tick)
    return Reconstruction(session, Fit(grams))


def _grams_beforehand(session: Session) -> TokenGrams | None:
    """What the first pass gathers for the low-rank bases; None where the layers are not known yet, or where beside all
    else that it holds there is no room: in a pass of their own there may be."""
    layers = named_layers(session)
    if not layers or len(session.pairs) < 2:
        return None
    grams = TokenGrams(session, layers)
    return grams if session.has_room(grams.bytes) else None


def layers_to_reconstruct(session: Session, summary: PatchSummary) -> list[int]:
    """The layers asked for (``low_rank.layers``), ascending; none where ``auto`` finds none that stands out.

    Raises:
        ConfigurationError: the model has no such layer.
    """
    named = named_layers(session)
    if named is not None:
        return named
    found = (summary.peak_layer, _largest([gain.mean for gain in summary.layer_gain]))
    return sorted({layer for layer in found if layer is not None})


def named_layers(session: Session) -> list[int] | None:
    """The layers asked for, ascending; None where they are for the audit to find (``auto``).

    Raises:
        ConfigurationError: the model has no such layer.
    """
    layers = session.config.low_rank.layers
    if layers == "auto":
        return None
    if layers == "all":
        return list(range(session.num_layers))
    outside = [layer for layer in sorted(set(layers)) if not 0 <= layer < session.num_layers]
    if outside:
        raise ConfigurationError(f"low_rank.layers names {outside}; the model has layers 0 to {session.num_layers - 1}")
    return sorted(set(layers))


def _largest(values: list[float]) -> int | None:
    return int(np.argmax(values)) if np.isfinite(values).all() else None


def _check_reference(
    session: Session, reference: Reference, build: Assembler, probes: ProbeSet, context: Context
) -> ReferenceCheck:
    """Is the reference what it should be: the policy's starting point, and the one the trainer precomputed with?"""
    same = build.found.identical
    verdict, reason = "not_run", "training has begun; policy and reference are compared at step 0"
    if context.at_start and same:
        verdict, reason = "passed", "policy and reference give equal activations, bit by bit, before training"
    elif context.at_start:
        known = np.abs(build.shift[np.isfinite(build.shift)])
        moved = f"the margin shift is {known.mean():.3g} nats on average" if len(known) else "no margin is finite"
        verdict = "failed"
        reason = (
            f"before the first step policy and reference already differ: {moved}. "
            "Training optimizes the policy against this reference, not against its own starting point. "
            "Usual causes: an adapter initialization that changes the base weights (PiSSA, OLoRA), trained biases, "
            "or a reference loaded from another model or in another precision"
        )
    difference = None
    precomputed = [pair.reference_logps for pair in probes.pairs]
    if context.compare_precomputed and all(logps is not None for logps in precomputed):
        theirs = np.array([logps[0] - logps[1] for logps in precomputed if logps is not None])
        difference = float(np.abs(build.reference_margin - theirs).max())
        scale = np.array([abs(logps[0]) + abs(logps[1]) for logps in precomputed if logps is not None])
        # Two ways to sum the same log-probabilities differ by rounding, which grows with their size.
        half = session.reference.compute_dtype in (torch.bfloat16, torch.float16)
        mismatch = float(np.abs(build.reference_margin - theirs).mean())
        if not mismatch <= (1e-2 if half else 1e-4) * float(scale.mean()):
            verdict = "failed"
            reason = (
                f"the trainer's precomputed reference margins differ from this reference's by {mismatch:.3g} nats on "
                "average: it is not the reference the trainer uses"
            )
        elif verdict == "not_run":
            verdict = "passed"
            reason = f"its margins equal the trainer's precomputed ones (largest difference {difference:.2g} nats)"
    return ReferenceCheck(
        source=reference.source,
        same_weights=same,
        verdict=verdict,
        reason=reason,
        last_sync_step=context.last_sync_step,
        precomputed_margin_difference=difference,
    )


def provenance_of(session: Session, probes: ProbeSet, hashes: tuple[str, str], context: Context) -> Provenance:
    """Which models, pairs and settings a record of this session speaks of."""
    anatomy = session.policy.anatomy
    weight = next(parameter for parameter in session.policy.model.parameters() if parameter.is_floating_point())
    return Provenance(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
        model_type=str(getattr(session.policy.model.config, "model_type", type(session.policy.model).__name__)),
        num_layers=anatomy.num_layers,
        hidden_size=anatomy.hidden_size,
        vocab_size=anatomy.vocab_size,
        policy_hash=hashes[0],
        reference_hash=hashes[1],
        probe_hash=probes.content_hash,
        probe_name=context.probe_name,
        probe_source=probes.source,
        probe_held_out=probes.held_out,
        pairs=len(probes),
        pairs_dropped=dict(probes.dropped),
        seed=session.config.seed,
        device=str(session.device),
        parameter_dtype=str(weight.dtype).removeprefix("torch."),
        compute_dtype=str(session.policy.compute_dtype).removeprefix("torch."),
        max_length=probes.max_length,
        truncation_mode=probes.truncation_mode,
        shared_prompts=session.shared,
        layout_reason=session.layout_reason,
        beta=context.beta,
        config=session.config.to_dict(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _arrays(found: Collected, findings: LowRankFindings | None, sites: list[SiteFindings]) -> dict[str, np.ndarray]:
    arrays = {f"per_pair.{name}": values for name, values in found.per_pair.items()} | site_arrays(sites)
    if findings is not None:
        for (basis, layer), values in findings.bases.items():
            arrays[f"subspace.{basis}.{layer}"] = values
        for (basis, layer), values in findings.fitted.items():
            arrays[f"per_pair.low_rank.{basis}.{layer}"] = values
        for (_, layer), values in findings.random.items():
            arrays[f"per_pair.low_rank.random.{layer}"] = values.mean(axis=-1)
    return arrays


def ticker(context: Context, total: int) -> Callable[[], None]:
    """What to call after each of ``total`` batches: it moves the progress bar, where one is wanted."""
    if context.progress is None:
        return lambda: None
    bar = context.progress(total, "align_audit")

    def tick() -> None:
        bar.update(1)
        if bar.n >= total:
            bar.close()

    return tick
