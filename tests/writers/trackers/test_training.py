"""Real, short trainings that report to a tracker: in which order callbacks come, and over which steps curves stand."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun
from align_audit.errors import ConfigurationError
from align_audit.monitoring.trainer import read_trainer
from align_audit.options.rules import CAUSES
from tests.helpers.dpo import Trained, build
from tests.helpers.pages import data_in
from tests.helpers.tracker_stores import Store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SETTINGS = {
    "max_pairs": 4, "statistics": {"bootstrap_resamples": 100}, "progress": False, "localization": {"enabled": False},
    "low_rank": {"enabled": False}, "spinal": {"enabled": False}, "generations": {"enabled": False}, "strict": True,
    "patching": {"transplants": False, "reverse": False, "noise_draws": 0}, "tensorboard": "off",
    # At 0, 2 and 3; after two steps of this size every audit is beyond these limits.
    "schedule": {"health": False, "every_n_steps": 2}, "alerts": {"kl_warning": 1e-9, "kl_error": 1e-9}, "budget": None,
}  # fmt: skip


def trained(folder: Path, callbacks: list[Any], **options: Any) -> tuple[Trained, str]:
    """Three steps; and what was printed."""
    run = build(folder / "run", "new adapter", callbacks, max_steps=3, save_strategy="no", **options)
    for callback in callbacks:
        callback.attach(run.trainer)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        run.trainer.train()
    return run, screen.getvalue()


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of the same training without an audit and without a tracker."""
    return trained(tmp_path_factory.mktemp("alone"), [])[0].losses


def test_a_training_is_in_its_tracker_beside_the_trainers_own_curves(
    store: Store, losses: list[Any], tmp_path: Path
) -> None:
    folder, name = tmp_path / "run" / "align_audit", f"{store.name} training"

    callback = AlignmentAuditCallback(config=AuditConfig.from_dict(SETTINGS))
    run, screen = trained(tmp_path, [callback], report_to=[store.name], run_name=name)
    store.finish()
    stored = store.read(name)

    audited = AuditRun.load(tmp_path / "run").records
    kl = {record.step: record.margins.kl.mean for record in audited}
    assert list(kl) == [0, 2, 3]
    assert stored.curves["align_audit health/kl"] == pytest.approx(kl)
    assert sorted(stored.pictures["align_audit health/over_steps"]) == [0, 2, 3]

    loss = "loss" if store.name == "mlflow" else "train/loss"
    assert sorted(stored.curves[loss]) == [1, 2, 3]
    assert [stored.curves[loss][step] for step in (1, 2, 3)] == pytest.approx([row["loss"] for row in losses[:3]])
    assert stored.axis == sorted(set(stored.axis))
    assert run.losses == losses  # bit for bit

    opened = [title for _, title, _ in stored.notices if title.endswith(f": {CAUSES['drift']}")]
    assert 1 <= len(opened) <= 2
    assert not any(title in screen for title in opened)  # Trackio prints them otherwise
    assert stored.report is not None
    (shown,), (kept,) = data_in(stored.report)["sets"], data_in((folder / "report.html").read_text())["sets"]
    assert shown["panels"] == kept["panels"] and shown["panels"][0]["steps"] == [0, 2, 3]
    assert kept["texts"] is not None and shown["texts"] is None  # the data stays here
    lines = [line for line in screen.splitlines() if line.startswith("align_audit writes to ")]
    titles = {"wandb": "W&B run", "mlflow": "MLflow run", "trackio": "Trackio run"}
    assert len(lines) == 1
    assert f"align_audit writes to {folder}, {titles[store.name]} {name}" in lines[0]


def test_what_a_trainer_reports_to(store: Store, tmp_path: Path) -> None:
    run = build(tmp_path / "run", "new adapter", [], report_to=[store.name, "tensorboard"])
    assert read_trainer(run.trainer, run.trainer.args).trackers == (store.name,)
    assert read_trainer(None, run.trainer.args).trackers == (store.name,)


def test_a_tracker_that_the_trainer_does_not_report_to_is_refused(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(config=AuditConfig.from_dict({**SETTINGS, "trackers": ["wandb"]}))
    with pytest.raises(ConfigurationError, match=r"asks for wandb, and the trainer reports to no tracker.*report_to"):
        trained(tmp_path, [callback])
