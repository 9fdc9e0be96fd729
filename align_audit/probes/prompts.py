"""The prompts of probe pairs, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align_audit.probes.pairs import ProbePair


def distinct_prompts(
    pairs: Sequence[ProbePair], wanted: Callable[[tuple[int, ...]], bool]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Place and prompt of a pair of each prompt that is ``wanted``, in the order of the pairs.

    Pairs with one prompt are of one group, but where it is of a single token; and cut from the left, one prompt is several.
    """
    prompts: set[tuple[int, ...]] = set()
    groups: set[int] = set()
    for place, pair in enumerate(pairs):
        prompt = pair.chosen_ids[: pair.chosen_start]
        if wanted(prompt) and prompt not in prompts and pair.group not in groups:
            prompts.add(prompt)
            groups.add(pair.group)
            yield place, prompt
