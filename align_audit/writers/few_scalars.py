"""The ten curves that tell how a run stands, and the text beside them.

Tags are ``align_audit health/<name>`` and ``align_audit where/<name>``, those of a named probe set
``align_audit health/<probe name>/<name>``: TensorBoard groups curves by what stands before the first slash.

- ``health``: ``status`` (0 HEALTHY, 1 WATCH, 2 ERROR, 3 BLIND), ``chosen_logp_change_per_token`` and ``kl`` (nats per token),
  ``next_token_accuracy`` and ``reward_accuracy`` (shares), ``entropy_ratio`` (the policy's over the reference's);
- ``where``, of full audits: ``peak_layer``, ``peak_share`` (of the shift, gained there), ``additivity``, ``delta_align``.
"""

from __future__ import annotations

import math

from align_audit.writers.brief import figures_in_words, what_to_do
from align_audit.writers.markdown import escaped
from align_audit.writers.scalars import ROOT
from align_audit.writers.standing import Standing, evidence_in_words, peak_share, where_in_words

HEALTH = f"{ROOT} health"
WHERE = f"{ROOT} where"
STATUS_VALUES = {"HEALTHY": 0.0, "WATCH": 1.0, "ERROR": 2.0, "BLIND": 3.0}


def group_of(group: str, probe_name: str | None) -> str:
    """What the tags of a group begin with, up to the last slash."""
    return group if probe_name is None else f"{group}/{probe_name}"


def few_scalars(standing: Standing) -> dict[str, float]:
    """Tag → value of what is one finite number at this audit."""
    record = standing.record
    margins, name = record.margins, record.provenance.probe_name
    health = {
        "status": STATUS_VALUES[standing.status.word],
        "chosen_logp_change_per_token": margins.chosen_logp_change_per_token.mean,
        "kl": margins.kl.mean,
        "next_token_accuracy": margins.token_accuracy.mean,
        "reward_accuracy": standing.reward_accuracy.mean,
        "entropy_ratio": standing.entropy_ratio,
    }
    where: dict[str, float] = {}
    if (patching := record.patching) is not None:
        peak = patching.peak_layer
        where["peak_layer"] = math.nan if peak is None else float(peak)
        where["peak_share"] = peak_share(record)
        where["additivity"] = patching.additivity.mean
    if record.spinal is not None:
        where["delta_align"] = record.spinal.delta_align
    tags = {f"{group_of(HEALTH, name)}/{key}": value for key, value in health.items()}
    tags |= {f"{group_of(WHERE, name)}/{key}": value for key, value in where.items()}
    return {tag: value for tag, value in tags.items() if math.isfinite(value)}


def status_text(standing: Standing) -> str:
    """How the run stands at an audit, in Markdown: status, figures, where, and what to do."""
    lines = [f"**{standing.status.word}** at step {standing.record.step}", figures_in_words(standing)]
    if standing.status.word != "HEALTHY":
        lines[0] += f": {escaped(standing.headline())}"
    step = standing.record.step
    lines.append(f"*Where:* {where_in_words(standing.full, step)}. *Evidence:* {evidence_in_words(standing.full)}.")
    if standing.status.word != "HEALTHY":
        lines.append(f"**Do:** {escaped(what_to_do(standing))}")
    return "\n\n".join(lines)
