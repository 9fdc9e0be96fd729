"""Finer sites inside a decoder layer: what its attention adds to the residual stream, what its MLP adds, each head's part.

Found by trying, not by class. A module's output is an *addend* when, with the addends that run after it held fixed, what
is added to it appears in the layer's output, times one number (a residual multiplier), and nowhere else; with all addends
held fixed the layer's output must follow the stream that enters. So the norm behind the attention (Gemma 2, OLMo 2), two
branches side by side (GPT-J, Falcon), a module that adds the residual itself (BLOOM) and a single mixer (Mamba) come out
as they compute. The first addend that mixes positions is the attention, if its makers call it so; the largest that treats
every position by itself is the MLP, experts included. A head's part is what its slice of the attention's output projection
adds to the projection's output; the parts of all heads, and the bias, sum to it (the "result" of a head: Elhage et al. 2021,
transformer-circuits.pub/2021/framework).

What cannot be established is not guessed: the layer then has no such site, and says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from align_audit.errors import AnatomyError, SiteError
from align_audit.models.replay import Recording, Replay, rounding

Kind = Literal["attention_output", "mlp_output", "head"]

ATTENTION_WORDS = ("attn", "attention")
"""One of these is in the name or class of whatever its makers consider attention; other mixers (state spaces,
convolutions, recurrences) are not called so. The one thing that is read from names."""


class Place(NamedTuple):
    """One site of a layer: an addend, or one head's part of the attention."""

    kind: Kind
    head: int | None = None


@dataclass(frozen=True)
class LayerSites:
    """Where one decoder layer's sites are: paths of modules within the layer; None where a site was not established.

    Attributes:
        attention, mlp: the module whose output is added to the stream.
        projection: the attention's output projection; its input is the heads side by side.
        heads: how many.
        addends: all modules whose outputs are added, in the order in which they run.
        missing: per kind of site, why the layer has none.
    """

    attention: str | None = None
    mlp: str | None = None
    projection: str | None = None
    heads: int = 0
    addends: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def path(self, kind: Kind) -> str | None:
        """Of the module at whose output the site is met."""
        return {"attention_output": self.attention, "mlp_output": self.mlp, "head": self.projection}[kind]

    @property
    def kinds(self) -> list[str]:
        """What there is to patch; a whole block there always is."""
        found = {"attention_output": self.attention, "mlp_output": self.mlp, "head": self.projection}
        return ["block", *(kind for kind, path in found.items() if path is not None)]


class Sites:
    """The sites of an opened model: recorded, swapped and differentiated during one call of one layer.

    Every use puts its hooks on for that call only and takes them off whatever happens; a site that was not met exactly
    once is an error. The layer always runs at all positions: a swap and narrowing (``Replay.layer``'s ``read``) never meet.

    Args:
        like: the sites of a model that is built just the same; they are then checked, not found again.

    Raises:
        SiteError: ``like`` does not hold for this model.
    """

    def __init__(self, replay: Replay, like: Sites | None = None) -> None:
        self.replay = replay
        self.layers: list[LayerSites] = find_sites(replay, None if like is None else like.layers)

    def check(self, kind: Kind, layer: int, head: int | None = None) -> None:
        """Raise unless the layer has the site.

        Raises:
            SiteError: saying what it has instead.
        """
        found = self.layers[layer]
        if found.path(kind) is None:
            raise SiteError(f"layer {layer} has {', '.join(found.kinds)}; no {kind}: {found.missing[kind]}")
        if head is not None and not 0 <= head < found.heads:
            raise SiteError(f"layer {layer} has heads 0 to {found.heads - 1}; no head {head}")

    def record(
        self,
        layer: int,
        recording: Recording,
        places: Collection[Place],
        keep: Callable[[Place, torch.Tensor], torch.Tensor] = lambda place, tensor: tensor.clone(),
    ) -> dict[Place, torch.Tensor]:
        """What stood at ``places`` of a layer in a recorded run, [R, T, d] each, from one call of the layer.

        Args:
            keep: what to keep of each tensor, called while one of them is there at a time.
        """
        found: dict[Place, torch.Tensor] = {}

        def look(call: _Call) -> None:
            for place in places:
                if self.layers[layer].path(place.kind) == call.path and place.head is None:
                    found[place] = keep(place, call.output)
            alone = [place for place in places if place.head is not None]
            if alone and call.path == self.layers[layer].projection:
                bias = call.bias()
                for place in alone:
                    found[place] = keep(place, self._part(layer, call, place.head, bias))

        with self._hooks(layer, recording, {place.kind for place in places}, look):
            self.replay.layer(layer, recording.after(layer - 1), recording)
        return found

    def swapped(
        self, layer: int, recording: Recording, place: Place, swap: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """h_layer [R, T, d] of a recorded run in which the tensor t [R, T, d] at ``place`` was ``swap(t)``.

        For a head, the attention's projection gives its output plus ``swap(t)`` − t.
        """

        def exchange(call: _Call) -> torch.Tensor:
            if place.head is None:
                return swap(call.output.clone()).clone()  # some layers write into what their modules return (Falcon)
            own = self._part(layer, call, place.head, call.bias())
            return call.output + (swap(own) - own)

        with self._hooks(layer, recording, {place.kind}, exchange):
            return self.replay.layer(layer, recording.after(layer - 1), recording)

    @contextlib.contextmanager
    def tapped(self, layer: int, recording: Recording, kinds: Collection[Kind]) -> Iterator[dict[Kind, torch.Tensor]]:
        """Inside, a call of the layer under autograd leaves behind the tensors at its sites, to be differentiated by.

        Yields:
            kind → the module's own output, in whatever shape it has; for ``head`` the projection's output, of which every
            head's part is a summand.
        """
        found: dict[Kind, torch.Tensor] = {}

        def look(call: _Call) -> torch.Tensor:
            for kind in kinds:
                if self.layers[layer].path(kind) == call.path:
                    found[kind] = call.raw
            # The layer goes on with a copy, which it may write into.
            return call.output.clone()

        with self._hooks(layer, recording, kinds, look):
            yield found

    def _part(self, layer: int, call: _Call, head: int | None, bias: torch.Tensor) -> torch.Tensor:
        """What one head adds to the projection's output, [R, T, d]: the projection of its slice of the input alone."""
        assert head is not None
        width = call.input.shape[-1] // self.layers[layer].heads
        alone = torch.zeros_like(call.input)
        within = slice(head * width, (head + 1) * width)
        alone[..., within] = call.input[..., within]
        return call.again(alone) - bias

    @contextlib.contextmanager
    def _hooks(
        self, layer: int, recording: Recording, kinds: Collection[Kind], act: Callable[[_Call], torch.Tensor | None]
    ) -> Iterator[None]:
        paths = []
        for kind in kinds:
            self.check(kind, layer)
            paths.append(self.layers[layer].path(kind))
        # The attention's addend may be the output projection itself: one hook then does for both.
        with contextlib.ExitStack() as stack:
            for path in dict.fromkeys(paths):
                assert path is not None
                shape = recording.after(layer - 1).shape
                stack.enter_context(_met(self.replay.layers[layer], path, shape, act))
            yield


# -- hooks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A module's call: its path, first input [R, T, k], and its output as it is and as [R, T, d]."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    raw: torch.Tensor
    shape: torch.Size

    @property
    def output(self) -> torch.Tensor:
        return self.raw.view(self.shape)

    @property
    def input(self) -> torch.Tensor:
        value = self.args[0] if self.args else next(iter(self.kwargs.values()))
        assert isinstance(value, torch.Tensor)
        return value

    def again(self, value: torch.Tensor) -> torch.Tensor:
        """The module on another first input; without its hooks, so that this one is not called again."""
        if self.args:
            output = self.module.forward(value, *self.args[1:], **self.kwargs)
        else:
            output = self.module.forward(**{**self.kwargs, next(iter(self.kwargs)): value})
        tensor = _tensor(output)
        assert tensor is not None
        return tensor.view(self.shape)

    def bias(self) -> torch.Tensor:
        """What the module makes of nothing, [R, T, d]."""
        return self.again(torch.zeros_like(self.input))


@contextlib.contextmanager
def _met(layer: nn.Module, path: str, shape: torch.Size, act: Callable[[_Call], torch.Tensor | None]) -> Iterator[None]:
    """Inside, ``act`` sees the output of the module at ``path`` and may give another [R, T, d] in its place.

    Raises:
        AnatomyError: the module did not run exactly once.
    """
    met = 0

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal met
        met += 1
        tensor = _tensor(output)
        assert tensor is not None
        other = act(_Call(path, module, args, kwargs, tensor, shape))
        return None if other is None else _with(output, other.view(tensor.shape).to(tensor.dtype))

    handle = layer.get_submodule(path).register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if met != 1:
        raise AnatomyError(f"expected {path!r} to run once in a call of its decoder layer; it ran {met} times")


def _tensor(output: Any) -> torch.Tensor | None:
    """The first tensor a module returned."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _with(output: Any, tensor: torch.Tensor) -> Any:
    return type(output)((tensor, *output[1:])) if type(output) in (tuple, list) else tensor


# -- finding them -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def find_sites(replay: Replay, like: Sequence[LayerSites] | None = None) -> list[LayerSites]:
    """The sites of every decoder layer, by trying on a few tokens; layers built alike are tried once, then checked.

    Args:
        like: of a model that is built just the same.

    Raises:
        SiteError: ``like`` does not hold here.
    """
    worked = replay.layer_tokens
    recording = replay.record(replay.probe_inputs())
    config: Any = replay.model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    known: dict[Any, LayerSites] = {}
    found = []
    for index, layer in enumerate(replay.layers):
        trial = _Trial(replay, recording, index)
        built = tuple((name, type(module)) for name, module in layer.named_modules())
        sites = like[index] if like is not None else known.get(built)
        if sites is not None and not trial.holds(sites.addends):
            if like is not None:
                raise SiteError(
                    f"the modules whose outputs layer {index} of the policy adds to its stream are not what the "
                    f"reference's adds ({', '.join(sites.addends)}), although both are built alike"
                )
            sites = None
        if sites is None:
            sites = trial.find(heads if isinstance(heads, int) else None)
            known[built] = sites
        found.append(sites)
    replay.layer_tokens = worked
    return found


@dataclass(frozen=True)
class _Hook:
    """Sees what a module returns (or its first input), and may give something of the same size in its place."""

    name: str
    act: Callable[[torch.Tensor], torch.Tensor | None]
    on_input: bool = False

    def register(self, module: nn.Module) -> Any:
        def changed(tensor: torch.Tensor) -> torch.Tensor | None:
            other = self.act(tensor)
            return None if other is None else other.view(tensor.shape).to(tensor.dtype)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = None if args else next(iter(kwargs))
            other = changed(args[0] if name is None else kwargs[name])
            if other is None:
                return None
            return ((other, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: other})

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            tensor = _tensor(output)
            assert tensor is not None
            other = changed(tensor)
            return None if other is None else _with(output, other)

        if self.on_input:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)


class _Seen:
    """Keeps the tensor that a hook was shown."""

    value: torch.Tensor

    def __call__(self, tensor: torch.Tensor) -> None:
        self.value = tensor.detach().clone()


class _Trial:
    """One layer on a few tokens, run again and again with something held or moved inside it."""

    def __init__(self, replay: Replay, recording: Recording, index: int) -> None:
        self.replay = replay
        self.recording = recording
        self.index = index
        self.layer = replay.layers[index]
        self.entering = recording.after(index - 1)
        self.leaving = recording.after(index)
        self.names = {name: module for name, module in self.layer.named_modules() if name}
        self.tolerance = rounding(64, self.entering.dtype, replay.compute_dtype)
        self._generator = torch.Generator().manual_seed(0)
        self.order: list[str] = []
        """Modules that run once in a call, first done first."""
        self.outputs: dict[str, torch.Tensor] = {}
        """Of those, what they return, where it has the size of the stream."""
        self.inputs: dict[str, torch.Tensor] = {}
        self._watch()

    # -- running the layer ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        calls: dict[str, int] = {}

        def look(name: str) -> Callable[..., None]:
            def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                calls[name] = calls.get(name, 0) + 1
                self.order.append(name)
                tensor = _tensor(output)
                if tensor is not None and self._like_stream(tensor):
                    self.outputs[name] = tensor.detach().clone().view(self.entering.shape)
                value = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(value, torch.Tensor) and self._by_position(value):
                    self.inputs[name] = value.detach().clone()

            return after

        handles = [module.register_forward_hook(look(name), with_kwargs=True) for name, module in self.names.items()]
        try:
            self.run()
        finally:
            for handle in handles:
                handle.remove()
        self.order = [name for name in self.order if calls[name] == 1]
        self.outputs = {name: value for name, value in self.outputs.items() if calls[name] == 1}

    def _like_stream(self, tensor: torch.Tensor) -> bool:
        """[R, T, d], or [R·T, d]."""
        return tensor.shape[-1:] == self.entering.shape[-1:] and self._by_position(tensor)

    def _by_position(self, tensor: torch.Tensor) -> bool:
        rows, width, _ = self.entering.shape
        return tensor.is_floating_point() and tensor.shape[:-1] in ((rows, width), (rows * width,))

    def run(self, held: Collection[str] = (), *hooks: _Hook, stream: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output on ``stream`` (None: what entered it in the recorded run), with changes inside.

        Args:
            held: modules that return what they returned in the recorded run.
        """
        handles: list[Any] = []
        try:
            for hook in (*map(self._hold, held), *hooks):
                handles.append(hook.register(self.names[hook.name]))
            return self.replay.layer(self.index, self.entering if stream is None else stream, self.recording).detach()
        finally:
            for handle in handles:
                handle.remove()

    def _hold(self, name: str) -> _Hook:
        return _Hook(name, lambda _: self.outputs[name].clone())

    def _last_position(self, tensor: torch.Tensor) -> tuple[int, ...] | None:
        """Where, in a module's output, the vector of the first row's last position begins; None if it has no such."""
        rows, width, _ = self.entering.shape
        if tensor.shape[:-1] == (rows, width):
            return (0, width - 1)
        if tensor.shape[:-1] == (rows * width,):
            return (width - 1,)
        if tensor.dim() == 4 and tensor.shape[:2] == (rows, width):
            return (0, width - 1, 0)
        if tensor.dim() == 4 and (tensor.shape[0], tensor.shape[2]) == (rows, width):
            return (0, 0, width - 1)
        return None

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        """Random numbers of the size of ``like``'s own, the same on every device."""
        size = float(like.double().square().mean().sqrt()) or 1.0
        noise = torch.randn(like.shape, generator=self._generator, dtype=torch.float64) * size
        return noise.to(device=like.device, dtype=like.dtype)

    # -- addends -------------------------------------------------------------------------------------------------------

    def find(self, heads: int | None) -> LayerSites:
        addends = self._addends()
        if isinstance(addends, str):
            return LayerSites(missing=dict.fromkeys(("attention_output", "mlp_output", "head"), addends))
        mixing = [name for name in addends if self._mixes(name, addends)]
        parts = self._parts(addends)
        missing: dict[str, str] = {}
        attention = mlp = projection = None
        mixer = next((self._largest(parts[name]) for name in mixing), None)
        called = " ".join(f"{name} {type(self.names[name]).__name__}" for name in (parts[mixing[0]] if mixing else ()))
        if mixer is None:
            missing["attention_output"] = "nothing it adds to the stream mixes positions"
        elif any(word in called.lower() for word in ATTENTION_WORDS):
            attention = mixing[0]
        else:
            missing["attention_output"] = f"its mixer is {type(self.names[mixer]).__name__}"
        pointwise = [name for name in addends if name not in mixing]
        if pointwise:
            mlp = max(pointwise, key=lambda name: sum(map(self._own_parameters, parts[name])))
        else:
            missing["mlp_output"] = "everything it adds to the stream mixes positions"
        if attention is None:
            missing["head"] = missing["attention_output"]
        elif heads is None:
            missing["head"] = "the model's config has no num_attention_heads"
        else:
            projection = self._projection(attention, parts[attention], addends, heads)
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

    def holds(self, addends: Sequence[str]) -> bool:
        """Whether these are this layer's addends, in this order; nothing was found before: nothing is looked for now."""
        if not addends:
            return isinstance(self._addends(), str)
        if any(name not in self.outputs for name in addends):
            return False
        adds = all(self._adds(name, addends[place + 1 :]) for place, name in enumerate(addends))
        return adds and self._follows(addends)

    def _addends(self) -> list[str] | str:
        """Modules whose outputs are added to the stream, in the order in which they run; or why there are none."""
        if not bool(torch.isfinite(self.leaving).all()):
            return "its stream is not finite"
        if not torch.equal(self.run(), self.leaving) and self.leaving.device.type == "cpu":
            return "it does not give the same output twice"
        found: list[str] = []
        # From the last to run, so that what an addend does to those behind it is held; outer modules are done after
        # the inner ones that make them up, which then change nothing.
        for name in reversed(self.order):
            if name not in self.outputs or not self._adds(name, found):
                continue
            # A module that returns the whole stream, its residual included (BLOOM's), cuts the stream off when held.
            if torch.equal(self.run([*found, name], stream=self._moved_stream()), self.leaving):
                continue
            found.insert(0, name)
        if not found or not self._follows(found):
            return (
                "its output is not the stream that enters it plus what modules of it return (the stream is normalized "
                "or gated as a whole, or added to by no module)"
            )
        return found

    def _moved_stream(self) -> torch.Tensor:
        self._generator.manual_seed(1)
        return self.entering + self._large_noise()

    def _large_noise(self) -> torch.Tensor:
        """[R, T, d], of the size of the larger of the streams before and behind the layer: rounding cannot hide it."""
        sizes = [float(stream.double().square().mean()) for stream in (self.entering, self.leaving)]
        return self._noise(self.entering if sizes[0] > sizes[1] else self.leaving)

    def _adds(self, name: str, held: Collection[str]) -> bool:
        """Whether, with ``held`` fixed, something added to the module's output is added to the layer's, times a number."""
        if not bool(torch.isfinite(self.outputs[name]).all()):
            return False
        added = self._large_noise()
        moved = self.run(held, self._shift(name, added)).double() - self.leaving.double()
        return self._is_multiple(moved, added.double(), self.leaving.double().abs() + self.outputs[name].double().abs())

    def _follows(self, addends: Collection[str]) -> bool:
        """Whether, with all addends fixed, the layer's output moves as the stream that enters it does."""
        stream = self._moved_stream()
        moved = self.run(addends, stream=stream).double() - self.leaving.double()
        scale = self.leaving.double().abs() + stream.double().abs()
        return self._is_multiple(moved, stream.double() - self.entering.double(), scale)

    def _is_multiple(self, moved: torch.Tensor, added: torch.Tensor, scale: torch.Tensor) -> bool:
        factor = float((moved * added).sum() / added.square().sum())
        if not abs(factor) > 1e-3:
            return False
        room = self.tolerance * (scale * max(1.0, abs(factor)) + (factor * added).abs())
        return bool(((moved - factor * added).abs() <= room).all())

    def _mixes(self, name: str, addends: Collection[str]) -> bool:
        """Whether the addend at later positions depends on the stream at the first one, all other addends held."""
        stream = self.entering.clone()
        stream[0, 0] = self._moved_stream()[0, 0]
        seen = _Seen()
        self.run([other for other in addends if other != name], _Hook(name, seen), stream=stream)
        own = self.outputs[name][0, 1:].double()
        moved = (seen.value.view(self.entering.shape)[0, 1:].double() - own).abs().max()
        return bool(moved > self.tolerance * own.abs().max())

    def _parts(self, addends: Sequence[str]) -> dict[str, list[str]]:
        """For each addend the modules that run for it: those done after the addend before it."""
        parts: dict[str, list[str]] = {}
        begin = 0
        for name in addends:
            end = self.order.index(name) + 1
            parts[name] = self.order[begin:end]
            begin = end
        return parts

    def _own_parameters(self, name: str) -> int:
        return sum(parameter.numel() for parameter in self.names[name].parameters(recurse=False))

    def _largest(self, parts: Sequence[str]) -> str:
        """Of some modules the one that holds most: a mixer, not its norms; the outer of two."""
        return max(reversed(parts), key=lambda name: sum(p.numel() for p in self.names[name].parameters()))

    # -- heads ---------------------------------------------------------------------------------------------------------

    def _projection(self, attention: str, parts: Sequence[str], addends: Sequence[str], heads: int) -> str | None:
        """The linear module through which all of the attention passes, and whose input is its heads side by side."""
        others = [name for name in addends if name != attention]
        for name in reversed(parts):
            if (
                name in self.outputs
                and name in self.inputs
                and any(True for _ in self.names[name].parameters())
                and self.inputs[name].shape[-1] % heads == 0
                and self._carries_all(name, attention, others)
                and self._is_linear(name)
                and self._has_heads(name, parts[: parts.index(name)], heads)
            ):
                return name
        return None

    def _carries_all(self, name: str, attention: str, others: Collection[str]) -> bool:
        """Whether the addend is a function of what this module returns, and of nothing else that the stream changes."""
        if name == attention:
            return True
        own, seen = self.outputs[attention], _Seen()
        self.run([*others, name], _Hook(attention, seen), stream=self._moved_stream())
        if not torch.equal(seen.value.view(own.shape), own):
            return False
        self.run(others, self._shift(name, self._large_noise()), _Hook(attention, seen))
        return not torch.equal(seen.value.view(own.shape), own)

    def _shift(self, name: str, added: torch.Tensor) -> _Hook:
        return _Hook(name, lambda tensor: tensor + added.view(tensor.shape))

    def _is_linear(self, name: str) -> bool:
        """f(a + b) + f(0) = f(a) + f(b)."""
        one, other = self._noise(self.inputs[name]), self._noise(self.inputs[name])

        def apply(value: torch.Tensor) -> torch.Tensor:
            seen = _Seen()
            self.run((), _Hook(name, lambda _: value, on_input=True), _Hook(name, seen))
            return seen.value.double()

        both, zero = apply(one + other), apply(torch.zeros_like(one))
        first, second = apply(one), apply(other)
        scale = max(float(value.abs().max()) for value in (both, first, second))
        return float((both + zero - first - second).abs().max()) <= 4 * self.tolerance * scale

    def _has_heads(self, name: str, before: Sequence[str], heads: int) -> bool:
        """Whether some number computed on the way (a query's, say) moves most of one head's slice and nothing else, and
        none a smaller part of a slice: then the slices are heads, and not several each. A value's moves one number."""
        own = self.inputs[name]
        place = self._last_position(own)
        assert place is not None

        def moved_by(*nudge: _Hook) -> torch.Tensor:
            seen = _Seen()
            self.run((), *nudge, _Hook(name, seen, on_input=True))
            return (seen.value - own)[place].double().abs()

        room = moved_by()  # 0, but for kernels that are not deterministic
        width, found = own.shape[-1] // heads, False
        for other in before:
            size = self._coordinates(other) if not any(True for _ in self.names[other].children()) else None
            for coordinate in dict.fromkeys((0, size // 2, size - 1)) if size is not None else ():
                # Both ways: where a softmax is saturated, one of them may change nothing.
                ways = [moved_by(_Hook(other, self._nudge(coordinate, way))) > room for way in (1.0, -1.0)]
                moved = (ways[0] | ways[1]).view(heads, width).sum(-1)
                if int((moved > 0).sum()) == 1 and int(moved.max()) > 1:
                    if 2 * int(moved.max()) <= width:
                        return False
                    found = True
        return found

    def _nudge(self, coordinate: int, way: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def far(tensor: torch.Tensor) -> torch.Tensor:
            moved, place = tensor.clone(), self._last_position(tensor)
            assert place is not None
            moved[place][coordinate] += way * (8 * float(tensor.double().square().mean().sqrt()) + 0.1)
            return moved

        return far

    def _coordinates(self, name: str) -> int | None:
        """Of a module's output at one position, where it has one."""
        size: list[int] = []

        def look(tensor: torch.Tensor) -> None:
            if self._last_position(tensor) is not None:
                size.append(tensor.shape[-1])

        try:
            self.run((), _Hook(name, look))
        except AssertionError:  # it returns no tensor
            return None
        return size[0] if len(size) == 1 else None
