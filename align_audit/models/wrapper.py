"""Does what stands around a causal LM compute anything that the model inside does not? Seen in one call of each.

Replay calls layers, norm and head of the model inside. What a wrapper does at a call besides calling it (a hook set up for
the tokens of this call, logits changed afterwards, other positions handed in) would be missing from every number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

from align_audit.errors import SHOWN, AlignAuditError, AnatomyError, plain
from align_audit.models.replay import Replay
from align_audit.models.weights.sharded import is_spread


def check_wrapper(around: nn.Module, replay: Replay, inputs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Refuse a wrapper that computes otherwise than the model inside does when it is called by itself.

    Looked at are the hooks that are in place once the wrapper has begun its work, so that what an adapter will do at a call
    shows before training has given it any weight, and then the last layer's output and the logits.

    Args:
        around: the wrapper, or the model itself: then there is nothing to see.
        replay: the causal LM inside.
        inputs: what both are called with, rows without padding.
        tolerance: largest difference, as a share of the largest value.

    Raises:
        AnatomyError: something differs; the message says what.
    """
    model = replay.model
    if around is model:
        return
    outside, inside = _Call(replay), _Call(replay)
    with torch.no_grad(), replay.autocast():
        outside.run(around, inputs)
        inside.run(model, inputs)
    reason = _hooked(outside, inside) or _apart(outside, inside, tolerance)
    if reason is not None:
        raise AnatomyError(
            f"{type(around).__name__} cannot be audited: called with tokens it does more than the {type(model).__name__} "
            f"inside ({reason}), and an audit calls that model's layers, never what is around it. Expected a wrapper that "
            "works through the weights alone, as LoRA does; one that sets something up at each call (activated LoRA, say) "
            "does not"
        )


@contextlib.contextmanager
def by_itself(around: Any, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the causal LM is called without what stands around it. Where it fails then, and its wrapper does not, the
    wrapper hands it something at each call.

    Args:
        around: the wrapper, or the model itself.
        inputs: what both can be called with.

    Raises:
        AnatomyError: that is so, and weights are not spread over processes. An error that the wrapper raises too is the
            trainer's to meet, and goes through as it is; so does one that a call of the model does not raise again.
    """
    try:
        yield
    except AlignAuditError:
        raise
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        # Of weights that are spread, each layer takes all processes; this one may be alone with its error.
        if around is model or any(is_spread(parameter) for parameter in model.parameters()):
            raise
        if not _works(around, inputs) or _works(model, inputs):
            raise
        raise AnatomyError(
            f"{type(around).__name__} cannot be audited: called by itself, as an audit calls it, the {type(model).__name__} "
            f"inside fails ({type(error).__name__}: {plain(error, SHOWN)}), and through its wrapper it does not. Expected a "
            "wrapper that works through the weights alone, as LoRA does"
        ) from error


def _works(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    try:
        model(**inputs, use_cache=False)
    except AlignAuditError:
        raise
    except Exception:
        return False
    return True


class _Call:
    """What is seen of the model inside during one call: its hooks, its last layer's output, its logits."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self.hooks: dict[str, Hashable] = {}
        self.output: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None

    def run(self, called: Any, inputs: dict[str, torch.Tensor]) -> None:
        handles = [
            self._replay.model.get_input_embeddings().register_forward_pre_hook(self._on_entry),
            self._replay.layers[-1].register_forward_hook(self._on_exit),
        ]
        try:
            self.logits = getattr(called(**inputs, use_cache=False), "logits", None)
        finally:
            for handle in handles:
                handle.remove()

    def _on_entry(self, *_: Any) -> None:
        # The last entry counts: a wrapper may run the model once to find out what to do at the call that follows.
        self.hooks = {name: _hooks(module) for name, module in self._replay.model.named_modules()}

    def _on_exit(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = self._replay.anatomy.stream(output)


def _hooks(module: nn.Module) -> Hashable:
    """How often each class of hook stands on a module (those of :class:`_Call` are there at each call alike)."""
    return len(module._forward_pre_hooks), len(module._forward_hooks), "forward" in vars(module)


def _hooked(outside: _Call, inside: _Call) -> str | None:
    names = [name for name, hooks in outside.hooks.items() if hooks != inside.hooks.get(name)]
    if not names:
        return None
    return f"it hooks {len(names)} of its modules for the time of a call, such as {names[0] or 'the model itself'}"


def _apart(outside: _Call, inside: _Call, tolerance: float) -> str | None:
    for what, a, b in (
        ("the last layer's output", outside.output, inside.output),
        ("the logits", outside.logits, inside.logits),
    ):
        if a is None or b is None:  # a head that is fused with the loss gives none
            continue
        if a.shape != b.shape:
            return f"{what} has the shape {list(a.shape)} where the model inside gives {list(b.shape)}"
        if not bool(torch.isfinite(b).all()):
            continue  # a model that has overflowed is for the audit to report
        difference = max(_largest(x.double() - y.double()) for x, y in zip(_parts(a), _parts(b), strict=True))
        scale = _largest(b)
        if not difference <= tolerance * scale:
            return f"{what} differ by up to {difference:.3g}, where {scale:.3g} is the largest value"
    return None


def _parts(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows in blocks, of which few are copied in float64 at once."""
    return tuple(values.flatten(0, -2).split(64))


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())
