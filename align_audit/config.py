"""What an audit measures, when, and how loudly it speaks. Frozen, validated on construction, to and from dict and YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from align_audit.errors import ConfigurationError, plain, quoted
from align_audit.options.examples import ExamplesConfig
from align_audit.options.part import Part
from align_audit.options.refusals import Refused, explained
from align_audit.options.rule_settings import (
    AddedRule,
    Limits,
    RuleOptions,
    RuleSetting,
    check_order,
    none_can_open,
    read_rules,
)
from align_audit.options.rules import RULES, Rule
from align_audit.options.schedule import ScheduleConfig
from align_audit.options.trackers import TrackerChoice
from align_audit.options.webhook import WebhookConfig
from align_audit.options.yaml_lines import in_a_line, lines_of, loaded

__all__ = [
    "AddedRule", "AlertConfig", "AuditConfig", "ExamplesConfig", "GenerationsConfig", "LocalizationConfig", "LowRankConfig",
    "PatchingConfig", "RuleOptions", "ScheduleConfig", "SiteConfig", "SpinalConfig", "StatisticsConfig", "WebhookConfig",
]  # fmt: skip

Positions = Literal["all", "prompt", "completion", "last_prompt_token"]
Basis = Literal["activation", "shift"]

_SHOWN = (
    "progress", "tensorboard", "tensorboard_scalars", "tensorboard_images", "report", "trackers", "trackers_texts", "verbose",
    "examples",
)  # fmt: skip
"""Options of what is shown, which change nothing in a record."""

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class StatisticsConfig(Part):
    """Intervals and tests over pairs (METHODS §2)."""

    confidence: Fraction = 0.95
    interval: Literal["percentile", "bca"] = "percentile"
    bootstrap_resamples: int = Field(default=1000, ge=100)


class PatchingConfig(Part):
    """Layer-wise activation patching and its controls (METHODS §1, §2)."""

    enabled: bool = True
    positions: Positions = "all"
    embedding: bool = True
    """Also patch what enters layer 0, which recovery's first gain is measured from."""
    transplants: bool = True
    """Block transplants: each block's own update alone, in the reference."""
    reverse: bool = True
    noise_draws: int = Field(default=3, ge=0)
    """Random directions at the peak layer, whose verdict they decide; one at every other layer."""
    exact_pairs: Annotated[int, Field(ge=8)] | Literal["auto"] | None = None
    """None: every pair is patched. Else this many, drawn by hash; the others' effects are estimated by attribution, which
    the patched ones correct, with the margin shift beside it (control variates): unbiased, wider or narrower as these
    correlate, which the record says. Whatever else is patched is then measured on the patched pairs only.
    "auto": ``control_pairs`` at every layer, on which everything else is then measured; and at each layer as many more as
    ``equivalent_pairs`` takes, by how well the others' effects are estimated there. It saves something where there are more
    probe pairs (``max_pairs``) than that, 160 say."""
    equivalent_pairs: int = Field(default=64, ge=8)
    """With ``exact_pairs`` "auto": effects get intervals as wide as if so many pairs were patched and nothing estimated."""
    attribution_points: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = (0.0, 0.5)
    """Where on the straight line from the reference's streams (0) to the policy's (1) attribution takes its gradients.
    (0.0,) is plain attribution patching, first order; each point costs one backward pass, and late in training a second
    one is worth it."""
    attribution_path: Literal["joint", "layer"] = "joint"
    """``joint``: all streams move along that line together, and one backward pass serves every layer. ``layer``: only the
    patched layer's does and the reference goes on from there, as in the patched run: integrated gradients proper, as
    exact alone as there are points, at more than the price of patching."""
    keep_reference: bool = False
    """Keep the reference's streams and gradients at 0 of attributed pairs on disk, in the run's ``cache`` folder, for the
    audits that follow. With ``attribution_points`` (0.0,) a pair that is not patched then costs one forward of the
    policy. A token takes 2 (L + 1) d numbers in the model's dtype: 64 pairs of 300 tokens in 32 layers of 4,096 in
    bfloat16, 10 GB. Worth it where reading them is faster than computing them, as on a CPU."""
    control_pairs: int = Field(default=24, ge=2)
    """Pairs, at most, on which noise, reverse and random subspaces are patched and gradients are taken: these need fewer
    than an estimate. Which ones is drawn by hash, before anything is measured."""
    split_half_repeats: int = Field(default=100, ge=1)
    split_half_agreement: Fraction = 0.8
    """The control passes when at least this share of random half splits agree on the peak layer, and a localization is
    claimed only where at least this share of bootstrap resamples agree on its layers."""

    @field_validator("attribution_points")
    @classmethod
    def _points_ascend(cls, points: tuple[float, ...]) -> tuple[float, ...]:
        if not points or list(points) != sorted(set(points)):
            raise ValueError(f"expected ascending points in [0, 1], such as (0.0, 0.5); found {points}")
        return points

    @model_validator(mode="after")
    def _something_to_keep(self) -> Self:
        if self.keep_reference and self.exact_pairs is None:
            raise ValueError("keep_reference is for pairs that are only attributed: set exact_pairs, which is unset")
        if self.keep_reference and (self.attribution_path != "joint" or 0.0 not in self.attribution_points):
            raise ValueError(
                "keep_reference keeps gradients at the reference's own streams: expected attribution_path='joint' and 0.0 "
                f"among attribution_points; found {self.attribution_path!r} and {self.attribution_points}"
            )
        return self


class LocalizationConfig(Part):
    """LASSO over layers (METHODS §3)."""

    enabled: bool = True
    target: Literal["shift", "effect"] = "shift"
    folds: int = Field(default=5, ge=2)
    selection_resamples: int = Field(default=50, ge=1)
    permutations: int = Field(default=20, ge=1)


class LowRankConfig(Part):
    """Low-rank subspace reconstruction (METHODS §4)."""

    enabled: bool = True
    bases: tuple[Basis, ...] = ("activation", "shift")
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    layers: Literal["auto", "all"] | tuple[int, ...] = "auto"
    """``auto``: the peak layer of the block transplants and the layer of the largest gain in recovery."""
    random_draws: int = Field(default=1, ge=0)
    """Random subspaces of every rank for each of the control pairs, each pair its own."""

    @field_validator("ranks")
    @classmethod
    def _ranks_ascend(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if not ranks or any(k < 1 for k in ranks) or list(ranks) != sorted(set(ranks)):
            raise ValueError(f"expected ascending ranks of at least 1, such as (1, 2, 4, 8); found {ranks}")
        return ranks


class SiteConfig(Part):
    """Patching of one kind of site below the whole stream, at every layer or some (METHODS §1, "Sites")."""

    site: Literal["attention_output", "mlp_output", "head", "block"]
    """``block``: ``width`` adjacent layers as a whole; ``head``: what one attention head adds to its layer's attention."""
    layers: Literal["all"] | tuple[int, ...] = "all"
    """``all``: every layer that has the site. For ``block`` the layers at which windows start."""
    heads: Literal["all"] | tuple[int, ...] = "all"
    width: int = Field(default=1, ge=1)
    positions: Positions = "all"
    estimator: Literal["exact", "attribution", "control_variate"] = "exact"
    """``exact``: each unit of each pair is patched. ``attribution``: to first order, all units from one backward pass, with
    its correlation to exact effects on some pairs. ``control_variate``: those pairs' exact effects, corrected by it."""
    pairs: int | None = Field(default=None, ge=1)
    """Pairs patched exactly, drawn by hash. None: for ``exact`` all that patching patches, else 16."""

    @field_validator("layers", "heads")
    @classmethod
    def _named_once(cls, named: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(named, tuple) and (not named or min(named) < 0 or len(set(named)) < len(named)):
            raise ValueError(f'expected "all" or some indices from 0, each once, such as (0, 3); found {named}')
        return named

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.heads != "all" and self.site != "head":
            raise ValueError(f'heads are for site "head" only; found heads={self.heads} with site={self.site!r}')
        if self.width != 1 and self.site != "block":
            raise ValueError(
                f'a window of layers (width={self.width}) is for site "block" only; found site={self.site!r}'
            )
        if self.estimator == "control_variate" and self.pairs is not None and self.pairs < 8:
            raise ValueError(f"a control variate fits a slope on at least 8 patched pairs; found pairs={self.pairs}")
        return self


class SpinalConfig(Part):
    """Contraction, transport and the scores made of them (METHODS §5)."""

    enabled: bool = True
    window: tuple[Fraction, Fraction] = (0.1, 0.9)
    terminal_fraction: Fraction | None = None
    """Depth fraction of the terminal block; None: the last max(⌈L/3⌉, min(4, L)) layers."""
    weights: tuple[Finite, Finite, Finite] = (1.0, 1.0, 1.0)
    max_rows: int = Field(default=4096, ge=32)
    """Token rows that enter the spectra and transport; more are subsampled, deterministically, and the record says so."""
    transport_rows: Annotated[int, Field(ge=2)] | Literal["auto", "all"] = "auto"
    """Of these, the rows that transport is the mean over, drawn by hash: its cost is rows × vocabulary. "auto": as many as
    give the mean of every layer, in both models, a standard error of at most 2 % of it; "all": all of them."""
    gradient_concentration: bool = True

    @model_validator(mode="after")
    def _window_ascends(self) -> Self:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"expected an ascending window such as (0.1, 0.9); found {self.window}")
        return self


class GenerationsConfig(Part):
    """Greedy continuations of probe prompts (METHODS §6): repetition, length, and how odd the reference finds them."""

    enabled: bool = True
    prompts: int = Field(default=8, ge=1)
    """Prompts that are continued, drawn by hash among those of the probe pairs."""
    max_new_tokens: int = Field(default=32, ge=8)


class AlertConfig(Limits):
    """The limits of the alert rules, what to do when one fires, and rules switched off, tuned or added.

    The limits (``kl_warning``, …), with unit, direction and default, are those of ``align_audit.options.rules``, which
    ``docs/alerts.md`` prints. One of infinity (``.inf`` in YAML) switches its level off, where it may be so large.

    Example:
        >>> AlertConfig(kl_warning=0.5, rules={"entropy": "off"}).uses("entropy_out_of_bounds")
        False
        >>> AlertConfig(rules={"norm": {"signal": "grad_norm", "above": 50.0, "patience": 3}}).rules["norm"].level
        'warning'
    """

    if TYPE_CHECKING:

        def __init__(self, **options: Any) -> None:
            """Limits and rules are options too, which only their table knows: ``AuditConfig.from_dict`` checks them all."""

    enabled: bool = True
    """False: no rule is asked. The status of such a run is BLIND, since nothing says whether all is well. So it is where
    ``rules`` add none, and leave none of the table on that could open an alert."""
    action: Literal["log", "save", "stop"] = "log"
    """Done when an alert of level ``action_level`` or above fires. ``save`` writes a checkpoint, ``stop`` ends training."""
    action_level: Literal["warning", "error"] = "error"
    webhook: WebhookConfig | None = None
    """Where warnings and errors are posted to as they open, get worse and are resolved: a URL, or these options."""
    baseline_audits: int = Field(default=3, ge=1, le=8)
    """Healthy audits after which a run is also compared with itself; as many as are looked back for it at most."""
    error_looks: int = Field(default=2, ge=1)
    """Looks in a row beyond the limit of an error that make one by themselves, where nothing else agrees."""
    agreeing_families: int = Field(default=3, ge=2)
    """So many independent signs at one look make an error, however weak; two, where one is beyond its own limit of an error."""
    hysteresis: float = Field(default=0.8, gt=0, le=1)
    """An open alert clears only beyond this share of its limit (1: at the limit itself), at two looks in a row."""
    cooldown: int = Field(default=3, ge=0)
    """Looks after an alert was resolved in which a warning of the same cause has to be seen once more before it opens again."""
    rules: dict[str, RuleSetting] = Field(default_factory=dict)
    """Rule → ``off``, or its options and limits; or your own (:class:`~align_audit.options.rule_settings.AddedRule`)."""

    @model_validator(mode="before")
    @classmethod
    def _sort_out_rules(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("rules"), dict):
            return values
        rules, limits = read_rules(values["rules"])
        if twice := sorted(set(limits) & set(values)):
            raise ValueError(f"expected {twice[0]} once; found it under alerts and under rules")
        return values | limits | {"rules": rules}

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for rule in RULES:
            if self.uses(rule.name) and self.may_be_error(rule.name):
                check_order(rule, self)
        self.__dict__["enabled"] &= not none_can_open(self.rules, self.agreeing_families)
        return self

    def uses(self, rule: str) -> bool:
        """Is this rule of the table switched on?"""
        said = self.rules.get(rule)
        return not isinstance(said, RuleOptions) or said.enabled

    def patience(self, rule: Rule) -> int:
        """Looks in a row after which a rule of the table counts by itself."""
        said = self.rules.get(rule.name)
        return said.patience or rule.patience if isinstance(said, RuleOptions) else rule.patience

    def may_be_error(self, rule: str) -> bool:
        """May this rule of the table give more than a warning?"""
        said = self.rules.get(rule)
        return not isinstance(said, RuleOptions) or said.level == "error"

    @property
    def added(self) -> dict[str, AddedRule]:
        """The rules that are not in the table."""
        return {name: said for name, said in self.rules.items() if isinstance(said, AddedRule)}


class AuditConfig(Part):
    """Everything an audit can be told.

    Args:
        max_pairs: probe pairs drawn from the dataset; more pairs narrow the intervals and cost time in proportion.
        batch_tokens: padded tokens in one batch; None: what keeps this device busy. Halves when memory runs out.
        share_prompts: compute a pair's prompt once for both completions, in models where a check on two pairs shows
            that it changes nothing; the record says whether that was so.
        working_memory_mb: memory the streams of one batch may take together, in MiB; patched ones are walked in groups.
            None: 1024, on a larger accelerator a sixteenth of its memory. Halves when memory runs out.
        seed: of every random draw of an audit (subsample, bootstrap, noise, splits). No global random state is touched.
        budget: share of a run's wall-clock time that audits may take, measured as it goes; a checkpoint at which not even a
            look fits gets no audit. What is made whatever it costs says :class:`~align_audit.options.schedule.ScheduleConfig`.
            None: no limit; every audit that the schedule asks for is made in full.
        strict: raise when an audit breaks, instead of recording it and letting training go on.
        tensorboard: ``auto`` writes beside the trainer's own curves where it has a TensorBoard log, else into
            ``<output_dir>/align_audit/tensorboard``; ``off`` writes none. ``tensorboard_scalars``: ``few`` are the ten that
            tell how the run stands, ``all`` what is measured by layer too. ``tensorboard_images``: also draw full audits.
        report: rewrite ``<output_dir>/align_audit/report.html`` after each audit: the run as a page, in one file.
        trackers: ``auto`` writes to W&B, MLflow and Trackio where the trainer reports to them; ``off`` to none; or some names.
            ``trackers_texts``: the report that they get shows texts of probe pairs, too.
        verbose: print all that an audit measured on the terminal, in place of a line or five.
        max_length, truncation_mode: of probe sequences; None takes the trainer's (or 1024 and ``keep_start``).

    Example:
        >>> AuditConfig(max_pairs=32).schedule.on_save
        True
        >>> AuditConfig.from_dict({"max_pairs": 32}) == AuditConfig(max_pairs=32)
        True
    """

    max_pairs: int = Field(default=64, ge=1)
    batch_tokens: int | None = Field(default=None, ge=1)
    share_prompts: bool = True
    working_memory_mb: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    budget: Fraction | None = 0.05
    strict: bool = False
    progress: bool = True
    tensorboard: Literal["auto", "off"] = "auto"
    tensorboard_scalars: Literal["few", "all"] = "few"
    tensorboard_images: bool = True
    report: bool = True
    trackers: TrackerChoice = "auto"
    trackers_texts: bool = False
    verbose: bool = False
    max_length: int | None = Field(default=None, ge=2)
    truncation_mode: Literal["keep_start", "keep_end"] | None = None
    statistics: StatisticsConfig = StatisticsConfig()
    patching: PatchingConfig = PatchingConfig()
    localization: LocalizationConfig = LocalizationConfig()
    low_rank: LowRankConfig = LowRankConfig()
    sites: tuple[SiteConfig, ...] = ()
    """Finer sites to patch beside the residual stream; none by default, since each takes a walk of its own."""
    spinal: SpinalConfig = SpinalConfig()
    generations: GenerationsConfig = GenerationsConfig()
    examples: ExamplesConfig = ExamplesConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    alerts: AlertConfig = AlertConfig()

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as :meth:`from_dict` takes them back, and as a record stores them: infinity is ``"Infinity"``.

        What is secret (``alerts.webhook``: ``url`` and ``headers``) is left out.
        """
        values: dict[str, Any] = json.loads(self.model_dump_json())
        return values

    def measures_as(self, stored: Mapping[str, Any]) -> bool:
        """Does an audit with these options measure what one with the stored ones did? What is shown of it is no matter."""
        options = self.to_dict()
        return {name: options[name] for name in options if name not in _SHOWN} == {
            name: stored[name] for name in stored if name not in _SHOWN
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from nested plain values; an unknown or invalid one raises :class:`ConfigurationError`."""
        _check_names(values, "the options")
        return cls(**values)

    def to_yaml(self, path: str | Path) -> None:
        """Write all options, as :meth:`from_yaml` reads them."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file of options; those left out keep their defaults. What is wrong is said with its line."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            values = loaded(text)
        except Exception as error:  # PyYAML raises many kinds on what is no YAML, or YAML that is too deep
            raise ConfigurationError(
                f"cannot read the audit configuration {plain(path)}: {in_a_line(error)}"
            ) from None  # PyYAML's own words quote the line, which may hold a secret
        if values is None:
            values = {}
        _check_names(values, plain(path))
        try:
            return cls.from_dict(values)
        except Refused as refused:
            raise ConfigurationError(explained(refused.error, AuditConfig, lines_of(text))) from None


def _check_names(values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise ConfigurationError(f"{where}: expected a mapping of options, found {type(values).__name__}")
    if unnamed := [key for key in values if not isinstance(key, str)]:
        raise ConfigurationError(f"{where}: expected names of options, found {quoted(unnamed[0])}")
