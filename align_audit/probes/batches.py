"""Probe pairs as padded tensors, with the bookkeeping every measure needs: where a model is read, for which pair.

Two layouts hold the same tokens. *Separate*: a row for each completion, behind its own copy of the prompt. *Shared*: one
row a pair, the prompt once, then both completions, which cannot see each other; for models in which a check shows that
this changes nothing (``auditing.session.layout``). Nothing downstream knows which one it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from align_audit.probes.pairs import ProbePair

PADDING, PROMPT, CHOSEN, REJECTED = -1, 0, 1, 2
"""Whose token stands at a position of a shared row."""


@dataclass(frozen=True)
class PairBatch:
    """B probe pairs as R right-padded rows of T tokens.

    Separate layout: R = 2B, the chosen rows, then the rejected ones. Shared layout: R = B.

    *Prediction entries* are the positions whose next token is a completion token (METHODS, notation), flattened to
    length P and ordered by side, pair, position. In the shared layout the last common position is read for both sides.

    Attributes:
        pair_index: [B] where each pair stands in its ``ProbeSet``.
        input_ids, attention_mask: [R, T].
        place: [R, T] each token's position in its own sequence.
        segment: [R, T] in the shared layout: ``PROMPT`` for the common tokens, ``CHOSEN``, ``REJECTED``, ``PADDING``;
            in the separate one ``PROMPT`` or ``PADDING`` only: every token of a row sees all before it.
        copies: [R, T] how many of the pair's two sequences a position stands for: 2, 1, or 0 for padding.
        in_completion: [R, T] True at completion tokens.
        last_prompt: [R, T] True at the position before a completion's first token.
        row, position, target, pair, side: [P] of each prediction entry: its row and position, the token it should
            predict, its pair within the batch, and 0 for chosen or 1 for rejected.
        distinct: [P] False where the same prefix was already counted, as an entry of the chosen side.
    """

    pair_index: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    place: torch.Tensor
    segment: torch.Tensor
    copies: torch.Tensor
    in_completion: torch.Tensor
    last_prompt: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor
    pair: torch.Tensor
    side: torch.Tensor
    distinct: torch.Tensor

    @property
    def num_pairs(self) -> int:
        """B."""
        return int(self.pair_index.numel())

    @property
    def shared(self) -> bool:
        """Whether a pair is one row."""
        return self.input_ids.shape[0] == self.num_pairs

    @property
    def row_pair(self) -> torch.Tensor:
        """[R] the pair, within the batch, that each row belongs to."""
        return torch.arange(self.input_ids.shape[0], device=self.row.device) % self.num_pairs

    @property
    def read(self) -> torch.Tensor:
        """The places among the R·T positions that hold a prediction entry, each once, ascending."""
        places: torch.Tensor = (self.row * self.input_ids.shape[1] + self.position).unique()
        return places

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What a causal LM is called with. Shared rows bring their own mask [R, 1, T, T] (True: is seen)."""
        if not self.shared:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        query, key = self.segment[:, :, None], self.segment[:, None, :]
        # Padding sees itself, so that no row of the softmax is empty.
        visible = ((key == PROMPT) | (key == query)).tril()
        return {"input_ids": self.input_ids, "attention_mask": visible[:, None], "position_ids": self.place}

    def position_mask(self, positions: str) -> torch.Tensor:
        """[R, T] booleans: the positions a patch replaces. Padding is never among them.

        Args:
            positions: "all", "prompt", "completion" or "last_prompt_token".
        """
        valid = self.attention_mask.bool()
        if positions == "all":
            return valid
        if positions == "prompt":
            return valid & ~self.in_completion
        if positions == "completion":
            return valid & self.in_completion
        return valid & self.last_prompt

    def only_row(self, row: int) -> PairBatch:
        """That row of a separate batch by itself, with its prediction entries and no padding."""
        width = int(self.attention_mask[row].sum())
        in_row = self.row == row
        fields = {
            name: getattr(self, name)[row : row + 1, :width]
            for name in ("input_ids", "attention_mask", "place", "segment", "copies", "in_completion", "last_prompt")
        }
        entries = {name: getattr(self, name)[in_row] for name in ("position", "target", "pair", "side", "distinct")}
        # Two rows a pair, of which this is one: told apart from a shared row by the pair it does not make whole.
        return PairBatch(
            pair_index=self.pair_index.new_empty(0), row=torch.zeros_like(entries["side"]), **fields, **entries
        )

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on another device."""
        return PairBatch(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class _Piece:
    """A run of tokens within a row: those of one sequence from position ``start`` on."""

    ids: tuple[int, ...]
    start: int
    segment: int
    completion: int


def common_prompt(pair: ProbePair) -> int:
    """Tokens of the prompt that both sequences of the pair begin with: what a shared row holds once."""
    common = min(pair.common_prefix, pair.chosen_start, pair.rejected_start)
    # Where one prompt goes on, a position cannot be the last of a prompt and not be it.
    return common if pair.chosen_start == pair.rejected_start else max(0, common - 1)


def make_batch(
    pairs: Sequence[ProbePair], pair_index: Sequence[int], pad_token_id: int, *, shared: bool = False
) -> PairBatch:
    """Pad ``pairs`` into one batch. ``pair_index`` says where each stands in its ``ProbeSet``."""
    rows: list[list[_Piece]] = []
    if shared:
        for pair in pairs:
            common = common_prompt(pair)
            rows.append(
                [
                    _Piece(pair.chosen_ids[:common], 0, PROMPT, pair.chosen_start),
                    _Piece(pair.chosen_ids[common:], common, CHOSEN, pair.chosen_start),
                    _Piece(pair.rejected_ids[common:], common, REJECTED, pair.rejected_start),
                ]
            )
    else:
        rows += [[_Piece(pair.chosen_ids, 0, PROMPT, pair.chosen_start)] for pair in pairs]
        rows += [[_Piece(pair.rejected_ids, 0, PROMPT, pair.rejected_start)] for pair in pairs]
    width = max(sum(len(piece.ids) for piece in row) for row in rows)
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    segment = np.full(shape, PADDING, dtype=np.int64)
    place, copies = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    in_completion, last_prompt = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, pieces in enumerate(rows):
        column = 0
        for piece in pieces:
            end = column + len(piece.ids)
            positions = piece.start + np.arange(len(piece.ids))
            input_ids[row, column:end] = piece.ids
            segment[row, column:end] = piece.segment
            place[row, column:end] = positions
            copies[row, column:end] = 2 if shared and piece.segment == PROMPT else 1
            in_completion[row, column:end] = positions >= piece.completion
            last_prompt[row, column:end] = positions == piece.completion - 1
            column = end
    return PairBatch(
        pair_index=torch.tensor(list(pair_index), dtype=torch.long),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy((segment != PADDING).astype(np.int64)),
        place=torch.from_numpy(place),
        segment=torch.from_numpy(segment),
        copies=torch.from_numpy(copies),
        in_completion=torch.from_numpy(in_completion),
        last_prompt=torch.from_numpy(last_prompt),
        **_entries(pairs, shared),
    )


def _entries(pairs: Sequence[ProbePair], shared: bool) -> dict[str, torch.Tensor]:
    """The prediction entries of a batch, column by column."""
    parts: dict[str, list[np.ndarray]] = {
        name: [] for name in ("row", "position", "target", "pair", "side", "distinct")
    }
    for side in (0, 1):
        for owner, pair in enumerate(pairs):
            ids, start = (pair.chosen_ids, pair.chosen_start) if side == 0 else (pair.rejected_ids, pair.rejected_start)
            # A completion that starts at position 0 has nothing before it to predict its first token from.
            read = np.arange(max(start, 1) - 1, len(ids) - 1)
            position, row = read, owner + side * len(pairs)
            if shared:
                row = owner
                common = common_prompt(pair)
                if side == 1:  # behind the chosen completion
                    position = np.where(read < common, read, read + len(pair.chosen_ids) - common)
            counted = (read < pair.common_prefix) & np.isin(read, pair.chosen_predictions)
            parts["row"].append(np.full(len(read), row))
            parts["position"].append(position)
            parts["target"].append(np.asarray(ids)[read + 1])
            parts["pair"].append(np.full(len(read), owner))
            parts["side"].append(np.full(len(read), side))
            parts["distinct"].append(np.full(len(read), True) if side == 0 else ~counted)
    columns = {name: torch.from_numpy(np.concatenate(pieces)) for name, pieces in parts.items()}
    return {name: column.bool() if name == "distinct" else column.long() for name, column in columns.items()}


def pair_tokens(pair: ProbePair, shared: bool) -> int:
    """Tokens a pair takes in a row (each of its two rows, in the separate layout, is as long as the longer one)."""
    if shared:
        return len(pair.chosen_ids) + len(pair.rejected_ids) - common_prompt(pair)
    return max(len(pair.chosen_ids), len(pair.rejected_ids))


def plan_batches(
    pairs: Sequence[ProbePair], batch_tokens: int, *, shared: bool = False, padding: float = 0.1
) -> list[list[int]]:
    """Which pairs go together: lists of indices, longest pairs first, at most ``batch_tokens`` padded tokens a batch.

    A pair longer than that makes a batch of its own, and so does one that would leave more than ``padding`` of its
    batch empty: similar lengths go together. The order depends on the pairs alone, so two audits of the same probes see
    the same batches.
    """
    length = [pair_tokens(pair, shared) for pair in pairs]
    rows = 1 if shared else 2
    groups: list[list[int]] = []
    for index in sorted(range(len(pairs)), key=lambda i: (-length[i], i)):
        if groups:
            padded = rows * (len(groups[-1]) + 1) * length[groups[-1][0]]
            # What a single pair wastes (its shorter completion) is not the batch's doing.
            alone = rows * sum(length[i] for i in (*groups[-1], index))
            if padded <= batch_tokens and padded - alone <= padding * padded:
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups
