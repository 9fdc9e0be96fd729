"""Models built to mislead: a reference, a policy that is the reference plus pushes of known parts, and what is true of them.

The truth comes from plain forwards of whole models: a hybrid that has some weights of one model and the rest of the other
*is* the patched model when all positions are patched, so no hook and no code of the audit is needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from align_audit import AuditConfig, AuditRecord
from align_audit.lab.planting.parts import weights_of
from align_audit.lab.planting.reading import margin_gradient, margins
from align_audit.lab.planting.steps import norm
from align_audit.probes.pairs import ProbePair, ProbeSet
from tests.helpers.audits import QUICK_GENERATIONS
from tests.helpers.tiny import VOCABULARY, tiny_model

Floats = NDArray[np.float64]

EMBEDDING, HEAD, NORM = "model.embed_tokens.", "lm_head.", "model.norm."

NO_NUMBERS = (
    "cost", "provenance.created", "provenance.versions", "provenance.config", "provenance.probe_hash",
    "provenance.probe_source", "provenance.probe_name", "provenance.pairs_dropped",
)  # fmt: skip
"""Parts of a record that say when, how and on what, not what was measured."""


def layer(number: int) -> str:
    """The prefix of a decoder layer's weights."""
    return f"model.layers.{number}."


def small_llama(layers: int = 4, width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random Llama without tied weights."""
    return tiny_model(
        "llama", seed=seed, dtype=dtype, num_hidden_layers=layers, hidden_size=width, intermediate_size=width,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip


def asked(**changes: Any) -> AuditConfig:
    """A configuration that patches and controls; LASSO, low rank and spectra only where asked for."""
    options: dict[str, Any] = {
        "max_pairs": 500, "generations": QUICK_GENERATIONS, "progress": False, "tensorboard": "off",
        "statistics": {"bootstrap_resamples": 400}, "localization": {"enabled": False},
        "low_rank": {"enabled": False}, "spinal": {"enabled": False},
    }  # fmt: skip
    return AuditConfig(**{**options, **changes})


# -- pairs -------------------------------------------------------------------------------------------------------------


def probe_set(pairs: Iterable[ProbePair]) -> ProbeSet:
    """These pairs as a probe set, in this order."""
    return ProbeSet(tuple(pairs), "random tokens", {}, 64, "keep_start", None)


def pair_of(index: int, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> ProbePair:
    """A pair of one prompt."""
    return ProbePair(index, (*prompt, *chosen), (*prompt, *rejected), len(prompt), len(prompt))


def grouped_pairs(groups: int, per_prompt: int, seed: int = 0, prompt: int = 4, alike: int = 4) -> ProbeSet:
    """``per_prompt`` pairs a prompt, whose completions differ only in the token after the first ``alike``."""
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return generator.integers(3, VOCABULARY, size=count).tolist()

    pairs = []
    for _ in range(groups):
        start, chosen, rejected = tokens(prompt), tokens(alike), tokens(alike)
        ends = generator.choice(np.arange(3, VOCABULARY), size=per_prompt, replace=False).tolist()
        pairs += [pair_of(len(pairs) + i, start, [*chosen, end], [*rejected, end]) for i, end in enumerate(ends)]
    return probe_set(pairs)


def renumbered(pairs: Iterable[ProbePair]) -> ProbeSet:
    """The same pairs as another data set would number them: by place."""
    return probe_set(replace(pair, index=place) for place, pair in enumerate(pairs))


def prompt_of(pair: ProbePair) -> tuple[int, ...]:
    return pair.chosen_ids[: pair.chosen_start]


# -- policies ----------------------------------------------------------------------------------------------------------


def pushed(policy: nn.Module, pairs: Iterable[ProbePair], part: str, nats: float, step: float = 0.03) -> nn.Module:
    """A copy whose mean margin is ``nats`` (to 2 %) above the policy's: gradient steps in one part of the model alone.

    Each step is ``step`` of the part's own norm long; the last is halved until it ends at the right place.
    """
    result = copy.deepcopy(policy)
    known, sign = list(pairs), math.copysign(1.0, nats)
    weights = {name: value for name, value in weights_of(result).items() if name.startswith(part)}
    assert weights, f"no weight begins with {part}"
    start = float(margins(result, known).mean())
    size = step * norm(list(weights.values()))
    for _ in range(120):
        gradient = margin_gradient(result, known)
        scale = sign * size / norm([gradient[name] for name in weights])
        while True:
            for name, value in weights.items():
                value.add_(gradient[name], alpha=scale)
            moved = sign * (float(margins(result, known).mean()) - start)
            if moved <= 1.02 * abs(nats):
                break
            for name, value in weights.items():
                value.sub_(gradient[name], alpha=scale)
            scale, size = scale / 2, size / 2
        if moved >= 0.98 * abs(nats):
            return result
    raise AssertionError(f"{part} moved the mean margin by {sign * moved:.2f} nats only; {nats} were asked")


def together(reference: nn.Module, *policies: nn.Module) -> nn.Module:
    """The reference plus what each policy changed of it."""
    result = copy.deepcopy(reference)
    start = weights_of(reference)
    for name, value in weights_of(result).items():
        for policy in policies:
            value.add_(weights_of(policy)[name] - start[name])
    return result


# -- what is true ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Of each of N pairs, nats. ``transplants`` and ``effects`` have a column for the embedding, then one a layer;
    ``transplants`` has a last one for norm and head."""

    shift: Floats
    transplants: Floats
    effects: Floats

    @property
    def shares(self) -> Floats:
        """Mean transplants over the mean shift."""
        return self.transplants.mean(0) / self.shift.mean()

    @property
    def gains(self) -> Floats:
        """Shares of the shift gained at the embedding, each layer, and norm and head."""
        recovery = np.concatenate([[0.0], self.effects.mean(0) / self.shift.mean(), [1.0]])
        return np.diff(recovery)


def truth(policy: nn.Module, reference: nn.Module, pairs: Iterable[ProbePair]) -> Known:
    """Margins of hybrids: one part alone from the policy (transplants); all parts up to one from the policy (effects)."""
    known = list(pairs)
    new = weights_of(policy)
    depth = len(reference.model.layers)  # type: ignore[union-attr, arg-type]
    parts = [(EMBEDDING,), *((layer(number),) for number in range(depth)), (NORM, HEAD)]

    def with_parts(prefixes: tuple[str, ...]) -> Floats:
        lent = {name: value for name, value in new.items() if name.startswith(prefixes)}
        return np.asarray(margins(reference, known, lent).numpy())

    start = with_parts(("none",))
    transplants = np.stack([with_parts(part) - start for part in parts], 1)
    up_to = [tuple(prefix for part in parts[: place + 1] for prefix in part) for place in range(depth + 1)]
    effects = np.stack([with_parts(prefixes) - start for prefixes in up_to], 1)
    return Known(np.asarray(margins(policy, known).numpy()) - start, transplants, effects)


# -- records -----------------------------------------------------------------------------------------------------------


def leaves(record: AuditRecord, skipped: Sequence[str] = NO_NUMBERS) -> dict[str, Any]:
    """Dotted path → value of all that a record holds, but for the skipped parts."""

    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if any(path == name or path.startswith(name + ".") for name in skipped):
            return
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(f"{path}.{key}" if path else str(key), item)
        elif isinstance(value, list | tuple):
            yield f"{path}.length", len(value)
            for place, item in enumerate(value):
                yield from walk(f"{path}.{place}", item)
        else:
            yield path, value

    return dict(walk("", record.model_dump()))


def differences(
    record: AuditRecord, expected: AuditRecord, tolerance: float, skipped: Sequence[str] = NO_NUMBERS
) -> list[str]:
    """The leaves that differ, numbers by more than ``tolerance`` of the larger of 1 and their size."""
    seen, wanted = leaves(record, skipped), leaves(expected, skipped)
    different = [f"{path}: only in one" for path in sorted(seen.keys() ^ wanted.keys())]
    for path in sorted(seen.keys() & wanted.keys()):
        value, right = seen[path], wanted[path]
        if isinstance(value, float) and isinstance(right, float):
            equal = value == right or (math.isnan(value) and math.isnan(right))
            equal = equal or abs(value - right) <= tolerance * max(1.0, abs(right))
        else:
            equal = value == right
        if not equal:
            different.append(f"{path}: {value!r}, expected {right!r}")
    return different


def shuffles(pairs: ProbeSet, seed: int = 3) -> dict[str, Callable[[], ProbeSet]]:
    """The same pairs in other orders: as they are numbered, and numbered anew."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    return {
        "reversed": lambda: probe_set(reversed(pairs.pairs)),
        "shuffled": lambda: probe_set(pairs.pairs[place] for place in order),
        "reversed and numbered anew": lambda: renumbered(reversed(pairs.pairs)),
        "shuffled and numbered anew": lambda: renumbered(pairs.pairs[place] for place in order),
    }
