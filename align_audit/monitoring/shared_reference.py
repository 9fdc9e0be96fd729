"""One reference for many checkpoints: loaded once, and again only for a policy of another dtype."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from align_audit.errors import ReferenceUnavailableError
from align_audit.models.anatomy import is_peft
from align_audit.models.reference import Reference, resolve_reference


class SharedReference:
    """The reference that was asked for, loaded whole and once for all checkpoints; else the one each policy names.

    It is loaded as :func:`~align_audit.models.reference.resolve_reference` loads one for the policy: in its dtype, with
    its attention. A policy of another dtype has it loaded again.

    Args:
        path: a folder or hub name; None: the reference that an adapter comes with.
    """

    def __init__(self, path: str | None, trust_remote_code: bool = False) -> None:
        self._path = path
        self._trust_remote_code = trust_remote_code
        self._held: tuple[torch.dtype, Reference] | None = None

    def of(self, policy: nn.Module, folder: Path) -> Reference:
        """The reference of ``policy``, which came from ``folder``.

        Raises:
            ReferenceUnavailableError: it cannot be loaded, it is the policy's own folder, or a full model was given without
                any.
        """
        if self._path is None:
            if not is_peft(policy):
                # A saved full model names its own folder as its source: that is the policy again, not its reference.
                raise ReferenceUnavailableError(
                    f"{folder.name} is a full model and does not say what it was trained from; pass --reference with "
                    "the model that training started from"
                )
            return resolve_reference(policy)
        if Path(self._path).is_dir() and Path(self._path).resolve() == folder.resolve():
            raise ReferenceUnavailableError(
                f"--reference is {folder.name} itself, the checkpoint to be audited; expected the model that its training "
                "started from"
            )
        dtype = next(weight.dtype for weight in policy.parameters() if weight.is_floating_point())
        if self._held is None or self._held[0] != dtype:
            self._held = None  # lets go of it first
            loaded = resolve_reference(policy, self._path, trust_remote_code=self._trust_remote_code, stream=False)
            # Held as a model, which an audit does not let go of.
            self._held = dtype, Reference(loaded.source, model=loaded.model())
        return self._held[1]
