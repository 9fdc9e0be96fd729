"""Draws that depend on what is drawn, not on when: by a hash of the identity of a pair, a row or a position, and a seed.

Neither batches, nor the order of the pairs, nor what else is drawn changes them, and no global random state is touched.
(Draws from a generator over all pairs, as of the bootstrap, lie with what uses them.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

Array = np.ndarray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def subset_order(pair_ids: Sequence[int] | Sequence[str], seed: int = 0) -> Array:
    """A random order of the pairs; the first n are the exact ones, at every layer and for every n.

    Pairs are sorted by the BLAKE2b hash of (seed, identity): no measured value, no position and no other pair enters, so
    a prefix is a simple random subset, a longer prefix contains the shorter, and a pair keeps its rank against another
    when pairs are added, dropped or reordered. Pairs with the same identity keep their order, next to each other.

    Returns:
        int64 ``[N]``, a permutation of 0 … N − 1: positions in ``pair_ids``.

    Example:
        >>> subset_order([10, 11, 12, 13, 14], seed=0).tolist()
        [1, 3, 2, 4, 0]
        >>> subset_order([14, 12, 10], seed=0).tolist()
        [1, 0, 2]
    """
    keys = [hashlib.blake2b(f"{seed}:{identity}".encode(), digest_size=16).digest() for identity in pair_ids]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def row_keys(pair_index: Array | int, side: Array | int, position: Array | int, seed: int) -> Array:
    """A pseudo-random key for every token row, from what the row *is*, not from when it is seen.

    (pair, side, position) are packed into 64 bits and mixed twice with the SplitMix64 finalizer (Steele et al. 2014),
    the seed entering between: a bijection, so different rows have different keys.

    Args:
        pair_index: 0 … 2³¹ − 1. The arguments broadcast against each other.
        side: 0 for chosen (and rows common to both), 1 for rejected.
        position: 0 … 2³² − 1.
        seed: 0 … 2⁶⁴ − 1.

    Returns:
        int64, spread evenly over its whole range (negative keys included).

    Raises:
        ValueError: an argument is no integer or outside its range.

    Example:
        >>> row_keys(np.array([0, 0, 1]), 0, np.array([0, 1, 0]), seed=0).tolist()
        [5197578548964807871, -2529857523242969672, -1506547071961215988]
    """
    given = {"pair_index": (pair_index, 1 << 31), "side": (side, 2), "position": (position, 1 << 32)}
    parts = []
    for name, (integers, limit) in given.items():
        values = np.asarray(integers)
        if values.dtype.kind not in "iu":
            raise ValueError(f"expected integers for {name}; found {values.dtype}")
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise ValueError(f"expected {name} in [0, {limit}); found {values.min()} … {values.max()}")
        parts.append(values.astype(np.uint64))
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"expected a seed in [0, 2**64), found {seed}")
    pair, chosen_or_rejected, where = np.broadcast_arrays(*parts)
    packed = (pair << np.uint64(33)) | (chosen_or_rejected << np.uint64(32)) | where
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        return _mix(_mix(packed + _GOLDEN) + np.uint64(seed) * _GOLDEN).view(np.int64)


def keep_rows(keys: Array, max_rows: int) -> Array:
    """Mask of the ``max_rows`` rows with the smallest keys: the same rows in whatever order they come.

    Args:
        keys: integers ``[n]``, distinct (of equal ones the first are taken).
        max_rows: cap; all rows are kept where there are no more.

    Returns:
        bool ``[n]``.

    Raises:
        ValueError: wrong shape or dtype, or ``max_rows`` below 1.

    Example:
        >>> keep_rows(np.array([7, -2, 5]), max_rows=2).tolist()
        [False, True, True]
    """
    keys = _checked_keys(keys)
    if max_rows < 1:
        raise ValueError(f"expected max_rows of at least 1, found {max_rows}")
    mask = np.zeros(len(keys), dtype=bool)
    mask[np.argsort(keys, kind="stable")[:max_rows]] = True
    return mask


def noise_directions(seed: int, pairs: Sequence[int], layer: int, draw: int, length: int, width: int) -> torch.Tensor:
    """Random unit directions u, float32 [len(pairs), length, width], drawn from (seed, pair, layer, position, draw).

    The direction of a pair at a position does not depend on which other pairs are asked for, nor on ``length``: both
    completions of a pair share it, batches may be cut differently, and no global random state is touched.
    """
    directions = np.empty((len(pairs), length, width), dtype=np.float32)
    for row, pair in enumerate(pairs):
        # Layer −1 is what enters layer 0; seeds must not be negative. Drawn in order, so a longer draw begins the same.
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, pair, layer + 1, draw])))
        generator.standard_normal(out=directions[row], dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return torch.from_numpy(directions)


def _checked_keys(keys: Array) -> Array:
    keys = np.asarray(keys)
    if keys.ndim != 1 or keys.dtype.kind not in "iu":
        raise ValueError(f"expected integer keys [n]; found shape {list(keys.shape)}, {keys.dtype}")
    return keys


def _mix(z: Array) -> Array:
    """SplitMix64's finalizer: a bijection of 64-bit words (arithmetic modulo 2⁶⁴)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = z ^ (z >> np.uint64(31))
    return mixed
