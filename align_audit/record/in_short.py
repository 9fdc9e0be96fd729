"""One audit in a line and in a small table, for whoever looks at a record in a prompt or a notebook."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

from align_audit.errors import plain

if TYPE_CHECKING:
    from align_audit.record.audit_record import AuditRecord
    from align_audit.record.estimate import Estimate


_LEFT = 'style="text-align:left"'


def line_of(record: AuditRecord) -> str:
    """Step, kind, pairs, the two figures that are asked for first, and what is said about where the preference sits.

    Example:
        >>> line_of(record)                                                                    # doctest: +SKIP
        '<AuditRecord step 60, full, 24 pairs: margin shift +14.6 nats, KL 0.173 nats/token, localized in layers 3–4>'
    """
    there, margins = record.provenance, record.margins
    on = "" if there.probe_name is None else f" of {there.probe_name!r}"
    figures = f"margin shift {_number(margins.shift, '+')} nats, KL {_number(margins.kl)} nats/token"
    where = "" if record.finding is None else ", " + _claim(record)
    alerts = [alert.rule for alert in record.alerts if alert.event != "resolved" and alert.level != "info"]
    warned = f", alerts: {', '.join(alerts)}" if alerts else ""
    return plain(f"<AuditRecord step {record.step}, {record.kind}, {there.pairs} pairs{on}: {figures}{where}{warned}>")


def html_of(record: AuditRecord) -> str:
    """A table of the figures of a record with their intervals; everything in it is escaped."""
    from align_audit.record.stored_records import Head

    there, margins = record.provenance, record.margins
    on = "" if there.probe_name is None else f" of {there.probe_name!r}"
    rows = {
        "pairs": f"{there.pairs}{on} from {there.probe_source}",
        "margin shift (nats)": f"{margins.shift:.3g}",
        "reward accuracy": f"{Head.of(record).reward_accuracy:.3g}",
        "chosen log-prob. change (nats/token)": f"{margins.chosen_logp_change_per_token:.3g}",
        "KL to the reference (nats/token)": f"{margins.kl:.3g}",
        "next tokens right": f"{margins.token_accuracy:.3g}",
        "where": "not measured" if record.finding is None else record.finding.words,
        "alerts": "; ".join(f"{alert.level} {alert.rule} ({alert.event})" for alert in record.alerts) or "none",
    }
    lines = "".join(
        f"<tr><th {_LEFT}>{html.escape(name)}</th><td {_LEFT}>{html.escape(plain(words))}</td></tr>"
        for name, words in rows.items()
    )
    caption = html.escape(plain(f"align_audit, step {record.step}, {record.kind} audit of {there.model_type}"))
    return f"<table><caption>{caption}</caption><tbody>{lines}</tbody></table>"


def _claim(record: AuditRecord) -> str:
    assert record.finding is not None
    # What a sentence goes on to say is its evidence.
    return record.finding.words.split(" (")[0] if record.finding.localized else "no localization claimed"


def _number(estimate: Estimate, sign: str = "") -> str:
    return "not known" if math.isnan(estimate.mean) else f"{estimate.mean:{sign}.3g}"
