"""What changed in text: the pairs that lost and gained most, token by token, as data of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align_audit.record.audit_record import AuditRecord
from align_audit.record.pair_texts import PairText, PairTexts, TokenChange
from align_audit.record.run import AuditRun
from align_audit.record.step_files import texts_exist
from align_audit.record.stored_records import chosen
from align_audit.writers.web.json_values import in_words, lines, number, text


def texts_data(run: AuditRun, records: Sequence[AuditRecord]) -> dict[str, Any] | None:
    """The pairs of the last audit that kept some; None: none did, or the last audit was told to keep none.

    Args:
        records: of the present course of one probe set, by step. No more are parsed than have texts beside them.

    Returns:
        ``step``; ``lost`` and ``gained``, pairs with ``pair`` (its place in the data set), ``shift`` (nats), ``prompt``, and
        ``chosen`` and ``rejected`` with ``tokens`` (``text`` and ``change``, nats), and ``length``, that of the completion in
        tokens, where only its beginning is kept. Beside a number that is infinite, which JSON has none for, stands ``says``.
    """
    if not records or not _keeps_texts(records[-1]):
        return None
    with_texts = chosen(records, lambda head: texts_exist(run.directory, head))
    for place in reversed(range(len(with_texts))):
        record = with_texts[place]
        kept = run.pair_texts(record)
        if kept is not None and (kept.lost or kept.gained):
            return {"step": record.step, **_sides(kept)}
    return None


def _keeps_texts(record: AuditRecord) -> bool:
    """Whoever switches them off may have a reason, and does not look for those of earlier audits."""
    options = record.provenance.config.get("examples", {})
    return not isinstance(options, dict) or options.get("pairs") != 0


def _sides(kept: PairTexts) -> dict[str, Any]:
    return {"lost": [_pair(pair) for pair in kept.lost], "gained": [_pair(pair) for pair in kept.gained]}


def _pair(pair: PairText) -> dict[str, Any]:
    return {
        "pair": pair.pair,
        **_change(pair.shift, "shift"),
        "prompt": lines(pair.prompt),
        "chosen": _completion(pair.chosen, pair.chosen_tokens),
        "rejected": _completion(pair.rejected, pair.rejected_tokens),
    }


def _completion(tokens: Sequence[TokenChange], length: int | None) -> dict[str, Any]:
    return {
        "tokens": [{"text": _token(token.text), **_change(token.change)} for token in tokens],
        "length": length,
    }


def _token(words: str) -> str:
    """Ends of lines are shown as ``↵``, and tabs as ``⇥``: a token that is one would not be seen."""
    return text(words.replace("\n", "↵").replace("\t", "⇥"))


def _change(value: float, name: str = "change") -> dict[str, Any]:
    """The number, and what it is where it is none; a change that is not known says nothing."""
    words = in_words(value)
    return {name: number(value)} if words is None else {name: None, "says": words}
