"""How far an audit is, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def ticker(progress: Callable[[int, str], Any] | None, total: int) -> Callable[[], None]:
    """What to call after each of ``total`` batches: it moves the progress bar, where one is wanted.

    A bar that cannot be drawn (its terminal is gone) is no reason to end an audit.

    Args:
        progress: makes a bar of so many steps under a title, with ``update(1)``, ``n`` and ``close()``; None: no bar.
    """
    if progress is None:
        return lambda: None
    try:
        bar = progress(total, "align_audit")
    except OSError as error:
        logger.info("align_audit shows no progress: %s", error)
        return lambda: None
    broken: list[OSError] = []

    def tick() -> None:
        if broken:
            return
        try:
            bar.update(1)
            if bar.n >= total:
                bar.close()
        except OSError as error:
            broken.append(error)
            logger.info("align_audit shows no more progress: %s", error)

    return tick
