"""Who computes the sweeps. Everything here but ``ours.py`` runs where align_audit is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A contender: where its class is, and the distributions it needs (the first one is what it is a benchmark of)."""

    module: str
    class_name: str
    needs: tuple[str, ...] = ()
    peer: bool = False

    def load(self) -> Any:
        return getattr(import_module(f"engine.contenders.{self.module}"), self.class_name)


CONTENDERS = {
    "hooks": Entry("hooks", "Hooks"),
    "restart": Entry("hooks", "Restart"),
    "restart-sorted": Entry("hooks", "RestartSorted"),
    "nnsight": Entry("nnsight_peer", "NNsightPeer", ("nnsight",), peer=True),
    "nnsight-skip": Entry("nnsight_peer", "NNsightSkip", ("nnsight",), peer=True),
    "nnterp": Entry("nnterp_peer", "NNterpPeer", ("nnterp", "nnsight"), peer=True),
    "transformer-lens": Entry("transformer_lens_peer", "TransformerLensPeer", ("transformer-lens",), peer=True),
    "pyvene": Entry("pyvene_peer", "PyvenePeer", ("pyvene",), peer=True),
    "align_audit": Entry("ours", "AlignAudit", ("align-audit",)),
}
