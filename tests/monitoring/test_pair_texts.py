"""What changed in text, in a run: beside each record, by the trainer's tokenizer, and never in the way of an audit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun, ProbeSet
from align_audit.auditing.session.open_models import OpenModels
from align_audit.models.reference import resolve_reference
from align_audit.monitoring import monitor as module
from align_audit.monitoring.monitor import Monitor
from align_audit.monitoring.outcome import Moment
from align_audit.record.audit_record import AuditKind
from align_audit.record.log import FOLDER, RunLog
from tests.helpers.callback_runs import CREATED, quick
from tests.helpers.dpo import ROWS, build
from tests.helpers.monitor_bench import Broken
from tests.helpers.probe_tokenizer import make_tokenizer
from tests.helpers.tiny import perturbed, tiny_model


class NoText:
    """A tokenizer that cannot be had any more when its text is wanted."""

    def __len__(self) -> int:
        return 10_000

    def decode(self, *_: Any, **__: Any) -> str:
        raise OSError("vocabulary gone")


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    reference = tiny_model("llama", dtype=torch.float32, vocab_size=512)
    return perturbed(reference), reference


@pytest.fixture(scope="module")
def probes() -> ProbeSet:
    return ProbeSet.from_dataset(ROWS[:6], make_tokenizer())


@pytest.fixture
def audit(models: tuple[nn.Module, nn.Module], probes: ProbeSet, tmp_path: Path) -> Any:
    """Audits the policy at some steps, as one monitor, and gives the run."""

    def made(
        *steps: int, config: AuditConfig | None = None, tokenizer: Any = probes.tokenizer, kind: AuditKind = "health"
    ) -> Any:
        log = RunLog(tmp_path)
        monitor = Monitor({None: replace(probes, tokenizer=tokenizer)}, config or quick(), log)
        for step in steps:
            opened = OpenModels(models[0], resolve_reference(*models))
            assert monitor.audit(opened, Moment(step, kind)).failures == []
        monitor.close()
        return AuditRun.load(tmp_path)

    return made


@pytest.mark.parametrize("kind", ["health", "full"])
def test_every_kind_of_audit_writes_them_before_anybody_is_told(
    kind: AuditKind, audit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def tell(_: Any, record: Any, history: Any) -> None:
        told.append(AuditRun.load(tmp_path).pair_texts(record))

    monkeypatch.setattr(module.Writers, "record", tell)
    run = audit(5, kind=kind)
    texts = run.pair_texts(run.records[0])
    assert texts is not None
    assert 1 <= len(texts.lost + texts.gained) <= 6
    assert told == [texts]
    rows = {pair.pair: ROWS[pair.pair] for pair in texts.lost + texts.gained}
    for pair in texts.lost + texts.gained:
        assert "".join(token.text for token in pair.chosen) == rows[pair.pair]["chosen"] + "<eos>"
        assert "".join(token.text for token in pair.rejected) == rows[pair.pair]["rejected"] + "<eos>"
        assert pair.prompt == rows[pair.pair]["prompt"]


def test_0_leaves_no_text_of_the_data_in_anything_that_is_written(audit: Any, tmp_path: Path) -> None:
    run = audit(5, config=quick(examples={"pairs": 0}), kind="full")
    assert run.pair_texts(run.records[0]) is None
    written = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "arrays.safetensors" in written
    for name, content in written.items():
        assert not any(word in content for word in (b"capital", b"Paris", b"wonderful")), name


@pytest.mark.parametrize("breaks", ["the tokenizer", "the disk"])
def test_an_audit_whose_texts_cannot_be_kept_is_an_audit_and_that_is_said_once(
    breaks: str, audit: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if breaks == "the disk":
        Broken(monkeypatch, "save_texts")
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        run = audit(5, 6, 7, **({"tokenizer": NoText()} if breaks == "the tokenizer" else {}))
    assert [record.step for record in run.records] == [5, 6, 7]
    assert run.failures == []
    assert [run.pair_texts(record) for record in run.records] == [None] * 3
    said = [entry.getMessage() for entry in caplog.records if "what changed in text" in entry.getMessage()]
    assert len(said) == 1
    assert "at step 5" in said[0]
    assert ("vocabulary gone" if breaks == "the tokenizer" else "no space left") in said[0]


def test_probes_that_were_saved_are_shown_with_the_trainers_tokenizer(probes: ProbeSet, tmp_path: Path) -> None:
    probes.save(tmp_path / "probes.json")
    loaded = ProbeSet.load(tmp_path / "probes.json")
    assert loaded.tokenizer is None
    assert loaded == probes
    assert hash(loaded) == hash(probes)
    callback = AlignmentAuditCallback(
        loaded, quick(schedule={"before_training": False, "health": False, "on_last_step": True})
    )
    trained = build(tmp_path / "out", CREATED, [callback], max_steps=1, save_strategy="no")
    callback.attach(trained.trainer)
    trained.trainer.train()
    run = AuditRun.load(tmp_path / "out")
    texts = run.pair_texts(run.records[-1])
    assert texts is not None
    (first, *_) = texts.gained + texts.lost
    assert "".join(token.text for token in first.chosen) == ROWS[first.pair]["chosen"] + "<eos>"
    assert (tmp_path / "out" / FOLDER / "step-1" / "texts.json").exists()
