"""One decoder layer on a few tokens, run again and again with something inside it held or moved."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from align_audit.models.precision import rounding
from align_audit.models.replay import Recording, Replay
from align_audit.models.sites import first_tensor, with_first_tensor


@dataclass(frozen=True)
class Hook:
    """Sees what a module returns (or its first input), and may give something of the same size in its place."""

    name: str
    act: Callable[[torch.Tensor], torch.Tensor | None]
    on_input: bool = False

    def register(self, module: nn.Module) -> Any:
        def changed(tensor: torch.Tensor) -> torch.Tensor | None:
            replaced = self.act(tensor)
            return None if replaced is None else replaced.view(tensor.shape).to(tensor.dtype)

        def on_entry(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = None if args else next(iter(kwargs))
            replaced = changed(args[0] if name is None else kwargs[name])
            if replaced is None:
                return None
            return ((replaced, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: replaced})

        def on_exit(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            tensor = first_tensor(output)
            assert tensor is not None
            replaced = changed(tensor)
            return None if replaced is None else with_first_tensor(output, replaced)

        if self.on_input:
            return module.register_forward_pre_hook(on_entry, with_kwargs=True)
        return module.register_forward_hook(on_exit)


class Seen:
    """Keeps the tensor that a hook was shown."""

    value: torch.Tensor

    def __call__(self, tensor: torch.Tensor) -> None:
        self.value = tensor.detach().clone()


class Trial:
    """A layer, and what its modules take and return in a recorded run.

    Attributes:
        entering, leaving: the stream [R, T, d] before and behind the layer.
        names: the layer's modules by their path.
        tolerance: how far numbers that are computed otherwise may lie apart, as a share of the largest.
    """

    def __init__(self, replay: Replay, recording: Recording, index: int) -> None:
        self.replay = replay
        self.recording = recording
        self.index = index
        self.layer = replay.layers[index]
        self.entering = recording.after(index - 1)
        self.leaving = recording.after(index)
        self.names = {name: module for name, module in self.layer.named_modules() if name}
        self.tolerance = rounding(64, self.entering.device.type, self.entering.dtype, replay.compute_dtype)
        self._generator = torch.Generator().manual_seed(0)
        self.order: list[str] = []
        """Modules that run once in a call, first done first."""
        self.outputs: dict[str, torch.Tensor] = {}
        """Of those, what they return, where it has the size of the stream."""
        self.inputs: dict[str, torch.Tensor] = {}
        """The first argument of a module, where it is a vector a position."""
        self._watch()

    def _watch(self) -> None:
        calls: dict[str, int] = {}

        def look(name: str) -> Callable[..., None]:
            def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                calls[name] = calls.get(name, 0) + 1
                self.order.append(name)
                tensor = first_tensor(output)
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

    def run(self, held: Collection[str] = (), *hooks: Hook, stream: torch.Tensor | None = None) -> torch.Tensor:
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

    def _hold(self, name: str) -> Hook:
        return Hook(name, lambda _: self.outputs[name].clone())

    def last_position(self, tensor: torch.Tensor) -> tuple[int, ...] | None:
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

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        """Random numbers of the size of ``like``'s own, the same on every device."""
        size = float(like.double().square().mean().sqrt()) or 1.0
        noise = torch.randn(like.shape, generator=self._generator, dtype=torch.float64) * size
        return noise.to(device=like.device, dtype=like.dtype)

    def moved_stream(self) -> torch.Tensor:
        """What enters the layer, moved far; the same each time."""
        self._generator.manual_seed(1)
        return self.entering + self.large_noise()

    def large_noise(self) -> torch.Tensor:
        """[R, T, d], of the size of the larger of the streams before and behind the layer: rounding cannot hide it."""
        sizes = [float(stream.double().square().mean()) for stream in (self.entering, self.leaving)]
        return self.noise(self.entering if sizes[0] > sizes[1] else self.leaving)

    def shift(self, name: str, added: torch.Tensor) -> Hook:
        """Adds to what a module returns."""
        return Hook(name, lambda tensor: tensor + added.view(tensor.shape))

    def coordinates(self, name: str) -> int | None:
        """Of a module's output at one position, where it has one."""
        size: list[int] = []

        def look(tensor: torch.Tensor) -> None:
            if self.last_position(tensor) is not None:
                size.append(tensor.shape[-1])

        try:
            self.run((), Hook(name, look))
        except AssertionError:  # it returns no tensor
            return None
        return size[0] if len(size) == 1 else None
