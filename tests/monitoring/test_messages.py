"""A real training whose alerts go to a server that is slow, refuses or hangs, and to a function: nothing of it shows."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun
from align_audit.errors import ConfigurationError
from align_audit.monitoring.checkpoints import audit_saved
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.writers.messages import as_json
from align_audit.writers.webhook import VARIABLE, Webhook
from tests.helpers import web
from tests.helpers.audits import QUICK
from tests.helpers.dpo import ROWS, Trained, build
from tests.helpers.web import SECRET, code, hang, ok, serving

SECONDS = 1.5
PATIENT = 20.0
"""A time-out, in seconds, that nobody waits for who gets an answer, however busy the machine is."""
SLACK = 1.0
"""What a test allows a busy machine beyond a time-out, in seconds."""

ALARMED: dict[str, Any] = {"chosen_drop_warning": 1e-9, "kl_warning": 1e-9, "kl_error": 1e-9}
"""Limits at which every run is alarmed."""


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands between this process and itself."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(VARIABLE, raising=False)


def options(webhook: Any = None) -> AuditConfig:
    return AuditConfig.from_dict(
        {**QUICK, "strict": True, "generations": {"enabled": False}, "alerts": {**ALARMED, "webhook": webhook}}
    )


def trained(output: Path, webhook: Any = None, on_alert: Any = None) -> Trained:
    callback = AlignmentAuditCallback(config=options(webhook), on_alert=on_alert)
    run = build(output, "ref_model made", [callback], max_steps=3, save_strategy="no")
    callback.attach(run.trainer)
    with contextlib.redirect_stdout(None):
        run.trainer.train()
    return run


def alerts_of(output: Path) -> list[tuple[Alert, AuditRecord]]:
    """The warnings and errors of a run, in the order in which they are told."""
    run = AuditRun.load(output)
    return [(alert, record) for record in run.records for alert in record.alerts if alert.level != "info"]


def told(output: Path) -> list[dict[str, Any]]:
    """What a server is to be told of a run."""
    return [as_json(alert, record, output) for alert, record in alerts_of(output) if alert.event != "open"]


def assert_same(run: Trained, other: Trained) -> None:
    """Bit by bit."""
    assert run.losses == other.losses
    for name, weight in run.weights.items():
        assert torch.equal(weight, other.weights[name]), name


@dataclass
class Waits:
    """Seconds that training spent in the webhook's writer."""

    alerts: list[float] = field(default_factory=list)
    closes: list[float] = field(default_factory=list)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    kept = Waits()

    def measured(method: Callable[..., None], into: list[float]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            began = time.perf_counter()
            try:
                method(*args)
            finally:
                into.append(time.perf_counter() - began)

        return call

    monkeypatch.setattr(Webhook, "alert", measured(Webhook.alert, kept.alerts))
    monkeypatch.setattr(Webhook, "close", measured(Webhook.close, kept.closes))
    return kept


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """The same run, told to nobody."""
    output = tmp_path_factory.mktemp("silent") / "run"
    return output, trained(output)


@pytest.mark.parametrize(
    ("answers", "arrives"),
    [
        pytest.param([ok], True, id="at once", marks=pytest.mark.slow),
        pytest.param([web.slowly], True, id="slowly", marks=pytest.mark.slow),
        pytest.param([code(500), ok], True, id="500 once", marks=pytest.mark.slow),
        pytest.param([code(429), ok], True, id="429 once", marks=pytest.mark.slow),
        pytest.param([web.break_off, ok], True, id="closes in the middle", marks=pytest.mark.slow),
        pytest.param([code(404)], False, id="404", marks=pytest.mark.slow),
        pytest.param([code(500)], False, id="500 for ever", marks=pytest.mark.slow),
        pytest.param([hang], False, id="hangs"),
        pytest.param([web.trickle], False, id="trickles", marks=pytest.mark.slow),
        pytest.param([], False, id="refuses"),
    ],
)
def test_training_waits_for_no_server_but_a_time_out_at_its_end(
    answers: list[web.Answer], arrives: bool, silent: tuple[Path, Trained], waits: Waits, tmp_path: Path
) -> None:
    output, seconds = tmp_path / "run", PATIENT if arrives else SECONDS
    with serving(*(answers or [ok])) as server:
        url = server.url if answers else web.refusing_url()
        run = trained(output, {"url": url, "timeout_seconds": seconds})
        expected = told(output)
        assert expected, "a run that alarms"
        assert server.taken == (expected if arrives else [])

    assert max(waits.alerts) < 0.5
    assert sum(waits.alerts) + sum(waits.closes) < seconds + SLACK

    kept = output / "align_audit" / "unsent.jsonl"
    lines = [json.loads(line)["posted"] for line in kept.read_text().splitlines()] if kept.exists() else []
    assert sorted(lines, key=str) == ([] if arrives else sorted(expected, key=str))

    quiet, other = silent
    assert_same(run, other)
    assert [alert for alert, _ in alerts_of(output)] == [alert for alert, _ in alerts_of(quiet)]
    logged = AuditRun.load(output).alerts
    assert logged == AuditRun.load(quiet).alerts and logged
    assert not [path for path in output.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_function_is_told_and_may_break(silent: tuple[Path, Trained], tmp_path: Path) -> None:
    calls: list[tuple[Alert, AuditRecord]] = []

    def on_alert(alert: Alert, record: AuditRecord) -> None:
        calls.append((alert, record))
        raise RuntimeError("no network")

    run = trained(tmp_path / "run", on_alert=on_alert)
    heard = [(alert, record.key) for alert, record in calls if alert.level != "info"]
    stored = alerts_of(tmp_path / "run")
    assert heard == [(alert, record.key) for alert, record in stored if alert.event != "open"] and heard
    assert_same(run, silent[1])


def test_a_training_without_a_url_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=VARIABLE):
        trained(tmp_path / "run", {"form": "slack"})


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="on_alert"):
        AlignmentAuditCallback(on_alert="print")  # type: ignore[arg-type]


def test_saved_checkpoints_tell_each_alert_once(tmp_path: Path) -> None:
    """Audited again, they are shown again, and told to nobody again; the secret may be another one then."""
    callback = AlignmentAuditCallback(config=options())
    run = build(tmp_path / "run", "ref_model made", [callback], max_steps=2, save_steps=2)
    callback.attach(run.trainer)
    with contextlib.redirect_stdout(None):
        run.trainer.train()
    probes = tmp_path / "probes.jsonl"
    probes.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:6]))
    calls: list[str] = []
    checkpoint, base = tmp_path / "run" / "checkpoint-2", str(tmp_path / "base")

    with serving(ok) as server:
        for url in (server.url, server.url + "/another"):
            audit_saved(
                {checkpoint: 2}, base, probes, options(url), tmp_path / "saved",
                on_alert=lambda alert, record: calls.append(alert.rule),
            )  # fmt: skip
        assert server.taken == told(tmp_path / "saved")
    assert calls == [alert.rule for record in AuditRun.load(tmp_path / "saved").records for alert in record.alerts]
    assert calls
