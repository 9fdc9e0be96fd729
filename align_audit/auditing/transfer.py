"""``transfer``: do the subspaces that carry a policy's change on some pairs carry it on others? (METHODS §4).

The experiment that *Alignment is Localized* (arXiv 2510.16167) asks for: a subspace fitted on one probe set, harmlessness
say, patched on another, helpfulness.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import nn

from align_audit.auditing.given import check_given
from align_audit.auditing.measurements.attribution import Attribution
from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.low_rank import layers_to_reconstruct
from align_audit.auditing.measurements.measurement import AuditTask
from align_audit.auditing.measurements.patching import Patching
from align_audit.auditing.measurements.subspaces import Fit, Key, Reconstruction, TokenGrams
from align_audit.auditing.measurements.transfer_cells import EXCLUDED, HELD_OUT, Cells, ProbeSide, held_out_spans
from align_audit.auditing.origin import check_origin
from align_audit.auditing.passes import first_pass, second_pass
from align_audit.auditing.probe_files import Probes, opened
from align_audit.auditing.progress import ticker
from align_audit.auditing.provenance import provenance_of
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.memory import memory_explained
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, ProbeError
from align_audit.measures.resampling import LEAST_GROUPS
from align_audit.models.anatomy import Anatomy
from align_audit.models.reference import Reference, fingerprints, load_policy, refuse_itself, resolve_reference
from align_audit.models.saved_pair import check_saved
from align_audit.probes.names import check_names
from align_audit.record.audit_record import Cost
from align_audit.record.checkpoint_names import step_to_record
from align_audit.record.transfer_record import RandomSubspaces, SubspaceAngles, TransferCell, TransferRecord

if TYPE_CHECKING:
    from align_audit.probes.pairs import ProbeSet

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")

Which = dict[tuple[str, str], np.ndarray]
"""(fitted set, patched set) → [N] which span each of the patched set's pairs is patched with."""


def transfer(
    policy: nn.Module | str | Path,
    reference: nn.Module | str | Path | None,
    probes: Mapping[str, Probes],
    config: AuditConfig | None = None,
    step: int | None = None,
    *,
    anatomy: Anatomy | None = None,
) -> TransferRecord:
    """The transfer matrix: subspaces fitted on each probe set, patched on the pairs of each (METHODS §4).

    On the diagonal the sets are cross-fit by halves, with the numbers of an ordinary audit. Off it a subspace is fitted on
    all pairs of one set; a pair of the other set that occurs in it too is patched with the subspace of the half it is
    not in, and left out where it is in both.

    Args:
        policy, reference: as :func:`align_audit.audit`.
        probes: at least two sets by name; paths of pairs as of :func:`align_audit.audit`.
        config: its ``low_rank`` says bases, ranks, layers and random draws (``layers="auto"``: what each set would choose
            by itself, together), ``patching`` the positions, ``statistics`` the intervals. What else it switches on or off
            is not looked at.
        step: as :func:`align_audit.audit`.
        anatomy: where the decoder layers are, for a model in which they cannot be found.

    Returns:
        The record. Neither model, nor any random state, is changed.

    Raises:
        ConfigurationError: names that cannot be ones, fewer than two sets, no layer to look at, or an argument that
            :func:`align_audit.audit` would refuse.
        ProbeError: no set has two pairs.
        ReferenceUnavailableError, AnatomyError: as :func:`align_audit.audit`.

    Example::

        record = transfer(policy, reference, {"harmless": harmless, "helpful": helpful})
        record.effect_fraction("shift", record.layers[0])["harmless"]["helpful"][4].mean
    """
    if not isinstance(probes, Mapping):
        raise ConfigurationError(f"expected probe sets by name, {{'harmless': …}}; found {type(probes).__name__}")
    check_names(probes)
    check_given(policy=policy, reference=reference, config=config, anatomy=anatomy)
    config = config or AuditConfig()
    folder = None if isinstance(policy, nn.Module) else Path(policy)
    step = step_to_record(step, folder)
    sets = opened(probes, policy, reference, config)
    _check_sets(sets)
    if not isinstance(policy, nn.Module):
        if not isinstance(reference, nn.Module):
            check_saved(policy, reference)
        policy = load_policy(policy, reference=reference)
    resolved = resolve_reference(policy, reference)
    hashes = fingerprints(policy, resolved)
    refuse_itself(hashes[0], resolved, hashes[1])
    if folder is not None:
        check_before_transfer(folder, step or None, policy, resolved, hashes, named=reference is not None)
    return run_transfer(policy, resolved, sets, config, step, anatomy=anatomy, hashes=hashes)


def check_before_transfer(
    folder: Path,
    step: int | None,
    policy: nn.Module,
    reference: Reference,
    hashes: tuple[str, str],
    *,
    named: bool,
    tell: Callable[[str], None] = logger.warning,
) -> None:
    """Compare a saved policy and its reference with the log beside it (arguments and errors as of ``check_origin``).

    Its pairs may be any. Another reference that was named is said here, and in the record's ``reference_source``.
    """
    origin = check_origin(folder, step, policy, reference, hashes, {}, named=named, tell=tell)
    if origin is not None and origin.reference.verdict == "failed":
        reference.source += " (not the one that the run of this checkpoint was audited against)"


def run_transfer(
    policy: nn.Module,
    reference: Reference,
    probes: Mapping[str, ProbeSet],
    config: AuditConfig,
    step: int = 0,
    *,
    anatomy: Anatomy | None = None,
    hashes: tuple[str, str] | None = None,
    progress: Callable[[int, str], Any] | None = None,
) -> TransferRecord:
    """:func:`transfer`, with the reference found already.

    Args:
        hashes: of the weights of policy and reference, where they have just been read.
        progress: makes a progress bar of so many batches.
    """
    _check_sets(probes)
    began = time.perf_counter()
    with memory_explained(), OpenModels(policy, reference, anatomy=anatomy, hashes=hashes) as models:
        sides, tick = _gather(models, probes, _settings(config), step, progress)
        chosen, layers = _layers(sides)
        reasons: dict[str, str] = {}
        for side in sides:
            grams = TokenGrams(side.session, layers)
            grams.gather(tick)
            side.fit = Fit(grams)
        which = {
            (fitted.name, patched.name): held_out_spans(
                patched.session.pairs, fitted.session.pairs, fitted.fitted.halves
            )
            for fitted in sides
            for patched in sides
            if fitted is not patched
        }
        cells, random = _patch(sides, which, layers, Cells(reasons), tick)
        first = sides[0].session
        return TransferRecord(
            step=step,
            probe_names=list(probes),
            provenance={side.name: provenance_of(side.session, side.task.request) for side in sides},
            reference_source=reference.source,
            ranks=sides[0].fitted.ranks,
            layers=layers,
            chosen_layers=chosen,
            shift={side.name: side.behaviour.mean_shift for side in sides},
            shared_pairs=_shared(sides, which),
            cells=cells,
            random=random,
            angles=_angles(sides, layers, Cells(reasons)),
            cost=Cost(
                seconds=time.perf_counter() - began,
                peak_memory=max(side.session.meter.peak for side in sides),
                forward_equivalents=first.forward_equivalents([pair for side in sides for pair in side.session.pairs]),
            ),
            reasons=reasons,
        )


def _check_sets(probes: Mapping[str, ProbeSet]) -> None:
    """Refuse what no matrix can be made of."""
    if len(probes) < 2:
        raise ConfigurationError(f"a transfer is between at least two probe sets; found {', '.join(probes)} alone")
    most = max(pairs.groups for pairs in probes.values())
    if most < LEAST_GROUPS:
        raise ProbeError(
            f"no probe set has more than {most} independent pairs (those that share a prompt are one), so nothing has an "
            f"interval; expected at least {LEAST_GROUPS} in one of them"
        )


def _settings(config: AuditConfig) -> AuditConfig:
    """As an audit would run with these options, but for what the matrix does not need."""
    auto = config.low_rank.layers == "auto"
    values = config.to_dict()
    # Only to choose layers by themselves do the sets need block transplants and the first layer's gain.
    values["patching"] |= {
        "enabled": True, "transplants": auto, "embedding": auto, "reverse": False, "noise_draws": 0,
    }  # fmt: skip
    values["low_rank"]["enabled"] = True
    for part in ("localization", "spinal"):
        values[part]["enabled"] = False
    return AuditConfig.from_dict(values)


def _gather(
    models: OpenModels,
    probes: Mapping[str, ProbeSet],
    config: AuditConfig,
    step: int,
    progress: Callable[[int, str], Any] | None,
) -> tuple[list[ProbeSide], Callable[[], None]]:
    """The full patch of every set: the effects that those of the subspaces are shares of."""
    sides = []
    for name, pairs in probes.items():
        session = Session(models, pairs.pairs, config, truncation_mode=pairs.truncation_mode)
        task = AuditTask(session, AuditRequest(pairs, config, step, probe_name=name), ReferenceCache())
        task.begin((Behaviour, Attribution, Patching))
        sides.append(ProbeSide(name, task))
    tick = ticker(progress, 3 * sum(len(side.session.plan) for side in sides))
    for side in sides:
        first_pass(side.task, tick)
    return sides, tick


def _layers(sides: list[ProbeSide]) -> tuple[dict[str, list[int]], list[int]]:
    """What each set asks for, and all of it."""
    chosen, why = {}, {}
    for side in sides:
        summary = side.task[Patching].summary
        assert summary is not None
        chosen[side.name] = layers_to_reconstruct(side.session, summary)
        why[side.name] = summary.peak_reason
    layers = sorted({layer for wanted in chosen.values() for layer in wanted})
    if not layers:
        reasons = "; ".join(f"on {name!r} {reason}" for name, reason in why.items())
        raise ConfigurationError(
            f"no layer to reconstruct at ({reasons}). Name layers (low_rank.layers, or --layer), or give a policy that has "
            "moved away from its reference"
        )
    return chosen, layers


def _patch(
    sides: list[ProbeSide], which: Which, layers: list[int], cells: Cells, tick: Callable[[], None]
) -> tuple[dict[str, dict[int, dict[str, dict[str, TransferCell]]]], dict[str, dict[int, dict[str, RandomSubspaces]]]]:
    """Every set's subspaces patched on every set's pairs, one pass over each set."""
    bases = sides[0].session.config.low_rank.bases
    keys: list[Key] = [(basis, layer) for basis in bases for layer in layers]
    by_key: dict[Key, dict[str, dict[str, TransferCell]]] = {key: {side.name: {} for side in sides} for key in keys}
    random: dict[Key, dict[str, RandomSubspaces]] = {key: {} for key in keys}
    for patched in sides:
        looks: dict[str, Reconstruction] = {}
        for fitted in sides:
            if fitted is patched:
                looks[fitted.name] = Reconstruction(patched.session, fitted.fitted, random=bases)
            elif (which[fitted.name, patched.name] != EXCLUDED).any():
                spans = which[fitted.name, patched.name]
                # What is left out in the end is walked with the others: a batch is patched as a whole.
                spans = np.where(spans == EXCLUDED, HELD_OUT, spans)
                looks[fitted.name] = Reconstruction(patched.session, fitted.fitted, spans, random=())
        second_pass(patched.session, list(looks.values()), tick)
        for key in keys:
            chance = cells.random(patched, key, looks[patched.name])
            if chance is not None:
                random[key][patched.name] = chance
            for fitted in sides:
                spans = which.get((fitted.name, patched.name), fitted.fitted.spans_of_pairs)
                by_key[key][fitted.name][patched.name] = cells.cell(
                    fitted, patched, spans, looks.get(fitted.name), key, chance
                )
    return _nested(by_key), _nested(random)


def _angles(sides: list[ProbeSide], layers: list[int], cells: Cells) -> dict[str, dict[int, list[SubspaceAngles]]]:
    pairs = [(first, second) for place, first in enumerate(sides) for second in sides[place + 1 :]]
    return {
        basis: {
            layer: [cells.angles(*pair, (basis, layer), place) for place, pair in enumerate(pairs)] for layer in layers
        }
        for basis in sides[0].session.config.low_rank.bases
    }


def _shared(sides: list[ProbeSide], which: Which) -> dict[str, dict[str, int]]:
    return {
        fitted.name: {
            patched.name: int((which[fitted.name, patched.name] != HELD_OUT).sum())
            for patched in sides
            if patched is not fitted
        }
        for fitted in sides
    }


def _nested(by_key: Mapping[Key, _Value]) -> dict[str, dict[int, _Value]]:
    nested: dict[str, dict[int, _Value]] = {}
    for (basis, layer), value in by_key.items():
        nested.setdefault(basis, {})[layer] = value
    return nested
