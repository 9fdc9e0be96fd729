"""Packages that watch a training log, fed with what the trainer logged as their own callbacks would, at their own settings.

    pip install trainpulse losslint training-doctor trainscope lightning

Those that are not installed are left out, and named. What they call information is no alarm. llm-foundry's KillLossSpike judges
after a window of 100 losses, and is silent in runs of this length by construction; trainsafe generates with the model, which is
not stored.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from align_audit.record.training_log import LogRow
from destabilization.rules import Alarms, Level, Raised, RuleSet, of_log
from destabilization.stored import StoredRun


def _trainpulse(log: Sequence[LogRow]) -> list[tuple[str, Level]]:
    """Its ``Monitor`` takes every metric that is logged; alerts of the newest row."""
    from trainpulse import Monitor

    monitor = Monitor()
    for row in log:
        alerts = [alert for name, value in row.logs.items() for alert in monitor.log(name, row.step, value)]
    return [
        (alert.detector, "error" if alert.severity.value == "critical" else "warning")
        for alert in alerts
        if alert.severity.value != "info"
    ]


def _losslint(log: Sequence[LogRow]) -> list[tuple[str, Level]]:
    """Its checks on the log so far, as its watch mode makes them."""
    from losslint.checks import run_all_checks
    from losslint.parsing import RunLog

    names = sorted({name for row in log for name in row.logs})
    series = {name: [row.logs.get(name) for row in log] for name in names}
    findings = run_all_checks(RunLog([row.step for row in log], series, Path(tempfile.gettempdir())))
    return [(finding.check, finding.severity) for finding in findings if finding.severity != "info"]


def _training_doctor(log: Sequence[LogRow]) -> list[tuple[str, Level]]:
    """Its ``Doctor``, fed row by row as its callback does (which crashes in a trainer of today)."""
    from training_doctor.doctor import Doctor

    doctor = Doctor()
    for row in log:
        diagnoses = doctor.log(row.step, **row.logs)
    return [
        (diagnosis.problem, "error" if diagnosis.severity.value == "critical" else "warning")
        for diagnosis in diagnoses
        if diagnosis.severity.value != "info"
    ]


def _trainscope(log: Sequence[LogRow]) -> list[tuple[str, Level]]:
    """Its default detector on the training loss."""
    from trainscope.core.detectors import ChangePointDetector

    detector, score = ChangePointDetector(), None
    for row in log:
        loss = row.logs.get("loss", math.nan)
        if math.isfinite(loss):
            score = detector.update(loss)
    return [] if score is None or "loss" not in log[-1].logs else [("loss spike", "error")]


_ALONE = SimpleNamespace(
    global_rank=1,  # the first writes a file
    strategy=SimpleNamespace(
        root_device="cpu", barrier=lambda: None, reduce_boolean_decision=lambda decision, all: decision
    ),
)
"""A Fabric as far as Lightning's detection asks it."""


def _lightning(run: StoredRun) -> list[Raised]:
    """Its ``SpikeDetection`` gets the loss of every batch, here of every step. It ends the training at a spike, which its user
    resumes without that batch."""
    import torch
    from lightning.fabric.utilities.spike import SpikeDetection, TrainingSpikeException

    detection, spikes = SpikeDetection(), []
    for batch, row in enumerate(row for row in run.log if "loss" in row.logs):
        try:
            detection.on_train_batch_end(_ALONE, torch.tensor(row.logs["loss"]), None, batch)
        except TrainingSpikeException:
            spikes.append(Raised(row.step, "loss spike", "error"))
    return spikes


PACKAGES: dict[str, Alarms] = {
    "trainpulse": of_log(_trainpulse),
    "losslint": of_log(_losslint),
    "training_doctor": of_log(_training_doctor),
    "trainscope": of_log(_trainscope),
    "lightning": _lightning,
}


def package_rules() -> tuple[list[RuleSet], list[str]]:
    """The packages that are installed, and the names of those that are not. They have no dial: laxness changes nothing."""
    installed = {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
    rules = [
        RuleSet(f"package {name}", lambda laxness, alarms=PACKAGES[name]: alarms)
        for name, there in installed.items()
        if there
    ]
    return rules, [name for name, there in installed.items() if not there]
