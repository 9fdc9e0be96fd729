"""What a run needs beside models and pairs: versions, a folder to write to, a log, trackers, and what its options name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from torch import nn

from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError, counted
from align_audit.models.reference import policy_fingerprint
from align_audit.monitoring.doctor_plan import Check, Plan
from align_audit.monitoring.start import checked_writers, continues
from align_audit.options.trackers import TRACKER_NAMES
from align_audit.probes.pairs import ProbeSet
from align_audit.record.log import FOLDER, RECORDS, look_into_log
from align_audit.record.stored_records import StoredRecords
from align_audit.writers.writer import Surroundings

_ROOM = 2**30
"""Bytes that a run's log, pictures and arrays never come near."""


def versions() -> Check:
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


def stored_in(plan: Plan) -> StoredRecords | AlignAuditError:
    """What the log of the run's folder holds, read once for all that is said of it; or why it cannot be opened."""
    if plan.output_dir is None:
        return StoredRecords()
    try:
        return look_into_log(plan.output_dir)
    except AlignAuditError as error:
        return error


def place_checks(plan: Plan, config: AuditConfig, stored: StoredRecords | AlignAuditError) -> Iterator[Check]:
    """Can the run write where it means to, do its trackers exist, and would its writers start?

    Args:
        stored: as :func:`stored_in` gives it.
    """
    if plan.output_dir is not None:
        yield _folder(plan.output_dir, stored)
    reported = _reported(plan, config)
    for name in reported:
        if name not in ("none", "all"):
            yield _tracker(name, config)
    # The writers that the run would have, on a folder that they are not to touch.
    around = Surroundings(
        plan.output_dir or Path(),
        trackers=tuple(name for name in TRACKER_NAMES if name in reported or "all" in reported),
    )
    try:
        checked_writers(config, around)
    except AlignAuditError as error:
        yield Check(
            "writers", "red", str(error), "give it what it needs, or take it out of the audit's options (--config)"
        )


def texts_kept(config: AuditConfig) -> Check:
    """How much of the data's text audits keep."""
    pairs = config.examples.pairs
    if not pairs:
        return Check("texts", "green", "audits keep no text of the data (examples.pairs is 0)")
    return Check(
        "texts",
        "green",
        f"audits keep, beside the records, the text of the {pairs} pairs that lost and the {pairs} that gained most "
        f"(examples.pairs: {pairs}; 0 keeps none)",
    )


def not_tried(plan: Plan) -> Iterator[Check]:
    """What nothing here says anything about."""
    several = f"{plan.processes} processes (everything is tried and timed on one)" if plan.processes > 1 else None
    untried = (*plan.untried, several) if several else plan.untried
    if untried:
        yield Check(
            "not tried",
            "yellow",
            "; ".join(untried),
            "a first run of a few steps shows it: what cannot work is refused before the first step",
        )
    if plan.unforeseen:
        yield Check(
            "not foreseen", "yellow", "; ".join(plan.unforeseen), "--steps and --save-steps, where they are known"
        )


def log_check(
    plan: Plan,
    config: AuditConfig,
    policy: nn.Module,
    sets: Mapping[str | None, ProbeSet],
    stored: StoredRecords | AlignAuditError,
) -> Iterator[Check]:
    """What would become of the audits that the run's folder holds already. Why a log cannot be opened is said of the folder.

    Args:
        stored: as :func:`stored_in` gives it.
        policy: with the weights that training starts from.
    """
    if isinstance(stored, AlignAuditError) or not stored:
        return
    audits = counted(len(stored), "audit")
    if plan.resumes:
        yield Check("log", "green", f"training that is resumed goes on with the {audits} there")
    elif not plan.lora and continues(stored, policy_fingerprint(policy), sets, config):
        yield Check("log", "green", f"a run goes on with the {audits} there, of this start, these pairs and options")
    else:
        unless = ", unless the adapters begin exactly as they did then" if plan.lora else ""
        yield Check(
            "log",
            "yellow",
            f"training that begins from step 0 moves the {audits} there to a folder previous-N{unless}",
            "choose another output_dir, or resume that run",
        )


def _folder(folder: Path, stored: StoredRecords | AlignAuditError) -> Check:
    if isinstance(stored, AlignAuditError):
        return Check("output", "red", str(stored), "choose another output_dir")
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < _ROOM:
        return Check(
            "output", "yellow", f"{free / 2**20:.0f} MiB are free at {place}", "make room: checkpoints need more"
        )
    if stored:
        return Check("output", "yellow", f"{folder} holds {counted(len(stored), 'audit')} of an earlier run")
    return Check("output", "green", f"records go to {folder / FOLDER / RECORDS} ({free / 2**30:.0f} GiB free)")


def _reported(plan: Plan, config: AuditConfig) -> tuple[str, ...]:
    """What the trainer reports to; where that is not known, what the options count on."""
    if plan.report_to is not None:
        return plan.report_to
    return config.trackers if isinstance(config.trackers, tuple) else ()


def _tracker(name: str, config: AuditConfig) -> Check:
    if name not in ("tensorboard", *TRACKER_NAMES):
        return Check("trackers", "yellow", f"{name} gets the trainer's curves, but none of the audit's")
    if importlib.util.find_spec(name) is None:
        return Check("trackers", "red", f"report_to names {name}, which is not installed", f"pip install {name}")
    off = config.tensorboard == "off" if name == "tensorboard" else not _wants(name, config)
    if off:
        return Check("trackers", "yellow", f"{name} gets the trainer's curves alone: the audit's options leave it out")
    return Check("trackers", "green", f"the audit writes to {name} beside the trainer's curves")


def _wants(name: str, config: AuditConfig) -> bool:
    return config.trackers == "auto" or (config.trackers != "off" and name in config.trackers)
