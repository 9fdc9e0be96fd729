"""What of an audit goes up with a training that uploads its folder to the Hub.

``push_to_hub`` uploads all of ``output_dir`` but checkpoints and what begins with ``_``, and the audit's log lies in it: with
the text of held-out pairs, which somebody who publishes a model may have no right, and no thought, to publish.
"""

from __future__ import annotations

import logging
from pathlib import Path

from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, plain
from align_audit.monitoring.trainer import TrainerFacts
from align_audit.record.log import FOLDER

logger = logging.getLogger(__name__)


def kept_from_hub(config: AuditConfig, facts: TrainerFacts, *, writes: bool) -> AuditConfig:
    """The options of a run whose folder is uploaded: no text is kept where nobody has asked for it.

    Args:
        writes: this process says what is done.

    Raises:
        ConfigurationError: gigabytes that are of use on this machine alone would be uploaded at each checkpoint.
    """
    if not facts.pushes_to_hub:
        return config
    if config.patching.keep_reference:
        raise ConfigurationError(
            "push_to_hub uploads output_dir, and patching.keep_reference keeps gigabytes in output_dir/align_audit/cache; "
            "expected one of them"
        )
    if writes:
        _say_earlier_texts(Path(facts.output_dir) / FOLDER)
    if config.examples.pairs == 0:
        return config
    if "examples" in config.model_fields_set and "pairs" in config.examples.model_fields_set:
        if writes:
            logger.warning(
                "align_audit: push_to_hub uploads output_dir, and with it the text of the probe pairs that each audit keeps "
                "(examples.pairs is %d, as asked for), in align_audit/step-*/texts.json and align_audit/report.html",
                config.examples.pairs,
            )
        return config
    if writes:
        logger.warning(
            "align_audit: push_to_hub uploads output_dir with the audit's log, so no text of probe pairs is kept in it "
            "(examples.pairs: 0). To have texts there all the same, ask for them: AuditConfig(examples={'pairs': 3})"
        )
    return config.model_copy(update={"examples": config.examples.model_copy(update={"pairs": 0})})


def _say_earlier_texts(log: Path) -> None:
    """That texts which audits before this run have kept go up as well."""
    texts = sorted(path.relative_to(log).as_posix() for path in log.rglob("step-*/texts*.json"))
    if texts:
        logger.warning(
            "align_audit: push_to_hub uploads output_dir, and with it the text of probe pairs that earlier audits kept "
            "(%d files in %s, such as %s, and reports beside them): delete those that are not to be published",
            len(texts), plain(log), plain(texts[0]),
        )  # fmt: skip
