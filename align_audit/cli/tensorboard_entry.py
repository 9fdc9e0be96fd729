"""What TensorBoard imports to show the tab "Align audit": the entry point of the group ``tensorboard_plugins``.

An exception while an entry point is imported ends ``tensorboard`` for everybody in that environment. So this module imports
nothing but the standard library and the base class, which TensorBoard has loaded by then; the rest is imported by
:meth:`TabLoader.load`, where whatever goes wrong costs the tab alone.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins.base_plugin import TBLoader


class TabLoader(TBLoader):  # type: ignore[misc]
    """Makes the tab, or says once in TensorBoard's log why there is none."""

    def load(self, context: Any) -> Any:
        """The plugin; None where it, or anything that it needs, cannot be loaded.

        Args:
            context: TensorBoard's ``TBContext``.
        """
        try:
            from align_audit.cli.intervals import interval
            from align_audit.writers.web.tensorboard_tab import AlignAuditTab

            return AlignAuditTab(context, interval)
        except Exception as error:
            logging.getLogger("tensorboard").warning(
                'The tab "Align audit" is missing, because align_audit cannot be loaded (%s: %s). All else is as always; '
                "`pip install --force-reinstall align-audit` in this environment may mend it.",
                type(error).__name__,
                error,
            )
            return None
