"""Which units a configuration of finer sites asks for, in two models that may not have them all (METHODS §1, "Sites")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from align_audit.auditing.session.walk import Session
from align_audit.config import SiteConfig
from align_audit.errors import SiteError, plural
from align_audit.models.find_sites import find_sites
from align_audit.models.sites import Kind, Sites


@dataclass(frozen=True)
class Unit:
    """What is swapped at once: layers ``layer`` to ``last`` of a block, one layer's addend, or one of its heads."""

    layer: int
    last: int
    head: int | None = None


@dataclass(frozen=True)
class ModelSites:
    """The finer sites of both models. ``alike``: both are built the same, so neither needs to be named."""

    policy: Sites
    reference: Sites
    alike: bool

    @classmethod
    def of(cls, session: Session) -> Self:
        """Find them, by trying."""
        alike = session.models.alike
        with session.as_policy() as replay:
            policy = find_sites(replay)
        with session.as_reference() as replay:
            return cls(policy, find_sites(replay, policy if alike else None), alike)

    def why_lacking(self, kind: Kind, layer: int) -> str | None:
        """Why a layer of either model has no such site; None where both have it."""
        for name, sites in (("policy", self.policy), ("reference", self.reference)):
            site_layer = sites.layers[layer]
            if site_layer.path(kind) is None:
                where = "" if self.alike else f" in the {name}"
                return f"{', '.join(site_layer.kinds)}; no {kind}{where}: {site_layer.missing[kind]}"
        return None

    def heads(self, layer: int, wanted: Sequence[int] | None) -> list[int]:
        """The heads of a layer (None: all), which both models have.

        Raises:
            SiteError: one of them has fewer.
        """
        heads = list(range(self.policy.layers[layer].heads)) if wanted is None else sorted(wanted)
        for head in heads:
            for sites in (self.policy, self.reference):
                sites.check("head", layer, head)
        return heads


def units_of(number: int, config: SiteConfig, layers: int, sites: ModelSites | None) -> tuple[list[Unit], str | None]:
    """The units of the ``number``-th configuration, and which layers have no such site, and why (None: all have it).

    Args:
        layers: L.
        sites: None where only windows of layers are asked for.

    Raises:
        SiteError: the models, or the layers named, do not have the site; the message lists what there is.
    """
    named = range(layers) if config.layers == "all" else sorted(config.layers)
    outside = [layer for layer in named if layer >= layers]
    if outside:
        raise SiteError(f"sites.{number}.layers names {outside}; the model has layers 0 to {layers - 1}")
    if config.site == "block":
        return _windows(number, config, layers, named), None
    assert sites is not None
    kind = config.site
    lacking = {layer: why for layer in named if (why := sites.why_lacking(kind, layer)) is not None}
    if lacking and (config.layers != "all" or len(lacking) == layers):
        raise SiteError(f"sites.{number}: {_grouped(lacking)}")
    units = []
    for layer in named:
        if layer in lacking:
            continue
        if kind == "head":
            heads = sites.heads(layer, None if config.heads == "all" else config.heads)
            units += [Unit(layer, layer, head) for head in heads]
        else:
            units.append(Unit(layer, layer))
    return units, _grouped(lacking) if lacking else None


def _windows(number: int, config: SiteConfig, layers: int, named: Sequence[int]) -> list[Unit]:
    past = [layer for layer in named if layer + config.width > layers]
    if config.width > layers or (past and config.layers != "all"):
        raise SiteError(
            f"sites.{number}: windows of {config.width} layers"
            + (f" that start at {past} end past the last layer" if config.width <= layers else "")
            + f"; the model has layers 0 to {layers - 1}"
            + (f", so windows start at 0 to {layers - config.width}" if config.width <= layers else "")
        )
    return [Unit(layer, layer + config.width - 1) for layer in named if layer not in past]


def _grouped(lacking: dict[int, str]) -> str:
    """Layers with what they have and lack, those that are alike together."""
    groups: dict[str, list[int]] = {}
    for layer, words in lacking.items():
        groups.setdefault(words, []).append(layer)
    return "; ".join(
        f"{plural('layer', len(layers))} {', '.join(map(str, layers))} {'have' if len(layers) > 1 else 'has'} {words}"
        for words, layers in groups.items()
    )
