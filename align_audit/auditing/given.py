"""What a user passes in Python: of the right type, or refused at once, with what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError
from align_audit.models.anatomy import Anatomy


def check_given(*, config: Any = None, anatomy: Any = None, reference: Any = None, **models: Any) -> None:
    """Refuse what is none of what these arguments take; None: it was left out.

    Args:
        models: others that have to be a model or its path, by what the user calls them.

    Raises:
        ConfigurationError: one is of another type.
    """
    if config is not None and not isinstance(config, AuditConfig):
        raise ConfigurationError(
            f"expected config to be an AuditConfig, found {type(config).__name__}; build one with "
            "AuditConfig(...), AuditConfig.from_dict or AuditConfig.from_yaml"
        )
    if anatomy is not None and not isinstance(anatomy, Anatomy):
        raise ConfigurationError(
            f"expected anatomy to be an Anatomy, found {type(anatomy).__name__}; build one with "
            "Anatomy(layers='model.layers'), the path of the decoder layers"
        )
    given = models if reference is None else {**models, "reference": reference}
    for name, model in given.items():
        if not isinstance(model, nn.Module | str | Path):
            raise ConfigurationError(
                f"expected the {name} to be a model or the path of one, found {type(model).__name__}"
            )
