"""Writers as a run tells them: in order, each of everything, whatever breaks in one; and how a new one is added."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditConfig, AuditRun
from align_audit.errors import ConfigurationError
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import RunLog
from align_audit.writers.registry import WRITERS, writers_for
from align_audit.writers.writer import Surroundings, Writers
from tests.helpers.make_record import make_run

NO_RUN = AuditRun(Path("nowhere"), [], [], [])


@dataclass
class Toy:
    """Remembers what it is told; ``breaks`` at one of it."""

    told: list[tuple[str, Any]] = field(default_factory=list)
    breaks: str = ""
    error: BaseException = field(default_factory=lambda: ValueError("no paper"))
    name: str = "a toy"

    def start(self, run: AuditRun) -> None:
        self._note("start", [record.step for record in run.records])

    def record(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        self._note("record", (record.step, [earlier.step for earlier in history]))

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        self._note("alert", (alert.rule, record.step))

    def close(self) -> None:
        self._note("close", None)

    def _note(self, event: str, what: Any) -> None:
        self.told.append((event, what))
        if event == self.breaks:
            raise self.error


def tell(writers: Writers, run: Sequence[AuditRecord]) -> None:
    for place, record in enumerate(run):
        writers.record(record, run[: place + 1])
        for alert in record.alerts:
            writers.alert(alert, record)


RUN = make_run("destabilizing", 3, 2)
TOLD = [
    ("record", (0, [0])),
    ("record", (50, [0, 50])),
    ("record", (100, [0, 50, 100])),
    *(("alert", (alert.rule, 100)) for alert in RUN[2].alerts),
    ("close", None),
]


def test_a_new_writer_is_one_line_in_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that it knows nothing of tells it of everything."""
    from align_audit import AlignmentAuditCallback
    from tests.helpers.dpo import build

    toy, surroundings = Toy(), []

    def of(config: AuditConfig, around: Surroundings) -> Toy:
        surroundings.append(around)
        return toy

    monkeypatch.setattr("align_audit.writers.registry.WRITERS", [*WRITERS, of])
    settings = {
        "max_pairs": 4, "statistics": {"bootstrap_resamples": 100}, "tensorboard": "off", "progress": False, "strict": True,
        "localization": {"enabled": False}, "low_rank": {"enabled": False}, "spinal": {"enabled": False},
        "alerts": {"kl_warning": 1e-9, "kl_error": 1e-9}, "generations": {"enabled": False},
        "schedule": {"last_step_seconds": 0},
    }  # fmt: skip
    callback = AlignmentAuditCallback(config=AuditConfig.from_dict(settings))
    trained = build(tmp_path / "run", "ref_model made", [callback], max_steps=1, save_strategy="no")
    callback.attach(trained.trainer)
    trained.trainer.train()

    # The look at step 1 warns, and is followed by a full audit at once: one alert, which is told once.
    stored = AuditRun.load(tmp_path / "run")
    assert [(record.step, record.kind) for record in stored.records] == [(0, "health"), (1, "health"), (1, "full")]
    assert [[(alert.rule, alert.event) for alert in record.alerts] for record in stored.records] == [
        [], [("kl_out_of_bounds", "opened")], [("kl_out_of_bounds", "open")],
    ]  # fmt: skip
    assert toy.told == [
        ("start", []),
        ("record", (0, [0])),
        ("record", (1, [0, 1])),
        ("alert", ("kl_out_of_bounds", 1)),
        ("record", (1, [0, 1, 1])),
        ("close", None),
    ]
    assert [(around.output_dir, around.probe_names) for around in surroundings] == [(tmp_path / "run", (None,))]


@dataclass
class Witness(Toy):
    """Is told of failures, too."""

    def failure(self) -> None:
        self._note("failure", None)


def test_a_failure_is_told_to_those_that_show_failures(caplog: pytest.LogCaptureFixture) -> None:
    witness, toy, last = Witness(breaks="failure"), Toy(), Witness()
    Writers([witness, toy, last]).failure()
    assert (witness.told, toy.told, last.told) == ([("failure", None)], [], [("failure", None)])
    assert "could not show a failure in a toy: ValueError: no paper" in caplog.text


def test_the_configuration_chooses_among_the_writers(tmp_path: Path) -> None:
    def names(**options: Any) -> list[str]:
        config = AuditConfig.from_dict(options)
        made = [make(config, Surroundings(tmp_path, on_alert=print)) for make in WRITERS]
        return [writer.name for writer in made if writer is not None]

    assert names() == ["TensorBoard", "the report", "standard output", "Python logging", "on_alert"]
    assert names(tensorboard="off") == ["the report", "standard output", "Python logging", "on_alert"]
    posted = {"tensorboard": "off", "report": False, "alerts": {"webhook": "https://localhost/"}}
    assert names(**posted) == ["standard output", "Python logging", "on_alert", "the webhook"]
    writers_for(AuditConfig(), Surroundings(tmp_path))
    assert list(tmp_path.iterdir()) == [], "nothing is opened before the start"


def test_a_resumed_run_is_started_with_what_it_has(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for record in RUN:
        log.append(record)
    run = AuditRun.of(log)
    assert (run.directory, run.alerts) == (log.directory, AuditRun.load(tmp_path).alerts)
    toy = Toy()
    Writers([toy]).start(run)
    assert toy.told == [("start", [0, 50, 100])]


@pytest.mark.parametrize("breaks", ["record", "alert", "close"])
@pytest.mark.parametrize("error", [ValueError("no paper"), SystemExit(1)], ids=["error", "exit"])
def test_what_breaks_in_one_keeps_no_other_from_showing(
    breaks: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = Toy(breaks=breaks, error=error), Toy(name="another toy")
    writers = Writers([broken, whole])
    writers.start(NO_RUN)
    tell(writers, RUN)
    writers.close()
    assert whole.told == broken.told == [("start", []), *TOLD]

    said = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.ERROR]
    kind = f"a toy: {type(error).__name__}: {error}"
    assert (
        said
        == {
            "record": [f"align_audit could not write step {step} to {kind}" for step in (0, 50, 100)],
            "alert": [f"align_audit could not write step 100 to {kind}"],  # two alerts or more, said once
            "close": [f"align_audit could not close {kind}"],
        }[breaks]
    )
    traced = [bool(entry.exc_info) for entry in caplog.records]
    assert traced == [True] + [False] * (len(said) - 1), "the traceback comes once"


def test_a_keyboard_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        tell(Writers([Toy(breaks="record", error=KeyboardInterrupt())]), RUN)


def test_an_exit_that_a_handler_of_the_users_asks_for_passes() -> None:
    """A cluster is about to stop the program, whose handler ends it, while something is shown."""
    told = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
    signaling = Toy()
    signaling.record = lambda *_: os.kill(os.getpid(), signal.SIGUSR1)  # type: ignore[method-assign]
    try:
        with pytest.raises(SystemExit):
            tell(Writers([signaling]), RUN)
    finally:
        signal.signal(signal.SIGUSR1, told)


def test_a_writer_that_cannot_start_refuses_and_closes_those_before_it() -> None:
    first, third = Toy(), Toy()
    refusing = Toy(breaks="start", error=ConfigurationError("no disk"))
    with pytest.raises(ConfigurationError, match="no disk"):
        Writers([first, refusing, third]).start(NO_RUN)
    assert first.told == [("start", []), ("close", None)]
    assert third.told == []


def test_writers_are_light_and_know_no_model() -> None:
    code = (
        "import sys, align_audit.record.log\n"
        "from align_audit.writers import registry, tensorboard, terminal\n"
        "from align_audit.writers.plots import canvas, gallery\n"
        "heavy = {'torch', 'tensorboard', 'matplotlib', 'pandas', 'rich', 'transformers', 'numpy', 'tqdm'}\n"
        "own = {'align_audit.models', 'align_audit.measures', 'align_audit.auditing'}\n"
        "print(sorted((heavy | own) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
