"""May a pair's prompt be computed once for both completions? Tried on real pairs, never assumed (DESIGN, "The wavefront")."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from align_audit.auditing.session.memory import out_of_memory
from align_audit.models.replay import Replay
from align_audit.probes.batches import PairBatch, common_prompt, make_batch, pair_tokens

if TYPE_CHECKING:
    from torch import nn

    from align_audit.probes.pairs import ProbePair

logger = logging.getLogger(__name__)

_TAKE_MASKS = frozenset({None, "eager", "sdpa"})
"""Attention that adds whatever mask it is given; None: the model does not say which it has. Others (flex, flash, kernels from
elsewhere) read a mask as something else, and one that they do not expect can end the process, with no error to be caught."""


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
    if unknown := _attention_of(replay.model) - _TAKE_MASKS:
        return f"{', '.join(sorted(map(str, unknown)))} is not given a mask in which completions do not see each other"
    for index, sides in tried:
        pair = pairs[index]
        batch = make_batch([pair], [index], 0, shared=True).to(replay.device)
        try:
            packed = _logits(replay, batch)
        except Exception as error:
            if out_of_memory(error):
                raise  # it says nothing of the model, and would be kept for the run
            return f"the model does not take rows with a mask of their own ({type(error).__name__}: {error})"
        apart = make_batch([pair], [index], 0).to(replay.device)
        for side in sides:
            logits = _logits(replay, apart.only_row(side))
            if not bool(torch.isfinite(logits).all()):
                return "the model's logits are not finite, so the two layouts cannot be compared"
            difference = _apart(logits, packed[batch.side == side])
            if not difference <= tolerance:
                beside = _apart(logits, _logits(replay, apart)[apart.side == side])
                if not beside <= tolerance:
                    return _depends_on_rows(pair.index, beside)
                return (
                    f"with the prompt computed once the logits of pair {pair.index} differ by {difference:.2g} of the "
                    f"largest one ({tolerance:.2g} is rounding): tokens of one completion reach the other, or positions "
                    "are not what they were"
                )
    return None


def _attention_of(model: nn.Module) -> set[str | None]:
    """Which kernels the model's modules attend with."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {getattr(config, "_attn_implementation", None) for config in configs}


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


def _apart(logits: torch.Tensor, packed: torch.Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((logits - packed).abs().max() / logits.abs().max())


def _depends_on_rows(pair: int, difference: float) -> str:
    reason = (
        f"the logits of pair {pair} differ by {difference:.2g} of the largest one when another row is computed beside it: "
        "what this model says of a text depends on the texts in its batch (activations quantized by the batch, as in 8-bit "
        "weights, or experts with a limited number of places), and every number of an audit by about as much"
    )
    logger.warning("align_audit: %s", reason)
    return reason


@torch.no_grad()
def _logits(replay: Replay, batch: PairBatch) -> torch.Tensor:
    """Next-token logits [P, V] at the batch's prediction entries, in float32 or better."""
    top = replay.record(batch.model_inputs()).after(replay.num_layers - 1)
    logits = replay.head(top[batch.row, batch.position])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
