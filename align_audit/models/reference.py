"""The reference model, wherever it lives: one object whose context manager puts the model in the reference's state."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align_audit.errors import ReferenceUnavailableError
from align_audit.models.anatomy import is_peft
from align_audit.models.fingerprint import fingerprint
from align_audit.models.loading import load_model

REFERENCE_ADAPTER = "ref"
"""The name under which DPOTrainer keeps a frozen copy of a pretrained adapter, in memory and in its checkpoints."""


class Reference:
    """Where the reference is and how to reach it.

    Attributes:
        source: in words, for the record.
        shares_weights: True when it is the policy's own module in another adapter state.
    """

    def __init__(
        self,
        source: str,
        model: nn.Module | None = None,
        load: Callable[[], nn.Module] | None = None,
        adapter_of: nn.Module | None = None,
    ) -> None:
        self.source = source
        self._model = model
        self._load = load
        self._policy = adapter_of

    @property
    def shares_weights(self) -> bool:
        return self._policy is not None

    def model(self) -> nn.Module:
        """The module; loaded from disk now if it is not in memory (see :meth:`release`)."""
        if self._policy is not None:
            return self._policy
        if self._model is None:
            assert self._load is not None
            self._model = self._load()
        return self._model

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The module computes as the reference inside, and as before after."""
        if self._policy is None:
            yield
            return
        policy: Any = self._policy
        if REFERENCE_ADAPTER in policy.peft_config:
            before = list(policy.active_adapters)
            policy.base_model.set_adapter(REFERENCE_ADAPTER)
            try:
                yield
            finally:
                policy.base_model.set_adapter(before)
        else:
            with policy.disable_adapter():
                yield

    def fingerprint(self) -> str:
        """Hash of the weights the reference computes with: inactive adapters do not count."""
        model: Any = self.model()
        skipped: tuple[str, ...] = ()
        if is_peft(model):
            names = set(model.peft_config)
            if self._policy is not None:
                skipped = tuple(sorted(names - {REFERENCE_ADAPTER}))
            else:
                skipped = tuple(sorted(names - set(model.active_adapters)))
        return fingerprint(model, without_adapters=skipped)

    def release(self) -> None:
        """Let go of a model that was loaded for one audit."""
        if self._load is not None and self._model is not None:
            self._model = None
            gc.collect()
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def policy_fingerprint(policy: nn.Module) -> str:
    """Hash of the weights the policy computes with; a frozen reference adapter beside it does not count."""
    if is_peft(policy):
        inactive = set(policy.peft_config) - set(policy.active_adapters)  # type: ignore[arg-type]
        return fingerprint(policy, without_adapters=tuple(sorted(inactive)))
    return fingerprint(policy)


def load_policy(path: str | Path, *, device: torch.device | str | None = None) -> nn.Module:
    """A saved policy; the frozen reference adapter of a trainer's checkpoint comes with it, inactive.

    Raises:
        ReferenceUnavailableError: as :func:`~align_audit.models.loading.load_model`.
    """
    policy: Any = load_model(path, device=device)
    frozen = Path(path) / REFERENCE_ADAPTER
    if is_peft(policy) and (frozen / "adapter_config.json").is_file():
        policy.load_adapter(frozen, adapter_name=REFERENCE_ADAPTER)
        policy.eval()
    return policy


def resolve_reference(
    policy: nn.Module,
    given: nn.Module | str | Path | None = None,
    trainer_reference: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> Reference:
    """Find the reference of ``policy`` (DESIGN, "Which reference").

    The order: ``given``; the trainer's ``ref_model``; the policy's ``"ref"`` adapter; its adapters switched off; the
    path or hub name the policy itself came from.

    Raises:
        ReferenceUnavailableError: none of these can be had.
    """

    def like_policy(path: str | Path) -> Callable[[], nn.Module]:
        # PEFT's wrapper hides the model's own attributes; the embedding says dtype and device for both.
        core = policy.get_base_model() if is_peft(policy) else policy  # type: ignore[operator]
        weight = next(parameter for parameter in core.parameters() if parameter.is_floating_point())
        attention = getattr(core.config, "_attn_implementation", None)
        return lambda: load_model(
            path, dtype=weight.dtype, device=weight.device, attention=attention, trust_remote_code=trust_remote_code
        )

    if isinstance(given, nn.Module):
        if given is policy:
            raise ReferenceUnavailableError(
                "the reference passed is the policy itself; expected another model, a path, or None to let it be found"
            )
        return Reference("a model that was passed", model=given)
    if given is not None:
        return Reference(f"loaded from {Path(given).name}", load=like_policy(given))
    if trainer_reference is not None:
        return Reference("the trainer's ref_model", model=trainer_reference)
    if is_peft(policy):
        if REFERENCE_ADAPTER in policy.peft_config:  # type: ignore[operator]
            return Reference(f"the policy's {REFERENCE_ADAPTER!r} adapter", adapter_of=policy)
        return Reference("the policy with its adapters off", adapter_of=policy)
    path = getattr(getattr(policy, "config", None), "_name_or_path", "")
    if path:
        return Reference(f"loaded from the policy's own source, {Path(path).name}", load=like_policy(path))
    raise ReferenceUnavailableError(
        "no reference model can be had: none was passed, the trainer holds none, the policy has no adapters, and it "
        "was not loaded from a path. Pass `reference=` (a model, a directory or a hub name) to AlignmentAuditCallback "
        "or audit, or call `callback.attach(trainer)` if the trainer holds the reference."
    )


def check_fit(policy: Any, reference: Any) -> None:
    """Refuse a reference whose streams or vocabulary cannot be compared with the policy's (arguments: ``Anatomy``s)."""
    for field, words in (("num_layers", "decoder layers"), ("hidden_size", "width"), ("vocab_size", "vocabulary size")):
        ours, theirs = getattr(policy, field), getattr(reference, field)
        if ours != theirs:
            raise ReferenceUnavailableError(
                f"the reference does not fit the policy: {words} {theirs} against the policy's {ours}. Expected the "
                "model that training started from; pass that one as `reference=` (or as the trainer's `ref_model`)."
            )
