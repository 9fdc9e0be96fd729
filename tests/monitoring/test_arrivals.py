"""Which checkpoints of a folder are complete: never one that is half there, whatever the order in which its files come."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from align_audit.monitoring import arrivals
from align_audit.monitoring.arrivals import Arrivals, Checkpoint


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Folder:
    """A training's folder, looked at by a clock that the test moves."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock = path, Clock()
        self.arrivals = Arrivals(path, settled=5.0, clock=self.clock)

    def look(self, after: float = 0.0) -> list[Checkpoint]:
        self.clock.now += after
        return self.arrivals.look()

    def lack(self, after: float = 0.0) -> str | None:
        (checkpoint,) = self.look(after)
        return checkpoint.lack


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def weights(path: Path, count: int = 8) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({"a": np.arange(count, dtype=np.float32), "b": np.zeros((2, 2), np.float16)}, path)


def state(folder: Path, step: int = 20, last: int = 60) -> None:
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": last}))


def saved(run: Folder, step: int = 20, *, trainer: bool = True) -> Path:
    """A checkpoint of one file, in the trainer's order."""
    folder = run.path / f"checkpoint-{step}"
    weights(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    if trainer:
        state(folder, step)
    return folder


def test_what_the_trainer_finished_is_complete_at_once(run: Folder) -> None:
    saved(run)
    (checkpoint,) = run.look()
    assert (checkpoint.step, checkpoint.lack, checkpoint.ends_training) == (20, None, False)
    assert saved(run, 60)
    assert [each.ends_training for each in run.look()] == [False, True]


def test_by_step_and_nothing_else(run: Folder) -> None:
    for step in (100, 20, 3):
        saved(run, step)
    for name in ("checkpoint-x", "checkpoint-20-old", "checkpoint-0", "runs"):
        shutil.copytree(run.path / "checkpoint-20", run.path / name)
    (run.path / "checkpoint-7").mkdir()
    assert [checkpoint.step for checkpoint in run.look()] == [3, 20, 100]


def test_of_two_of_one_step_the_one_that_a_trainer_calls_so(run: Folder) -> None:
    saved(run)
    for name in ("checkpoint-0020", "checkpoint-020"):
        shutil.copytree(run.path / "checkpoint-20", run.path / name)
    assert [checkpoint.folder.name for checkpoint in run.look()] == ["checkpoint-20"]
    shutil.rmtree(run.path / "checkpoint-20")
    assert [checkpoint.folder.name for checkpoint in run.look()] == ["checkpoint-020"]


@pytest.mark.parametrize("cut", [0, 4, 30, -1])
def test_a_weights_file_that_is_not_as_long_as_its_header_says(run: Folder, cut: int) -> None:
    folder = saved(run)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:cut])
    state(folder)
    assert "model.safetensors is not as long" in str(run.lack())
    assert "model.safetensors is not as long" in str(run.lack(after=3600)), "however long it has been so"
    (folder / "model.safetensors").write_bytes(data)
    state(folder)
    assert run.lack() is None


def test_a_header_of_nonsense(run: Folder) -> None:
    folder = saved(run)
    for header in (
        b"\xff" * 64,
        (20).to_bytes(8, "little") + b"[1, 2, 3]           ",
        (2).to_bytes(8, "little") + b"{]",
    ):
        (folder / "model.safetensors").write_bytes(header)
        assert run.lack(after=60) is not None


def test_every_shard_has_to_be_there_with_or_without_the_index(run: Folder) -> None:
    folder = run.path / "checkpoint-20"
    names = [f"model-{place:05d}-of-00003.safetensors" for place in (1, 2, 3)]
    for name in names[:2]:
        weights(folder / name)
    (folder / "config.json").write_text("{}")
    state(folder)
    assert run.lack(after=60) == "model-00003-of-00003.safetensors is missing, and 1 more shard"
    weights(folder / names[2])
    assert "model.safetensors.index.json is missing" in str(run.lack(after=60))
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[2]}})
    (folder / "model.safetensors.index.json").write_text(index[:40])
    assert run.lack(after=60) is not None, "half an index"
    (folder / "model.safetensors.index.json").write_text(index)
    assert run.lack() == "it may still be written"
    assert run.lack(after=5) is None
    (folder / names[1]).unlink()
    assert run.lack(after=60) == f"{names[1]} is missing"


def test_without_a_trainers_state_it_has_to_be_quiet_for_some_seconds(run: Folder) -> None:
    folder = saved(run, trainer=False)
    assert run.lack() == "it may still be written"
    assert run.lack(after=4) == "it may still be written"
    (folder / "tokenizer.json").write_text("{}")
    assert run.lack(after=4) == "it may still be written", "something has changed"
    assert run.lack(after=4.9) == "it may still be written"
    assert run.lack(after=0.2) is None


def test_a_state_that_is_older_than_the_weights_says_nothing(run: Folder) -> None:
    """A copy came in another order, or a resumed training writes over the checkpoint."""
    folder = saved(run)
    os.utime(folder / "trainer_state.json", ns=(10**18, 10**18))
    assert run.lack() == "it may still be written"
    assert run.lack(after=5) is None


def test_half_a_state_is_no_state(run: Folder) -> None:
    folder = saved(run)
    (folder / "trainer_state.json").write_text('{"global_step": 2')
    assert run.lack(after=60) == "its trainer_state.json is not whole"


@pytest.mark.parametrize("absent", ["model.safetensors", "config.json"])
def test_a_state_does_not_stand_for_what_a_model_is_read_from(run: Folder, absent: str) -> None:
    folder = saved(run)
    (folder / absent).unlink()
    assert run.lack(after=60) is not None


def test_an_adapter_and_the_frozen_copy_beside_it(run: Folder) -> None:
    folder = run.path / "checkpoint-20"
    for place in (folder, folder / "ref"):
        weights(place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text("{}")
    state(folder)
    assert run.lack() is None
    with (folder / "ref" / "adapter_model.safetensors").open("ab") as file:
        file.truncate(40)
    assert "ref/adapter_model.safetensors is not as long" in str(run.lack(after=60))


def test_the_optimizer_may_be_written_last(run: Folder) -> None:
    """Other ranks write their random states after the first one has finished."""
    folder = saved(run)
    (folder / "rng_state_1.pth").write_bytes(b"1")
    os.utime(folder / "rng_state_1.pth")
    assert run.lack() is None


def test_what_changed_since_a_look(run: Folder) -> None:
    folder = saved(run)
    (checkpoint,) = run.look()
    assert not checkpoint.changed()
    (folder / "README.md").write_text("a card")
    assert not checkpoint.changed(), "no model is read from it"
    weights(folder / "model.safetensors", 9)
    assert checkpoint.changed()
    shutil.rmtree(folder)
    assert checkpoint.changed()
    assert run.look() == []


def test_a_folder_that_is_not_there(run: Folder) -> None:
    shutil.rmtree(run.path)
    with pytest.raises(FileNotFoundError):
        run.look()


def test_a_state_that_comes_while_the_weights_are_read_is_of_the_next_look(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(run, trainer=False)
    lack = arrivals._lack

    def slow(place: Path, files: Any) -> Any:
        state(place)
        return lack(place, files)

    monkeypatch.setattr(arrivals, "_lack", slow)
    assert run.lack() == "it may still be written"
    assert run.lack() is None
    assert (folder / "trainer_state.json").exists()
