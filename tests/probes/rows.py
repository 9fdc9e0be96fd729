"""Records of preference pairs, and sets drawn of them, that tests of this folder share."""

from __future__ import annotations

from typing import Any

from align_audit.probes.pairs import ProbeSet

TEXT = {"prompt": "Is the sky blue?", "chosen": " The sky is blue.", "rejected": " The world is round."}
CHAT = {
    "prompt": [{"role": "user", "content": "Is the sky blue?"}],
    "chosen": [{"role": "assistant", "content": "The sky is blue."}],
    "rejected": [{"role": "assistant", "content": "The world is round."}],
}


def ready(n: int, unusable: tuple[int, ...] = ()) -> list[dict[str, list[int]]]:
    """``n`` records of token ids that tell their number; those in ``unusable`` have equal completions."""
    return [
        {"prompt_ids": [1, 2], "chosen_ids": [i, 7], "rejected_ids": [i, 7 if i in unusable else 8]} for i in range(n)
    ]


def draw(rows: Any, **options: Any) -> ProbeSet:
    return ProbeSet.from_dataset(rows, None, **options)
