"""One reference for many checkpoints: loaded once, and again only for a policy of another dtype."""

from __future__ import annotations

import torch
from torch import nn

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

    def of(self, policy: nn.Module) -> Reference:
        """The reference of ``policy``, whose folder :func:`~align_audit.models.saved_pair.check_saved` has let pass.

        Raises:
            ReferenceUnavailableError: it cannot be loaded.
        """
        if self._path is None:
            return resolve_reference(policy)
        dtype = next(weight.dtype for weight in policy.parameters() if weight.is_floating_point())
        if self._held is None or self._held[0] != dtype:
            self._held = None  # lets go of it first
            loaded = resolve_reference(policy, self._path, trust_remote_code=self._trust_remote_code, stream=False)
            # Held as a model, which an audit does not let go of.
            self._held = dtype, Reference(loaded.source, model=loaded.model())
        return self._held[1]
