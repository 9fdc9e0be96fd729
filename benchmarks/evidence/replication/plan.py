"""Which runs there are: a setup (model, pairs, way of training), three kinds of run, and seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["healthy", "null", "ruined"]
KINDS: tuple[Kind, ...] = ("healthy", "null", "ruined")
"""As the data is; on pairs whose sides are swapped by the toss of a coin; at a rate far too high."""

Method = Literal["lora", "full"]
"""What is trained: adapters of all linear modules, or every weight."""

FIRST, SECOND = "first", "second"
"""The two slices of probe pairs; the second is audited after the last step only."""

EVALUATED = 16
"""Pairs of the trainer's eval set."""
LORA_RANK = 8


@dataclass(frozen=True)
class Setup:
    """What all runs of one row of the page share.

    Attributes:
        model, data: what they are called; where they lie is no part of a setup.
        pairs: probe pairs of a slice.
        steps: optimizer steps, of ``batch`` pairs each; no pair is trained on twice.
        micro_batch: pairs of one forward; gradients of several are added up.
        audited: steps of full audits, the first one 0 and the last one ``steps``.
        learning_rate: constant; the ruined run's is ``ruin`` times that.
        max_length: pairs with a longer sequence, in tokens, are left out.
        exact_pairs: ``patching.exact_pairs`` of the audits.
        spinal_rows: ``spinal.max_rows`` of the audits.
        transport_rows: ``spinal.transport_rows`` of the audits.
        looked_at: probe pairs, of the first slice, of the health looks in the run.
        probed: whether probe pairs are held out, or drawn from those that are trained on.
    """

    model: str
    data: str
    method: Method
    pairs: int
    steps: int
    batch: int
    micro_batch: int
    audited: tuple[int, ...]
    learning_rate: float
    ruin: float
    beta: float
    max_length: int
    dtype: str
    exact_pairs: int | Literal["auto"] | None
    spinal_rows: int = 4096
    transport_rows: int | Literal["auto"] = "auto"
    looked_at: int = 32
    probed: Literal["held-out", "trained"] = "held-out"

    @property
    def spinal(self) -> dict[str, Any]:
        """The options of its audits that say how many token rows a trace has."""
        return {"max_rows": self.spinal_rows, "transport_rows": self.transport_rows}

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.model}-{self.data}-{self.method}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return {**asdict(self), "audited": list(self.audited)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Setup:
        """From what :meth:`to_dict` gave."""
        return cls(**{**values, "audited": tuple(values["audited"])})


@dataclass(frozen=True)
class Case:
    """One run."""

    setup: Setup
    kind: Kind
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{self.seed}"

    @property
    def learning_rate(self) -> float:
        """Of this run."""
        return self.setup.learning_rate * (self.setup.ruin if self.kind == "ruined" else 1.0)


def early_middle_late(steps: int) -> tuple[int, ...]:
    """The audited steps where none are named: before training, after an eighth and a half of it, and at its end."""
    return tuple(sorted({0, *(max(1, steps // part) for part in (8, 2)), steps}))
