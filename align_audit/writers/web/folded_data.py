"""What a page folds away: transfer between probe sets, continuations, cost, provenance, and what is not known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align_audit.errors import RecordError
from align_audit.record.audit_record import IN_TRAINING, AuditRecord
from align_audit.record.numbers import numbers
from align_audit.record.run import AuditRun
from align_audit.record.stored_records import Head, heads_of
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.standing import figure, percent
from align_audit.writers.web.json_values import estimate, number, row, text
from align_audit.writers.words import cost_in_words

TRANSFER = "transfer.json"
"""The record that ``align-audit transfer`` leaves in an output folder."""
MOST_UNKNOWN = 60
"""Reasons of what is not known that a page lists; numbers of one reason stand together."""


def transfer_data(run: AuditRun) -> dict[str, Any] | None:
    """The transfer matrix that lies in the output folder; None: there is none, or it is of another run."""
    path = run.output_dir / TRANSFER
    if not path.is_file():
        return None
    try:
        record = TransferRecord.load(path)
    except (RecordError, OSError) as error:
        return {"title": text(f"The transfer record cannot be read: {error}"), "cells": []}
    policies = {there.policy_hash for there in record.provenance.values()}
    if run.is_set_aside and policies.isdisjoint(head.policy_hash for head in heads_of(run.records)):
        return None  # it is of the run that was begun in its place
    cells = [
        {
            "basis": basis,
            "layer": layer,
            "fitted": text(fitted),
            "patched": text(patched),
            "rank": record.ranks[-1],
            "fraction": estimate(cell.effect_fraction[-1]),
            "pairs": cell.pairs,
            "control": cell.control.verdict.replace("_", " "),
        }
        for basis, layer, fitted, patched, cell in record.each()
        if cell.effect_fraction
    ]
    return {"title": f"Transfer between probe sets at step {record.step}", "cells": cells}


def continuations_data(record: AuditRecord | None) -> list[list[str]]:
    """What policy and reference write, side by side: rows of a name, the policy's and the reference's figure."""
    if record is None or record.generations is None:
        return []
    said = record.generations
    return [
        ["4-grams repeated", percent(said.repetition.mean), percent(said.reference_repetition.mean)],
        ["tokens", figure(said.length.mean), figure(said.reference_length.mean)],
        [f"ended within {said.max_new_tokens} tokens", percent(said.ended.mean), percent(said.reference_ended.mean)],
        ["surprise to the reference (nats/token)", figure(said.surprise.mean), figure(said.reference_surprise.mean)],
    ]


def cost_data(heads: Sequence[Head]) -> dict[str, Any]:
    """Seconds of each audit by step, and what they come to in words (:func:`~align_audit.writers.words.cost_in_words`)."""
    return {
        "title": cost_in_words(heads),
        "steps": [head.step for head in heads],
        "kinds": [head.kind for head in heads],
        "seconds": row(head.seconds for head in heads),
        "peak_memory_mib": number(max((head.peak_memory for head in heads), default=0) / 2**20),
    }


def provenance_data(record: AuditRecord | None, run: AuditRun) -> list[list[str]]:
    """Rows of a name and a text: which models, pairs and versions the numbers speak of."""
    rows = [["log", str(run.directory)]]
    if record is not None:
        there = record.provenance
        held_out = {True: "held out", False: "training pairs", None: "not known whether held out"}[there.probe_held_out]
        dropped = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in there.pairs_dropped.items() if count)
        rows += [
            ["model", f"{there.model_type}, {there.num_layers} layers, {there.hidden_size} wide"],
            ["policy", there.policy_hash],
            ["reference", f"{there.reference_hash} ({record.reference_check.source})"],
            ["reference check", f"{record.reference_check.verdict.replace('_', ' ')}: {record.reference_check.reason}"],
            ["probe pairs", f"{there.pairs} ({held_out}), {there.probe_source}" + (f"; dropped: {dropped}" if dropped else "")],
            ["probe hash", there.probe_hash],
            ["beta", "not known" if there.beta is None else f"{there.beta:g}"],
            ["device", f"{there.device}, parameters {there.parameter_dtype}, computed in {there.compute_dtype}"],
            ["versions", ", ".join(f"{name} {version}" for name, version in there.versions.items())],
            ["record", f"schema {record.schema_version}, methods {record.methods_version}, made {there.created}"],
        ]  # fmt: skip
    return [[name, text(words)] for name, words in rows]


def unknown_data(record: AuditRecord | None) -> list[dict[str, Any]]:
    """What an audit could not know, by reason: ``reason``, and the ``paths`` of the numbers in the record."""
    if record is None:
        return []
    paths: dict[str, list[str]] = {}
    for item in numbers(record):
        # A verdict's reason stands with it, and is why its value is known, too.
        if item.reason and not item.path.startswith("controls.") and item.path not in IN_TRAINING:
            places = paths.setdefault(item.reason, [])
            if item.series not in places:
                places.append(item.series)
    for path, reason in record.reasons.items():
        if path in IN_TRAINING:  # what an audit costs is nothing about the models
            continue
        places = paths.setdefault(reason, [])
        if not any(path == place or path.startswith(f"{place}.") for place in places):
            places.append(path)
    listed = list(paths.items())[:MOST_UNKNOWN]
    return [{"reason": text(reason), "paths": [text(path) for path in places[:6]]} for reason, places in listed]


def failures_data(run: AuditRun) -> list[list[str]]:
    """Rows of a step, a time and the last line of the traceback, for each audit that broke; the newest hundred."""
    rows = []
    for failure in run.failures[-100:]:
        lines = failure.error.strip().splitlines()
        on = "" if failure.probe_name is None else f" (probes {failure.probe_name!r})"
        rows.append([f"{failure.step}", text(failure.time), text((lines[-1] if lines else "no traceback") + on)])
    return rows
