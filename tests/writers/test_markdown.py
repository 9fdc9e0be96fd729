"""Text from outside in Markdown: TensorBoard shows it letter by letter, and does nothing that it says."""

from __future__ import annotations

import html
import re
from typing import Any

import markdown
import pytest

from align_audit.errors import plain
from align_audit.record.alert import Alert
from align_audit.record.audit_record import Control
from align_audit.record.estimate import Estimate
from align_audit.writers.few_scalars import status_text
from align_audit.writers.markdown import code, escaped
from align_audit.writers.messages import as_slack
from align_audit.writers.standing import standing_at
from align_audit.writers.tensorboard import alert_text, controls_table, not_known_table
from tests.helpers.make_record import make_record
from tests.writers.test_messages import FOLDER, HOSTILE, RECORD

HOSTILES = [
    HOSTILE, "# heading", "- item", "+ item", "1. item", "2) item", "---", "===", "> quote", "    code", "* item", "`code`",
    "![picture](http://e.test/x.png)", "[link](http://e.test)", "[x]: http://e.test", "__bold__", "a_b_c kl_out_of_bounds",
    "<img src=http://e.test/x.png>", "&lt;b&gt;", "one\n\n# two\n- three", "a | b | c", "\\*a\\*", "~~~", "@here @channel",
    "~~struck~~ $x_1 + y_1$ $$m$$", "https://e.test/a WWW.e.test www.e.test me@e.test",
]  # fmt: skip


def shown(text: str) -> str:
    """What TensorBoard makes of it, as HTML."""
    rendered: str = markdown.markdown(
        text, extensions=["markdown.extensions.tables", "markdown.extensions.fenced_code"]
    )
    return rendered


@pytest.mark.parametrize("text", HOSTILES)
def test_a_text_is_shown_as_it_is(text: str) -> None:
    rendered = re.fullmatch(r"<p>([^<>]*)</p>", shown(escaped(text)))
    assert rendered, shown(escaped(text))
    assert html.unescape(rendered[1]) == plain(" ".join(text.split()))


@pytest.mark.parametrize("text", HOSTILES)
def test_nothing_is_left_that_any_reader_makes_something_of(text: str) -> None:
    """Links that nobody marked as such, mentions, formulas and what is struck out: of trackers and model hubs."""
    assert not [sign for sign in ("://", "www.", "@", "$", "~") if sign in escaped(text).lower()]


FIELDS = ("rule", "message", "suggestion", "probe_name", "checkpoint", "command", "knob", "remedy", "cause")


def documents(text: str, event: Any) -> list[str]:
    """All that TensorBoard shows of an alert, and of what a record says of its controls and its gaps."""
    values: dict[str, Any] = {
        "step": 100,
        "since": 100,
        "level": "error",
        "event": event,
        "value": 1.0,
        "clean_step": 5,
    }
    alert = Alert(**(dict.fromkeys(FIELDS, text) | values))
    record = make_record(100, layers=3, alerts=[alert])
    noise = Control(verdict="failed", reason=text)
    unknown = Estimate.unknown(text)
    record = record.model_copy(
        update={
            "controls": record.controls.model_copy(update={"noise": noise}),
            "reference_check": record.reference_check.model_copy(update={"source": text, "reason": text}),
            "margins": record.margins.model_copy(update={"kl": unknown}),
        }
    )
    written = [alert_text(alert), status_text(standing_at(record, [])), controls_table(record), not_known_table(record)]
    assert event == "resolved" or all(re.search(r"\w", each) for each in written)
    return written


@pytest.mark.parametrize("text", HOSTILES)
@pytest.mark.parametrize("event", ["opened", "resolved"])
def test_no_field_of_an_alert_formats_or_loads_anything(text: str, event: Any) -> None:
    """One walk over all of it: the tags are those that harmless words have."""
    for hostile, harmless in zip(documents(text, event), documents("words", event), strict=True):
        assert re.findall(r"<[a-z]+", shown(hostile)) == re.findall(r"<[a-z]+", shown(harmless)), hostile
        assert "http" not in "".join(re.findall("<[^>]*>", shown(hostile)))


@pytest.mark.parametrize("path", ["sites.a|b", "a`b", "x\ny"])
def test_a_path_is_one_piece_of_code(path: str) -> None:
    assert re.fullmatch(r"<p><code>[^<>]*</code></p>", shown(code(path)))


@pytest.mark.parametrize("text", HOSTILES)
@pytest.mark.parametrize("field", FIELDS)
def test_slack_mentions_nobody(text: str, field: str) -> None:
    values: dict[str, Any] = dict.fromkeys(("rule", "message", "suggestion"), "x")
    alert = Alert(**(values | {"step": 1, "level": "error", "value": 1.0, field: text}))
    said = as_slack(alert, RECORD, FOLDER / "@everyone")
    assert not re.search(r"[<>@]", said["text"])
    assert said["mrkdwn"] is False
