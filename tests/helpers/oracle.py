"""A plain and slow oracle: every number of METHODS.md straight from its definition.

Nothing here is fast and nothing is clever. Each sequence runs alone, shape [1, T], without padding, batching or cache;
every patched number is one full forward of the model with a hook that swaps a tensor. The oracle shares no code with
``align_audit`` and imports nothing from it, so an agreement between the two is evidence. Features, subspaces and SPINAL stand
in ``oracle_subspaces.py`` and ``oracle_spinal.py``.

Letters as in METHODS.md: N pairs, L decoder layers (0-based), ``h_l`` the residual stream after layer l, ``h_{-1}``
what enters layer 0. An array with L+1 columns starts with layer -1, so layer l sits in column l+1.

Numbers come back in float64 NumPy; the models run in whatever dtype they have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float64]
Positions = Literal["all", "prompt", "completion", "last_prompt_token"]
Basis = Literal["activation", "shift"]
Edit = Callable[[Tensor], Tensor]

# Where the decoder layers live, for the families this oracle knows.
LAYER_PATHS = {
    "llama": ("model", "layers"),
    "qwen3": ("model", "layers"),
    "gemma2": ("model", "layers"),
    "gpt2": ("transformer", "h"),
}


class PairLike(Protocol):
    """One preference pair: two full sequences, and for each the index of its first completion token."""

    @property
    def chosen_ids(self) -> Sequence[int]: ...

    @property
    def rejected_ids(self) -> Sequence[int]: ...

    @property
    def chosen_start(self) -> int: ...

    @property
    def rejected_start(self) -> int: ...


@dataclass(frozen=True)
class Pair:
    """A ready-made PairLike for tests."""

    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_start: int
    rejected_start: int


# ---------------------------------------------------------------------------------------------------------------------
# The model, run once


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a bare causal LM, bottom to top."""
    config: Any = model.config
    family = str(config.model_type)
    if family not in LAYER_PATHS:
        raise ValueError(f"the oracle knows {sorted(LAYER_PATHS)}, not {family!r}; add its layer path to LAYER_PATHS")
    module: Any = model
    for name in LAYER_PATHS[family]:
        module = getattr(module, name)
    return list(module)


@dataclass(frozen=True)
class Run:
    """One forward: logits [T, V] and the L+1 residual streams [T, d]; ``h(l)`` is the stream after layer l."""

    logits: Tensor
    streams: list[Tensor]

    def h(self, layer: int) -> Tensor:
        """h_l for l = -1 … L-1."""
        return self.streams[layer + 1]


def forward(
    model: nn.Module,
    ids: Sequence[int],
    *,
    edit_input: tuple[int, Edit] | None = None,
    edit_output: tuple[int, Edit] | None = None,
    grad: bool = False,
) -> Run:
    """One full forward of one sequence, with at most one swap at a layer's input and one at a layer's output.

    ``edit_input=(l, f)`` gives layer l the tensor f(x) in place of x, ``edit_output=(l, f)`` replaces what layer l
    returns. The streams are recorded after the swaps, as detached copies. With ``grad`` the graph starts at layer 0's
    input and the streams are the very tensors [1, T, d] that the layers pass on.
    """
    if model.training:
        raise ValueError("the model is in train mode; call .eval() first")
    layers = decoder_layers(model)
    streams: list[Tensor | None] = [None] * (len(layers) + 1)

    def record(slot: int, stream: Tensor) -> None:
        if streams[slot] is not None:
            raise RuntimeError(f"layer {slot - 1} ran twice in one forward")
        if stream.ndim != 3 or stream.shape[:2] != (1, len(ids)):
            raise RuntimeError(f"layer {slot - 1}: expected a stream [1, {len(ids)}, d], found {tuple(stream.shape)}")
        streams[slot] = stream if grad else stream[0].detach().clone()

    def before(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            if grad and index == 0:
                stream = stream.detach().requires_grad_(True)
            if edit_input is not None and edit_input[0] == index:
                stream = edit_input[1](stream)
            if index == 0:
                record(0, stream)
            if args:
                return (stream, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": stream}

        return hook

    def after(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            if edit_output is not None and edit_output[0] == index:
                stream = edit_output[1](stream)
            record(index + 1, stream)
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        return hook

    handles = []
    try:
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
            handles.append(layer.register_forward_hook(after(index)))
        with torch.set_grad_enabled(grad):
            device = next(model.parameters()).device
            input_ids = torch.tensor([list(ids)], dtype=torch.long, device=device)
            logits = model(input_ids=input_ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    recorded = [stream for stream in streams if stream is not None]
    if len(recorded) != len(layers) + 1:
        raise RuntimeError(f"expected {len(layers) + 1} streams, found {len(recorded)}: some layer never ran")
    return Run(logits, recorded)


def replace_with(source: Tensor, positions: Sequence[int] | None = None) -> Edit:
    """An edit that writes ``source`` [T, d] over a stream [1, T, d], at the given positions (None: everywhere)."""

    def edit(stream: Tensor) -> Tensor:
        if stream[0].shape != source.shape:
            raise ValueError(f"cannot write a stream {tuple(source.shape)} over one of {tuple(stream[0].shape)}")
        where = torch.tensor(list(range(len(source)) if positions is None else positions), dtype=torch.long)
        edited = stream.clone()
        edited[0, where] = source[where].to(stream)
        return edited

    return edit


def run_patched(model: nn.Module, ids: Sequence[int], layer: int, edit: Edit) -> Run:
    """One forward in which h_layer is edited: the output of that layer, or the input of layer 0 for layer -1."""
    if layer == -1:
        return forward(model, ids, edit_input=(0, edit))
    return forward(model, ids, edit_output=(layer, edit))


def lens_logits(model: nn.Module, ids: Sequence[int], stream: Tensor) -> Tensor:
    """The model's own final norm, head and whatever follows, read on ``stream`` [T, d] -> logits [T, V]."""
    return run_patched(model, ids, len(decoder_layers(model)) - 1, replace_with(stream)).logits


# ---------------------------------------------------------------------------------------------------------------------
# Pairs and positions


def sides(pair: PairLike) -> list[tuple[tuple[int, ...], int]]:
    """[(chosen ids, start), (rejected ids, start)]."""
    return [(tuple(pair.chosen_ids), pair.chosen_start), (tuple(pair.rejected_ids), pair.rejected_start)]


def prediction_positions(ids: Sequence[int], start: int) -> list[int]:
    """Positions whose next token is a completion token."""
    return [position for position in range(len(ids) - 1) if position + 1 >= start]


def patched_positions(ids: Sequence[int], start: int, positions: Positions) -> list[int]:
    """The token positions that a patch of this kind overwrites."""
    everywhere = range(len(ids))
    if positions == "all":
        return list(everywhere)
    if positions == "prompt":
        return [position for position in everywhere if position < start]
    if positions == "completion":
        return [position for position in everywhere if position >= start]
    if positions == "last_prompt_token":
        return [position for position in everywhere if position == start - 1]
    raise ValueError(f"unknown positions {positions!r}")


def spectral_positions(pairs: Sequence[PairLike]) -> list[tuple[list[int], list[int]]]:
    """Prediction positions of (chosen, rejected) of each pair; one whose tokens 0 … p occurred before is left out."""
    met: set[tuple[int, ...]] = set()
    places = []
    for pair in pairs:
        kept: tuple[list[int], list[int]] = ([], [])
        for out, (ids, start) in zip(kept, sides(pair), strict=True):
            for position in prediction_positions(ids, start):
                prefix = ids[: position + 1]
                if prefix not in met:
                    met.add(prefix)
                    out.append(position)
        places.append(kept)
    return places


def prompt_group(pair: PairLike) -> int:
    """63 bits of the hash of the prompt; of the whole pair where that has fewer than two tokens."""
    prompt = list(pair.chosen_ids[: pair.chosen_start])
    whole = [list(pair.chosen_ids), list(pair.rejected_ids), pair.chosen_start, pair.rejected_start]
    text = json.dumps([prompt] if len(prompt) > 1 else whole, separators=(",", ":"))
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) // 2


def halves(pairs: Sequence[PairLike], seed: int) -> NDArray[np.bool_]:
    """Whole groups, in the order of their hashes, each to the half that has fewer pairs; the second where both have as many."""
    members: dict[int, list[int]] = {}
    for place, pair in enumerate(pairs):
        members.setdefault(prompt_group(pair), []).append(place)
    order = sorted(
        members, key=lambda group: hashlib.blake2b(f"{seed}:half:{group}".encode(), digest_size=16).hexdigest()
    )
    second = np.zeros(len(pairs), dtype=bool)
    counts = [0, 0]
    for group in order:
        half = int(counts[1] <= counts[0])
        counts[half] += len(members[group])
        second[members[group]] = bool(half)
    return second


def log_probs(logits: Tensor, ids: Sequence[int], start: int) -> Tensor:
    """Next-token log-probabilities [P, V] in float64 at the prediction positions."""
    return logits[prediction_positions(ids, start)].double().log_softmax(dim=-1)


def token_log_probs(logits: Tensor, ids: Sequence[int], start: int) -> Tensor:
    """log p of each completion token [P], in float64."""
    rows = log_probs(logits, ids, start)
    targets = [ids[position + 1] for position in prediction_positions(ids, start)]
    return rows[list(range(len(targets))), targets]


# ---------------------------------------------------------------------------------------------------------------------
# Margins and patching (METHODS, Notation and 1)


def margins(model: nn.Module, pairs: Sequence[PairLike]) -> tuple[Floats, Floats, Floats]:
    """m = log p(chosen) - log p(rejected) -> (margin [N], chosen log p [N], rejected log p [N])."""
    chosen_logp, rejected_logp = np.zeros(len(pairs)), np.zeros(len(pairs))
    for i, pair in enumerate(pairs):
        for out, (ids, start) in zip((chosen_logp, rejected_logp), sides(pair), strict=True):
            out[i] = token_log_probs(forward(model, ids).logits, ids, start).sum().item()
    return chosen_logp - rejected_logp, chosen_logp, rejected_logp


def _patched_margin(
    base: nn.Module, pair: PairLike, layer: int, streams: Sequence[Tensor], positions: Positions = "all"
) -> float:
    """m_i(base) with h_layer overwritten by streams = (chosen [T, d], rejected [T, d])."""
    logps = []
    for (ids, start), stream in zip(sides(pair), streams, strict=True):
        edit = replace_with(stream, patched_positions(ids, start, positions))
        logps.append(token_log_probs(run_patched(base, ids, layer, edit).logits, ids, start).sum().item())
    return logps[0] - logps[1]


def patch_effects(
    source: nn.Module, base: nn.Module, pairs: Sequence[PairLike], positions: Positions = "all"
) -> Floats:
    """m_i(base patched with source's h_l) - m_i(base) -> [N, L+1], column 0 for layer -1.

    ``policy_into_reference`` is ``patch_effects(policy, reference, pairs)``; swap the roles for the reverse.
    """
    depth = len(decoder_layers(base))
    baseline = margins(base, pairs)[0]
    effects = np.zeros((len(pairs), depth + 1))
    for i, pair in enumerate(pairs):
        runs = [forward(source, ids) for ids, _ in sides(pair)]
        for layer in range(-1, depth):
            streams = [run.h(layer) for run in runs]
            effects[i, layer + 1] = _patched_margin(base, pair, layer, streams, positions) - baseline[i]
    return effects


def block_transplants(policy: nn.Module, reference: nn.Module, pairs: Sequence[PairLike]) -> Floats:
    """What each part of the policy does alone inside the reference, in nats -> [N, L+2].

    Column 0: embedding_transplant (the patch at -1). Column l+1: the reference's h_{l-1} goes through the policy's
    block l, and the reference continues. Column L+1: head_transplant, the policy's norm and head on the reference's
    h_{L-1}.
    """
    depth = len(decoder_layers(reference))
    baseline = margins(reference, pairs)[0]
    effects = np.zeros((len(pairs), depth + 2))
    for i, pair in enumerate(pairs):
        policy_runs = [forward(policy, ids) for ids, _ in sides(pair)]
        reference_runs = [forward(reference, ids) for ids, _ in sides(pair)]
        effects[i, 0] = _patched_margin(reference, pair, -1, [run.h(-1) for run in policy_runs]) - baseline[i]
        for layer in range(depth):
            outputs = []
            for (ids, _), run in zip(sides(pair), reference_runs, strict=True):
                fed = forward(policy, ids, edit_input=(layer, replace_with(run.h(layer - 1))))
                outputs.append(fed.h(layer))
            effects[i, layer + 1] = _patched_margin(reference, pair, layer, outputs) - baseline[i]
        last = [run.h(depth - 1) for run in reference_runs]
        effects[i, depth + 1] = _patched_margin(policy, pair, depth - 1, last) - baseline[i]
    return effects


def summary(effects: Floats, transplants: Floats, delta: Floats) -> dict[str, Any]:
    """recovery [L+1] (column 0: layer -1), layer_gain [L], embedding_gain, head_gain, additivity, peak_layer (in the direction
    of the mean delta).

    Raw ratios: the rule that turns them into NaN when the interval of mean delta contains 0 is not applied here.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        recovery = effects.sum(axis=0) / delta.sum()
        additivity = transplants.mean(axis=0).sum() / delta.mean()
    return {
        "recovery": recovery,
        "layer_gain": recovery[1:] - recovery[:-1],
        "embedding_gain": float(recovery[0]),
        "head_gain": float(1 - recovery[-1]),
        "additivity": float(additivity),
        "peak_layer": int(np.argmax(np.sign(delta.mean()) * transplants[:, 1:-1].mean(axis=0))),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Behaviour (METHODS 6)


def behaviour(policy: nn.Module, reference: nn.Module, pairs: Sequence[PairLike]) -> dict[str, Floats]:
    """Per-pair behavioural numbers, each [N].

    ``{chosen,rejected}_logp_change`` and ``…_per_token``; ``kl`` (policy from reference), ``entropy`` and
    ``reference_entropy``: means over the prediction positions of both sequences, nothing counted once;
    ``token_accuracy`` and ``reference_token_accuracy``: share of chosen completion tokens that are the argmax;
    ``shift``: the change of the margin; ``correct`` and ``ranking_correct``: 1.0 where it, or the policy's margin, is
    above 0 (their means are ``accuracy`` and ``ranking_accuracy``).
    """
    names = [f"{side}_logp_change{per}" for side in ("chosen", "rejected") for per in ("", "_per_token")]
    names += ["kl", "entropy", "reference_entropy", "token_accuracy", "reference_token_accuracy"]
    names += ["shift", "correct", "ranking_correct"]
    out = {name: np.full(len(pairs), np.nan) for name in names}
    for i, pair in enumerate(pairs):
        pooled: dict[str, list[float]] = {"kl": [], "entropy": [], "reference_entropy": []}
        logps: dict[str, tuple[float, float]] = {}
        for side, (ids, start) in zip(("chosen", "rejected"), sides(pair), strict=True):
            positions = prediction_positions(ids, start)
            new, old = (log_probs(forward(model, ids).logits, ids, start).cpu() for model in (policy, reference))
            new_logp = old_logp = 0.0
            new_hits, old_hits = [], []
            for row, position in enumerate(positions):
                target = ids[position + 1]
                new_logp += new[row, target].item()
                old_logp += old[row, target].item()
                new_hits.append(new[row].argmax().item() == target)
                old_hits.append(old[row].argmax().item() == target)
                pooled["kl"].append((new[row].exp() * (new[row] - old[row])).sum().item())
                pooled["entropy"].append(-(new[row].exp() * new[row]).sum().item())
                pooled["reference_entropy"].append(-(old[row].exp() * old[row]).sum().item())
            logps[side] = new_logp, old_logp
            out[f"{side}_logp_change"][i] = new_logp - old_logp
            if positions:
                out[f"{side}_logp_change_per_token"][i] = (new_logp - old_logp) / len(positions)
            if side == "chosen" and positions:
                out["token_accuracy"][i] = np.mean(new_hits)
                out["reference_token_accuracy"][i] = np.mean(old_hits)
        for name, values in pooled.items():
            if values:
                out[name][i] = np.mean(values)
        policy_margin, reference_margin = (logps["chosen"][k] - logps["rejected"][k] for k in (0, 1))
        out["shift"][i] = policy_margin - reference_margin
        out["correct"][i] = float(out["shift"][i] > 0)
        out["ranking_correct"][i] = float(policy_margin > 0)
    return out
