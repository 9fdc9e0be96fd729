"""The one table of alert rules: what each is called, what it reads, of which cause it is a sign, and its limits.

Every limit is an option of ``AlertConfig`` under its name here, and its default stands here alone. ``align_audit.alerts``
holds what computes a rule, under the same name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Literal

from align_audit.errors import quoted

Level = Literal["warning", "error"]
Direction = Literal["above", "below"]
Weight = Literal["certain", "alone", "witness"]
"""``certain``: an error by itself, at once. ``alone``: a warning by itself. ``witness``: counts beside another sign only."""

Source = Literal["margins", "reference", "generations", "patching", "localization", "low_rank", "spinal", "log"]
"""The part of a record that a rule reads, or the trainer's log. A record without it neither raises nor clears the rule."""


@dataclass(frozen=True)
class Limit:
    """One number that a rule goes by.

    Attributes:
        option: its name in ``AlertConfig``.
        unit: in words.
        direction: on which side of it the rule fires.
        level: what lies beyond it; None: a setting of the rule, no limit of a level.
        above, below: between which numbers, exclusively, the option may lie.
        relative: eased by hysteresis, as limits are that a value crosses; False for counts and exact comparisons.
    """

    option: str
    default: float
    unit: str
    direction: Direction
    level: Level | None
    says: str
    above: float = 0.0
    below: float = math.inf
    relative: bool = True

    @property
    def bounded(self) -> bool:
        """Is there a largest number for the option? Everything lies below infinity, which would switch nothing off there."""
        return not math.isinf(self.below) or self.direction == "below"

    def eased(self, value: float, hysteresis: float) -> float:
        """The limit that an open alert has to come back behind: ``value`` moved to the healthy side by that share of its
        distance from what is healthy, which is 1 for a ratio, and 0 for what only grows."""
        if not self.relative:
            return value
        if self.is_ratio:
            return 1 + (value - 1) * hysteresis
        return value * hysteresis if self.direction == "above" else value / hysteresis

    @property
    def is_ratio(self) -> bool:
        """Of a number that is 1 where all is well; the limit lies on one side of it."""
        return self.above >= 1.0 if self.direction == "above" else self.below == 1.0


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        cause: what several rules have in common; one cause is one alert.
        family: rules that are no independent signs of each other; agreement is counted in families.
        patience: looks in a row after which it counts by itself.
        lone_error: seen beyond its limit of an error at two looks in a row, it is an error by itself.
        error_without_limit: it has an error that no limit stands for: a sign turned round, weights that are equal.
        on_every_set: it counts where all probe sets show it: of one that is of something else it says nothing.
        reads: dotted paths in a record, or columns of the log.
        says: what it fires on, as a clause.
    """

    name: str
    cause: str
    family: str
    source: Source
    weight: Weight
    reads: tuple[str, ...]
    says: str
    limits: tuple[Limit, ...] = ()
    patience: int = 1
    lone_error: bool = True
    error_without_limit: bool = False
    on_every_set: bool = False

    @property
    def levels(self) -> list[tuple[Limit, Limit]]:
        """Of each number that has both, the limit of a warning and that of an error, which stands behind it."""
        return [
            (limit, behind)
            for limit, behind in pairwise(self.limits)
            if (limit.level, behind.level) == ("warning", "error")
        ]

    @property
    def highest(self) -> str:
        """The highest level that it can reach with nothing but itself."""
        if self.weight == "certain":
            return "error"
        if self.weight == "witness":
            return "none"
        strong = self.error_without_limit or any(limit.level == "error" for limit in self.limits)
        return "error" if self.lone_error and strong else "warning"


CAUSES: dict[str, str] = {
    "numbers": "numbers overflow",
    "reference": "the reference is not the right one",
    "drift": "the policy is leaving its language",
    "preference": "the preference is lost or reversed",
    "learning": "nothing is learned",
    "saturation": "nothing is left to learn",
}
"""Cause → what it is, in words. In the order in which they are told at equal level."""

NO_WAY_BACK: dict[str, str] = {
    "learning": "There is nothing to go back to, because nothing was learned yet: mend that and start again",
    "saturation": "There is no need to go back: what was learned stands",
}
"""Causes of which no earlier checkpoint is free, or which did no harm to this one → that, in words."""


def _warning(
    option: str, default: float, unit: str, direction: Direction, says: str, above: float = 0.0, below: float = math.inf
) -> Limit:
    return Limit(option, default, unit, direction, "warning", says, above, below)


def _error(
    option: str, default: float, unit: str, direction: Direction, says: str, above: float = 0.0, below: float = math.inf
) -> Limit:
    return Limit(option, default, unit, direction, "error", says, above, below)


def _setting(option: str, default: float, unit: str, says: str, below: float = 1e9, *, above: float = 0.0) -> Limit:
    return Limit(option, default, unit, "above", None, says, above=above, below=below, relative=False)


_OF_REFERENCE = "share of the reference's"
_TOKEN = "nats per token"
_OF_START = "share of its start"

_RECORD_RULES = (
    Rule(
        "non_finite", "numbers", "numbers", "margins", "certain", ("margins.policy", "margins.reference"),
        "margins of policy or reference are NaN or infinite",
    ),
    Rule(
        "reference_mismatch", "reference", "reference", "reference", "certain", ("reference_check.verdict",),
        "before the first step the reference is not the policy, or not the one the trainer precomputed with",
    ),
    Rule(
        "reference_changed", "reference", "reference", "reference", "certain", ("provenance.reference_hash",),
        "the reference's weights moved and no synchronization did it",
    ),
    Rule(
        "chosen_logp_falling", "drift", "likelihood", "margins", "alone", ("margins.chosen_logp_change_per_token",),
        "chosen completions lose likelihood against the reference (alone never an error)",
        (
            _warning("chosen_drop_warning", 0.25, _TOKEN, "above", "fall of the chosen log-probability"),
            _error("chosen_drop_error", 0.6, _TOKEN, "above", "the same"),
        ),
        lone_error=False,
    ),
    Rule(
        "kl_out_of_bounds", "drift", "likelihood", "margins", "alone",
        ("margins.kl", "margins.chosen_logp_change_per_token"),
        "KL to the reference is large; up to its second limit a witness while chosen completions keep their likelihood",
        (
            _warning("kl_warning", 0.35, _TOKEN, "above", "KL(policy ‖ reference)"),
            _error("kl_error", 0.7, _TOKEN, "above", "the same"),
            _setting(
                "kl_chosen_drop", 0.03, _TOKEN, "a smaller fall of the chosen log-probability than this keeps it",
                below=1e3, above=-1e3,
            ),
        ),
    ),
    Rule(
        "entropy_out_of_bounds", "drift", "entropy", "margins", "alone", ("margins.entropy", "margins.reference_entropy"),
        "next-token entropy collapses or explodes",
        (
            _warning("entropy_ratio_low", 0.5, _OF_REFERENCE, "below", "entropy, collapsing", below=1.0),
            _error("entropy_ratio_low_error", 0.3, _OF_REFERENCE, "below", "the same", below=1.0),
            _warning("entropy_ratio_high", 1.5, _OF_REFERENCE, "above", "entropy, exploding", above=1.0),
            _error("entropy_ratio_high_error", 2.0, _OF_REFERENCE, "above", "the same", above=1.0),
        ),
    ),
    Rule(
        "token_accuracy_collapsed", "drift", "tokens", "margins", "alone",
        ("margins.token_accuracy", "margins.reference_token_accuracy"),
        "the policy no longer predicts the tokens that its reference predicts",
        (
            _warning("token_accuracy_ratio_warning", 0.8, _OF_REFERENCE, "below", "next-token accuracy", below=1.0),
            _error("token_accuracy_ratio_error", 0.6, _OF_REFERENCE, "below", "the same", below=1.0),
        ),
    ),
    Rule(
        "sudden_change", "drift", "jump", "margins", "alone",
        ("margins.kl", "margins.chosen_logp_change_per_token"),
        "KL or the chosen log-probability moves far faster than at the looks before, and stays there; KL alone is a witness "
        "where it is one by itself",
        (
            _warning("jump_deviations", 8.0, "median absolute deviations", "above", "change since the look before"),
            _setting("jump_share", 0.5, "share of a warning limit", "the least change that counts", below=10.0),
        ),
        patience=2,
    ),
    Rule(
        "repetition", "drift", "text", "generations", "alone",
        ("generations.repetition", "generations.reference_repetition"),
        "continuations repeat themselves more than the reference's",
        (
            _warning("repetition_rise_warning", 0.25, "share of 4-grams", "above", "rise over the reference's", below=1.0),
            _error("repetition_rise_error", 0.5, "share of 4-grams", "above", "the same", below=1.0),
        ),
    ),
    Rule(
        "length_exploited", "drift", "text", "generations", "alone",
        ("generations.length", "generations.reference_length", "generations.ended", "generations.reference_ended"),
        "continuations are much longer or shorter than the reference's, or no longer end",
        (
            _warning("length_ratio_high", 1.5, _OF_REFERENCE, "above", "length, growing", above=1.0),
            _error("length_ratio_high_error", 2.5, _OF_REFERENCE, "above", "the same", above=1.0),
            _warning("length_ratio_low", 0.5, _OF_REFERENCE, "below", "length, shrinking", below=1.0),
            _error("length_ratio_low_error", 0.25, _OF_REFERENCE, "below", "the same", below=1.0),
            _warning("ended_drop_warning", 0.4, "share", "above", "fewer continuations that end", below=1.0),
            _error("ended_drop_error", 0.7, "share", "above", "the same", below=1.0),
        ),
    ),
    Rule(
        "surprising_text", "drift", "text", "generations", "alone",
        ("generations.surprise", "generations.reference_surprise"),
        "the reference finds the policy's continuations odd",
        (
            _warning("surprise_rise_warning", 1.0, _TOKEN, "above", "rise over the reference's own"),
            _error("surprise_rise_error", 2.5, _TOKEN, "above", "the same"),
        ),
    ),
    Rule(
        "additivity_high", "drift", "layers", "patching", "alone", ("patching.additivity",),
        "the layers' updates add up to far more than the shift: they work against each other",
        (_warning("additivity_high", 1.5, "share of the shift", "above", "additivity", above=1.0),),
    ),
    Rule(
        "additivity_collapsed", "drift", "layers", "patching", "alone", ("patching.additivity",),
        "the layers' updates no longer act separately",
        (_warning("additivity_warning", 0.4, "share of the shift", "below", "additivity", below=1.0),),
    ),
    Rule(
        "localization_moved", "drift", "layers", "localization", "witness",
        ("localization.center_of_mass", "localization.entropy"),
        "the change moves to other depths, or spreads over the layers",
        (
            _warning("center_moved", 0.25, "share of the depth", "above", "from the run's own first", below=1.0),
            _warning("localization_spread", 0.25, "share", "above", "rise of the profile's entropy", below=1.0),
        ),
        patience=2,
    ),
    Rule(
        "rank_inflated", "drift", "layers", "low_rank", "witness", ("low_rank.shift.*.rank_95",),
        "the change needs many more directions than it did",
        (_warning("rank_ratio", 3.0, "share of the run's own first", "above", "rank_95", above=1.0),),
        patience=2,
    ),
    Rule(
        "subspace_rotated", "drift", "layers", "low_rank", "witness", ("low_rank.shift.*.principal_angles",),
        "the subspace of the change turned since the audit before",
        (_warning("rotation", 1.2, "radians", "above", "median principal angle", below=math.pi / 2),),
        patience=2,
    ),
    Rule(
        "coherence_collapsed", "drift", "depth", "spinal", "witness", ("spinal.coherence",),
        "the depth trace turns jagged",
        (_warning("coherence_drop_warning", 0.5, "share of the run's own first", "above", "fall of coherence", below=1.0),),
    ),
    Rule(
        "terminal_jump", "drift", "depth", "spinal", "witness",
        ("spinal.policy.contraction", "spinal.policy.transport"),
        "contraction or transport of the last layers is far from the reference's",
        (
            _warning("contraction_moved", 0.3, "slope", "above", "mean over the terminal block"),
            _warning("transport_moved", 0.3, "radians", "above", "mean over the terminal block", below=math.pi),
        ),
    ),
    Rule(
        "gradient_left_terminal", "drift", "depth", "spinal", "witness", ("spinal.gradient_concentration",),
        "the margin's gradient leaves the last layers",
        (_warning("concentration_drop", 0.4, "share of the run's own first", "above", "fall", below=1.0),),
        patience=2,
    ),
    Rule(
        "margin_reversed", "preference", "margin", "margins", "alone", ("margins.shift",),
        "the margin shift on the probes lies below 0, or falls below its best, at two looks in a row",
        (_warning("shift_of_best", 0.5, "share of its best", "below", "margin shift", below=1.0),),
        patience=2,
        error_without_limit=True,
    ),
    Rule(
        "accuracy_falling", "preference", "accuracy", "margins", "alone", ("margins.accuracy",),
        "preference accuracy on the probes falls from its best",
        (
            _warning("accuracy_drop_warning", 0.1, "share", "above", "fall from its best", below=1.0),
            _error("accuracy_drop_error", 0.25, "share", "above", "the same", below=1.0),
        ),
    ),
    Rule(
        "never_started", "learning", "weights", "margins", "alone",
        ("margins.kl", "margins.shift", "reference_check.same_weights"),
        "after a share of the run the policy is still its reference, in its weights or in all it says",
        (
            _warning("never_started_kl", 1e-4, _TOKEN, "below", "KL, with no shift of the margin"),
            _setting("never_started_share", 0.25, "share of the run", "when to look, where its length is known", below=1.0),
            _setting("never_started_steps", 50, "steps", "when to look, where it is not"),
        ),
        patience=2,
        error_without_limit=True,
    ),
    Rule(
        "nothing_learned", "learning", "margin", "margins", "alone", ("margins.shift", "margins.accuracy", "margins.kl"),
        "the policy has moved, but half-way through the run no probe set shows a shift of the margin, now or before",
        (
            _warning("nothing_learned_accuracy", 0.75, "share", "below", "accuracy, with no shift of the margin", below=1.0),
            _setting("nothing_learned_share", 0.5, "share of the run", "when to look, where its length is known", below=1.0),
            _setting("nothing_learned_steps", 100, "steps", "when to look, where it is not"),
        ),
        patience=2,
        on_every_set=True,
    ),
)  # fmt: skip

_LOG_RULES = (
    Rule(
        "log_not_finite", "numbers", "log", "log", "certain", ("loss", "grad_norm"),
        "the loss, or three gradient norms in a row, are NaN or infinite, or the loss is exactly 0 with a gradient of 0 or NaN",
    ),
    Rule(
        "log_chosen_falling", "drift", "log", "log", "alone", ("eval_logps/chosen", "logps/chosen"),
        "chosen log-probabilities fall against their start",
        (_warning("log_chosen_ratio", 1.3, _OF_START, "above", "chosen log-probabilities", above=1.0),),
        patience=2,
    ),
    Rule(
        "log_entropy", "drift", "log", "log", "alone", ("eval_entropy", "entropy"),
        "entropy leaves its start",
        (
            _warning("log_entropy_low", 0.5, _OF_START, "below", "entropy, collapsing", below=1.0),
            _warning("log_entropy_high", 1.5, _OF_START, "above", "entropy, exploding", above=1.0),
        ),
        patience=2,
    ),
    Rule(
        "log_token_accuracy", "drift", "log", "log", "alone", ("eval_mean_token_accuracy", "mean_token_accuracy"),
        "next-token accuracy falls against its start",
        (_warning("log_token_accuracy_ratio", 0.7, _OF_START, "below", "next-token accuracy", below=1.0),),
        patience=2,
    ),
    Rule(
        "log_gradient_spike", "drift", "log", "log", "witness", ("grad_norm",),
        "the gradient norm spikes twice within the window",
        (_warning("log_spike_ratio", 10.0, "share of the median", "above", "gradient norm", above=1.0),),
    ),
    Rule(
        "log_accuracy", "preference", "log", "log", "alone", ("rewards/accuracies", "rewards/margins"),
        "the training pairs are ranked worse than by chance over the window; early in a run reliably so",
        (_warning("log_accuracy_low", 0.5, "share", "below", "reward accuracy over the window", below=1.0),),
        patience=2,
    ),
    Rule(
        "log_stuck", "learning", "log", "log", "alone", ("loss", "rewards/margins", "grad_norm"),
        "the loss stays at ln 2 with no reward margin, or gradients are exactly 0",
        (_warning("log_stuck_margin", 1e-3, "reward", "below", "loss from ln 2, and reward margin"),),
        patience=2,
    ),
    Rule(
        "log_saturated", "saturation", "log", "log", "alone", ("loss", "rewards/accuracies"),
        "the loss is used up: every training pair is ranked right with certainty",
        (
            _warning("log_saturated_loss", 0.01, "nats", "below", "loss over the window"),
            _setting("log_window", 16, "steps", "the window of all rules of the log"),
        ),
        patience=2,
    ),
)  # fmt: skip

RULES: tuple[Rule, ...] = _RECORD_RULES + _LOG_RULES
"""In the order in which they are told at equal level."""

RETIRED: frozenset[str] = frozenset({"control_failed"})
"""Rules of earlier versions that are none any more: controls are notes beside the numbers. Their alerts say nothing."""

BY_NAME: dict[str, Rule] = {rule.name: rule for rule in RULES}
RULE_OF: dict[str, str] = {limit.option: rule.name for rule in reversed(RULES) for limit in rule.limits}
"""Option of a limit → name of its rule."""
LIMITS: dict[str, Limit] = {limit.option: limit for rule in RULES for limit in rule.limits}


def rule_named(name: str) -> Rule | None:
    """The rule of this name, or the only one that begins with it (``kl``: ``kl_out_of_bounds``); None: there is none."""
    if name in BY_NAME:
        return BY_NAME[name]
    beginning = [rule for rule in RULES if rule.name.startswith(f"{name}_")]
    return beginning[0] if len(beginning) == 1 else None


def did_you_mean(name: str, names: list[str]) -> str:
    """``" (did you mean 'kl_warning'?)"``, or the empty string where none of the names is near."""
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean {quoted(near[0])}?)" if near else ""


def rule_names() -> list[str]:
    """What rules may be called: their names, and the beginnings that :func:`rule_named` takes for them."""
    beginnings = {rule.name.split("_")[0] for rule in RULES}
    return [*BY_NAME, *sorted(name for name in beginnings if rule_named(name) is not None and name not in BY_NAME)]
