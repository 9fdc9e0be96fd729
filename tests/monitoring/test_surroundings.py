"""What is taken away from a run while it trains (a folder, the reader of its output) ends audits, never training."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.errors import ConfigurationError
from tests.helpers.callback_runs import At, quick, run, steps
from tests.helpers.dpo import Trained, build, saved_model

_AT_ONCE: dict[str, Any] = {"rules": {"at_once": {"signal": "margins.kl", "above": 1e-9, "level": "error"}}}
_EVERY_STEP = {"every_n_steps": 1, "on_save": False}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The same training without the callback."""
    trained = build(tmp_path_factory.mktemp("plain") / "run", "ref_model made", [])
    with contextlib.redirect_stdout(None):
        trained.trainer.train()
    return trained


@contextlib.contextmanager
def nobody_reads() -> Iterator[None]:
    """Standard output is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    own, sys.stdout = sys.stdout, os.fdopen(writer, "w", encoding="utf-8")
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()
        sys.stdout = own


def trained_unread(output: Path, **config: Any) -> Trained:
    trained = build(output, "ref_model made", [callback := AlignmentAuditCallback(config=quick(**config))])
    callback.attach(trained.trainer)
    # It prints as well, and would break first.
    trained.trainer.remove_callback(PrinterCallback)
    with nobody_reads():
        trained.trainer.train()
    return trained


def same_training(one: Trained, other: Trained) -> bool:
    return one.losses == other.losses and all(
        torch.equal(one.weights[name], other.weights[name]) for name in one.weights
    )


@pytest.mark.parametrize("strict", [False, True])
def test_training_outlives_the_reader_of_its_output(
    tmp_path: Path, plain: Trained, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "align_audit"):
        trained = trained_unread(tmp_path / "run", strict=strict)
    assert same_training(trained, plain)
    assert steps(tmp_path / "run") == [0, 2, 3]
    assert sum("to standard output" in record.message for record in caplog.records) == 3


def test_the_process_keeps_its_output_where_it_was(tmp_path: Path) -> None:
    before = os.fstat(1)
    trained_unread(tmp_path / "run")
    assert (os.fstat(1).st_dev, os.fstat(1).st_ino) == (before.st_dev, before.st_ino)


def test_an_alert_stops_training_though_nobody_reads_it(tmp_path: Path) -> None:
    trained = trained_unread(
        tmp_path / "run", strict=False, schedule=_EVERY_STEP, alerts={"action": "stop", **_AT_ONCE}
    )
    assert trained.trainer.state.global_step == 1


@pytest.mark.filterwarnings("ignore:alerts could not be copied")
def test_an_alert_stops_training_though_it_cannot_be_written(tmp_path: Path) -> None:
    output = tmp_path / "run"

    def in_the_way(**_: Any) -> None:
        (output / "align_audit" / "alerts.jsonl").unlink(missing_ok=True)
        (output / "align_audit" / "alerts.jsonl").mkdir()

    trained = run(
        output, quick(strict=False, schedule=_EVERY_STEP, alerts={"action": "stop", **_AT_ONCE}),
        others=[At("on_step_begin", 0, in_the_way)],
    )  # fmt: skip
    assert trained.trainer.state.global_step == 1
    records = (output / "align_audit" / "records.jsonl").read_text().splitlines()
    assert len(records) == 2


@pytest.mark.filterwarnings("ignore:.*found no held-out pairs")
@pytest.mark.filterwarnings("ignore:the audit log .* was deleted or replaced")
# The thread of TensorBoard's writer ends with its folder.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("step", [1, 3])
def test_training_outlives_its_log_folder(tmp_path: Path, plain: Trained, step: int) -> None:
    output = tmp_path / "run"
    trained = run(
        output, quick(strict=False, tensorboard="auto"), attach=False,
        others=[At("on_step_begin" if step == 1 else "on_epoch_end", step, lambda **_: shutil.rmtree(output / "align_audit"))],
        report_to=[],
    )  # fmt: skip
    assert same_training(trained, plain)


@pytest.mark.filterwarnings("ignore:.*found no held-out pairs")
def test_a_tensorboard_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / "align_audit").mkdir(parents=True)
    (output / "align_audit" / "tensorboard").write_text("in the way")
    with pytest.raises(ConfigurationError, match="cannot write TensorBoard curves"):
        run(output, quick(tensorboard="auto"), attach=False)


def test_an_event_that_breaks_outside_an_audit_is_recorded(tmp_path: Path, plain: Trained) -> None:
    """The schedule asks for the trainer's synchronization steps, which are gone here: no audit was reached."""
    output = tmp_path / "run"
    own: list[AlignmentAuditCallback] = []

    def spoil(**_: Any) -> None:
        own[0].config.__dict__["schedule"] = None

    trained = build(output, "ref_model made", [callback := AlignmentAuditCallback(config=quick(strict=False))])
    own.append(callback)
    trained.trainer.add_callback(At("on_step_begin", 1, spoil))
    callback.attach(trained.trainer)
    with contextlib.redirect_stdout(None):
        trained.trainer.train()
    assert same_training(trained, plain)
    assert [failure.step for failure in AuditRun.load(output).failures][:1] == [2]


def test_a_trainer_without_a_reference_can_be_attached(tmp_path: Path) -> None:
    """A plain ``Trainer`` has no ``ref_model``: the reference that was passed is used."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from tests.helpers.dpo import ROWS
    from tests.helpers.probe_tokenizer import make_tokenizer

    base = saved_model(tmp_path / "base")
    tokenizer = make_tokenizer()
    rows = [tokenizer(row["prompt"] + row["chosen"]) for row in ROWS[:4]]
    callback = AlignmentAuditCallback(probes=ROWS[16:], config=quick(), reference=base)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        learning_rate=5e-3, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=arguments,
        train_dataset=Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows]),
        processing_class=tokenizer, callbacks=[callback], data_collator=default_data_collator,
    )  # fmt: skip
    callback.attach(trainer)  # type: ignore[arg-type]
    with contextlib.redirect_stdout(None):
        trainer.train()
    assert steps(tmp_path / "run") == [0, 2]
