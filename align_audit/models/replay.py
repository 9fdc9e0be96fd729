"""Record one forward of a model, then continue it from any layer with another residual stream.

No architecture is re-implemented. A recording keeps the very arguments each decoder layer received (masks, rotary
embeddings, flags); continuing calls the model's own layer modules with them. The final norm, the unembedding and
whatever the model does to its logits come from calling the model with every decoder layer stubbed. What cannot be
replayed exactly is found at load, by trying, and refused with the layer's number (``verify``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from align_audit.errors import AnatomyError
from align_audit.models.anatomy import Anatomy
from align_audit.models.pointwise import narrowed

_HEAD_BYTES = {"cpu": 32 * 2**20}
"""Size of one block of float32 logits, by device type; on a CPU it should stay in its cache."""
_HEAD_BYTES_ELSEWHERE = 256 * 2**20
_HEAD_ROWS = 128
"""The fewest rows of a block: with fewer, reading the unembedding takes longer than multiplying by it."""


def head_rows(device: str, vocabulary: int) -> int:
    """How many rows go through norm and unembedding at once on a type of device."""
    return max(_HEAD_BYTES.get(device, _HEAD_BYTES_ELSEWHERE) // (4 * vocabulary), _HEAD_ROWS)


@dataclass(frozen=True)
class LayerCall:
    """The arguments one decoder layer received, with a hole where the stream was, and what else it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Recording:
    """One forward: ``streams[l + 1]`` is the residual stream after layer l, ``streams[0]`` what enters layer 0.

    A recording that was stopped at a layer holds no stream above it, and calls above it only where they were asked for.
    """

    streams: list[torch.Tensor]
    calls: list[LayerCall]
    logits: torch.Tensor | None = None

    def after(self, layer: int) -> torch.Tensor:
        """h_layer, [R, T, d]; −1 is what enters layer 0."""
        return self.streams[layer + 1]


def attention_of(model: nn.Module) -> set[str | None]:
    """Which kernels a model's modules attend with."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {getattr(config, "_attn_implementation", None) for config in configs}


def _device_of(embedding: Any) -> torch.device:
    # A wrapper's `weight` may be made anew whenever it is asked for (PEFT's trainable tokens).
    weight = next(embedding.parameters(), None)
    device: torch.device = embedding.weight.device if weight is None else weight.device
    return device


def _with_added_mask(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a mask [R, 1, T, T] as eager attention adds it: 0 where something is seen, the least number elsewhere."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 4 or mask.dtype != torch.bool or attention_of(model) != {"eager"}:
        return inputs
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return inputs | {"attention_mask": added}


@dataclass(frozen=True)
class Stream:
    """A residual stream that joins a walk after layer ``start``; ``make`` builds it only then."""

    key: Hashable
    start: int
    make: Callable[[], torch.Tensor]


class Replay:
    """A causal LM opened between its layers. :func:`~align_audit.models.verify.open_replay` makes one, and checks it.

    Args:
        model: the causal LM itself, out of all wrappers.
        anatomy: where the stream passes, with nothing left open.
        autocast: makes the context the model computes in; recording, replay and head all run inside it.
        compute_dtype: of its matrix products there.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        autocast: Callable[[], AbstractContextManager[Any]],
        compute_dtype: torch.dtype,
    ) -> None:
        self.model: Any = model
        self.anatomy = anatomy
        self.autocast = autocast
        self.compute_dtype = compute_dtype
        self.layers = anatomy.modules(model)
        self.layer_tokens = 0
        """Layer calls × tokens so far: the work done, for the record's cost."""
        self.outputs: list[Any] = []
        """What each layer returns, with a hole where the stream is; known once :func:`open_replay` has recorded a forward."""
        self.copies = False
        """Layers write into their argument, so each gets its own."""
        self.pointwise: list[nn.Module] = []
        """Modules of the last layer that may run at some positions only."""
        self.hold: Callable[[int], None] = lambda index: None
        """Has a layer in memory, whether or not it is going to compute: several processes bring it together."""
        self.may_skip_layers = True
        """The arguments of layers are recorded rightly where those below do not compute."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def stream_dtype(self) -> torch.dtype:
        """Of the residual stream after the last layer."""
        return self.anatomy.stream(self.outputs[-1]).dtype

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so what enters the model."""
        return _device_of(self.model.get_input_embeddings())

    def _forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The model's own forward, as it stands (wrapped by a trainer, say); its logits [R, T, V]."""
        # A loss over the experts' routers is for training, and with the layers stubbed no router runs.
        options = {"output_router_logits": False} if getattr(self.model.config, "output_router_logits", False) else {}
        logits: torch.Tensor = self.model(**_with_added_mask(self.model, inputs), use_cache=False, **options).logits
        return logits

    # -- recording -------------------------------------------------------------------------------------------------

    def record(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        keep_logits: bool = False,
        until: int | None = None,
        calls_above: bool = False,
        top_only: bool = False,
    ) -> Recording:
        """One forward of the model itself, with what passed between its layers.

        Args:
            inputs: ``input_ids`` [R, T], ``attention_mask`` [R, T] or [R, 1, T, T], and what else the model takes.
            keep_logits: go on to the logits; else the forward ends with the layers, and norm and head do not run.
            until: the last layer to run; None: all.
            calls_above: also keep the arguments of the layers above ``until``, which are called and do not compute, so
                that other streams can be walked to the top. In a model whose layers hand on more than that allows (see
                the check at load) they compute, and the recording is a whole one.
            top_only: only the stream after the last layer that runs is kept, and the others, L times as much, are empty.

        Raises:
            ValueError: logits are asked for of layers that do not run.
        """
        top = self.num_layers - 1
        last = top if until is None or (calls_above and not self.may_skip_layers) else until
        if keep_logits and last < top:
            raise ValueError(f"logits need all layers: expected until=None or {top}, found {until}")
        stop = top if calls_above else last
        below: list[Any] = []
        with self._passing(last + 1, below) if stop > last else contextlib.nullcontext():
            try:
                return self._record(inputs, keep_logits, last, stop, below, top_only)
            except _WritesInPlace:
                self.copies = True
                return self._record(inputs, keep_logits, last, stop, below, top_only)

    def _record(
        self,
        inputs: Mapping[str, torch.Tensor],
        keep_logits: bool,
        last: int,
        stop: int,
        below: list[Any],
        top_only: bool,
    ) -> Recording:
        """Layers up to ``last`` run, those up to ``stop`` are called; ``below`` is given what ``last`` returned."""
        streams: list[torch.Tensor] = []
        calls: list[LayerCall] = []
        entered: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor, int]] = []

        def on_entry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream = self.anatomy.take(args, kwargs)
            # Where layers write into their argument, the recording keeps its own.
            kept = stream.clone() if self.copies else stream
            entered.append((*self.anatomy.put(args, kwargs, None), stream, stream._version))
            if not streams:
                streams.append(kept.detach()[:0] if top_only else kept.detach())

        def on_exit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hollow_args, hollow_kwargs, stream, version = entered.pop()
            if stream._version != version and not self.copies:
                raise _WritesInPlace
            left = self.anatomy.stream(output).detach()
            if len(calls) <= last:
                kept = left.new_empty(0) if top_only and len(calls) < last else left
                streams.append(kept.clone() if self.copies else kept)
            if len(calls) == last:
                below[:] = [output]
            calls.append(LayerCall(hollow_args, dict(hollow_kwargs), self.anatomy.wrap(output, left[:0, :0])))
            if module is self.layers[stop] and not keep_logits:
                raise _Recorded

        handles: list[Any] = []
        for layer in self.layers:
            handles.append(layer.register_forward_pre_hook(on_entry, with_kwargs=True))
            handles.append(layer.register_forward_hook(on_exit, with_kwargs=True))
        logits = None
        try:
            with torch.no_grad(), self.autocast():
                logits = self._forward(**inputs)
        except _Recorded:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != stop + 1:
            raise AnatomyError(
                f"expected each of the {self.num_layers} layers in {self.anatomy.layers!r} to run once in a forward of "
                f"{type(self.model).__name__}; {len(calls)} calls were seen"
            )
        self.layer_tokens += (last + 1) * inputs["input_ids"].numel()
        return Recording(streams, calls, logits)

    # -- replay ----------------------------------------------------------------------------------------------------

    def layer(
        self, index: int, stream: torch.Tensor, recording: Recording, read: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The model's own layer ``index`` applied to ``stream`` [R, T, d], with the recorded arguments.

        Args:
            read: [n] places among the R·T positions, each once, that matter afterwards. The last layer's parts that treat every
                position by itself then run at these only, and what it returns elsewhere means nothing.
        """
        call = recording.calls[index]
        args, kwargs = self.anatomy.put(call.args, call.kwargs, stream.clone() if self.copies else stream)
        self.layer_tokens += stream.shape[0] * stream.shape[1]
        last = index == self.num_layers - 1
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.autocast())
            if read is not None and last and self.pointwise:
                stack.enter_context(narrowed(self.pointwise, read, (stream.shape[0], stream.shape[1])))
            return self.anatomy.stream(self.layers[index](*args, **kwargs))

    def entering_last(self, recording: Recording) -> torch.Tensor:
        """h_{L−2} [R, T, d] of the recorded run, walked layer by layer as patched streams are."""
        stream = recording.after(-1)
        for index in range(self.num_layers - 1):
            stream = self.layer(index, stream, recording)
        return stream

    def walk(
        self,
        recording: Recording,
        streams: Iterable[Stream],
        max_streams: int,
        *,
        same_as: Recording | None = None,
        read: torch.Tensor | None = None,
    ) -> Iterator[tuple[Hashable, torch.Tensor | None]]:
        """Continue many streams to the top: each weight is visited once per group of ``max_streams`` streams.

        Everything below the layer a stream joins after is irrelevant to it and is not computed.

        Args:
            same_as: a recording whose streams replay to themselves. A stream that equals it bit by bit where it joins
                would end where it ends; it is not walked, and comes back as None.
            read: as in :meth:`layer`: the positions at which h_{L−1} will be read.

        Yields:
            each stream's key and h_{L−1} [R, T, d].
        """
        waiting = sorted(streams, key=lambda stream: stream.start)
        for first in range(0, len(waiting), max_streams):
            group = waiting[first : first + max_streams]
            active: list[tuple[Hashable, torch.Tensor]] = []
            unchanged: list[Hashable] = []
            for index in range(group[0].start, self.num_layers):
                if index >= 0:
                    self.hold(index)
                for place, (key, stream) in enumerate(active):
                    active[place] = (key, self.layer(index, stream, recording, read))
                for item in group:
                    if item.start == index:
                        joining = item.make()
                        if same_as is not None and torch.equal(joining, same_as.after(index)):
                            unchanged.append(item.key)
                        else:
                            active.append((item.key, joining))
            yield from ((key, None) for key in unchanged)
            while active:
                yield active.pop(0)

    # -- norm, head, logit post-processing ---------------------------------------------------------------------------

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """Next-token logits [n, V] of residual rows [n, d]: the model's own norm, unembedding and what comes after.

        Every row is fed as a sequence of one token, so the cost of masks and positions does not grow with n.
        """
        ids = torch.zeros((rows.shape[0], 1), dtype=torch.long, device=self.device)
        with self._stubbed(rows[:, None, :]), self.autocast():
            logits = self._forward(input_ids=ids, attention_mask=torch.ones_like(ids))
        return logits[:, 0]

    def head_blocks(self, count: int) -> Iterator[slice]:
        """Equal blocks of rows for :meth:`head`; the same for every stream, so that equal rows give equal logits."""
        size = head_rows(self.device.type, self.anatomy.vocab_size)
        for first in range(0, count, size):
            yield slice(first, min(first + size, count))

    def _stubbed(self, stream: torch.Tensor) -> AbstractContextManager[None]:
        """Every decoder layer returns ``stream``, whatever it is given."""
        return _instead(self.layers, lambda index, *_: self.anatomy.wrap(self.outputs[index], stream))

    def _passing(self, first: int, below: list[Any]) -> AbstractContextManager[None]:
        """Layers from ``first`` return the stream that they are given, and what else the layer in ``below`` has returned."""
        return _instead(
            self.layers[first:], lambda _, args, kwargs: self.anatomy.wrap(below[0], self.anatomy.take(args, kwargs))
        )


@contextlib.contextmanager
def _instead(
    layers: Sequence[nn.Module], returned: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """These layers do not compute: they return what ``returned`` makes of their place among them and of their arguments."""

    def stub(place: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: returned(place, args, kwargs)

    replaced = [layer.__dict__.get("forward") for layer in layers]
    try:
        for place, layer in enumerate(layers):
            layer.forward = stub(place)
        yield
    finally:
        for layer, forward in zip(layers, replaced, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


class _WritesInPlace(Exception):
    """A layer wrote into the stream it was given."""


class _Recorded(Exception):
    """The last layer that was asked for has run: leave the forward, norm and head are not needed."""


def equal_streams(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], mask: torch.Tensor) -> bool:
    """Whether two recordings agree bit by bit at the ``mask``ed [R, T] positions."""
    return all(torch.equal(a[mask], b[mask]) for a, b in zip(first, second, strict=True))
