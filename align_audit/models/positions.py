"""How long a sequence a model takes: what its configuration says, and whether its positions are rows of a table."""

from __future__ import annotations

from typing import Any

from torch import nn

_MORE = 4
"""Rows that a table of positions may have beside one for each position (OPT's begins with two)."""


def positions_of(model: Any) -> int | None:
    """How many tokens a sequence of the model may have, by its configuration; None: it names no limit.

    Behind the last of learned positions there is no row of their table (on a CUDA device to look for it is an assertion
    that ends the process); behind the last of others a model was never trained.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def learned_positions(model: Any) -> int | None:
    """How many positions a model with a table of them has; None: it has no such table, or names no limit."""
    limit, tokens = positions_of(model), model.get_input_embeddings()
    if limit is None:
        return None
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return limit if any(limit <= table.num_embeddings <= limit + _MORE for table in tables) else None
