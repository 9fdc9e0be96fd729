"""Record one forward of a model, then continue it from any layer with another residual stream.

No architecture is re-implemented. A recording keeps the very arguments each decoder layer received (masks, rotary
embeddings, flags); continuing calls the model's own layer modules with them. The final norm, the unembedding and
whatever the model does to its logits come from calling the model with every decoder layer stubbed. What cannot be
replayed exactly is found at load, by trying, and refused with the layer's number.
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
from align_audit.models.anatomy import Anatomy, check_kind, find_anatomy, unwrap
from align_audit.models.pointwise import find_pointwise, narrowed

_HEAD_BYTES = {"cpu": 32 * 2**20}
"""Size of one block of float32 logits, by device type; on a CPU it should stay in its cache."""
_HEAD_BYTES_ELSEWHERE = 256 * 2**20
_HEAD_ROWS = 128
"""The fewest rows of a block: with fewer, reading the unembedding takes longer than multiplying by it."""


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


def _no_taps(layer: int) -> AbstractContextManager[Mapping[Any, torch.Tensor]]:
    return contextlib.nullcontext({})


@dataclass(frozen=True)
class Stream:
    """A residual stream that joins a walk after layer ``start``; ``make`` builds it only then."""

    key: Hashable
    start: int
    make: Callable[[], torch.Tensor]


class Replay:
    """A causal LM opened between its layers.

    Args:
        model: the policy or the reference, wrapped or not.
        anatomy: where the stream passes; found (and checked) when None or incomplete.
        autocast: makes the context the trainer computes in; recording, replay and head all run inside it.
        like: a replay, checked already, of a model that is built just as this one is; what is a matter of how a model
            computes, and not of its weights, is then taken from it.
    """

    anatomy: Anatomy
    layers: list[nn.Module]
    _copies: bool
    """Layers write into their argument, so each gets its own."""
    _pointwise: list[nn.Module]
    """Modules of the last layer that may run at some positions only."""
    _may_skip_layers: bool
    """The arguments of layers are recorded rightly where those below do not compute."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        like: Replay | None = None,
    ) -> None:
        self.model: Any = unwrap(model)
        check_kind(self.model)
        self.autocast = autocast
        self.layer_tokens = 0
        """Layer calls × tokens so far: the work done, for the record's cost."""
        probe = self.probe_inputs()
        with torch.no_grad(), autocast():
            self._adopt_autocast(probe)
        with torch.no_grad(), self.autocast():
            if like is not None:
                anatomy = like.anatomy
            elif anatomy is None or not anatomy.num_layers:
                anatomy = find_anatomy(self.model, probe, anatomy)
            self.anatomy = anatomy
            self.layers = anatomy.modules(self.model)
            self._copies = like is not None and like._copies
            self._pointwise = []
            self._may_skip_layers = like is None or like._may_skip_layers
            self._verify(probe, like)
        self.layer_tokens = 0

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def stream_dtype(self) -> torch.dtype:
        """Of the residual stream after the last layer."""
        return self.anatomy.stream(self._outputs[-1]).dtype

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so what enters the model."""
        return self.model.get_input_embeddings().weight.device

    def _forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The model's own forward, as it stands (wrapped by a trainer, say); its logits [R, T, V]."""
        # A loss over the experts' routers is for training, and with the layers stubbed no router runs.
        options = {"output_router_logits": False} if getattr(self.model.config, "output_router_logits", False) else {}
        return self.model(**inputs, use_cache=False, **options).logits

    # -- recording -------------------------------------------------------------------------------------------------

    def record(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        keep_logits: bool = False,
        until: int | None = None,
        calls_above: bool = False,
    ) -> Recording:
        """One forward of the model itself, with what passed between its layers.

        Args:
            inputs: ``input_ids`` [R, T], ``attention_mask`` [R, T] or [R, 1, T, T], and what else the model takes.
            keep_logits: go on to the logits; else the forward ends with the layers, and norm and head do not run.
            until: the last layer to run; None: all.
            calls_above: also keep the arguments of the layers above ``until``, which are called and do not compute, so
                that other streams can be walked to the top. In a model whose layers hand on more than that allows (see
                the check at load) they compute, and the recording is a whole one.

        Raises:
            ValueError: logits are asked for of layers that do not run.
        """
        top = self.num_layers - 1
        last = top if until is None or (calls_above and not self._may_skip_layers) else until
        if keep_logits and last < top:
            raise ValueError(f"logits need all layers: expected until=None or {top}, found {until}")
        stop = top if calls_above else last
        below: list[Any] = []
        with self._passing(range(last + 1, self.num_layers), below) if stop > last else contextlib.nullcontext():
            try:
                return self._record(inputs, keep_logits, last, stop, below)
            except _WritesInPlace:
                self._copies = True
                return self._record(inputs, keep_logits, last, stop, below)

    def _record(
        self, inputs: Mapping[str, torch.Tensor], keep_logits: bool, last: int, stop: int, below: list[Any]
    ) -> Recording:
        """Layers up to ``last`` run, those up to ``stop`` are called; ``below`` is given what ``last`` returned."""
        streams: list[torch.Tensor] = []
        calls: list[LayerCall] = []
        entered: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = []
        versions: list[int] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream = self.anatomy.take(args, kwargs)
            # Where layers write into their argument, the recording keeps its own.
            kept = stream.clone() if self._copies else stream
            versions.append(stream._version)
            entered.append((*self.anatomy.put(args, kwargs, None), stream))
            if not streams:
                streams.append(kept.detach())

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hollow_args, hollow_kwargs, stream = entered[-1]
            if stream._version != versions[-1] and not self._copies:
                raise _WritesInPlace
            left = self.anatomy.stream(output).detach()
            if len(calls) <= last:
                streams.append(left.clone() if self._copies else left)
            if len(calls) == last:
                below[:] = [output]
            calls.append(LayerCall(hollow_args, dict(hollow_kwargs), self.anatomy.wrap(output, left[:0, :0])))
            if module is self.layers[stop] and not keep_logits:
                raise _Recorded

        handles: list[Any] = []
        for layer in self.layers:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after, with_kwargs=True))
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
        args, kwargs = self.anatomy.put(call.args, call.kwargs, stream.clone() if self._copies else stream)
        self.layer_tokens += stream.shape[0] * stream.shape[1]
        last = index == self.num_layers - 1
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.autocast())
            if read is not None and last and self._pointwise:
                stack.enter_context(narrowed(self._pointwise, read, (stream.shape[0], stream.shape[1])))
            return self.anatomy.stream(self.layers[index](*args, **kwargs))

    def unpatched(self, recording: Recording) -> torch.Tensor:
        """h_{L−1} [R, T, d] of the recorded run, walked layer by layer as patched streams are."""
        stream = recording.after(-1)
        for index in range(self.num_layers):
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
        size = _HEAD_BYTES.get(self.device.type, _HEAD_BYTES_ELSEWHERE) // (4 * self.anatomy.vocab_size)
        size = max(size, _HEAD_ROWS)
        for first in range(0, count, size):
            yield slice(first, min(first + size, count))

    @contextlib.contextmanager
    def _stubbed(self, stream: torch.Tensor) -> Iterator[None]:
        """Every decoder layer returns ``stream``, whatever it is given."""
        with self._instead(range(self.num_layers), lambda index, *_: self.anatomy.wrap(self._outputs[index], stream)):
            yield

    def _passing(self, layers: Iterable[int], below: list[Any]) -> AbstractContextManager[None]:
        """These layers return the stream that they are given, and what else the layer in ``below`` them has returned."""
        return self._instead(
            layers, lambda _, args, kwargs: self.anatomy.wrap(below[0], self.anatomy.take(args, kwargs))
        )

    @contextlib.contextmanager
    def _instead(
        self, layers: Iterable[int], returned: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
    ) -> Iterator[None]:
        """These layers do not compute: they return what ``returned`` makes of their index and arguments."""

        def stub(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: returned(index, args, kwargs)

        replaced = [(index, self.layers[index]) for index in layers]
        before = [layer.__dict__.get("forward") for _, layer in replaced]
        try:
            for index, layer in replaced:
                layer.forward = stub(index)
            yield
        finally:
            for (_, layer), own in zip(replaced, before, strict=True):
                if own is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = own

    # -- gradients ---------------------------------------------------------------------------------------------------

    def stream_gradients(
        self,
        recording: Recording,
        objectives: Callable[[torch.Tensor], Sequence[torch.Tensor]],
        *,
        down_to: int = 0,
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """∂ objective / ∂ h_l, a list of [R, T, d] (one an objective), for l = L−1 … ``down_to``, one layer at a time.

        ``objectives`` takes h_{L−1} and gives scalars. Each layer is run again with its input as a leaf, so the graph
        of one layer lives at a time and no parameter's ``.grad`` is written.
        """
        for layer, gradients, _ in self.inner_gradients(recording, objectives, down_to=down_to):
            yield layer, gradients

    def inner_gradients(
        self,
        recording: Recording,
        objectives: Callable[[torch.Tensor], Sequence[torch.Tensor]],
        tap: Callable[[int], AbstractContextManager[Mapping[Any, torch.Tensor]]] = _no_taps,
        *,
        down_to: int = 0,
    ) -> Iterator[tuple[int, list[torch.Tensor], dict[Any, list[torch.Tensor]]]]:
        """:meth:`stream_gradients`, and on the way the gradients at tensors inside the layers.

        Args:
            tap: for a layer, a context in which a call of it leaves tensors of its graph in the mapping it yields.

        Yields:
            l, ∂ objective / ∂ h_l, and for layer l + 1 (empty at the top) the gradients by what its tap left: by key, one
            an objective.
        """
        # Grad mode is switched around each step, not around the yields: a generator must not leak it to its consumer.
        with torch.enable_grad():
            top = recording.after(self.num_layers - 1).detach().requires_grad_()
            gradients = [found[0] for found in _each_gradient(objectives(top), [top], None)]
        yield self.num_layers - 1, gradients, {}
        for index in range(self.num_layers - 1, down_to, -1):
            with torch.enable_grad():
                leaf = recording.after(index - 1).detach().requires_grad_()
                with tap(index) as inside:
                    output = self.layer(index, leaf, recording)
                each = _each_gradient([output] * len(gradients), [leaf, *inside.values()], gradients)
            gradients = [found[0] for found in each]
            inner = {key: [found[place + 1] for found in each] for place, key in enumerate(inside)}
            del output, inside, each
            self.layer_tokens += len(gradients) * leaf.shape[0] * leaf.shape[1]
            yield index - 1, gradients, inner

    # -- the check at load -------------------------------------------------------------------------------------------

    def probe_inputs(self) -> dict[str, torch.Tensor]:
        """A few tokens to try things on: two rows, the second of them padded."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(3, 3 + 14, device=self.device).remainder(vocabulary).view(2, 7)
        mask = torch.ones_like(ids)
        # One row is padded, as rows of a batch are: a mask that is never needed could hide that it is not replayed.
        mask[1, 5:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def _adopt_autocast(self, inputs: dict[str, torch.Tensor]) -> None:
        """Where the model's own forward turns autocast on (accelerate wraps it so), replay computes inside the same."""
        device = self.device.type
        seen: list[tuple[bool, torch.dtype]] = []

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))
            raise _Recorded

        handle = self.model.get_input_embeddings().register_forward_pre_hook(look)
        try:
            self.model(**inputs, use_cache=False)
        except _Recorded:
            pass
        finally:
            handle.remove()
        self.compute_dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        if seen and seen[0][0]:
            self.compute_dtype = dtype = seen[0][1]
            self.autocast = lambda: torch.autocast(device, dtype=dtype)

    def _verify(self, inputs: dict[str, torch.Tensor], like: Replay | None) -> None:
        """Replay from every layer must give the model's own streams and logits, and must leave the model as it was."""
        name = type(self.model).__name__
        recording, entering = self._entering(inputs)
        self._outputs: list[Any] = [call.output for call in recording.calls]
        for index in range(self.num_layers):
            if not _same(entering[index], recording.after(index - 1)):
                raise AnatomyError(
                    f"{name} cannot be replayed: between layer {index - 1} and layer {index} the model changes the "
                    "residual stream itself, outside any layer, so a stream continued by calling the layers would "
                    "differ from the model's own forward. Nothing falls back silently; this architecture is refused."
                )
        self._expect(recording, recording, "Dropout or other state inside the layer?")
        if like is None:
            self._expect(
                self._disturbed(inputs),
                recording,
                "The stream below it was another one than when they were recorded, so a layer gets more from those "
                "below it than the residual stream, and a patched stream cannot be continued.",
            )
            self._expect(
                recording,
                recording,
                "Another stream went through the layers in between: they hand something on beside the residual stream "
                "(keys and values, say), so a patched stream cannot be continued.",
            )
        assert recording.logits is not None
        valid = inputs["attention_mask"].bool()
        own = recording.logits[valid].double()
        headed = self.head(recording.after(self.num_layers - 1)[valid]).double()
        finite = bool(torch.isfinite(own).all())  # a model that has overflowed is for the audit to report
        difference = float((headed - own).abs().max()) if headed.shape == own.shape else float("inf")
        dtypes = (recording.logits.dtype, recording.streams[-1].dtype, self.compute_dtype)
        scale = float(own.abs().max())
        if finite and not difference <= rounding(64, *dtypes) * scale:
            raise AnatomyError(
                f"{name} cannot be replayed: its logits from the last layer's stream differ by {difference:.3g} when "
                "its layers are stubbed, so its norm and head depend on more than that stream"
            )
        if like is not None:
            last = self.layers[-1]
            names = {module: name for name, module in like.layers[-1].named_modules()}
            self._pointwise = [last.get_submodule(names[module]) for module in like._pointwise]
            return
        self._pointwise = self._find_pointwise(recording)
        self._may_skip_layers = self._can_skip_layers(inputs, recording)
        again = self.record(inputs)
        if not all(map(_same, again.streams, recording.streams)):
            raise AnatomyError(f"{name} cannot be audited: replaying its layers changed what the model computes")
        changed = inputs["input_ids"].clone()
        changed[:, -1] = (changed[:, -1] + 1) % self.anatomy.vocab_size
        ahead = self.record({**inputs, "input_ids": changed}).streams[-1][0, :-1]
        behind = recording.streams[-1][0, :-1]
        atol = rounding(1000, *dtypes) * float(behind.abs().max())
        if finite and not torch.allclose(ahead, behind, rtol=0.0, atol=atol):
            raise AnatomyError(
                f"{name} is not a causal language model: changing the last token changed the stream before it; "
                "expected a model loaded with AutoModelForCausalLM"
            )

    def _can_skip_layers(self, inputs: dict[str, torch.Tensor], recording: Recording) -> bool:
        """Whether layers that hand on what the lowest one returned are called with the arguments of the ``recording``."""
        try:
            begun = self.record(inputs, until=0, calls_above=True)
        except Exception:  # whatever a model makes of it, it is recorded whole then
            return False
        return all(
            _equal_arguments((one.args, one.kwargs), (other.args, other.kwargs))
            for one, other in zip(begun.calls, recording.calls, strict=True)
        )

    def _find_pointwise(self, recording: Recording) -> list[nn.Module]:
        """Parts of the last layer that may run at some positions only, found by trying (see ``models.pointwise``)."""
        last = self.num_layers - 1
        stream = recording.after(last - 1)
        rows, width = stream.shape[:2]
        # The upper end of every sequence: what it does not get from itself it gets from below.
        kept = torch.arange(rows * width, device=stream.device).view(rows, width)[:, width // 2 :].flatten()
        dtypes = (stream.dtype, self.compute_dtype)
        return find_pointwise(
            self.layers[last],
            lambda: self.layer(last, stream, recording),
            stream,
            kept,
            tolerance=rounding(64, *dtypes),
        )

    def _entering(self, inputs: dict[str, torch.Tensor]) -> tuple[Recording, dict[int, torch.Tensor]]:
        """A recording, and what each layer received in it (equal to what the one below returned, if all is well)."""
        entering: dict[int, torch.Tensor] = {}

        def look(index: int) -> Callable[..., None]:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entering[index] = self.anatomy.take(args, kwargs).detach().clone()

            return before

        handles = [
            layer.register_forward_pre_hook(look(index), with_kwargs=True) for index, layer in enumerate(self.layers)
        ]
        try:
            return self.record(inputs, keep_logits=True), entering
        finally:
            for handle in handles:
                handle.remove()

    def _disturbed(self, inputs: dict[str, torch.Tensor]) -> Recording:
        """A recording of the model with another stream entering layer 0, as a patch would have it."""

        def disturb(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.anatomy.put(args, kwargs, self.anatomy.take(args, kwargs).roll(1, dims=-1))

        handle = self.layers[0].register_forward_pre_hook(disturb, with_kwargs=True)
        try:
            return self.record(inputs)
        finally:
            handle.remove()

    def _expect(self, wanted: Recording, recording: Recording, why: str) -> None:
        """The layers, with the arguments of ``recording``, turn each stream of ``wanted`` into the next.

        From top to bottom, so that nothing a layer may leave behind for those above it is what they expect.
        """
        for index in reversed(range(self.num_layers)):
            replayed = self.layer(index, wanted.after(index - 1), recording)
            if not _same(replayed, wanted.after(index)):
                difference = (replayed.double() - wanted.after(index).double()).abs().max().item()
                raise AnatomyError(
                    f"{type(self.model).__name__} cannot be replayed: layer {index}, called again with the arguments "
                    f"it received, gave another output (largest difference {difference:.3g}). {why}"
                )


class _WritesInPlace(Exception):
    """A layer wrote into the stream it was given."""


class _Recorded(Exception):
    """The last layer that was asked for has run: leave the forward, norm and head are not needed."""


def _each_gradient(
    outputs: Sequence[torch.Tensor], by: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor] | None
) -> list[tuple[torch.Tensor, ...]]:
    """∂ output / ∂ each of ``by`` for each of several outputs of one graph, each times its ``upstream`` gradient."""
    found = []
    for place, output in enumerate(outputs):
        found.append(
            torch.autograd.grad(
                output,
                by,
                grad_outputs=None if upstream is None else upstream[place].to(output.dtype),
                retain_graph=place + 1 < len(outputs),
            )
        )
    return found


def _equal_arguments(one: Any, other: Any) -> bool:
    """Of two calls of a layer; of what is neither a tensor, a collection nor a plain value only the type is compared."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return _same(one, other) if one.is_floating_point() else bool(torch.equal(one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal_arguments(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal_arguments, one, other))
    return not isinstance(one, bool | int | float | str) or bool(one == other)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit by bit, or within rounding on a device whose kernels are not deterministic; NaN equals NaN."""
    if one.device.type == "cpu":
        return bool(torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True))
    tolerance = 8 * torch.finfo(one.dtype).eps
    scale = float(other.detach().abs().nan_to_num().max())
    return bool(torch.allclose(one, other, rtol=0.0, atol=tolerance * scale, equal_nan=True))


def rounding(steps: int, *dtypes: torch.dtype) -> float:
    """How far numbers computed in other shapes may lie apart, as a share of the largest: ``steps`` rounding units of
    float32, in which several families' norms compute whatever the dtype; 8 units of the coarsest dtype that is met."""
    return max(steps * torch.finfo(torch.float32).eps, *(8 * torch.finfo(dtype).eps for dtype in dtypes))


def equal_streams(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], mask: torch.Tensor) -> bool:
    """Whether two recordings agree bit by bit at the ``mask``ed [R, T] positions."""
    return all(torch.equal(a[mask], b[mask]) for a, b in zip(one, other, strict=True))
