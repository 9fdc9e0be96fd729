"""The tab "Align audit" of TensorBoard: its routes. What they answer is of :mod:`align_audit.writers.web.shown_runs`.

TensorBoard shows a plugin in a frame with a content security policy that allows nothing but its own host: scripts come as
files, the report's among them, and what runs say comes as JSON, which the front end sets as text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tensorboard.backend.http_util import Respond
from tensorboard.plugins.base_plugin import FrontendMetadata, TBPlugin
from werkzeug import Request, Response

from align_audit.errors import named, plain
from align_audit.record.run_sums import Intervals
from align_audit.writers.web.log_folders import folders_of, log_beside
from align_audit.writers.web.page import static
from align_audit.writers.web.shown_runs import ShownRuns

SCRIPT = "application/javascript"
FILES = {
    "tab.js": SCRIPT,
    "tab.css": "text/css",
    "kept.js": SCRIPT,
    "comparison.js": SCRIPT,
    "comparison.css": "text/css",
    "plotly-cartesian.min.js": SCRIPT,
    "charts.js": SCRIPT,
    "align_audit.js": SCRIPT,
    "align_audit.css": "text/css",
}
"""Of the front end: what is served, and as what. What starts a page of its own is that page's alone."""

App = Callable[..., Any]


class AlignAuditTab(TBPlugin):  # type: ignore[misc]
    """The plugin."""

    plugin_name = "align_audit"

    def __init__(self, context: Any, intervals: Intervals) -> None:
        """Of TensorBoard's ``TBContext``, and what makes the intervals of comparisons; no folder is looked at yet."""
        flags = context.flags
        logdir = getattr(flags, "logdir", "") or ""
        spec = getattr(flags, "logdir_spec", "") or ""
        self.runs = ShownRuns(folders_of(logdir or ("" if spec else context.logdir or ""), spec), intervals)

    def get_plugin_apps(self) -> dict[str, App]:
        """Route → what answers it."""
        apps: dict[str, App] = {
            "/runs": self._app(self._list),
            "/data": self._app(self._data),
            "/compare": self._app(self._compare),
        }
        files = {f"/{name}": self._app(functools.partial(self._file, name)) for name in FILES}
        return apps | files

    def is_active(self) -> bool:
        """Whether there are runs to show, or a hint of where they are. Called at each reload: it only looks for files."""
        return bool(self.runs.logs()) or log_beside(self.runs.folders) is not None

    def frontend_metadata(self) -> Any:
        """The tab renews itself, and keeps what is unfolded while another tab is looked at."""
        return FrontendMetadata(es_module_path="/tab.js", tab_name="Align audit", disable_reload=True)

    def _app(self, answer: Callable[[Request], Response]) -> App:
        """A WSGI application; what breaks in one answer is said in it."""

        @Request.application
        def application(request: Request) -> Response:
            try:
                return answer(request)
            except Exception as error:  # an answer, where TensorBoard would end the connection with a page of its own
                words = f"align_audit cannot show this: {plain(named(error), 500)}"
                return _respond(request, {"error": words}, "application/json", 500)

        return application

    def _list(self, request: Request) -> Response:
        return _respond(request, self.runs.listing(), "application/json")

    def _data(self, request: Request) -> Response:
        return self._answer(request, self.runs.page(request.args.get("run", "")))

    def _compare(self, request: Request) -> Response:
        return self._answer(request, self.runs.comparison(request.args.getlist("run")))

    def _answer(self, request: Request, content: bytes | None) -> Response:
        if content is None:
            words = "There is no such run (any more): choose one from the list."
            return _respond(request, {"error": words}, "application/json", 404)
        return _respond(request, content, "application/json")

    def _file(self, name: str, request: Request) -> Response:
        return _respond(request, static(name), FILES[name])


def _respond(request: Request, content: Any, kind: str, code: int = 200) -> Response:
    # Never 304, of which TensorBoard's log complains each time: the tab asks for a page only where its version is another.
    response: Response = Respond(request, content, kind, code=code)
    return response
