"""The probe sets of a run: those that were passed, else the trainer's held-out pairs, else pairs of its training set."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

from align_audit.config import AuditConfig
from align_audit.errors import ProbeError
from align_audit.measures.resampling import LEAST_GROUPS
from align_audit.models.guard import untouched
from align_audit.probes.names import as_name, check_names
from align_audit.probes.pairs import ProbeSet
from align_audit.record.finding import CLAIMED_FROM

if TYPE_CHECKING:
    from align_audit.monitoring.trainer import TrainerFacts

logger = logging.getLogger(__name__)


def given_by_name(probes: Any) -> TypeGuard[Mapping[str, Any]]:
    """Several sets by name; a mapping with the columns of pairs is one record or a table, which is refused as data."""
    return isinstance(probes, Mapping) and not {"chosen", "chosen_ids"} & set(probes)


class TrainingProbes:
    """The probe sets of one callback, which may see several trainings.

    Args:
        given: as of :func:`make_probe_sets`.

    Raises:
        ConfigurationError: names that cannot be ones.
    """

    def __init__(self, given: Any) -> None:
        if given_by_name(given):
            check_names(given)
        self._given = given
        self._data: tuple[Any, ...] = ()
        """What the sets were drawn from, where none were given."""
        self.sets: dict[str | None, ProbeSet] = {}

    def draw(self, config: AuditConfig, facts: TrainerFacts, tokenizer: Any) -> None:
        """Draw the sets of a training; those of an earlier one are not taken over from other data.

        Raises:
            ProbeError: the data holds no usable pair.
        """
        data = (facts.eval_sets, facts.train_set) if self._given is None else ()
        if not self.sets or any(map(operator.is_not, data, self._data)):
            self.sets = make_probe_sets(self._given, config, facts, tokenizer)
            self._data = data


def make_probe_sets(given: Any, config: AuditConfig, facts: TrainerFacts, tokenizer: Any) -> dict[str | None, ProbeSet]:
    """The probe sets by name; a single one without a name is called None.

    Args:
        given: a ``ProbeSet`` or any data that ``ProbeSet.from_dataset`` takes, or several by name; None: the trainer's.

    Raises:
        ProbeError: the data holds no usable pair.
        ConfigurationError: names that cannot be ones.
    """
    if given is None:
        sets = _sets_of_trainer(config, facts, tokenizer)
    elif given_by_name(given):
        sets = {name: _probe_set(data, config, facts, tokenizer) for name, data in given.items()}
    else:
        sets = {None: _probe_set(given, config, facts, tokenizer)}
    for name, probes in sets.items():
        called = "" if name is None else f" {name!r}"
        logger.info("align_audit probes%s: %s", called, probes.summary())
        if probes.groups < LEAST_GROUPS:
            logger.warning(
                "align_audit probes%s: %d independent pairs. No interval is made of fewer than %d (pairs that share a prompt "
                "count once), so that alerts go by means, which a few pairs can move, and a localization is claimed from %d "
                "only. Give more held-out pairs (probes=..., eval_dataset, max_pairs)",
                called, probes.groups, LEAST_GROUPS, CLAIMED_FROM,
            )  # fmt: skip
    return sets


def _sets_of_trainer(config: AuditConfig, facts: TrainerFacts, tokenizer: Any) -> dict[str | None, ProbeSet]:
    """The trainer's eval set, each of several by its name; else pairs of the training set."""
    evaluation = facts.eval_sets
    if isinstance(evaluation, dict):
        check_names(as_name(title) for title in evaluation)
        return {
            as_name(title): _probe_set(data, config, facts, tokenizer, f"the trainer's eval set {title!r}", True)
            for title, data in evaluation.items()
        }
    if evaluation is not None:
        return {None: _probe_set(evaluation, config, facts, tokenizer, "the trainer's eval set", True)}
    warnings.warn(
        "align_audit found no held-out pairs and takes its probes from the training set: accuracies and "
        "margins will look better than they are. Pass probes=..., or give the trainer an eval_dataset"
        + ("" if facts.attached else " and call callback.attach(trainer)"),
        stacklevel=4,
    )
    return {None: _probe_set(facts.train_set, config, facts, tokenizer, "the training set", False)}


def _probe_set(
    data: Any,
    config: AuditConfig,
    facts: TrainerFacts,
    tokenizer: Any,
    source: str | None = None,
    held_out: bool | None = None,
) -> ProbeSet:
    if isinstance(data, ProbeSet):
        return data if data.tokenizer is not None else replace(data, tokenizer=tokenizer)
    try:
        with untouched():
            return ProbeSet.from_dataset(
                data,
                tokenizer,
                max_pairs=config.max_pairs,
                max_length=config.max_length or facts.max_length,
                truncation_mode=str(config.truncation_mode or facts.truncation_mode),
                seed=config.seed,
                source=source,
                held_out=held_out,
            )
    except ProbeError as error:
        if source is None:
            raise  # the caller knows what was given
        raise ProbeError(
            f"no preference pairs can be drawn from {source}: {error}. Pass pairs to the callback: probes=..."
        ) from error
