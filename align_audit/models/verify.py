"""Open a model between its layers, and check at once that what it computes can be continued from any of them.

A replay is compared with the model's own forward on a few tokens: layer by layer, with another stream below, at the norm
and head, and once more at the end, when nothing may have changed. What a model does beside that (its own autocast, layers
that write into their argument or hand something on, modules that treat every position by itself) is found on the way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from align_audit.errors import AnatomyError
from align_audit.models.anatomy import Anatomy, check_kind, find_anatomy, unwrap, unwrap_only
from align_audit.models.pointwise import find_pointwise
from align_audit.models.precision import product_unit, rounding
from align_audit.models.replay import Recording, Replay
from align_audit.models.wrapper import by_itself

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Verified:
    """What trying a model has shown of how it computes. It holds for models that are built alike, as far as weights do not hide
    it: modules that begin at zero do nothing before the first steps.

    Attributes:
        compute_dtype: of its matrix products.
        copies, may_skip_layers: as of a :class:`Replay`.
        pointwise: names, in the last layer, of the modules that may run at some positions only.
        times: how often it was opened.
    """

    anatomy: Anatomy
    compute_dtype: torch.dtype
    copies: bool
    may_skip_layers: bool
    pointwise: tuple[str, ...]
    times: int = 1

    @classmethod
    def of(cls, replay: Replay, times: int = 1) -> Self:
        """Of a model that :func:`open_replay` has opened."""
        names = {module: name for name, module in replay.layers[-1].named_modules()}
        return cls(
            replay.anatomy,
            replay.compute_dtype,
            replay.copies,
            replay.may_skip_layers,
            tuple(names[module] for module in replay.pointwise),
            times,
        )


def open_replay(
    model: nn.Module,
    anatomy: Anatomy | None = None,
    autocast: Autocast = contextlib.nullcontext,
    like: Verified | None = None,
) -> Replay:
    """A causal LM opened between its layers, and checked.

    Args:
        model: the policy or the reference, wrapped or not.
        anatomy: where the stream passes; found (and checked) when None or incomplete.
        autocast: makes the context the trainer computes in.
        like: of a model that is built just as this one is, or of this one when it was opened before. What is a matter of how a
            model is built, and not of its weights, is then not tried again. That each layer can be continued from is, that the
            model is causal, and that what runs at some positions may.

    Raises:
        AnatomyError: it is no causal LM, its layers cannot be found, or replay would not give what it computes.
    """
    around, model = unwrap_only(model), unwrap(model)
    check_kind(model)
    inputs = probe_inputs(model)
    with torch.no_grad(), autocast():
        autocast, compute_dtype = _adopt_autocast(model, inputs, autocast)
    if like is not None and like.compute_dtype != compute_dtype:
        like = None
    with torch.no_grad(), autocast(), by_itself(around, model, inputs):
        if like is not None:
            anatomy = like.anatomy
        elif anatomy is None or not anatomy.num_layers:
            anatomy = find_anatomy(model, inputs, anatomy)
        replay = Replay(model, anatomy, autocast, compute_dtype)
        if like is not None:
            replay.copies, replay.may_skip_layers = like.copies, like.may_skip_layers
        _verify(replay, inputs, like)
    replay.layer_tokens = 0
    return replay


def probe_inputs(model: Any) -> dict[str, torch.Tensor]:
    """A few tokens to try things on: two rows [2, 7], the second of them padded."""
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(3, 3 + 14, device=embedding.device).remainder(embedding.shape[0]).view(2, 7)
    mask = torch.ones_like(ids)
    # One row is padded, as rows of a batch are: a mask that is never needed could hide that it is not replayed.
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class _Entered(Exception):
    """The embeddings are about to run: leave the forward."""


def _adopt_autocast(model: Any, inputs: dict[str, torch.Tensor], autocast: Autocast) -> tuple[Autocast, torch.dtype]:
    """Where the model's own forward turns autocast on (accelerate wraps it so), replay computes inside the same; and the
    dtype that matrix products are computed in."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device.type
    seen: list[tuple[bool, torch.dtype]] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))
        raise _Entered

    handle = embedding.register_forward_pre_hook(look)
    try:
        model(**inputs, use_cache=False)
    except _Entered:
        pass
    finally:
        handle.remove()
    if seen and seen[0][0]:
        dtype = seen[0][1]
        return lambda: torch.autocast(device, dtype=dtype), dtype
    return autocast, next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


# -- the check ---------------------------------------------------------------------------------------------------------


def _verify(replay: Replay, inputs: dict[str, torch.Tensor], like: Verified | None) -> None:
    """Replay from every layer must give the model's own streams and logits, and must leave the model as it was."""
    recording, entering = _entering(replay, inputs)
    replay.outputs = [call.output for call in recording.calls]
    _check_nothing_between_layers(replay, recording, entering)
    _expect(replay, recording, recording, "Dropout or other state inside the layer?")
    if like is None:
        _expect(
            replay,
            _disturbed(replay, inputs),
            recording,
            "The stream below it was another one than when they were recorded, so a layer gets more from those "
            "below it than the residual stream, and a patched stream cannot be continued.",
        )
        _expect(
            replay,
            recording,
            recording,
            "Another stream went through the layers in between: they hand something on beside the residual stream "
            "(keys and values, say), so a patched stream cannot be continued.",
        )
    assert recording.logits is not None
    valid = inputs["attention_mask"].bool()
    logits = recording.logits[valid].double()
    finite = bool(torch.isfinite(logits).all())  # a model that has overflowed is for the audit to report
    _check_head(replay, recording, valid, logits, finite)
    guess = [] if like is None else [replay.layers[-1].get_submodule(name) for name in like.pointwise]
    replay.pointwise = _find_pointwise(replay, recording, guess)
    if like is None:
        replay.may_skip_layers = _can_skip_layers(replay, inputs, recording)
        _check_unchanged(replay, inputs, recording)
    if finite:
        _check_causal(replay, inputs, recording)


def _entering(replay: Replay, inputs: dict[str, torch.Tensor]) -> tuple[Recording, dict[int, torch.Tensor]]:
    """A recording, and what each layer received in it (equal to what the one below returned, if all is well)."""
    entering: dict[int, torch.Tensor] = {}

    def look(index: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[index] = replay.anatomy.take(args, kwargs).detach().clone()

        return keep

    handles = [
        layer.register_forward_pre_hook(look(index), with_kwargs=True) for index, layer in enumerate(replay.layers)
    ]
    try:
        return replay.record(inputs, keep_logits=True), entering
    finally:
        for handle in handles:
            handle.remove()


def _check_nothing_between_layers(replay: Replay, recording: Recording, entering: Mapping[int, torch.Tensor]) -> None:
    for index in range(replay.num_layers):
        if not _same(entering[index], recording.after(index - 1)):
            raise AnatomyError(
                f"{_name(replay)} cannot be replayed: between layer {index - 1} and layer {index} the model changes the "
                "residual stream itself, outside any layer, so a stream continued by calling the layers would "
                "differ from the model's own forward. Nothing falls back silently; this architecture is refused."
            )


def _expect(replay: Replay, wanted: Recording, recording: Recording, why: str) -> None:
    """The layers, with the arguments of ``recording``, turn each stream of ``wanted`` into the next.

    From top to bottom, so that nothing a layer may leave behind for those above it is what they expect.
    """
    for index in reversed(range(replay.num_layers)):
        replayed = replay.layer(index, wanted.after(index - 1), recording)
        if not _same(replayed, wanted.after(index)):
            difference = (replayed.double() - wanted.after(index).double()).abs().max().item()
            raise AnatomyError(
                f"{_name(replay)} cannot be replayed: layer {index}, called again with the arguments "
                f"it received, gave another output (largest difference {difference:.3g}). {why}"
            )


def _disturbed(replay: Replay, inputs: dict[str, torch.Tensor]) -> Recording:
    """A recording of the model with another stream entering layer 0, as a patch would have it."""

    def disturb(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replay.anatomy.put(args, kwargs, replay.anatomy.take(args, kwargs).roll(1, dims=-1))

    handle = replay.layers[0].register_forward_pre_hook(disturb, with_kwargs=True)
    try:
        return replay.record(inputs)
    finally:
        handle.remove()


def _check_head(replay: Replay, recording: Recording, valid: torch.Tensor, logits: torch.Tensor, finite: bool) -> None:
    """Norm and head give the model's own ``logits`` [n, V] from the last stream at the ``valid`` [R, T] positions."""
    headed = replay.head(recording.after(replay.num_layers - 1)[valid]).double()
    difference = float((headed - logits).abs().max()) if headed.shape == logits.shape else float("inf")
    scale = float(logits.abs().max())
    if finite and not difference <= rounding(64, replay.device.type, *_dtypes(replay, recording)) * scale:
        raise AnatomyError(
            f"{_name(replay)} cannot be replayed: its logits from the last layer's stream differ by {difference:.3g} when "
            "its layers are stubbed, so its norm and head depend on more than that stream"
        )


def _find_pointwise(replay: Replay, recording: Recording, guess: list[nn.Module]) -> list[nn.Module]:
    """Parts of the last layer that may run at some positions only, found by trying (see ``models.pointwise``)."""
    last = replay.num_layers - 1
    stream = recording.after(last - 1)
    rows, width = stream.shape[:2]
    # The upper end of every sequence: what it does not get from itself it gets from below.
    kept = torch.arange(rows * width, device=stream.device).view(rows, width)[:, width // 2 :].flatten()
    return find_pointwise(
        replay.layers[last],
        lambda: replay.layer(last, stream, recording),
        stream,
        kept,
        guess=guess,
        tolerance=rounding(64, stream.device.type, stream.dtype, replay.compute_dtype),
    )


def _can_skip_layers(replay: Replay, inputs: dict[str, torch.Tensor], recording: Recording) -> bool:
    """Whether layers that hand on what the lowest one returned are called with the arguments of the ``recording``."""
    try:
        begun = replay.record(inputs, until=0, calls_above=True)
    except Exception:  # whatever a model makes of it, it is recorded whole then
        return False
    return all(
        _equal_arguments((skipping.args, skipping.kwargs), (call.args, call.kwargs))
        for skipping, call in zip(begun.calls, recording.calls, strict=True)
    )


def _check_unchanged(replay: Replay, inputs: dict[str, torch.Tensor], recording: Recording) -> None:
    again = replay.record(inputs)
    if not all(map(_same, again.streams, recording.streams)):
        raise AnatomyError(f"{_name(replay)} cannot be audited: replaying its layers changed what the model computes")


def _check_causal(replay: Replay, inputs: dict[str, torch.Tensor], recording: Recording) -> None:
    changed = inputs["input_ids"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % replay.anatomy.vocab_size
    ahead = replay.record({**inputs, "input_ids": changed}).streams[-1][0, :-1]
    behind = recording.streams[-1][0, :-1]
    atol = rounding(1000, replay.device.type, *_dtypes(replay, recording)) * float(behind.abs().max())
    if not torch.allclose(ahead, behind, rtol=0.0, atol=atol):
        raise AnatomyError(
            f"{_name(replay)} is not a causal language model: changing the last token changed the stream before it; "
            "expected a model loaded with AutoModelForCausalLM, and no adapter that mixes tokens"
        )


# -- how it is compared ------------------------------------------------------------------------------------------------


def _name(replay: Replay) -> str:
    return type(replay.model).__name__


def _dtypes(replay: Replay, recording: Recording) -> tuple[torch.dtype, ...]:
    """All that are met on the way to the logits."""
    assert recording.logits is not None
    return recording.logits.dtype, recording.streams[-1].dtype, replay.compute_dtype


def _equal_arguments(a: Any, b: Any) -> bool:
    """Of two calls of a layer; of what is neither a tensor, a collection nor a plain value only the type is compared."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return _same(a, b) if a.is_floating_point() else bool(torch.equal(a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal_arguments(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal_arguments, a, b))
    return not isinstance(a, bool | int | float | str) or bool(a == b)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, or within rounding on a device whose kernels are not deterministic; NaN equals NaN."""
    if a.device.type == "cpu":
        return bool(torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True))
    tolerance = 8 * product_unit(a.dtype, a.device.type)
    scale = float(b.detach().abs().nan_to_num().max())
    return bool(torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True))
