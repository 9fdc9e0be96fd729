"""What became of a run: the lines between healthy, worn, ruined and wasted. Pure functions of its ground truth.

Written and committed before any rule was tuned. The ground truth of a run is a series of :class:`Truth` measured on its
weights by ``truth.py``, which shares no code and no text with the audit.

*Harm* is what a run lost against its own start **and** against its twin (the same seed without the fault): the smaller of
the two, since what the twin loses as well is the price of preference training, and what the start had already is no harm.
A run without fault has no twin, and one whose twin is not healthy is not excused by it: for these the start alone decides.

- **ruined**: at two measurements in a row (or at the last one) a harm reaches its line:
  natural text or preferred answers 0.5 nats per token less likely (a perplexity 1.65 times as high); or continuations of
  held-out prompts that repeat themselves (distinct 4-grams down by 0.3, or compressibility by 0.2), that have lost a sense
  of length (mean length 1.75 times as long or 0.4 times as short, or the share that ends down by 0.5), or in which a tenth
  of the words is foreign to the texts.
- **worn**: the same at half of the line (for lengths at its square root). A warning is allowed there, and not counted.
- **wasted**: neither is so, and the preference was not learned: at the end the gap between preferred and dispreferred
  answers has grown by less than 0.03 nats per token, or by less than a quarter of what the twin's has.
- **healthy**: none of these.

Ruined comes before wasted, wasted before worn: whoever is told of a wasted run is told the truth.

Why these: 0.25 and 0.5 nats were proposed by a pilot in which healthy runs lost at most 0.17 and ruined ones several nats.
The lines of generations are far from what healthy runs of the models do, whose continuations are judged 16 at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Fate = Literal["healthy", "worn", "ruined", "wasted"]

LIKELIHOOD = 0.5
"""Nats per token."""
DISTINCT = 0.3
COMPRESSION = 0.2
LONGER, SHORTER = 1.75, 0.4
ENDED = 0.5
FOREIGN = 0.1
LEARNED = 0.03
"""Nats per token by which the gap has to have grown."""
LEARNED_OF_TWIN = 0.25
IN_A_ROW = 2


@dataclass(frozen=True)
class Truth:
    """What was measured of a policy at one step.

    Attributes:
        text: −log p of held-out natural text, nats per token.
        preferred, dispreferred: the same of held-out answers, given their prompts, without the token that ends them.
        distinct: share of distinct 4-grams in a greedy continuation, mean over prompts.
        compression: bytes of the zlib-compressed continuations over their bytes.
        length: tokens of a continuation, mean over prompts.
        ended: share of continuations that came to an end.
        foreign: share of their words that natural text does not have.
        weights: hash of the policy's weights.
    """

    step: int
    text: float
    preferred: float
    dispreferred: float
    distinct: float
    compression: float
    length: float
    ended: float
    foreign: float
    weights: str = ""

    @property
    def gap(self) -> float:
        """How much more likely a token of a preferred answer is, nats."""
        return self.dispreferred - self.preferred


@dataclass(frozen=True)
class Outcome:
    """The fate of a run.

    Attributes:
        since: the step from which on it was so: the first of the measurements in a row; for a wasted run the step at which
            the twin (or, without one, the run's end) had learned enough to tell. None for a healthy run.
        reason: which line, and by how much.
    """

    fate: Fate
    since: int | None
    reason: str


def _over(value: float, base: float) -> float:
    return value - base if math.isfinite(value) else math.inf


def _under(value: float, base: float) -> float:
    return base - value if math.isfinite(value) else math.inf


def _stretch(value: float, base: float) -> float:
    """How far a mean length has moved, as a share of the line on its side."""
    ratio = max(value, 1e-3) / max(base, 1e-3)
    return math.log(ratio) / math.log(LONGER if ratio > 1 else SHORTER)


HARMS: dict[str, Callable[[Truth, Truth], float]] = {
    "text": lambda now, base: _over(now.text, base.text) / LIKELIHOOD,
    "preferred": lambda now, base: _over(now.preferred, base.preferred) / LIKELIHOOD,
    "distinct": lambda now, base: _under(now.distinct, base.distinct) / DISTINCT,
    "compression": lambda now, base: _under(now.compression, base.compression) / COMPRESSION,
    "length": lambda now, base: _stretch(now.length, base.length),
    "ended": lambda now, base: _under(now.ended, base.ended) / ENDED,
    "foreign": lambda now, base: _over(now.foreign, base.foreign) / FOREIGN,
}
"""What was lost against a base, as a share of the line: 1 is ruined, a half is worn."""


def harm(now: Truth, start: Truth, twin: Truth | None) -> tuple[float, str]:
    """The largest harm at a step, as a share of its line, and its name."""
    worst = (-math.inf, "")
    for name, lost in HARMS.items():
        share = lost(now, start)
        if twin is not None:
            share = min(share, lost(now, twin))
        worst = max(worst, (share, name))
    return worst


def outcome(run: Sequence[Truth], twin: Sequence[Truth] | None = None) -> Outcome:
    """What became of a run.

    Args:
        run: in the order of the steps, from step 0.
        twin: of the run without the fault, at the same steps; None where there is none.

    Raises:
        ValueError: the steps do not begin at 0, or the twin's are others.
    """
    if not run or run[0].step != 0:
        raise ValueError("expected ground truth from step 0 on")
    if twin is not None and [truth.step for truth in twin] != [truth.step for truth in run]:
        raise ValueError("expected ground truth of run and twin at the same steps")
    excuse = twin if twin is not None and outcome(twin).fate == "healthy" else None
    harms = [harm(now, run[0], None if excuse is None else excuse[place]) for place, now in enumerate(run)]
    ruined = _crossed(harms, 1.0)
    if ruined is not None:
        share, name = harms[ruined]
        return Outcome("ruined", run[ruined].step, f"{name} at {share:.1f} of its line")
    wasted = _wasted(run, twin)
    if wasted is not None:
        return wasted
    worn = _crossed(harms, 0.5)
    if worn is not None:
        share, name = harms[worn]
        return Outcome("worn", run[worn].step, f"{name} at {share:.1f} of its line")
    return Outcome("healthy", None, f"worst: {max(harms)[1]} at {max(harms)[0]:.2f} of its line")


def _crossed(harms: Sequence[tuple[float, str]], line: float) -> int | None:
    """Where the first ``IN_A_ROW`` measurements above the line begin; the last one counts alone."""
    above = [share >= line for share, _ in harms]
    for place, _ in enumerate(above):
        if all(above[place : place + IN_A_ROW]):
            return place
    return None


def _wasted(run: Sequence[Truth], twin: Sequence[Truth] | None) -> Outcome | None:
    gains = [truth.gap - run[0].gap for truth in run]
    if twin is None:
        if gains[-1] >= LEARNED:
            return None
        return Outcome("wasted", run[-1].step, f"the gap grew by {gains[-1]:+.3f} nats per token")
    twin_gains = [truth.gap - twin[0].gap for truth in twin]
    needed = [max(LEARNED, LEARNED_OF_TWIN * gain) for gain in twin_gains]
    if gains[-1] >= needed[-1]:
        return None
    # The last stretch without enough of a gain, and of it the part in which the twin shows that there was one to be had.
    first = max((place + 1 for place, gain in enumerate(gains) if gain >= needed[place]), default=0)
    told = [place for place in range(first, len(run)) if twin_gains[place] >= LEARNED]
    since = run[told[0]].step if told else run[-1].step
    return Outcome(
        "wasted", since, f"the gap grew by {gains[-1]:+.3f} nats per token, the twin's by {twin_gains[-1]:+.3f}"
    )
