"""What goes up with a training that pushes its folder to the Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_audit import AlignmentAuditCallback, AuditConfig
from align_audit.errors import ConfigurationError
from align_audit.monitoring import hub
from align_audit.monitoring.trainer import read_trainer
from align_audit.record.log import FOLDER
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import ROWS, build


@pytest.mark.parametrize(
    ("options", "pushes", "pairs", "said"),
    [
        ({}, False, 3, ""),
        ({}, True, 0, "no text of probe pairs is kept in it"),
        ({"examples": {}}, True, 0, "no text of probe pairs is kept in it"),
        ({"examples": {"pairs": 0}}, True, 0, ""),
        ({"examples": {"pairs": 2}}, True, 2, "uploads output_dir, and with it the text of the probe pairs"),
    ],
)
def test_texts_are_kept_where_they_were_asked_for(
    options: dict[str, Any], pushes: bool, pairs: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts: Any = SimpleNamespace(pushes_to_hub=pushes, output_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING, logger=hub.__name__):
        for writes in (False, True):
            assert hub.kept_from_hub(AuditConfig.from_dict(options), facts, writes=writes).examples.pairs == pairs
    assert [said in entry.getMessage() for entry in caplog.records] == ([True] if said else [])


def test_texts_of_earlier_audits_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that is resumed with the option, or goes into the folder of another one."""
    for folder in ("step-5", "previous-1/step-10"):
        (tmp_path / FOLDER / folder).mkdir(parents=True)
        (tmp_path / FOLDER / folder / "texts-helpful.json").write_text("{}")
    facts: Any = SimpleNamespace(pushes_to_hub=True, output_dir=str(tmp_path))
    config = AuditConfig.from_dict({"examples": {"pairs": 0}})
    for writes in (False, True):
        hub.kept_from_hub(config, facts, writes=writes)
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert "earlier audits kept (2 files in" in said and "previous-1/step-10/texts-helpful.json" in said


def test_gigabytes_of_a_cache_are_not_uploaded() -> None:
    facts: Any = SimpleNamespace(pushes_to_hub=True, output_dir="out")
    config = AuditConfig.from_dict(
        {
            "patching": {
                "keep_reference": True,
                "exact_pairs": 8,
                "attribution_points": [0.0],
                "attribution_path": "joint",
            }
        }
    )
    with pytest.raises(ConfigurationError, match=r"patching\.keep_reference keeps gigabytes"):
        hub.kept_from_hub(config, facts, writes=True)


@pytest.mark.parametrize("pushes", [True, False])
def test_nothing_that_is_uploaded_holds_text(pushes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer uploads is all of its folder but checkpoints."""
    callback = AlignmentAuditCallback(config=quick(report=True))
    trained = build(tmp_path / "out", "ref_model passed", [callback])
    trained.trainer.args.push_to_hub = pushes
    monkeypatch.setattr(type(trained.trainer), "_push_from_checkpoint", lambda *_: None)
    callback.attach(trained.trainer)
    trained.trainer.train()
    kept = [path for path in (tmp_path / "out" / "align_audit").rglob("*") if path.is_file()]
    assert kept
    words = [row["chosen"].split()[-3:] for row in ROWS[16:]]
    holding = [
        path.name
        for path in kept
        if path.name.startswith("texts") or any(" ".join(each).encode() in path.read_bytes() for each in words)
    ]
    assert bool(holding) is not pushes, holding


def test_a_trainer_with_other_arguments_is_not_the_one_that_trains(tmp_path: Path) -> None:
    """A callback that goes on to another trainer, and was not attached to it, has nothing to say of it."""
    first = build(tmp_path / "first", "ref_model passed", []).trainer
    second = build(tmp_path / "second", "ref_model passed", []).trainer
    assert read_trainer(first, first.args).attached
    facts = read_trainer(first, second.args)
    assert (facts.attached, facts.reference, facts.eval_sets) == (False, None, None)
