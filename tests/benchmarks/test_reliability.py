"""The command that breaks runs: it tells a run that was left alone from one that was changed, and names enough of both."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import reliability
import torch
from reliability import Outcome, Row, document, merged, placed, rows, run_row
from reliability_runs import Now, Trained, raising, train


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    trained = train(tmp_path_factory.mktemp("plain") / "run", audited=False)
    assert trained.raised is None
    return trained


def test_there_are_enough_rows_and_none_twice() -> None:
    names = [(row.fault, row.moment) for row in rows()]
    assert len(names) >= 40
    assert len(set(names)) == len(names)


def test_a_run_whose_audit_broke_is_the_same_training(plain: Trained) -> None:
    outcome = run_row(
        Row("an exception", "in the head", placed("in the head", lambda log: raising(OSError("gone")))), plain
    )
    assert outcome.good
    assert (outcome.training, outcome.log) == ("same bits, saved", "all audits but 2; 1 failure")
    assert "the audit at step 2 broke and was recorded" in outcome.said


def test_a_training_that_was_changed_is_seen(plain: Trained) -> None:
    """The check could fail: one weight moves by a little."""

    @contextlib.contextmanager
    def moved(log: Path, trainer: Any, now: Now) -> Any:
        with torch.no_grad():
            next(trainer.model.parameters()).view(-1)[0] += 1e-3
        yield

    outcome = run_row(Row("a weight", "moved", moved), plain)
    assert not outcome.good
    assert outcome.training.startswith("OTHER BITS")


def test_a_training_that_was_ended_is_seen(plain: Trained) -> None:
    @contextlib.contextmanager
    def ended(log: Path, trainer: Any, now: Now) -> Any:
        trainer.optimizer_cls_and_kwargs = ("no optimizer", {})
        trainer.create_optimizer = raising(RuntimeError("planted"))
        yield

    outcome = run_row(Row("an error", "of the trainer", ended), plain)
    assert not outcome.good
    assert outcome.training == "ends with RuntimeError before the first step"


def test_some_rows_can_be_made_anew(tmp_path: Path) -> None:
    first, second = list(rows())[:2]
    path = tmp_path / "a.md"
    path.write_text(
        document([(first, Outcome("same bits, saved", "all | audits", "x")), (second, Outcome("a", "b", "c"))])
    )
    again = merged(path, [(second, Outcome("other", "log", "words"))])
    assert [(row.moment, outcome) for row, outcome in again] == [
        (first.moment, Outcome("same bits, saved", "all | audits", "x")),
        (second.moment, Outcome("other", "log", "words")),
    ]


def test_the_document_says_what_was_seen() -> None:
    row = Row("a fault", "a moment")
    text = document(
        [(row, Outcome("same bits, saved", "all audits", "a | b")), (row, Outcome("OTHER BITS", "none", ""))]
    )
    assert "In 1 of 2 training was what it is" in " ".join(text.split())
    assert "| a fault | a moment | same bits, saved | all audits | a \\| b |" in text
    assert reliability.__doc__ is not None
