"""Would an audit work here? Found out before training, and not at the first audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from align_audit.auditing.measurements.sites import SiteCollector
from align_audit.auditing.session.open_models import OpenModels, check_positions, check_vocabulary
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.models.anatomy import Anatomy
from align_audit.models.reference import Reference
from align_audit.options.rule_settings import check_layers
from align_audit.probes.pairs import ProbeSet
from align_audit.ranks import Ranks


def check_audit(
    policy: nn.Module,
    reference: Reference,
    probe_sets: Iterable[ProbeSet],
    config: AuditConfig,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    anatomy: Anatomy | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Open both models and try what every audit needs of them, on one pair.

    Args:
        ranks: the processes that do this together.

    Raises:
        AnatomyError: a model cannot be opened between its layers.
        ReferenceUnavailableError: the reference cannot be had, or does not fit the policy.
        ConfigurationError: probes of another vocabulary, or longer than a model has positions, or a site, or a layer
            that an alert rule reads, which the model does not have.
    """
    sets = list(probe_sets)
    with OpenModels(policy, reference, autocast=autocast, anatomy=anatomy, keep_loaded=True, ranks=ranks) as models:
        session = Session(models, sets[0].pairs[:1], config)
        for probes in sets:
            check_vocabulary(probes.pairs, models)
            check_positions(probes.pairs, models)
        SiteCollector(session)
        check_layers(config.alerts.rules, models.num_layers)
