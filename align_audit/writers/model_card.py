"""A section of a model card, in Markdown: what was audited, how it stands, where the preference sits, and on which evidence.

The section lies between two markers, so that it can be written again without touching anything else of the file. What comes
from outside (names, sources, messages) is escaped: it is shown as text wherever Markdown is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from align_audit.errors import ConfigurationError, RecordError, listed, plain
from align_audit.record.audit_record import AuditRecord, control_items
from align_audit.record.course import present_course
from align_audit.record.estimate import Estimate
from align_audit.record.finding import confidence_in_words
from align_audit.record.run import AuditRun
from align_audit.record.status import Status
from align_audit.writers.brief import what_to_do
from align_audit.writers.markdown import escaped
from align_audit.writers.standing import Standing, figure, percent, standing_at, where_in_words

BEGIN = "<!-- align_audit:begin -->"
END = "<!-- align_audit:end -->"


def model_card(run: AuditRun, step: int | None = None, checkpoints: Mapping[int, str] | None = None) -> str:
    """The section, from the first marker to the last, without a line's end behind it.

    Args:
        step: of the audit that it is of; None: the last.
        checkpoints: step → name, of those that exist.

    Raises:
        RecordError: nothing was audited, or not at that step.
    """
    steps = sorted({record.step for record in present_course(run.records)})
    if not steps:
        raise RecordError(f"no audit in {plain(run.directory)} to write a model card of: {plain(run.status.reason)}")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise RecordError(
            f"no audit of step {step} in {plain(run.directory)}; those audited are {listed(steps)} (--step names another)"
        )
    lines = [BEGIN, "## Alignment audit", ""]
    for name in run.probe_names:
        narrowed = run.select(name)
        record = _of_step(narrowed, step)
        if record is not None:
            if name is not None:
                lines += [f"### Probes {escaped(name)}", ""]
            lines += [*_section(narrowed, record, (checkpoints or {}).get(step)), ""]
    return "\n".join([*lines[:-1], END])


def _of_step(run: AuditRun, step: int) -> AuditRecord | None:
    """The audit that counts for a step: the last full one, where there is one."""
    audits = [record for record in present_course(run.records) if record.step == step]
    full = [record for record in audits if record.kind == "full"]
    return next(reversed(full or audits), None)


def _section(run: AuditRun, record: AuditRecord, checkpoint: str | None) -> Iterator[str]:
    standing = standing_at(record, run.records, run.training_log)
    newest = record.step == max(each.step for each in present_course(run.records))
    status = run.status if newest else standing.status
    standing = replace(standing, status=status)  # failures since that audit are what is to be done about
    yield _verdict(standing, status)
    yield ""
    yield "| | |"
    yield "|---|---|"
    for name, value in _rows(standing, checkpoint):
        yield f"| {name} | {value} |"
    yield ""
    yield from _evidence(standing.full, record.step)
    yield ""
    yield _made_with(record)


def _verdict(standing: Standing, status: Status) -> str:
    at, since = standing.record.step, "" if status.since is None else f" since step {status.since}"
    if status.word == "BLIND":
        words = f"**BLIND**{since} (last audit: step {at}). {escaped(status.reason)}"
    else:
        words = f"**{status.word}** at step {at}{'' if status.since == at or not since else ',' + since}. "
        words += escaped(status.reason)
    if status.blind:
        words += f" {escaped(status.blind)}"
    return words if status.word == "HEALTHY" else f"{words} **Do:** {escaped(what_to_do(standing))}."


def _rows(standing: Standing, checkpoint: str | None) -> Iterator[tuple[str, str]]:
    record = standing.record
    margins, there = record.margins, record.provenance
    yield "checkpoint", escaped(checkpoint) if checkpoint is not None else f"step {record.step}"
    yield "chosen answers against the reference", f"{_signed(margins.chosen_logp_change_per_token)} nats per token"
    yield "KL to the reference", f"{_unsigned(margins.kl)} nats per token"
    yield (
        "next tokens right",
        f"{_percent(margins.token_accuracy)}, reference {percent(margins.reference_token_accuracy.mean)}",
    )
    yield "reward accuracy", _percent(standing.reward_accuracy)
    yield "margin shift, nats", _signed(margins.shift)
    if standing.reward_margin is not None:
        yield "reward margin, β·nats", f"{figure(standing.reward_margin, signed=True)} (β = {there.beta:g})"
    yield "where", escaped(where_in_words(standing.full, record.step))
    groups = "" if there.groups in (None, there.pairs) else f", {there.groups} independent"
    held_out = {True: ", held out", False: ", trained on", None: ""}[there.probe_held_out]
    yield "probe pairs", f"{there.pairs}{groups}{held_out}, from {escaped(there.probe_source)}"


def _evidence(full: AuditRecord | None, step: int) -> Iterator[str]:
    """What is said about where, in whole, and each control with its verdict."""
    if full is None:
        yield "Where the preference sits was not measured."
        return
    at = "" if full.step == step else f" (of step {full.step})"
    said = full.finding.words if full.finding is not None else "nothing was said about where the preference sits"
    yield f"Where the preference sits{at}: {escaped(said)}."
    verdicts = {"passed": "passed", "failed": "failed", "not_run": "not run"}
    yield ""
    for name, control in control_items(full):
        yield f"- {name.replace('_', ' ')} control {verdicts[control.verdict]}: {escaped(control.reason)}"


def _made_with(record: AuditRecord) -> str:
    there = record.provenance
    versions = ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in there.versions.items())
    models = f"policy {escaped(there.policy_hash)}, reference {escaped(there.reference_hash)}"
    return (
        f"Intervals over probe pairs are at {confidence_in_words(record)}. "
        f"Reference: {escaped(record.reference_check.source)}. "
        f"Hashes: {models}, probes {escaped(there.probe_hash)}. {record.kind.capitalize()} audit of {escaped(there.created)} "
        f"by methods {record.methods_version}, schema {record.schema_version}, with {versions}."
    )


def _interval(estimate: Estimate, low: str, high: str) -> str:
    return "" if math.isnan(estimate.low) or math.isnan(estimate.high) else f" \\[{low}, {high}\\]"


def _signed(estimate: Estimate) -> str:
    ends = figure(estimate.low, signed=True), figure(estimate.high, signed=True)
    return figure(estimate.mean, signed=True) + _interval(estimate, *ends)


def _unsigned(estimate: Estimate) -> str:
    return figure(estimate.mean) + _interval(estimate, figure(estimate.low), figure(estimate.high))


def _percent(estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return f"not known ({escaped(estimate.reason)})" if estimate.reason else "not known"
    return percent(estimate.mean) + _interval(estimate, percent(estimate.low), percent(estimate.high))


# --- in a file --------------------------------------------------------------------------------------------------------


def with_section(page: bytes, section: str) -> bytes:
    """A file with the section in place of the one that it holds between the markers, or at its end where it holds none.

    Everything else is as it was, byte for byte; lines of the section end as those of the file do.

    Raises:
        ConfigurationError: the markers in the file are not one pair.

    Example:
        >>> with_section(b"# Model", "<!-- align_audit:begin -->new<!-- align_audit:end -->")
        b'# Model\\n\\n<!-- align_audit:begin -->new<!-- align_audit:end -->\\n'
    """
    ending = b"\r\n" if b"\r\n" in page else b"\n"
    made = ending.join(line.encode() for line in section.split("\n"))
    begin, end = BEGIN.encode(), END.encode()
    counts = page.count(begin), page.count(end)
    if counts == (0, 0):
        gap = b"" if not page else ending if page.endswith(b"\n") else ending * 2
        return page + gap + made + ending
    start, stop = page.find(begin), page.find(end)
    if counts != (1, 1) or stop < start:
        raise ConfigurationError(
            f"found {counts[0]} times {BEGIN} and {counts[1]} times {END}; expected one of each, in this order, around the "
            "section to replace. Remove them by hand, and the section is appended"
        )
    return page[:start] + made + page[stop + len(end) :]
