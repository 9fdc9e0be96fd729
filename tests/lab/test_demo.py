"""The demo: real runs of the shipped model. The whole of it is slow; a short one is not."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from align_audit.errors import ConfigurationError
from align_audit.lab import demo
from align_audit.lab import demo as show
from align_audit.lab.demo import HEALTHY, RUINED


def test_a_short_demo_trains_audits_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "HEALTHY", replace(HEALTHY, steps=4, audit_every=4))
    monkeypatch.setattr(show, "RUINED", replace(RUINED, steps=4, audit_every=4))
    monkeypatch.setattr(show, "AUDITED_PAIRS", 4)
    monkeypatch.setattr(show, "TRAINING_PAIRS", 32)
    monkeypatch.setattr(show, "HELD_OUT_PAIRS", 4)
    # TensorBoard's pictures are those that are saved, drawn once more at each audit.
    monkeypatch.setattr("align_audit.writers.tensorboard._add_images", lambda *_: None)
    outcomes = show.run_demo(tmp_path / "demo")
    printed = capsys.readouterr().out
    for outcome in outcomes:
        assert [record.step for record in outcome.run.records] == [0, 4]
        assert not outcome.run.failures
        assert outcome.log["loss"] > 0
        for path in outcome.pictures.values():
            assert path.read_bytes()[:4] == b"\x89PNG"
        assert len(outcome.pictures) == 6
        assert list((tmp_path / "demo" / outcome.settings.name / "runs").rglob("events.out.tfevents.*"))
    assert f"tensorboard --logdir {tmp_path / 'demo'}" in printed
    assert printed.count("align_audit step 0  HEALTHY  policy and reference are equal before training") == 2
    assert printed.count("latest healthy: ") == 2, "each run ends with its table"
    assert "latest healthy: checkpoint-4" in printed
    assert "callback.attach(trainer)" in printed, "what goes into a script of one's own"
    places = re.findall(r"^ *(?:Open first|and then): (.*)$", printed, re.MULTILINE)
    assert [Path(place).read_bytes()[:15] for place in places] == [b"<!DOCTYPE html>"] * 2
    # Ruin shows in the audit: both runs took as many steps on the same pairs.
    healthy, ruined = (outcome.run.records[-1].margins.kl.mean for outcome in outcomes)
    assert ruined > 10 * healthy > 0


def test_a_folder_that_is_not_the_demos_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="choose another --output"):
        show.run_demo(tmp_path)
    assert (tmp_path / "precious.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, None])
def test_an_earlier_demo_is_replaced_once_this_one_is_done(tmp_path: Path, end: type[BaseException] | None) -> None:
    output = tmp_path / "demo"
    with show._replaced(output):
        (output / "result").write_text("earlier")
    with contextlib.nullcontext() if end is None else pytest.raises(end), show._replaced(output):
        assert not (output / "result").exists(), "a demo begins in an empty folder"
        (output / "other").touch()
        if end is not None:
            raise end
    assert (output / "result").exists() == (end is not None)
    assert (output / "other").exists() == (end is None)
    assert list(tmp_path.iterdir()) == [output], "nothing is left beside it"


@pytest.mark.slow
def test_the_whole_demo_shows_the_contrast(tmp_path: Path) -> None:
    """An error alert fires while the training log still looks good, and none does on the healthy run."""
    healthy, ruined = show.run_demo(tmp_path / "demo")
    assert not [alert for alert in healthy.run.alerts if alert.level == "error"]
    assert min(alert.step for alert in ruined.run.alerts if alert.level == "error") <= 20
    assert ruined.log["rewards/accuracies"] > 0.9
    assert ruined.log["loss"] < healthy.log["loss"]
    assert ruined.log["rewards/margins"] > healthy.log["rewards/margins"]


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "demo", tmp_path / "demo"
    real.mkdir(parents=True)
    (real / demo._MARKER).touch()
    (real / "old").touch()
    link.symlink_to(real)
    with demo._replaced(link):
        (link / "new").touch()
    assert link.is_symlink() and {path.name for path in real.iterdir()} == {demo._MARKER, "new"}
    assert [path.name for path in real.parent.iterdir()] == ["demo"]
