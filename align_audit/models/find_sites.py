"""Where a decoder layer's finer sites are (see ``sites``), found by trying, not by class.

A module's output is an *addend* when, with the addends that run after it held fixed, what is added to it appears in the
layer's output, times one number (a residual multiplier), and nowhere else; with all addends held fixed the layer's output
must follow the stream that enters. So the norm behind the attention (Gemma 2, OLMo 2), two branches side by side (GPT-J,
Falcon), a module that adds the residual itself (BLOOM) and a single mixer (Mamba) come out as they compute. The first
addend that mixes positions is the attention, if its makers call it so; the largest that treats every position by itself is
the MLP, experts included. The heads are the slices of what enters the attention's output projection.

What cannot be established is not guessed: the layer then has no such site, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from align_audit.errors import SiteError
from align_audit.models.replay import Replay
from align_audit.models.sites import LayerSites, Sites
from align_audit.models.trial import Hook, Seen, Trial
from align_audit.models.verify import probe_inputs
from align_audit.models.weights.sharded import whole_size

ATTENTION_WORDS = ("attn", "attention")
"""One of these is in the name or class of whatever its makers consider attention; other mixers (state spaces,
convolutions, recurrences) are not called so. The one thing that is read from names."""


@torch.no_grad()
def find_sites(replay: Replay, like: Sites | None = None) -> Sites:
    """The sites of every decoder layer, by trying on a few tokens; layers built alike are tried once, then checked.

    Args:
        like: of a model that is built just the same; they are then checked, not found again.

    Raises:
        SiteError: ``like`` does not hold here.
    """
    worked = replay.layer_tokens
    recording = replay.record(probe_inputs(replay.model))
    config: Any = replay.model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    by_layout: dict[Any, LayerSites] = {}
    layers = []
    for index, layer in enumerate(replay.layers):
        trial = Trial(replay, recording, index)
        layout = tuple((name, type(module)) for name, module in layer.named_modules())
        sites = like.layers[index] if like is not None else by_layout.get(layout)
        if sites is not None and not _holds(trial, sites.addends):
            if like is not None:
                raise SiteError(
                    f"the modules whose outputs layer {index} of the policy adds to its stream are not what the "
                    f"reference's adds ({', '.join(sites.addends)}), although both are built alike"
                )
            sites = None
        if sites is None:
            sites = _sites_of(trial, heads if isinstance(heads, int) else None)
            by_layout[layout] = sites
        layers.append(sites)
    replay.layer_tokens = worked
    return Sites(replay, layers)


# -- addends -----------------------------------------------------------------------------------------------------------


def _sites_of(trial: Trial, heads: int | None) -> LayerSites:
    addends = _addends(trial)
    if isinstance(addends, str):
        return LayerSites(missing=dict.fromkeys(("attention_output", "mlp_output", "head"), addends))
    mixing = [name for name in addends if _mixes(trial, name, addends)]
    parts = _parts(trial, addends)
    missing: dict[str, str] = {}
    attention = mlp = projection = None
    mixer = next((_largest(trial, parts[name]) for name in mixing), None)
    called = " ".join(f"{name} {type(trial.names[name]).__name__}" for name in (parts[mixing[0]] if mixing else ()))
    if mixer is None:
        missing["attention_output"] = "nothing it adds to the stream mixes positions"
    elif any(word in called.lower() for word in ATTENTION_WORDS):
        attention = mixing[0]
    else:
        missing["attention_output"] = f"its mixer is {type(trial.names[mixer]).__name__}"
    pointwise = [name for name in addends if name not in mixing]
    if pointwise:
        mlp = max(pointwise, key=lambda name: sum(_own_parameters(trial, part) for part in parts[name]))
    else:
        missing["mlp_output"] = "everything it adds to the stream mixes positions"
    if attention is None:
        missing["head"] = missing["attention_output"]
    elif heads is None:
        missing["head"] = "the model's config has no num_attention_heads"
    else:
        projection = _projection(trial, attention, parts[attention], addends, heads)
        if projection is None:
            missing["head"] = (
                f"no linear module through which all of its attention's output passes takes an input that splits "
                f"into {heads} heads, each moved by itself"
            )
    return LayerSites(
        attention=attention,
        mlp=mlp,
        projection=projection,
        heads=heads if projection is not None and heads is not None else 0,
        addends=tuple(addends),
        missing=missing,
    )


def _holds(trial: Trial, addends: Sequence[str]) -> bool:
    """Whether these are this layer's addends, in this order; nothing was found before: nothing is looked for now."""
    if not addends:
        return isinstance(_addends(trial), str)
    if any(name not in trial.outputs for name in addends):
        return False
    adds = all(_adds(trial, name, addends[place + 1 :]) for place, name in enumerate(addends))
    return adds and _follows(trial, addends)


def _addends(trial: Trial) -> list[str] | str:
    """Modules whose outputs are added to the stream, in the order in which they run; or why there are none."""
    if not bool(torch.isfinite(trial.leaving).all()):
        return "its stream is not finite"
    if not torch.equal(trial.run(), trial.leaving) and trial.leaving.device.type == "cpu":
        return "it does not give the same output twice"
    addends: list[str] = []
    # From the last to run, so that what an addend does to those behind it is held; outer modules are done after
    # the inner ones that make them up, which then change nothing.
    for name in reversed(trial.order):
        if name not in trial.outputs or not _adds(trial, name, addends):
            continue
        # A module that returns the whole stream, its residual included (BLOOM's), cuts the stream off when held.
        if torch.equal(trial.run([*addends, name], stream=trial.moved_stream()), trial.leaving):
            continue
        addends.insert(0, name)
    if not addends or not _follows(trial, addends):
        return (
            "its output is not the stream that enters it plus what modules of it return (the stream is normalized "
            "or gated as a whole, or added to by no module)"
        )
    return addends


def _adds(trial: Trial, name: str, held: Collection[str]) -> bool:
    """Whether, with ``held`` fixed, something added to the module's output is added to the layer's, times a number."""
    if not bool(torch.isfinite(trial.outputs[name]).all()):
        return False
    added = trial.large_noise()
    moved = trial.run(held, trial.shift(name, added)).double() - trial.leaving.double()
    return _is_multiple(trial, moved, added.double(), trial.leaving.double().abs() + trial.outputs[name].double().abs())


def _follows(trial: Trial, addends: Collection[str]) -> bool:
    """Whether, with all addends fixed, the layer's output moves as the stream that enters it does."""
    stream = trial.moved_stream()
    moved = trial.run(addends, stream=stream).double() - trial.leaving.double()
    scale = trial.leaving.double().abs() + stream.double().abs()
    return _is_multiple(trial, moved, stream.double() - trial.entering.double(), scale)


def _is_multiple(trial: Trial, moved: torch.Tensor, added: torch.Tensor, scale: torch.Tensor) -> bool:
    factor = float((moved * added).sum() / added.square().sum())
    if not abs(factor) > 1e-3:
        return False
    room = trial.tolerance * (scale * max(1.0, abs(factor)) + (factor * added).abs())
    return bool(((moved - factor * added).abs() <= room).all())


def _mixes(trial: Trial, name: str, addends: Collection[str]) -> bool:
    """Whether the addend at later positions depends on the stream at the first one, all other addends held."""
    stream = trial.entering.clone()
    stream[0, 0] = trial.moved_stream()[0, 0]
    seen = Seen()
    trial.run([addend for addend in addends if addend != name], Hook(name, seen), stream=stream)
    recorded = trial.outputs[name][0, 1:].double()
    moved = (seen.value.view(trial.entering.shape)[0, 1:].double() - recorded).abs().max()
    return bool(moved > trial.tolerance * recorded.abs().max())


def _parts(trial: Trial, addends: Sequence[str]) -> dict[str, list[str]]:
    """For each addend the modules that run for it: those done after the addend before it."""
    parts: dict[str, list[str]] = {}
    begin = 0
    for name in addends:
        end = trial.order.index(name) + 1
        parts[name] = trial.order[begin:end]
        begin = end
    return parts


def _own_parameters(trial: Trial, name: str) -> int:
    return sum(map(whole_size, trial.names[name].parameters(recurse=False)))


def _largest(trial: Trial, parts: Sequence[str]) -> str:
    """Of some modules the one that holds most: a mixer, not its norms; the outer of two."""
    return max(reversed(parts), key=lambda name: sum(map(whole_size, trial.names[name].parameters())))


# -- heads -------------------------------------------------------------------------------------------------------------


def _projection(trial: Trial, attention: str, parts: Sequence[str], addends: Sequence[str], heads: int) -> str | None:
    """The linear module through which all of the attention passes, and whose input is its heads side by side."""
    held = [name for name in addends if name != attention]
    for name in reversed(parts):
        if (
            name in trial.outputs
            and name in trial.inputs
            and any(True for _ in trial.names[name].parameters())
            and trial.inputs[name].shape[-1] % heads == 0
            and _carries_all(trial, name, attention, held)
            and _is_linear(trial, name)
            and _has_heads(trial, name, parts[: parts.index(name)], heads)
        ):
            return name
    return None


def _carries_all(trial: Trial, name: str, attention: str, held: Collection[str]) -> bool:
    """Whether the addend is a function of what this module returns, and of nothing else that the stream changes."""
    if name == attention:
        return True
    recorded, seen = trial.outputs[attention], Seen()
    trial.run([*held, name], Hook(attention, seen), stream=trial.moved_stream())
    if not torch.equal(seen.value.view(recorded.shape), recorded):
        return False
    trial.run(held, trial.shift(name, trial.large_noise()), Hook(attention, seen))
    return not torch.equal(seen.value.view(recorded.shape), recorded)


def _is_linear(trial: Trial, name: str) -> bool:
    """f(a + b) + f(0) = f(a) + f(b)."""
    a, b = trial.noise(trial.inputs[name]), trial.noise(trial.inputs[name])

    def apply(value: torch.Tensor) -> torch.Tensor:
        seen = Seen()
        trial.run((), Hook(name, lambda _: value, on_input=True), Hook(name, seen))
        return seen.value.double()

    f_a_b, f_0 = apply(a + b), apply(torch.zeros_like(a))
    f_a, f_b = apply(a), apply(b)
    scale = max(float(value.abs().max()) for value in (f_a_b, f_a, f_b))
    return float((f_a_b + f_0 - f_a - f_b).abs().max()) <= 4 * trial.tolerance * scale


def _has_heads(trial: Trial, name: str, earlier: Sequence[str], heads: int) -> bool:
    """Whether some number computed on the way (a query's, say) moves most of one head's slice and nothing else, and
    none a smaller part of a slice: then the slices are heads, and not several each. A value's moves one number."""
    recorded = trial.inputs[name]
    place = trial.last_position(recorded)
    assert place is not None

    def moved_by(*nudge: Hook) -> torch.Tensor:
        seen = Seen()
        trial.run((), *nudge, Hook(name, seen, on_input=True))
        return (seen.value - recorded)[place].double().abs()

    room = moved_by()  # 0, but for kernels that are not deterministic
    width, fits = recorded.shape[-1] // heads, False
    for module in earlier:
        size = trial.coordinates(module) if not any(True for _ in trial.names[module].children()) else None
        for coordinate in dict.fromkeys((0, size // 2, size - 1)) if size is not None else ():
            # Both ways: where a softmax is saturated, one of them may change nothing.
            ways = [moved_by(Hook(module, _nudge(trial, coordinate, way))) > room for way in (1.0, -1.0)]
            moved = (ways[0] | ways[1]).view(heads, width).sum(-1)
            if int((moved > 0).sum()) == 1 and int(moved.max()) > 1:
                if 2 * int(moved.max()) <= width:
                    return False
                fits = True
    return fits


def _nudge(trial: Trial, coordinate: int, way: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def far(tensor: torch.Tensor) -> torch.Tensor:
        moved, place = tensor.clone(), trial.last_position(tensor)
        assert place is not None
        moved[place][coordinate] += way * (8 * float(tensor.double().square().mean().sqrt()) + 0.1)
        return moved

    return far
