"""Numbers that stand for tokens: what random draws depend on, and by which equal prompts are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def hash_of_prompt(prompt: Sequence[int]) -> int:
    """63 bits made of its tokens."""
    return digest([list(prompt)])


def digest(content: list[Any]) -> int:
    """63 bits made of lists of numbers."""
    made = hashlib.blake2b(json.dumps(content, separators=(",", ":")).encode(), digest_size=8).digest()
    return int.from_bytes(made, "big") >> 1
