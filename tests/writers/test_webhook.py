"""Alerts posted to a real HTTP server that answers, is slow, refuses or hangs: what comes, what is kept, who waits."""

from __future__ import annotations

import json
import logging
import ssl
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditConfig, AuditRun
from align_audit.errors import ConfigurationError
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import RunLog
from align_audit.writers.messages import as_json
from align_audit.writers.webhook import MOST_WAITING, VARIABLE, Address, Webhook
from align_audit.writers.writer import Surroundings
from tests.helpers import web
from tests.helpers.make_record import make_record
from tests.helpers.web import SECRET, Answer, code, hang, ok, refusing_url, serving, slowly

SECONDS = 1.5
PATIENT = 20.0
"""A time-out, in seconds, that nobody waits for who gets an answer, however busy the machine is."""
SLACK = 1.0
"""What a test allows a busy machine beyond a time-out, in seconds."""

RECORD = make_record(20, layers=3)


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands between this process and itself."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(VARIABLE, raising=False)


def alert(rule: str = "kl_out_of_bounds", **changes: Any) -> Alert:
    values: dict[str, Any] = {
        "rule": rule, "level": "error", "step": 20, "since": 20, "value": 9.4, "threshold": 2.0,
        "message": "The policy is far away.", "suggestion": "Lower the learning rate",
    }  # fmt: skip
    return Alert(**{**values, **changes})


def started(url: str | None, folder: Path, **options: Any) -> Webhook:
    """A writer that posts there, told that its run begins."""
    webhook = {"timeout_seconds": SECONDS, **options, **({} if url is None else {"url": url})}
    writer = Webhook.of(AuditConfig.from_dict({"alerts": {"webhook": webhook}}), Surroundings(folder))
    assert writer is not None
    folder.mkdir(exist_ok=True)
    writer.start(AuditRun(folder, [], [], []))
    return writer


def unsent(folder: Path) -> list[dict[str, Any]]:
    path = folder / "unsent.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timed(call: Any, *args: Any) -> float:
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


# -- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "requests"),
    [
        pytest.param([ok], 2, id="at once"),
        pytest.param([slowly], 2, id="slowly"),
        pytest.param([code(500), ok], 3, id="500 once"),
        pytest.param([code(503), code(502), ok], 4, id="503 and 502"),
        pytest.param([code(429, Retry_After="1"), ok], 3, id="429 with a pause"),
        pytest.param([code(429, Retry_After="Fri, 01 Jan 2100 00:00:00 GMT"), ok], 3, id="429 with a date"),
        pytest.param([web.hang_up, ok], 3, id="closed"),
        pytest.param([web.break_off, ok], 3, id="closed in the middle"),
    ],
)
def test_what_is_answered_in_time_arrives_in_order(
    answers: list[Answer], requests: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alerts = [alert(), alert("chosen_logp_falling", level="warning")]
    with serving(*answers) as server:
        writer = started(server.url, tmp_path, timeout_seconds=PATIENT)
        for each in alerts:
            assert timed(writer.alert, each, RECORD) < 0.5, "training does not wait"
        assert timed(writer.close) < PATIENT / 2
        assert server.taken == [as_json(each, RECORD, tmp_path) for each in alerts]
        assert len(server.bodies) == requests
    assert unsent(tmp_path) == []
    assert not caplog.records


def test_a_server_asks_for_a_pause_and_gets_it(tmp_path: Path) -> None:
    with serving(code(429, Retry_After="1"), ok) as server:
        writer = started(server.url, tmp_path, timeout_seconds=PATIENT)
        writer.alert(alert(), RECORD)
        assert 1.0 <= timed(writer.close) < PATIENT / 2
        assert len(server.taken) == 1


def test_the_request_is_json_with_the_given_headers(tmp_path: Path) -> None:
    with serving(ok) as server:
        writer = started(server.url, tmp_path, headers={"Authorization": "Bearer abc", "User-Agent": "me"})
        writer.alert(alert(), RECORD)
        writer.close()
    (headers,) = server.headers
    assert headers["Content-Type"] == "application/json"
    assert (headers["Authorization"], headers["User-Agent"]) == ("Bearer abc", "me")


def test_the_form_is_chosen(tmp_path: Path) -> None:
    with serving(ok) as server:
        for form in ("slack", "auto"):
            writer = started(server.url, tmp_path, form=form)
            writer.alert(alert(), RECORD)
            writer.close()
    slack, other = server.taken
    assert set(slack) == {"text", "mrkdwn"}
    assert other["rule"] == "kl_out_of_bounds", "only Slack's own host has Slack's form by itself"


def test_slacks_host_has_slacks_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[bytes] = []
    monkeypatch.setattr("align_audit.writers.webhook.Address.post", lambda self, body, deadline: posted.append(body))
    writer = started("https://hooks.slack.com/services/T/B/X", tmp_path)
    writer.alert(alert(), RECORD)
    writer.close()
    assert set(json.loads(posted[0])) == {"text", "mrkdwn"}


def test_only_events_are_posted(tmp_path: Path) -> None:
    """What stays open is no news, and what is only worth knowing stays in the record."""
    with serving(ok) as server:
        writer = started(server.url, tmp_path)
        for event in ("opened", "worse", "open", "resolved"):
            writer.alert(alert(event=event), RECORD)
        writer.alert(alert(level="info"), RECORD)
        writer.close()
    assert [body["event"] for body in server.taken] == ["opened", "worse", "resolved"]


def test_what_the_log_held_before_is_no_news(tmp_path: Path) -> None:
    log, later = RunLog(tmp_path), make_record(40, layers=3)
    log.append(RECORD)
    with serving(ok) as server:
        writer = Webhook.of(AuditConfig.from_dict({"alerts": {"webhook": server.url}}), Surroundings(tmp_path))
        assert writer is not None
        writer.start(AuditRun.of(log))
        writer.alert(alert(), RECORD)
        writer.alert(alert(step=40), later)
        writer.close()
    assert [body["step"] for body in server.taken] == [40]


# -- what does not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "requests", "reason"),
    [
        pytest.param(code(404), 2, "the answer was 404 Not Found", id="404"),
        pytest.param(code(400), 2, "the answer was 400 Bad Request", id="400"),
        pytest.param(code(302, Location="/elsewhere"), 2, "the answer was 302 Found", id="redirect"),
        pytest.param(code(429, Retry_After="3600"), 2, "the answer was 429 Too Many Requests", id="429 for an hour"),
    ],
)
def test_what_is_refused_for_good_is_kept_at_once_and_said_once(
    answer: Answer, requests: int, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alerts = [alert(), alert("chosen_logp_falling")]
    with serving(answer) as server:
        writer = started(server.url, tmp_path, timeout_seconds=PATIENT)
        for each in alerts:
            writer.alert(each, RECORD)
        assert timed(writer.close) < PATIENT / 2
        assert len(server.bodies) == requests, "none is tried again, and no redirect is followed"
    kept = unsent(tmp_path)
    assert [line["posted"] for line in kept] == [as_json(each, RECORD, tmp_path) for each in alerts]
    assert {line["reason"] for line in kept} == {reason}
    (entry,) = caplog.records
    assert entry.levelno == logging.ERROR
    assert reason in entry.getMessage() and str(tmp_path / "unsent.jsonl") in entry.getMessage()
    assert SECRET not in entry.getMessage() + (tmp_path / "unsent.jsonl").read_text()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(None, "the connection failed: [Errno", id="refuses"),
        pytest.param(code(500), "the answer was 500", id="500 for ever"),
        pytest.param(hang, "", id="hangs"),
        pytest.param(web.trickle, "it was not answered when the run ended", id="trickles"),
        pytest.param(web.break_off, "the connection failed: BadStatusLine", id="breaks off for ever"),
    ],
)
def test_what_never_gets_through_is_kept_and_a_run_ends_a_time_out_later(
    answer: Answer | None, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alerts = [alert(f"rule_{number}") for number in range(4)]
    with serving(answer or ok) as server:
        writer = started(refusing_url() if answer is None else server.url, tmp_path)
        for each in alerts:
            assert timed(writer.alert, each, RECORD) < 0.5
        assert timed(writer.close) < SECONDS + SLACK
        assert timed(writer.close) < 0.1, "there is nothing left to wait for"
    kept = unsent(tmp_path)
    assert sorted(line["posted"]["rule"] for line in kept) == [each.rule for each in alerts], "each once, none twice"
    assert kept[0]["reason"].startswith(reason)
    assert len(caplog.records) == 1
    assert SECRET not in caplog.text + (tmp_path / "unsent.jsonl").read_text()


def test_a_server_that_cannot_be_trusted_is_not_asked_again(tmp_path: Path) -> None:
    """This one speaks no TLS at all."""
    with serving(ok) as server:
        writer = started(server.url.replace("http:", "https:"), tmp_path, timeout_seconds=PATIENT)
        writer.alert(alert(), RECORD)
        assert timed(writer.close) < PATIENT / 2
        assert server.bodies == []
    (kept,) = unsent(tmp_path)
    assert kept["reason"].startswith("the connection failed: [SSL")


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), True),  # the server broke off
        (ssl.SSLZeroReturnError(6, "TLS/SSL connection has been closed"), True),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), False),
        (ssl.SSLError(1, "wrong version number"), False),
    ],
)
def test_a_tls_connection_that_breaks_off_is_tried_again(error: ssl.SSLError, again: bool) -> None:
    address = Address("https://example.invalid", {})

    def breaks(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError(error)

    address._opener.open = breaks  # type: ignore[method-assign]
    refusal = address._try(b"{}", 1.0)
    assert refusal is not None and refusal.again is again


def test_a_message_takes_one_time_out_and_the_next_one_goes_on(tmp_path: Path) -> None:
    with serving(hang, ok) as server:
        writer = started(server.url, tmp_path, timeout_seconds=0.5)
        writer.alert(alert("first"), RECORD)
        writer.alert(alert("second"), RECORD)
        deadline = time.monotonic() + 10
        while not server.taken and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [body["rule"] for body in server.taken] == ["second"]
        writer.close()
    (kept,) = unsent(tmp_path)
    assert (kept["posted"]["rule"], kept["reason"]) == ("first", "there was no answer in time")


def test_more_than_can_wait_is_kept(tmp_path: Path) -> None:
    count = MOST_WAITING + 20
    with serving(hang) as server:
        writer = started(server.url, tmp_path, timeout_seconds=0.5)
        for number in range(count):
            writer.alert(alert(f"rule_{number:03}"), RECORD)
        assert len(unsent(tmp_path)) >= 19, "at once, while the others wait"
        assert timed(writer.close) < 0.5 + SLACK
    assert sorted(line["posted"]["rule"] for line in unsent(tmp_path)) == [f"rule_{n:03}" for n in range(count)]


def test_a_folder_that_takes_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = started(refusing_url(), tmp_path, timeout_seconds=0.2)
    (tmp_path / "unsent.jsonl").mkdir()
    writer.alert(alert(), RECORD)
    writer.close()
    (entry,) = caplog.records
    assert "could not be kept" in entry.getMessage() and SECRET not in caplog.text


def test_a_training_that_breaks_has_posted_its_last_alert(tmp_path: Path) -> None:
    """Nothing closes the writers then; the process waits for what is under way, a time-out at most."""
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.writers.test_webhook import RECORD, alert, started\n"
        "writer = started(sys.argv[1], Path(sys.argv[2]), timeout_seconds=5)\n"
        "writer.alert(alert(), RECORD)\n"
        "raise SystemExit(3)\n"
    )
    with serving(slowly) as server:
        root = Path(__file__).resolve().parents[2]
        ended = subprocess.run([sys.executable, "-c", code, server.url, str(tmp_path)], cwd=root, check=False)
        assert ended.returncode == 3
        assert [body["rule"] for body in server.taken] == ["kl_out_of_bounds"]


# -- where to ----------------------------------------------------------------------------------------------------------


def test_the_environment_holds_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ok) as server:
        monkeypatch.setenv(VARIABLE, server.url)
        writer = started(None, tmp_path)
        writer.alert(alert(), RECORD)
        writer.close()
        assert len(server.taken) == 1


@pytest.mark.parametrize("url", [None, "", "ftp://127.0.0.1/" + SECRET])
def test_a_run_without_a_good_url_does_not_begin(
    url: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if url is not None:
        monkeypatch.setenv(VARIABLE, url)
    with pytest.raises(ConfigurationError, match=VARIABLE) as raised:
        started(None, tmp_path)
    assert SECRET not in str(raised.value)


def test_a_record_is_what_it_was(tmp_path: Path) -> None:
    before: AuditRecord = RECORD.model_copy(deep=True)
    with serving(ok) as server:
        writer = started(server.url, tmp_path)
        writer.alert(alert(), RECORD)
        writer.close()
    assert before == RECORD
