"""Probe sets that are named by their files: tokenized with the tokenizer that lies beside the models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, quoted
from align_audit.models.loading import base_of, load_tokenizer
from align_audit.probes.names import check_names
from align_audit.probes.pairs import ProbeSet

Probes = ProbeSet | str | Path
"""A probe set, or the path of its pairs."""


def read_probes(
    probes: str | Path | Mapping[str, str | Path],
    checkpoints: Iterable[Path],
    reference: str | None,
    config: AuditConfig,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
) -> dict[str | None, ProbeSet]:
    """The probe sets at those paths, tokenized with the models' tokenizer; a single path's set is called None.

    Args:
        revision: of the first checkpoint, where that is a hub name; None: the newest.
        max_length, truncation_mode: the training's, which hold where the options say nothing of them.

    Raises:
        ConfigurationError: a name that cannot be one, or no tokenizer is there.
        ProbeError: a file cannot be read, or holds no usable pair.
    """
    paths: dict[str | None, str | Path] = {}
    if isinstance(probes, Mapping):
        check_names(probes)
        paths.update(probes)
    else:
        paths[None] = probes
    bases = [base for folder in checkpoints if (base := base_of(folder)) is not None]
    places = [*checkpoints, *([reference] if reference is not None else []), *bases]
    tokenizer = load_tokenizer(places, trust_remote_code=trust_remote_code, revision=revision)
    return {
        name: ProbeSet.from_dataset(
            path,
            tokenizer,
            max_pairs=config.max_pairs,
            max_length=config.max_length or max_length,
            truncation_mode=config.truncation_mode or truncation_mode,
            seed=config.seed,
        )
        for name, path in paths.items()
    }


def opened(
    sets: Mapping[Any, Probes],
    policy: nn.Module | str | Path,
    reference: nn.Module | str | Path | None,
    config: AuditConfig,
) -> dict[Any, ProbeSet]:
    """The same sets, those that are paths read as :func:`read_probes` does it.

    Raises:
        ConfigurationError: a path, but neither model is one, so that there is no tokenizer to find.
        ProbeError: what is neither a set nor a path, and as :func:`read_probes`.
    """
    paths = {name: probes for name, probes in sets.items() if not isinstance(probes, ProbeSet)}
    for probes in paths.values():
        if not isinstance(probes, str | Path):
            raise ConfigurationError(
                f"probes: expected a ProbeSet or the path of preference pairs, found {type(probes).__name__}; make a set of a "
                "data set with ProbeSet.from_dataset(dataset, tokenizer)"
            )
    folders = [Path(policy)] if isinstance(policy, str | Path) else []
    start = str(reference) if isinstance(reference, str | Path) else None
    if paths and not folders and start is None:
        raise ConfigurationError(
            f"probes: {quoted(str(next(iter(paths.values()))))} is a path, and neither policy nor reference is one "
            "beside which a tokenizer could lie; pass ProbeSet.from_dataset(path, tokenizer)"
        )
    if not paths:
        return {name: probes for name, probes in sets.items() if isinstance(probes, ProbeSet)}
    read = read_probes(paths.get(None, paths), folders, start, config)
    return {name: probes if isinstance(probes, ProbeSet) else read[name] for name, probes in sets.items()}
