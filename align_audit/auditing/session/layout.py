"""May a pair's prompt be computed once for both completions? Tried on real pairs, never assumed (DESIGN, "The wavefront")."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from align_audit.auditing.session.memory import out_of_memory
from align_audit.models.replay import Replay, attention_of
from align_audit.probes.batches import PairBatch, common_prompt, make_batch, pair_tokens

if TYPE_CHECKING:
    from torch import nn

    from align_audit.probes.pairs import ProbePair

logger = logging.getLogger(__name__)

_TAKE_MASKS = frozenset({None, "eager", "sdpa"})
"""Attention that adds whatever mask it is given; None: the model does not say which it has. Others (flex, flash, kernels from
elsewhere) read a mask as something else, and one that they do not expect can end the process, with no error to be caught."""


_LENIENT = 1e-3
"""From such a tolerance on, as of 16 bits, what little lies beyond a window may pass for rounding."""


def why_not_shared(replay: Replay, pairs: Sequence[ProbePair], tolerance: float) -> str | None:
    """None where rows that hold the prompt once give the logits of separate rows; else the reason, in words.

    Two pairs are tried: the one with the longest sequence, since what a window or a schedule of positions does shows only
    beyond some length, and the shortest of those with a common prompt. Of the first, the longer sequence and the rejected
    one are computed for themselves: behind the chosen one in its row, the rejected is the side that position biases that
    count columns (ALiBi), recurrent states and models that ignore the mask they are given would change.

    Args:
        tolerance: largest difference of a logit, as a share of the largest logit.

    Raises:
        MemoryError, RuntimeError: memory ran out, as :func:`~align_audit.auditing.session.memory.out_of_memory` knows it.
    """
    tried = rows_tried(pairs)
    if not tried:
        return "no pair has a prompt token that both sequences begin with"
    if unknown := attention_of(replay.model) - _TAKE_MASKS:
        return f"{', '.join(sorted(map(str, unknown)))} is not given a mask in which completions do not see each other"
    if tolerance > _LENIENT and (window := _window(replay.model, pairs)) is not None:
        return f"the model attends within a window of {window} tokens, and some sequences are longer"
    for index, sides in tried:
        pair = pairs[index]
        batch = make_batch([pair], [index], 0, shared=True).to(replay.device)
        try:
            packed = _rows(replay, batch)
        except Exception as error:
            if out_of_memory(error):
                raise  # it says nothing of the model, and would be kept for the run
            return f"the model does not take rows with a mask of their own ({type(error).__name__}: {error})"
        apart = make_batch([pair], [index], 0).to(replay.device)
        for side in sides:
            alone = _rows(replay, apart.only_row(side))
            difference = _apart(replay, alone, packed[batch.side == side])
            if difference is None:
                return "the model's logits are not finite, so the two layouts cannot be compared"
            if not difference <= tolerance:
                beside = _apart(replay, alone, _rows(replay, apart)[apart.side == side])
                assert beside is not None
                if not beside <= tolerance:
                    return _depends_on_rows(pair.index, beside)
                return (
                    f"with the prompt computed once the logits of pair {pair.index} differ by {difference:.2g} of the "
                    f"largest one ({tolerance:.2g} is rounding): tokens of one completion reach the other, or positions "
                    "are not what they were"
                )
    return None


def rows_tried(pairs: Sequence[ProbePair]) -> list[tuple[int, tuple[int, ...]]]:
    """Places of the pairs that are tried, and which of their sides are computed for themselves; none share a prompt: empty."""
    order = sorted(
        (i for i, pair in enumerate(pairs) if common_prompt(pair)), key=lambda i: pair_tokens(pairs[i], True)
    )
    if not order:
        return []
    longest = max(range(len(pairs)), key=lambda i: pair_tokens(pairs[i], False))  # its longer sequence counts
    chosen_is_longer = len(pairs[longest].chosen_ids) > len(pairs[longest].rejected_ids)
    return [(longest, (0, 1) if chosen_is_longer else (1,)), (order[0], (0, 1))]


@torch.no_grad()
def _apart(replay: Replay, alone: torch.Tensor, together: torch.Tensor) -> float | None:
    """The largest difference of a logit, as a share of the largest one; None: some of ``alone`` are not finite.

    Args:
        alone, together: [P, d], of the same entries, computed in two ways. Their logits are made in blocks: of a long sequence
            they take gigabytes.
    """
    difference = largest = torch.zeros((), device=alone.device)
    for block in replay.head_blocks(len(alone)):
        logits, joined = (_in_float(replay.head(rows[block])) for rows in (alone, together))
        if not bool(torch.isfinite(logits).all()):
            return None
        # Not Python's max, which may pass a NaN over.
        difference = torch.maximum(difference, (logits - joined).abs().max())
        largest = torch.maximum(largest, logits.abs().max())
    return float(difference / largest)


def _depends_on_rows(pair: int, difference: float) -> str:
    reason = (
        f"the logits of pair {pair} differ by {difference:.2g} of the largest one when another row is computed beside it: "
        "what this model says of a text depends on the texts in its batch (activations quantized by the batch, as in 8-bit "
        "weights, or experts with a limited number of places), and every number of an audit by about as much"
    )
    logger.warning("align_audit: %s", reason)
    return reason


@torch.no_grad()
def _rows(replay: Replay, batch: PairBatch) -> torch.Tensor:
    """What the head reads [P, d] at the batch's prediction entries."""
    top = replay.record(batch.model_inputs(), top_only=True).after(replay.num_layers - 1)
    return top[batch.row, batch.position]


def _in_float(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _window(model: nn.Module, pairs: Sequence[ProbePair]) -> int | None:
    """The shortest window of attention that a sequence of these is longer than; None: none is. The mask of a shared row has
    none."""
    longest = max(len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))
    windows = []
    for config in {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}.values():
        kinds = getattr(config, "layer_types", None)
        if getattr(config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds):
            windows.append(getattr(config, "sliding_window", None))
        if kinds is None or "chunked_attention" in kinds:
            windows.append(getattr(config, "attention_chunk_size", None))
    shorter = [window for window in windows if isinstance(window, int) and 0 < window < longest]
    return min(shorter, default=None)
