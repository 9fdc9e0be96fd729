"""May a pair's prompt be computed once for both completions? Tried on real pairs, never assumed (DESIGN, "The wavefront")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from align_audit.batches import common_prompt, make_batch, pair_tokens
from align_audit.models.replay import Replay

if TYPE_CHECKING:
    from align_audit.probes import ProbePair


def why_not_shared(replay: Replay, pairs: Sequence[ProbePair], tolerance: float) -> str | None:
    """None where rows that hold the prompt once give the logits of separate rows; else the reason, in words.

    Two pairs are tried: the longest, since what a window or a schedule of positions does shows only beyond some length,
    and the shortest of those with a common prompt. Position biases that count rows (ALiBi), recurrent states and masks
    that ignore the one they are given all show here.

    Args:
        tolerance: largest difference of a logit, as a share of the largest logit.
    """
    order = sorted(
        (i for i, pair in enumerate(pairs) if common_prompt(pair)), key=lambda i: pair_tokens(pairs[i], True)
    )
    if not order:
        return "no pair has a prompt token that both sequences begin with"
    for index in sorted({order[0], order[-1]}):
        found = []
        for shared in (False, True):
            batch = make_batch([pairs[index]], [index], 0, shared=shared).to(replay.device)
            try:
                recording = replay.record(batch.model_inputs())
                top = recording.after(replay.num_layers - 1)
                found.append(replay.head(top[batch.row, batch.position]).double())
            except Exception as error:
                if not shared:
                    raise
                return f"the model does not take rows with a mask of their own ({type(error).__name__}: {error})"
        own, packed = found
        if not bool(torch.isfinite(own).all()):
            return "the model's logits are not finite, so the two layouts cannot be compared"
        difference = float((own - packed).abs().max() / own.abs().max())
        if not difference <= tolerance:
            return (
                f"with the prompt computed once the logits of pair {pairs[index].index} differ by {difference:.2g} of "
                f"the largest one ({tolerance:.2g} is rounding): tokens of one completion reach the other, or "
                "positions are not what they were"
            )
    return None
