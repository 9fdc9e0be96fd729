"""Which runs there are: bases that should work, faults put into them, and the split into tuning and scoring.

A kind's name promises nothing. What became of a run is measured (``truth.py``) and classed by lines that were written
down before any rule was tuned (``lines.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Split = Literal["tuning", "scoring"]
Group = Literal["healthy", "bait", "at once", "slowly", "known step", "silently", "never started", "wasted"]
"""What a kind was meant to be: rows of the tables, never a label."""

STEPS = 64
LONG = 160
"""Steps of the runs in which something goes wrong slowly."""
BATCH = 8
EVALUATE_EVERY = 8


@dataclass(frozen=True)
class Base:
    """A run without fault: the model and what its ``DPOConfig`` and LoRA configuration say.

    Attributes:
        steps: of the optimizer.
        pairs: different training pairs; the ``steps * BATCH`` rows repeat them.
        wrong_labels: share of the training pairs whose sides are swapped, from the first row.
    """

    name: str
    group: Group
    model: Literal["llama", "gpt2", "stories260k"] = "llama"
    learning_rate: float = 1e-4
    beta: float = 0.1
    schedule: str = "constant"
    warmup_steps: int = 0
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    loss_type: tuple[str, ...] = ("sigmoid",)
    label_smoothing: float = 0.0
    steps: int = STEPS
    pairs: int = STEPS * BATCH
    wrong_labels: float = 0.0
    sync_every: int | None = None
    """Steps after which TRL copies the policy into the reference; None: never."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run, and from which step on.

    Attributes:
        step: optimizer steps that the run shares with its twin.
        rows: what happens to the training rows from that step on (``data.CORRUPTIONS``).
        event: what happens in the process at that step (``faults.EVENTS``).
        rate: factor on the base's learning rate.
        beta: factor on the base's β.
        pairs: different training pairs, instead of the base's.
        sync_every: see :class:`Base`.
    """

    name: str
    group: Group
    step: int = 0
    rows: str | None = None
    event: str | None = None
    rate: float = 1.0
    beta: float = 1.0
    pairs: int | None = None
    sync_every: int | None = None

    def applied(self, base: Base) -> Base:
        """The settings of the run with this fault."""
        return replace(
            base,
            learning_rate=base.learning_rate * self.rate,
            beta=base.beta * self.beta,
            pairs=self.pairs or base.pairs,
            sync_every=self.sync_every,
        )


@dataclass(frozen=True)
class Case:
    """One run: a base, perhaps with a fault, and a seed."""

    split: Split
    base: Base
    fault: Fault | None
    seed: int

    @property
    def kind(self) -> str:
        """What it is called in tables, without model and seed."""
        return self.base.name if self.fault is None else self.fault.name

    @property
    def group(self) -> Group:
        """See :data:`Group`."""
        return self.base.group if self.fault is None else self.fault.group

    @property
    def settings(self) -> Base:
        """What the trainer is given."""
        return self.base if self.fault is None else self.fault.applied(self.base)

    @property
    def steps(self) -> int:
        """How long it is."""
        return self.base.steps

    @property
    def name(self) -> str:
        """The name of its folder."""
        fault = "" if self.fault is None else f"+{self.fault.name}"
        return f"{self.base.name}{fault}+{self.seed:03d}"

    @property
    def twin(self) -> Case | None:
        """The same seed without the fault; None for a run without one."""
        return None if self.fault is None else replace(self, fault=None)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

TUNING_BASES = (
    Base("steady", "healthy"),
    Base("gentle", "healthy", learning_rate=5e-5, beta=0.3),
    Base("cosine", "healthy", learning_rate=2e-4, schedule="cosine", warmup_steps=8),
    Base("adapter", "healthy", learning_rate=1e-3, lora_rank=8, lora_targets=PROJECTIONS),
    Base("adapter-gentle", "healthy", learning_rate=3e-4, lora_rank=8, lora_targets=PROJECTIONS),
    Base("brisk", "bait", learning_rate=2.5e-4, beta=0.1),
    Base("bump", "bait", learning_rate=3e-4, schedule="cosine", warmup_steps=24),
    Base("raising", "bait", learning_rate=2e-4, loss_type=("apo_zero",)),
    Base("raising-brisk", "bait", learning_rate=4e-4, loss_type=("apo_zero",)),
)
TUNING_FAULTS = {
    "steady": (
        Fault("rate-30", "at once", rate=30, beta=0.2),
        Fault("beta-low", "slowly", rate=5, beta=0.1),
        Fault("labels-flip", "known step", step=24, rows="flipped"),
        Fault("rate-spike", "known step", step=32, event="rate_spike"),
        Fault("long-answers", "silently", rows="lengthened"),
        Fault("rate-zero", "never started", rate=0),
        Fault("chosen-shuffled", "wasted", rows="chosen_shuffled"),
    ),
    "adapter": (Fault("adapter-rate-10", "at once", rate=10, beta=0.2),),
}

SCORING_BASES = (
    Base("declining", "healthy", learning_rate=1.5e-4, schedule="linear"),
    Base("narrow", "healthy", learning_rate=5e-4, lora_rank=16, lora_targets=("q_proj", "v_proj")),
    Base("few-pairs", "healthy", learning_rate=5e-5, pairs=128),
    Base("gpt2-plain", "healthy", model="gpt2"),
    Base("gpt2-cosine", "healthy", model="gpt2", learning_rate=2e-4, schedule="cosine", warmup_steps=6),
    Base("stories-plain", "healthy", model="stories260k"),
    Base("stories-cosine", "healthy", model="stories260k", learning_rate=2e-4, schedule="cosine", warmup_steps=6),
    Base("large-beta", "bait", beta=1.0),
    Base("anchored", "bait", learning_rate=2e-4, loss_type=("sigmoid", "sft")),
    Base("gpt2-anchored", "bait", model="gpt2", learning_rate=2e-4, loss_type=("sigmoid", "sft")),
    Base("stories-anchored", "bait", model="stories260k", learning_rate=2e-4, loss_type=("sigmoid", "sft")),
    Base("wrong-labels", "bait", wrong_labels=0.15),
    Base("smoothed", "bait", label_smoothing=0.1),
    Base("late-peak", "bait", learning_rate=2.5e-4, schedule="linear", warmup_steps=20),
)
SCORING_FAULTS = (
    Fault("rate-10", "at once", rate=10, beta=0.5),
    Fault("beta-tiny", "at once", rate=8, beta=0.05),
    Fault("many-epochs", "slowly", rate=4, beta=0.5, pairs=16),
    Fault("rate-high", "slowly", rate=4, beta=0.2),
    Fault("noise-late", "known step", step=36, rows="noise"),
    Fault("optimizer-lost", "known step", step=20, event="optimizer_lost"),
    Fault("reference-swapped", "known step", step=20, event="reference_swapped"),
    Fault("layers-swapped", "known step", step=36, event="layers_swapped"),
    Fault("repeated", "silently", rows="repeated"),
    Fault("formatting", "silently", rows="formatted"),
    Fault("brief", "silently", rows="cut_short"),
    Fault("idle-optimizer", "never started", event="idle_optimizer"),
    Fault("reference-follows", "never started", sync_every=1),
    Fault("equal-pairs", "wasted", rows="equal"),
    Fault("random-labels", "wasted", rows="labels_random"),
)
SCORING_FAULTED = ("declining", "gpt2-plain", "stories-plain")
"""The bases that faults are put into, one after the other from seed to seed."""

LONG_BASES = (
    Base("long-declining", "healthy", learning_rate=6e-5, schedule="linear", steps=LONG),
    Base("long-gpt2", "healthy", model="gpt2", learning_rate=2e-5, steps=LONG),
    Base("long-stories", "healthy", model="stories260k", learning_rate=4e-5, steps=LONG),
)
LONG_FAULTS = (
    Fault("rate-creeping", "slowly", rate=2.5, beta=0.3),
    Fault("beta-low-long", "slowly", rate=2, beta=0.05),
    Fault("epochs-over", "slowly", rate=2, beta=0.1, pairs=32),
)
"""Ruin that takes its time, in runs long enough for it: of the scoring split too, and scored with it."""

FIRST_SEED = {"tuning": 0, "scoring": 100}
SEEDS = 100


def cases(split: Split, seed: int) -> Iterator[Case]:
    """All runs of a split with the seed-th of its seeds: those without fault first.

    Raises:
        ValueError: the split has no such seed.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(f"expected a seed of 0 to {SEEDS - 1}, found {seed}")
    number = FIRST_SEED[split] + seed
    bases = {base.name: base for base in (TUNING_BASES if split == "tuning" else SCORING_BASES + LONG_BASES)}
    yield from (Case(split, base, None, number) for base in bases.values())
    if split == "tuning":
        faulted = [(name, fault) for name, faults in TUNING_FAULTS.items() for fault in faults]
    else:
        # Each fault meets each model, in three seeds; a seed has faults in all of them.
        long = tuple(base.name for base in LONG_BASES)
        faulted = [
            (names[(seed + place) % 3], fault)
            for names, faults in ((SCORING_FAULTED, SCORING_FAULTS), (long, LONG_FAULTS))
            for place, fault in enumerate(faults)
        ]
    yield from (Case(split, bases[name], fault, number) for name, fault in faulted)
