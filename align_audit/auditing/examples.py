"""What changed in text: which pairs' margins moved most, and their tokens as text with what became of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.measurement import AuditTask
from align_audit.probes.pairs import ProbePair
from align_audit.probes.token_texts import decoded, text_pieces
from align_audit.record.pair_texts import CUT, PairText, PairTexts, TokenChange

MOST_TOKENS = 160
"""Tokens of a completion that are kept, its first."""
MOST_OF_PROMPT = 600
"""Characters of a prompt that are kept, its last."""
_DECIMALS = 5
"""Of a token's change in nats: what is beyond differs with the shape of the batch."""


@dataclass(frozen=True)
class MovedPair:
    """A pair with its margin shift Δ (nats), and log π − log ρ of the tokens of both completions that can be predicted."""

    pair: ProbePair
    shift: float
    chosen: np.ndarray
    rejected: np.ndarray


def texts_of(task: AuditTask) -> Callable[[], PairTexts] | None:
    """Decodes what changed in text at an audit, after its passes; None where no text is to be kept.

    Nothing is decoded before it is called, so that only the process that writes takes the time.
    """
    count = task.session.config.examples.pairs
    if not count:
        return None
    behaviour = task[Behaviour]
    shift, changes = behaviour.shift, behaviour.state.token_changes.values

    def moved(places: list[int]) -> list[MovedPair]:
        measured = [(place, changes[place]) for place in places]
        return [MovedPair(task.session.pairs[at], float(shift[at]), *both) for at, both in measured if both is not None]

    lost, gained = moved_most(shift, count)
    return functools.partial(pair_texts, moved(lost), moved(gained), task.request.probes.tokenizer)


def moved_most(shift: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """Places of the ``count`` pairs, or fewer, whose margin lost most, and of those that gained most.

    Args:
        shift: [N] Δ of the pairs, nats. A pair of NaN, or of 0, has neither lost nor gained.

    Example:
        >>> moved_most(np.array([0.5, -1.0, 2.0, 0.0, -3.0, np.nan]), 1)
        ([4], [2])
    """
    lost, gained = (np.argsort(order, kind="stable").tolist() for order in (shift, -shift))
    return [at for at in lost if shift[at] < 0][:count], [at for at in gained if shift[at] > 0][:count]


def pair_texts(lost: Sequence[MovedPair], gained: Sequence[MovedPair], tokenizer: Any) -> PairTexts:
    """These pairs as text; where there is no tokenizer, as the ids of their tokens."""
    return PairTexts(
        lost=[_pair_text(moved, tokenizer) for moved in lost],
        gained=[_pair_text(moved, tokenizer) for moved in gained],
    )


def _pair_text(moved: MovedPair, tokenizer: Any) -> PairText:
    pair = moved.pair
    prompt = decoded(tokenizer, pair.chosen_ids[: pair.chosen_start])
    chosen, chosen_tokens = _completion(tokenizer, pair.chosen_ids, pair.chosen_start, moved.chosen)
    rejected, rejected_tokens = _completion(tokenizer, pair.rejected_ids, pair.rejected_start, moved.rejected)
    return PairText(
        pair=pair.index,
        prompt=prompt if len(prompt) <= MOST_OF_PROMPT else CUT + prompt[-MOST_OF_PROMPT:],
        shift=moved.shift,
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )


def _completion(
    tokenizer: Any, ids: Sequence[int], start: int, changes: np.ndarray
) -> tuple[list[TokenChange], int | None]:
    """The first pieces of a completion, and its length in tokens where these are not all."""
    length = len(ids) - start
    # Nothing predicts a token at position 0.
    by_token = np.concatenate([np.full(length - len(changes), math.nan), changes.astype(np.float64)])
    kept, place = [], 0
    for text, tokens in text_pieces(tokenizer, ids, start, MOST_TOKENS):
        with np.errstate(invalid="ignore"):
            change = round(float(by_token[place : place + tokens].sum()), _DECIMALS) + 0.0  # no −0.0
        kept.append(TokenChange(text=text, change=change))
        place += tokens
    return kept, None if place == length else length
