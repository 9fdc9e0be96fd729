"""What an alert says outside of the terminal, and where: Python logging beside the terminal, and a user's function."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditConfig, AuditRun
from align_audit.errors import ConfigurationError
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.writers.messages import LogLines, Told, alert_logger, as_json, as_slack, checked, headline, paragraphs
from align_audit.writers.writer import Surroundings
from tests.helpers.make_record import make_record

RECORD = make_record(20, layers=3)
FOLDER = Path("/runs/dpo")
HOSTILE = (
    'a <b>bold</b> &amp; <!channel> <https://x.test|link> \x1b[31mred\x07 line\nbreak \u202e "quoted" \ud800 *b* _i_'
)

WHOLE = Alert(
    rule="kl_out_of_bounds", cause="drift", level="error", event="worse", step=40, since=20, looks=3,
    signals=["chosen_logp_falling"], probe_name="harmless", layers=[3, 4, 5], value=9.4, baseline=0.1, threshold=2.0,
    message="The policy is far away.", suggestion="Lower the learning rate", clean_step=10, checkpoint="checkpoint-10",
    command="python train.py --resume",
)  # fmt: skip


def changed(**fields: Any) -> Alert:
    return WHOLE.model_copy(update=fields)


# -- words -------------------------------------------------------------------------------------------------------------


def test_the_json_form_holds_everything() -> None:
    assert as_json(WHOLE, RECORD, FOLDER) == {
        "align_audit": "0.1.0", "event": "worse", "rule": "kl_out_of_bounds",
        "cause": "drift", "level": "error", "step": 40, "since": 20, "looks": 3, "value": 9.4, "limit": 2.0,
        "baseline": 0.1, "layers": [3, 4, 5], "signals": ["chosen_logp_falling"], "message": "The policy is far away.",
        "suggestion": "Lower the learning rate", "clean_step": 10, "checkpoint": "checkpoint-10",
        "command": "python train.py --resume", "run": "/runs/dpo", "probes": "harmless",
    }  # fmt: skip


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_words(number: float) -> None:
    message = as_json(changed(value=number, baseline=number), RECORD, FOLDER)
    text = json.dumps(message, allow_nan=False)
    assert float(json.loads(text)["value"]) == pytest.approx(number, nan_ok=True)


def test_the_text_form_says_what_when_where_and_what_to_do() -> None:
    assert paragraphs(WHOLE, FOLDER) == [
        "ERROR worse at step 40: kl_out_of_bounds (since step 20, probes 'harmless', layers 3–5)",
        "The policy is far away.",
        "value 9.4; limit 2; baseline 0.1; agreeing: chosen_logp_falling",
        "To do: Lower the learning rate",
        "last clean audit: step 10; newest checkpoint from before: checkpoint-10; go back with: python train.py --resume",
        "run: /runs/dpo",
    ]


def test_an_alert_that_just_opened_does_not_repeat_its_step() -> None:
    assert headline(changed(event="opened", step=20, layers=[], probe_name=None)) == (
        "ERROR opened at step 20: kl_out_of_bounds"
    )


def test_what_is_resolved_says_so_and_asks_for_nothing() -> None:
    said = paragraphs(changed(event="resolved", step=60, level="warning", layers=[], probe_name=None))
    assert said[0] == "RESOLVED at step 60: kl_out_of_bounds (warning since step 20)"
    assert not any("To do" in line or "go back" in line for line in said)


def test_numbers_that_are_not_known_are_left_out() -> None:
    alert = changed(value=math.nan, baseline=None, threshold=None, signals=[])
    assert not any("value" in line or "nan" in line for line in paragraphs(alert))


@pytest.mark.parametrize("field", ["message", "suggestion", "rule", "checkpoint", "command", "probe_name"])
def test_slack_obeys_nothing_of_an_alert(field: str) -> None:
    message = as_slack(changed(**{field: HOSTILE}), RECORD, FOLDER)
    text = message["text"]
    assert message["mrkdwn"] is False, "no bold, no italics"
    assert "<" not in text and ">" not in text
    assert "&lt;!channel&gt;" in text and "&amp;amp;" in text, "as Slack shows it, it is what the alert says"
    assert all(letter.isprintable() for letter in text.replace("\n", ""))
    assert text.count("\n") == as_slack(WHOLE, RECORD, FOLDER)["text"].count("\n"), "one line stays one line"
    json.dumps(message).encode("ascii")


@pytest.mark.parametrize("field", ["message", "suggestion", "rule", "checkpoint", "command", "probe_name"])
def test_json_holds_plain_text(field: str) -> None:
    message = as_json(changed(**{field: HOSTILE}), RECORD, FOLDER)
    text = message["probes" if field == "probe_name" else field]
    assert text.isprintable() and "<!channel>" in text and "\\x1b[31m" in text, "escaped where shown, not here"


def test_a_long_text_is_cut() -> None:
    assert len(as_slack(changed(message="x" * 10**6), RECORD, FOLDER)["text"]) < 5000


# -- Python logging ----------------------------------------------------------------------------------------------------


@pytest.fixture
def log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a program's own handler writes; whatever libraries have switched off in this process before."""
    logging.disable(logging.NOTSET)
    place: logging.Logger | None = alert_logger
    while place is not None:
        monkeypatch.setattr(place, "disabled", False)
        monkeypatch.setattr(place, "propagate", True)
        if place is not logging.getLogger():
            place.setLevel(logging.NOTSET)
        place = place.parent
    logging.getLogger().setLevel(logging.WARNING)
    handler = logging.FileHandler(tmp_path / "program.log")
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    logging.getLogger().addHandler(handler)
    yield tmp_path / "program.log"
    logging.getLogger().removeHandler(handler)
    handler.close()


def log_lines() -> LogLines:
    writer = LogLines.of(AuditConfig(), Surroundings(FOLDER))
    writer.start(AuditRun(FOLDER, [], [], []))
    return writer


@pytest.mark.parametrize(
    ("level", "event", "logged"),
    [
        ("error", "opened", "ERROR"), ("warning", "opened", "WARNING"), ("error", "worse", "ERROR"),
        ("error", "resolved", "WARNING"), ("info", "opened", None), ("error", "open", None),
    ],
)  # fmt: skip
def test_an_event_is_a_line(level: Any, event: Any, logged: str | None, log_file: Path) -> None:
    log_lines().alert(changed(level=level, event=event, message=HOSTILE), RECORD)
    lines = log_file.read_text().splitlines()
    assert len(lines) == (logged is not None)
    for line in lines:
        assert line.startswith(f"{logged} align_audit.alerts align_audit: ")
        assert "kl_out_of_bounds" in line and "\x1b" not in line


def test_levels_and_filters_of_a_program_hold(log_file: Path) -> None:
    alert_logger.setLevel(logging.ERROR)
    try:
        log_lines().alert(changed(level="warning"), RECORD)
    finally:
        alert_logger.setLevel(logging.NOTSET)
    refuse: Any = lambda entry: False  # noqa: E731
    alert_logger.addFilter(refuse)
    try:
        log_lines().alert(WHOLE, RECORD)
    finally:
        alert_logger.removeFilter(refuse)
    assert log_file.read_text() == ""


CODE = """
import logging, sys
from tests.writers.test_messages import RECORD, WHOLE, log_lines
from align_audit.writers.terminal import Terminal
{setup}
record = RECORD.model_copy(update={{"alerts": [WHOLE]}})
for writer in (Terminal(), log_lines()):
    writer.alert(WHOLE, record)
"""


def printed(setup: str, stderr: int) -> tuple[str, str]:
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(setup=setup)],
        stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8", check=True, cwd=root,
    )  # fmt: skip
    return result.stdout, result.stderr or ""


def test_nothing_is_said_twice_in_one_place() -> None:
    """Standard error is where standard output is (a terminal, one file): the terminal's writer has said it."""
    setup = "logging.basicConfig(level='INFO')"
    together, _ = printed(setup, subprocess.STDOUT)
    assert together.count("The policy is far away") == 1
    output, errors = printed(setup, subprocess.PIPE)
    assert output.count("The policy is far away") == errors.count("The policy is far away") == 1


def test_without_a_handler_nothing_is_logged() -> None:
    output, errors = printed("", subprocess.PIPE)
    assert output.count("The policy is far away") == 1
    assert errors == ""


@pytest.mark.parametrize("setup", [
    "logging.basicConfig(stream=sys.stdout, level='INFO')",
    "from rich.logging import RichHandler; logging.basicConfig(handlers=[RichHandler()], level='INFO')",
    "import io; sys.stdout = io.StringIO(); logging.basicConfig(stream=sys.stdout)\n"
    "import atexit; atexit.register(lambda text=sys.stdout: sys.__stdout__.write(text.getvalue()))",
])  # fmt: skip
def test_a_handler_of_standard_output_is_passed_over(setup: str) -> None:
    output, _ = printed(setup, subprocess.PIPE)
    assert output.count("The policy is far away") == 1


# -- a user's function -------------------------------------------------------------------------------------------------


def told(function: Any) -> Told:
    writer = Told.of(AuditConfig(), Surroundings(FOLDER, on_alert=function))
    assert writer is not None
    writer.start(AuditRun(FOLDER, [RECORD], [], []))
    return writer


def test_a_function_gets_each_event_with_its_record() -> None:
    calls: list[tuple[Alert, AuditRecord]] = []
    later, alerts = make_record(40, layers=3), [WHOLE, changed(level="info"), changed(event="resolved")]
    writer = told(lambda alert, record: calls.append((alert, record)))
    for alert in [*alerts, changed(event="open")]:
        writer.alert(alert, later)
        writer.alert(alert, RECORD)  # which the log held before
    assert calls == [(alert, later) for alert in alerts]


def test_what_a_function_raises_is_said_once_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[BaseException] = [
        ValueError("one"),
        ValueError("two"),
        SystemExit(3),
        KeyError("three"),
        SystemExit(4),
    ]

    def function(alert: Alert, record: AuditRecord) -> None:
        raise errors.pop(0)

    writer, later = told(function), make_record(40, layers=3)
    for _ in range(5):
        writer.alert(WHOLE, later)
    assert errors == []
    said = [entry.getMessage().split(" at ")[0] for entry in caplog.records]
    assert said == [
        "on_alert raised ValueError: one",
        "on_alert raised SystemExit: 3",
        "on_alert raised KeyError: 'three'",
    ]
    assert all(entry.exc_info for entry in caplog.records)


def test_a_keyboard_interrupt_in_a_function_passes() -> None:
    def function(alert: Alert, record: AuditRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        told(function).alert(WHOLE, make_record(40, layers=3))


def test_what_cannot_be_called_is_refused() -> None:
    assert checked(None) is None
    with pytest.raises(ConfigurationError, match=r"expected on_alert to be a function .* found str"):
        checked("print")  # type: ignore[arg-type]
