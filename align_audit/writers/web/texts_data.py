"""What changed in text: the pairs that lost and gained most, token by token, as data of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align_audit.record.audit_record import AuditRecord
from align_audit.record.pair_texts import PairText, PairTexts, TokenChange
from align_audit.record.run import AuditRun
from align_audit.writers.web.json_values import lines, number, text


def texts_data(run: AuditRun, records: Sequence[AuditRecord]) -> dict[str, Any] | None:
    """The pairs of the last audit that kept some; None: none did.

    Args:
        records: of the present course of one probe set, by step.

    Returns:
        ``step``; ``lost`` and ``gained``, pairs with ``pair`` (its place in the data set), ``shift`` (nats), ``prompt``, and
        ``chosen`` and ``rejected`` with ``tokens`` (``text`` and ``change``, nats), and ``length``, that of the completion in
        tokens, where only its beginning is kept.
    """
    for record in reversed(records):
        kept = run.pair_texts(record)
        if kept is not None and (kept.lost or kept.gained):
            return {"step": record.step, **_sides(kept)}
    return None


def _sides(kept: PairTexts) -> dict[str, Any]:
    return {"lost": [_pair(pair) for pair in kept.lost], "gained": [_pair(pair) for pair in kept.gained]}


def _pair(pair: PairText) -> dict[str, Any]:
    return {
        "pair": pair.pair,
        "shift": number(pair.shift),
        "prompt": lines(pair.prompt),
        "chosen": _completion(pair.chosen, pair.chosen_tokens),
        "rejected": _completion(pair.rejected, pair.rejected_tokens),
    }


def _completion(tokens: Sequence[TokenChange], length: int | None) -> dict[str, Any]:
    """Ends of lines are shown as ``↵``: a token that is one would not be seen."""
    return {
        "tokens": [{"text": text(token.text.replace("\n", "↵")), "change": number(token.change)} for token in tokens],
        "length": length,
    }
