"""What one audit found: ``AuditRecord`` and its parts, as stored in a run log.

Conventions. Per-layer sequences have length L (the number of decoder layers, 0-based) unless a field says otherwise.
A number that cannot be known is NaN, and says why: an :class:`Estimate` in its ``reason``, any other field in
``AuditRecord.reasons`` under its dotted path. Records hold no tensors; what is large (per-pair values, subspace bases)
lies beside the log in ``step-N/*.safetensors``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from align_audit.record.alert import Alert
from align_audit.record.estimate import (
    NOT_MEASURED,
    Bare,
    Count,
    Estimate,
    Nats,
    NatsByLayer,
    NatsPerToken,
    Share,
    ShareByLayer,
)
from align_audit.record.in_short import html_of, line_of
from align_audit.record.schema import Labelled, Migration, Part, Stored
from align_audit.record.site_curve import SiteCurve
from align_audit.record.units import In, Labels

SCHEMA_VERSION = 8
"""Version of the fields of a record. Older records are migrated on load; newer ones are refused."""

METHODS_VERSION = 2
"""Version of the definitions of the measures. Numbers of different versions are not comparable."""

NO_TRAINER = "no trainer made a step beside this audit"
UNCOUNTED_PAIRS = "how many pairs a step of the trainer is made of could not be read from it"
"""Why an audit's cost is not known in the trainer's unit."""

IN_TRAINING = ("cost.training_pairs", "cost.share_of_run")
"""Paths of what is known of an audit's cost only where a trainer runs."""

Verdict = Literal["passed", "failed", "not_run"]
AuditKind = Literal["health", "full"]
"""``health``: what both models say of the pairs and how they continue prompts, nothing patched. ``full``: everything."""


RecordKey = tuple[int, str, str, str | None, AuditKind]
"""See :attr:`AuditRecord.key`."""


class Margins(Part):
    """Preference margins and the behavioural side-channel (METHODS, notation and §6). Log-probabilities in nats."""

    reference: Nats
    policy: Nats
    shift: Nats
    accuracy: Share
    ranking_accuracy: Share
    chosen_logp_change: Nats
    rejected_logp_change: Nats
    chosen_logp_change_per_token: NatsPerToken
    rejected_logp_change_per_token: NatsPerToken
    kl: NatsPerToken
    """KL(policy ‖ reference) of the next-token distribution, nats per token."""
    entropy: NatsPerToken
    """Of the policy's next-token distribution, nats per token."""
    reference_entropy: NatsPerToken
    token_accuracy: Share
    """Share of chosen completion tokens that are the policy's most likely next token."""
    reference_token_accuracy: Share

    def keeps_chosen(self, drop: float) -> bool:
        """Do chosen completions lose less than ``drop`` nats per token against the reference? Not where it is not known."""
        return -self.chosen_logp_change_per_token.mean < drop


class Generations(Part):
    """Greedy continuations of some probe prompts, by policy and reference (METHODS §6). Means are over prompts."""

    prompts: Count
    max_new_tokens: Annotated[int, In("tokens")]
    """How far each was continued at most."""
    repetition: Share
    """Share of a continuation's 4-grams that stood in it before."""
    reference_repetition: Share
    length: Annotated[Estimate, In("tokens")]
    """Tokens up to and with the one that ends the text, ``max_new_tokens`` where none came."""
    reference_length: Annotated[Estimate, In("tokens")]
    ended: Share
    """Share of continuations that came to an end within ``max_new_tokens``."""
    reference_ended: Share
    surprise: NatsPerToken
    """−log ρ of the policy's own continuation, nats per token: how odd the reference finds what the policy writes."""
    reference_surprise: NatsPerToken
    """The same of the reference's own continuation: what it finds usual."""


class Occasion(Part):
    """Why an audit was made in a run, and what the schedule chose from it."""

    reason: str
    next_step: Annotated[int | None, In("steps")] = None
    """At which step the next look is due, if nothing calls for an earlier one; None: at none."""
    share_spent: Annotated[float | None, In("share")] = None
    """Share of the run's wall-clock time that went into audits so far, with this one; None: not known yet."""
    unaffordable_seconds: Annotated[float | None, In("seconds")] = None
    """What a full audit was expected to take that was asked for and did not fit the budget; None: none was left out."""
    training_pair_seconds: Annotated[float | None, In("seconds")] = None
    """Of the trainer's own steps in this run, all processes together, for each pair trained on; evaluations, checkpoints and
    audits are no steps (older records count the former two). None: no step was made yet, or its pairs are not known."""


class Attribution(Part):
    """Attribution patching beside the exact effects, where only some pairs were patched; L values each."""

    exact_pairs: Count
    """Patched at every layer; what is not corrected by attribution is of these."""
    patched_pairs: Annotated[list[int], In("count", along="layer")] = Field(default_factory=list)
    """Patched at each layer: some layers may need more than others (``exact_pairs`` "auto")."""
    pairs: Count
    points: Annotated[list[float], In("share", along="place")] = Field(default_factory=lambda: [0.0])
    """Where its gradients were taken, from the reference's streams (0: first order) to the policy's (1)."""
    path: Literal["joint", "layer"] = "joint"
    """All streams together, or the patched layer's alone (integrated gradients); see ``PatchingConfig``."""
    correlation: Annotated[list[float], In("", along="layer")]
    """Between a pair's exact effect and its attribution, over the patched pairs (multiple, with several points)."""
    joint_correlation: Annotated[list[float], In("", along="layer")] = Field(default_factory=list)
    """The same with the pair's margin shift beside the attribution, which is known of every pair: what corrects
    ``effect``. Equal to ``correlation`` where there are too few patched pairs for one more slope."""
    equivalent_pairs: Annotated[list[float], In("count", along="layer")]
    """Patched pairs that would have given the effect's interval without attribution and shift."""
    mean: NatsByLayer
    """Of the attribution itself (averaged over the points), over all pairs: what it would have said alone."""


class LayerSet(Part):
    """The layers that stand clear of the others by what they contribute (METHODS §1, §3; ours). Empty with a reason."""

    layers: Annotated[list[int], In("layer", along="place")]
    gain: Share
    """Share of the margin shift gained at these layers: the sum of their ``layer_gain``."""
    separation: Annotated[Estimate, In("")]
    """How many times the largest contribution of the others the least of theirs is."""
    stability: Annotated[float, In("share")]
    """Share of bootstrap resamples of the pairs that give the same set."""
    selection_frequency: Annotated[list[float], In("share", along="layer")]
    """Share of resamples in which each layer belongs to the set; L values."""
    contribution: NatsByLayer = Field(default_factory=list)
    """Of each layer's update to the margin, nats: the geometric mean of its block transplant (what it does alone) and its gain
    (what it adds to those below), each at least its margin of error; L values."""


class Patching(Part):
    """Layer-wise activation patching (METHODS §1). Effects and transplants in nats; recovery and gains are shares."""

    positions: str
    estimator: Literal["exact", "control_variate"] = "exact"
    """How ``effect`` was estimated: every pair patched, or some, the others by attribution. The rest is always exact."""
    groups: Annotated[int | None, In("pairs")] = None
    """Independent pairs among those that everything was patched on: pairs that share a prompt count once."""
    attribution: Attribution | None = None
    effect: NatsByLayer
    effect_p_adjusted: Annotated[list[float], In("probability", along="layer")]
    """Two-sided p-values of effect ≠ 0, of the same estimates, Benjamini–Hochberg adjusted over layers."""
    recovery: ShareByLayer
    layer_gain: ShareByLayer
    block_transplant: NatsByLayer
    embedding_gain: Share
    head_gain: Share
    embedding_transplant: Nats
    head_transplant: Nats
    additivity: Share
    peak_layer: Annotated[int | None, In("layer")]
    standing_out: LayerSet | None = None


class Control(Part):
    """One control (METHODS §2): does the number it guards count as evidence? ``reason`` always says why."""

    verdict: Verdict
    reason: str
    effect: Annotated[list[Estimate] | None, In("nats")] = None
    """L values for ``noise``, ``reverse`` and ``identity``; for ``random_subspace`` one per evaluated rank."""
    value: float | None = None
    """Agreement over half splits for ``split_half``; p-value for ``permuted_targets``."""
    pairs: Annotated[int | None, In("count")] = None
    """Probe pairs it was measured on."""


class Controls(Part):
    """What stands beside the numbers and says whether they are evidence (METHODS §2)."""

    noise: Annotated[Control, In("", along="layer")]
    reverse: Annotated[Control, In("", along="layer")]
    identity: Annotated[Control, In("", along="layer")]
    random_subspace: Annotated[Control, In("", along="rank")]
    split_half: Annotated[Control, In("share")]
    permuted_targets: Annotated[Control, In("probability")] = Control(verdict="not_run", reason=NOT_MEASURED)


CONTROL_NAMES = tuple(Controls.model_fields)

GUARDED = {
    "noise": "the patching effects and recovery",
    "reverse": "the patching effects as causes",
    "identity": "any patching number of this record",
    "random_subspace": "the low-rank reconstruction",
    "split_half": "the peak layer",
    "permuted_targets": "the layers that the LASSO selects",
}
"""What is no evidence where a control fails."""


class Localization(Part):
    """Sparse localization (METHODS §3)."""

    target: str
    lasso_coefficients: Annotated[list[float], In("nats", along="layer")]
    lasso_lambda: Annotated[float, In("nats")]
    cv_r2: Bare
    """Cross-validated R² at the chosen λ; at or below 0 the layers do not predict the target."""
    selected_layers: Annotated[list[int], In("layer", along="place")]
    selection_frequency: Annotated[list[float], In("share", along="layer")]
    null_selection_frequency: Annotated[list[float], In("share", along="layer")]
    """The same frequencies with the targets permuted."""
    null_cv_r2: Annotated[list[float], In("", along="place")]
    center_of_mass: Annotated[float, In("share")]
    entropy: Annotated[float, In("share")]


class LowRankCurve(Labelled):
    """Low-rank reconstruction of one layer in one basis (METHODS §4); sequences run along ``ranks``."""

    ranks: Annotated[list[int], Labels("rank")]
    effect_fraction: Annotated[list[Estimate], In("share", along="rank")]
    explained_variance_ratio: Annotated[list[float], In("share", along="rank")]
    rank_95: Annotated[float, In("rank")]
    rank_95_low: Annotated[float, In("rank")] = math.nan
    rank_95_high: Annotated[float, In("rank")] = math.nan
    """Its bootstrap interval over pairs; infinite where no evaluated rank is enough."""
    full_effect: Nats
    principal_angles: Annotated[list[float] | None, In("radians", along="place")] = None
    """Radians, ascending, to the previous audit's subspace of the same layer and basis; None at a run's first."""


class DepthTrace(Part):
    """One model's path through its layers (METHODS §5)."""

    contraction: Annotated[list[float], In("", along="layer")]
    contraction_r2: Annotated[list[float], In("", along="layer")]
    contraction_stderr: Annotated[list[float], In("", along="layer")]
    transport: Annotated[list[float], In("radians", along="layer")]
    """Length L − 1; radians in [0, π]. A mean over all rows, or an estimate of it from some that were drawn."""
    singular_values: Annotated[list[int], In("count", along="layer")]
    """n per layer: min(rows, columns, numerical rank)."""
    below_rounding_floor: Annotated[list[int], In("count", along="layer")]
    """Singular values per layer that the dtype of the activations cannot resolve."""
    transport_stderr: Annotated[list[float], In("radians", along="layer")] = Field(default_factory=list)
    """Of ``transport`` as an estimate of the mean over all rows of these pairs, 0 where it is that mean; other pairs would give
    another mean. Empty in older records."""


class Spinal(Part):
    """SPINAL on policy and reference, on the same rows (METHODS §5)."""

    policy: DepthTrace
    reference: DepthTrace
    terminal_layers: Annotated[list[int], In("layer", along="place")]
    rows: Count
    rows_available: Count
    transport_rows: Annotated[int | None, In("count")] = None
    """The rows that transport was measured on, in both models; of ``rows_available``. None: not in older records."""
    transport_change_stderr: Annotated[list[float], In("radians", along="layer")] = Field(default_factory=list)
    """The same of the difference of both models' transport, which is of the same rows. Empty in older records."""
    delta_align: Bare
    delta_align_stderr: Annotated[float | None, In("")] = None
    """What of it the rows of these pairs leave open that transport was not measured on: 0 where there are none. It is no error
    over pairs, and contraction has no part in it. None: not in older records."""
    coherence: Bare
    reference_coherence: Bare
    gradient_concentration: Share
    score: Bare


class ReferenceCheck(Part):
    """Is the reference what it should be?

    ``same_weights``: on every probe token it computed what the policy did, bit by bit: each layer's stream in a full audit,
    the last one in a health audit. Weights that differ and still compute the same do not show.
    """

    source: str
    """Where the reference came from, in words."""
    same_weights: bool
    verdict: Verdict
    reason: str
    last_sync_step: Annotated[int | None, In("steps")] = None
    precomputed_margin_difference: Annotated[float | None, In("nats")] = None
    """Largest absolute difference to the trainer's precomputed reference margins, in nats."""


class Cost(Part):
    """What an audit took."""

    seconds: Annotated[float, In("seconds")]
    peak_memory: Annotated[int, In("bytes")]
    """Bytes above what was allocated when the audit began (device memory on CUDA, resident memory on a CPU)."""
    forward_equivalents: Annotated[float, In("forwards")]
    """Full forwards of one model over the probe pairs that the same layer calls amount to."""
    training_pairs: Annotated[float | None, In("pairs")] = None
    """On how many pairs the trainer would have trained in these seconds, by its own steps in this run up to the audit. None:
    no trainer ran, or had made no step yet (see ``reasons``); not in older records."""
    share_of_run: Annotated[float | None, In("share")] = None
    """Of the run's time so far, this audit in it, the share that it took. None: no trainer ran, or had made no step yet; not in
    older records."""


class Provenance(Part):
    """Everything needed to say which models, pairs and settings a record speaks of."""

    created: str
    versions: dict[str, str]
    model_type: str
    num_layers: Count
    hidden_size: Count
    vocab_size: Count
    policy_hash: str
    reference_hash: str
    probe_hash: str
    probe_name: str | None = None
    """What the run calls this probe set; None where it has one set, without a name."""
    probe_source: str
    probe_held_out: bool | None
    pairs: Count
    groups: Annotated[int | None, In("pairs")] = None
    """Of them, those that are independent of each other: pairs that share a prompt count once. None: not in older records."""
    pairs_dropped: dict[str, int]
    seed: Annotated[int, In("")]
    device: str
    parameter_dtype: str
    compute_dtype: str
    max_length: Annotated[int | None, In("tokens")]
    truncation_mode: str
    shared_prompts: bool = False
    """Whether each pair's prompt was computed once for both completions (same numbers, less work)."""
    layout_reason: str | None = None
    """Why it was not."""
    beta: Annotated[float | None, In("")] = None
    config: dict[str, Any]


class Finding(Part):
    """What an audit says about where the preference sits, in words and made only from the record (``record.finding.find``)."""

    words: str
    localized: bool
    layers: Annotated[list[int], In("layer", along="place")] = Field(default_factory=list)
    """Of the claim; empty where none is made."""


def _from_version_3(values: dict[str, Any]) -> dict[str, Any]:
    """Version 3 was written with several sets of fields, and what ``separation`` says changed within it."""
    standing_out = _inside(_inside(values, "patching"), "standing_out")
    if standing_out.get("layers") and "contribution" not in standing_out:
        # It came with the contributions that the ratio is of; before, it was a difference of block transplants.
        reason = "measured in nats by the version that wrote this record; here it is a ratio of contributions"
        standing_out["separation"] = {"mean": math.nan, "low": math.nan, "high": math.nan, "reason": reason}
    low_rank, reasons = _inside(values, "low_rank"), values.setdefault("reasons", {})
    for basis in low_rank if isinstance(reasons, dict) else ():
        for layer in (by_layer := _inside(low_rank, basis)):
            for name in ("rank_95_low", "rank_95_high"):
                if name not in _inside(by_layer, layer):
                    reasons[f"low_rank.{basis}.{layer}.{name}"] = NOT_MEASURED
    return values


def _inside(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of values that nobody has validated yet; empty where there is none."""
    part = values.get(name)
    return part if isinstance(part, dict) else {}


class AuditRecord(Stored):
    """Everything one audit found. Alerts, plots and reports can be made from it again with no model at hand."""

    newest: ClassVar[int] = SCHEMA_VERSION
    migrations: ClassVar[Mapping[int, Migration]] = {3: _from_version_3}

    finding: Finding | None = None
    """None in records of versions before it, and where nothing was patched."""
    kind: AuditKind = "full"
    occasion: Occasion | None = None
    """None outside of a run, and in records of versions before it."""
    step: Annotated[int, In("steps")]
    schema_version: Annotated[int, In("")] = SCHEMA_VERSION
    methods_version: Annotated[int, In("")] = METHODS_VERSION
    provenance: Provenance
    reference_check: ReferenceCheck
    margins: Margins
    generations: Generations | None = None
    patching: Patching | None
    controls: Controls
    localization: Localization | None
    low_rank: dict[str, dict[int, LowRankCurve]]
    """``low_rank[basis][layer]``; layer −1 does not occur."""
    sites: list[SiteCurve] = Field(default_factory=list)
    """In the order of the configuration."""
    spinal: Spinal | None
    extra: dict[str, Any] = Field(default_factory=dict)
    """Parts of measurements that have no field of their own here, by their name: plain JSON values, None where not known."""
    alerts: list[Alert] = Field(default_factory=list)
    cost: Cost
    reasons: dict[str, str] = Field(default_factory=dict)
    """Why a NaN or None elsewhere in the record is one: dotted path → reason."""

    @property
    def attribution(self) -> Attribution | None:
        """Where only some pairs were patched."""
        return self.patching.attribution if self.patching is not None else None

    @property
    def key(self) -> RecordKey:
        """What makes two audits the same: step, policy weights, reference weights, name of the probe set, kind."""
        there = self.provenance
        return (self.step, there.policy_hash, there.reference_hash, there.probe_name, self.kind)

    def __repr__(self) -> str:
        return line_of(self)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_of(self)


def control_items(record: AuditRecord) -> Iterator[tuple[str, Control]]:
    """Name and result of each control."""
    for name in CONTROL_NAMES:
        yield name, getattr(record.controls, name)
