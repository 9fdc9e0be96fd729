"""Draws that depend on what is drawn, not on when: by a hash of the identity of a pair, a row or a position, and a seed.

Neither batches, nor the order of the pairs, nor what else is drawn changes them, and no global random state is touched.
(Draws from a generator over all pairs, as of the bootstrap, lie with what uses them.)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

Array = np.ndarray

_GOLDEN, _WORD = 0x9E3779B97F4A7C15, 2**64 - 1


def subset_order(pair_ids: Sequence[int] | Sequence[str], seed: int = 0) -> Array:
    """A random order of the pairs; the first n are the exact ones, at every layer and for every n.

    Pairs are sorted by the BLAKE2b hash of (seed, identity): no measured value, no position and no other pair enters, so
    a prefix is a simple random subset, a longer prefix contains the shorter, and a pair keeps its rank against another
    when pairs are added, dropped or reordered. Which pairs share a prompt does not matter either: a subset in which each
    prompt came first with one pair would be of prompts more than of pairs, and its mean another than that of all pairs.

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


def halves(groups: Sequence[int], seed: int = 0) -> Array:
    """Which of two random halves each pair is in, whole groups at a time, going by hashes of the groups alone.

    Args:
        groups: of each pair.

    Returns:
        bool ``[N]``: True for the second half. They differ by at most the largest group; the second is not the smaller one
        where every pair is a group of its own.

    Example:
        >>> halves([1, 2, 3, 3, 4], seed=0).tolist()
        [True, True, False, False, True]
    """
    sizes = Counter(groups)
    keys = {group: hashlib.blake2b(f"{seed}:half:{group}".encode(), digest_size=16).digest() for group in sizes}
    second: dict[int, bool] = {}
    balance = 0
    for group in sorted(sizes, key=keys.__getitem__):
        second[group] = balance <= 0
        balance += sizes[group] if second[group] else -sizes[group]
    return np.array([second[group] for group in groups], dtype=bool)


def prefix_keys(ids: Sequence[int], seed: int) -> Array:
    """A pseudo-random key for every position of a sequence, made of all tokens up to it: what its row of activations is.

    Two positions whose whole prefixes are equal have equal keys, in whatever pair, side or batch they stand; two others do
    not, but for chance (2⁻⁶⁴ for any two). The state is multiplied and mixed token by token with SplitMix64's finalizer
    (Steele et al. 2014).

    Args:
        ids: tokens, each of at least 0.
        seed: 0 … 2⁶⁴ − 1.

    Returns:
        int64 ``[len(ids)]``, spread evenly over its whole range (negative keys included).

    Raises:
        ValueError: the seed is outside its range.

    Example:
        >>> one, other = prefix_keys([5, 6, 7], seed=0), prefix_keys([5, 6, 8], seed=0)
        >>> (one == other).tolist()
        [True, True, False]
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"expected a seed in [0, 2**64), found {seed}")
    keys = np.empty(len(ids), dtype=np.uint64)
    state = _mixed(seed + _GOLDEN)
    for place, token in enumerate(ids):
        state = _mixed(state * _GOLDEN + token + 1)
        keys[place] = state
    return keys.view(np.int64)


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

    ``pairs`` are identities, each of at least 0.

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


def _mixed(z: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit words (arithmetic modulo 2⁶⁴)."""
    z &= _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)
