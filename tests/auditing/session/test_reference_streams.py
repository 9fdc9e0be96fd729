"""``patching.keep_reference``: what is read from disk is what would have been computed; damage costs time only."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.auditing.measurements import attribution, spinal
from align_audit.auditing.session.reference_cache import ReferenceCache, ReferenceStreams
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError
from align_audit.models.gradients import stream_gradients
from align_audit.probes.batches import make_batch
from tests.helpers.audits import QUICK, QUICK_GENERATIONS, QUICK_LASSO, audited
from tests.helpers.dpo import build
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

pytestmark = pytest.mark.device


EVERYTHING: dict[str, Any] = {"reverse": True}
"""Of patching, beside every other measurement."""


def run(
    reference: Any, folder: Path | None, policy_seed: int = 1, pairs: int = 14, start: bool = False, **patching: Any
) -> Any:
    """Arrays and record of an audit by attribution, nine pairs of them patched; with :data:`EVERYTHING`, of all there is."""
    policy = perturbed(reference, scale=0.0 if start else 0.05, seed=policy_seed)
    how = {"exact_pairs": 9, "attribution_points": (0.0,), "keep_reference": folder is not None}
    rest = {"localization": QUICK_LASSO, "generations": QUICK_GENERATIONS} if patching.get("reverse") else {}
    config = AuditConfig.from_dict(
        {
            **QUICK, "max_pairs": pairs, "batch_tokens": 100, "spinal": {"enabled": True}, **rest,
            "patching": {**QUICK["patching"], **how, **patching},
        }
    )  # fmt: skip
    record, arrays = audited(
        policy, reference, random_pairs(pairs), config, cache=ReferenceCache(folder), at_start=start
    )
    return arrays, record


def same(one: Any, other: Any) -> bool:
    """Every number of both audits, bit by bit, but for what they cost."""
    arrays, record = one
    assert set(arrays) == set(other[0])
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, other[0][name], err_msg=name)
    left = {"cost", "provenance"}
    return record.model_dump_json(exclude=left) == other[1].model_dump_json(exclude=left)


def kept(folder: Path) -> set[Path]:
    return set(folder.rglob("streams-*/*.safetensors"))


@pytest.fixture
def backward(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Backward passes through a model so far."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stream_gradients(*args, **kwargs)

    for measurement in (attribution, spinal):
        monkeypatch.setattr(measurement, "stream_gradients", counted)
    return calls


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("points", [(0.0,), (0.0, 0.5)])
def test_read_is_computed_bit_by_bit(
    tmp_path: Path, family: str, points: tuple[float, ...], backward: list[int]
) -> None:
    reference = tiny_model(family)
    plain = run(reference, None, attribution_points=points, **EVERYTHING)
    passes = len(backward)
    first = run(reference, tmp_path, attribution_points=points, **EVERYTHING)
    assert len(backward) == 2 * passes
    second = run(reference, tmp_path, attribution_points=points, **EVERYTHING)
    assert len(backward) < 3 * passes, "gradients came from disk"
    assert same(first, plain)
    assert same(second, plain)
    assert kept(tmp_path)
    other = run(reference, tmp_path, policy_seed=2, attribution_points=points, **EVERYTHING)
    assert same(other, run(reference, None, policy_seed=2, attribution_points=points, **EVERYTHING))
    assert not same_effects(other, plain)


def same_effects(one: Any, other: Any) -> bool:
    return np.array_equal(one[0]["per_pair.attribution"], other[0]["per_pair.attribution"])


def test_attributed_pairs_cost_a_forward_of_the_policy(tmp_path: Path, backward: list[int]) -> None:
    reference = tiny_model("llama")
    first = run(reference, tmp_path)
    passes = len(backward)
    second = run(reference, tmp_path)
    assert len(backward) - passes < passes, "gradient concentration of the policy only"
    attributed = 5 / 14
    saved = first[1].cost.forward_equivalents - second[1].cost.forward_equivalents
    assert saved > 2.5 * attributed, "reference: forward, forward again for the graph, backward"


def test_another_reference_is_computed_and_the_old_files_go(tmp_path: Path, backward: list[int]) -> None:
    run(tiny_model("llama"), tmp_path)
    old = kept(tmp_path)
    passes = len(backward)
    moved = tiny_model("llama", seed=5)
    found = run(moved, tmp_path)
    assert len(backward) - passes == passes
    assert same(found, run(moved, None))
    new = kept(tmp_path)
    assert new
    assert not new & old


def test_other_probes_keep_their_own(tmp_path: Path) -> None:
    reference = tiny_model("llama")
    run(reference, tmp_path)
    first = kept(tmp_path)
    run(reference, tmp_path, pairs=13)
    assert first < kept(tmp_path)


def test_pairs_that_are_patched_now_are_recorded(tmp_path: Path) -> None:
    """Streams from disk cannot be continued: a batch of pairs that were attributed may be patched by the next audit."""
    reference = tiny_model("llama")
    for changes in ({"exact_pairs": 14}, {"attribution_points": (0.0, 0.5)}):
        run(reference, tmp_path)
        (trace,) = tmp_path.glob("reference-*")
        trace.unlink()  # its rows came in other batches, so its last bits are others
        assert same(run(reference, tmp_path, **changes), run(reference, None, **changes))


def test_damage_costs_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reference = tiny_model("llama")
    plain = run(reference, None)
    run(reference, tmp_path)
    whole = {path: path.read_bytes() for path in kept(tmp_path)}
    for damage in (lambda data: b"", lambda data: data[:-9], lambda data: b"{}" + data[2:]):
        for path, data in whole.items():
            path.write_bytes(damage(data))
        assert same(run(reference, tmp_path), plain)
        assert "the reference is computed again" in caplog.text
        caplog.clear()
    assert {path: path.read_bytes() for path in kept(tmp_path)} == whole, "written anew"


def test_a_full_disk_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = tiny_model("llama")
    plain = run(reference, None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert same(run(reference, tmp_path), plain)
    assert caplog.text.count("more than half of what is free") == 1
    assert not kept(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    assert same(run(reference, tmp_path / "file" / "cache"), plain)
    assert caplog.text.count("computes them at every audit") == 2


def test_a_store_knows_its_key(tmp_path: Path) -> None:
    pairs = random_pairs(2).pairs
    batch = make_batch(pairs, [0, 1], 0)
    tensors = {"stream.0": torch.randn(4, 3, 2), "gradient.0": torch.randn(4, 3, 2).bfloat16()}

    def opened(probes: str = "probes", weights: str = "weights", computed: str = "", **how: Any) -> ReferenceStreams:
        return ReferenceStreams(tmp_path, probes, weights, computed, torch.device("cpu"), **how)

    store = opened()
    assert store.get(batch) == {}
    store.put(batch, tensors)
    found = opened().get(batch)
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert store.get(make_batch(pairs, [1, 0], 0)) == {}, "other places"
    assert store.get(make_batch(pairs, [0, 1], 0, shared=True)) == {}, "another layout"
    assert opened(read=False).get(batch) == {}
    assert opened("other probes").get(batch) == {}
    assert opened(computed="otherwise").get(batch) == {}
    assert store.get(batch), "other probes, and other ways to compute, leave it alone"
    assert opened(weights="moved").get(batch) == {}
    assert not kept(tmp_path)


def test_batches_of_an_earlier_plan_and_abandoned_files_go(tmp_path: Path) -> None:
    pairs = random_pairs(3).pairs
    cpu = torch.device("cpu")
    first = ReferenceStreams(tmp_path, "probes", "weights", "", cpu)
    for places in ([0, 1], [2]):
        first.put(make_batch([pairs[i] for i in places], places, 0), {"stream.0": torch.ones(2)})
    first.forget_the_rest()
    assert len(kept(tmp_path)) == 2
    (folder,) = tmp_path.iterdir()
    for name, age in (("now", 0), ("tmp0killed_", 7200)):
        (folder / name).mkdir()
        os.utime(folder / name, times=(time.time() - age,) * 2)
    second = ReferenceStreams(tmp_path, "probes", "weights", "", cpu)
    assert second.get(make_batch(pairs[:2], [0, 1], 0))
    second.forget_the_rest()
    assert len(kept(tmp_path)) == 1
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["now"]


def test_only_files_that_a_store_wrote_are_removed(tmp_path: Path) -> None:
    """Notes, somebody's folder, and links to somebody's files and folders stay where they are, and what they lead to."""
    batch, cpu = make_batch(random_pairs(1).pairs, [0], 0), torch.device("cpu")
    cache, foreign = tmp_path / "cache", tmp_path / "foreign"
    foreign.mkdir()
    ReferenceStreams(cache, "probes", "weights", "", cpu).put(batch, {"stream.0": torch.ones(2)})
    (folder,) = cache.iterdir()
    (written,) = folder.iterdir()
    digits = "0" * 16
    old = (time.time() - 7200,) * 2
    for path in (folder / "notes.txt", folder / f"{digits}-model.safetensors", foreign / "batch.safetensors"):
        path.write_text("somebody's")
    (folder / "tmp0mine000").mkdir()
    (folder / "tmp0mine000" / "results.csv").write_text("somebody's")
    (folder / "tmp0linked0").symlink_to(foreign, target_is_directory=True)
    (folder / f"{digits}-{digits}-{digits}.safetensors").symlink_to(foreign / "batch.safetensors")
    for path in folder.iterdir():
        os.utime(path, old, follow_symlinks=False)
    os.utime(foreign, old)
    kept_names = {path.name for path in folder.iterdir()} - {written.name}
    ReferenceStreams(cache, "probes", "moved", "", cpu).forget_the_rest()
    assert {path.name for path in folder.iterdir()} == kept_names
    assert (folder / "tmp0mine000" / "results.csv").exists()
    assert (foreign / "batch.safetensors").read_text() == "somebody's"


def test_a_cache_folder_that_is_a_link_loses_nothing(tmp_path: Path) -> None:
    batch, cpu = make_batch(random_pairs(1).pairs, [0], 0), torch.device("cpu")
    ReferenceStreams(tmp_path / "cache", "probes", "weights", "", cpu).put(batch, {"stream.0": torch.ones(2)})
    (folder,) = (tmp_path / "cache").iterdir()
    folder.rename(tmp_path / "archive")
    folder.symlink_to(tmp_path / "archive", target_is_directory=True)
    ReferenceStreams(tmp_path / "cache", "probes", "moved", "", cpu)
    assert len(list((tmp_path / "archive").iterdir())) == 1


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    """A layer that does nothing hands on the stream, and the gradient, that it was given."""
    batch, cpu = make_batch(random_pairs(1).pairs, [0], 0), torch.device("cpu")
    one = torch.randn(2, 3, 4)
    tensors = {"stream.0": one, "stream.1": one, "gradient.0": one.transpose(0, 1), "gradient.1": one[:1]}
    ReferenceStreams(tmp_path, "probes", "weights", "", cpu).put(batch, tensors)
    found = ReferenceStreams(tmp_path, "probes", "weights", "", cpu).get(batch)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_equal_weights_that_compute_otherwise_are_computed(tmp_path: Path) -> None:
    """Rotary frequencies are no parameters, and attention kernels differ in their last bits."""
    reference = tiny_model("llama")
    run(reference, tmp_path)
    reference.model.rotary_emb.inv_freq *= 0.5
    scaled = run(reference, tmp_path)
    assert same(scaled, run(reference, None))
    reference.set_attn_implementation("eager")
    assert same(run(reference, tmp_path), run(reference, None))


def test_before_training_nothing_is_taken_on_trust(tmp_path: Path, backward: list[int]) -> None:
    reference = tiny_model("llama")
    run(reference, tmp_path)
    passes = len(backward)
    found = run(reference, tmp_path, start=True)
    assert len(backward) == 2 * passes
    assert found[1].reference_check.verdict == "passed"


def test_a_training_keeps_it_in_its_run_and_finds_the_same(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "max_pairs": 12, "low_rank": {"enabled": False}, "localization": {"enabled": False}, "spinal": {"enabled": False},
        "tensorboard": "off", "progress": False, "strict": True, "budget": None, "generations": {"enabled": False},
    }  # fmt: skip
    curves = []
    for keep in (True, False):
        patching = {"exact_pairs": 8, "attribution_points": (0.0,), "keep_reference": keep}
        callback = AlignmentAuditCallback(config=AuditConfig.from_dict({**values, "patching": patching}))
        trained = build(tmp_path / str(keep) / "run", "new adapter", [callback])
        callback.attach(trained.trainer)
        trained.trainer.train()
        audits = AuditRun.load(tmp_path / str(keep) / "run" / "align_audit")
        curves.append([(record.step, record.patching.model_dump_json()) for record in audits.records])
    assert len(curves[0]) >= 3
    assert curves[0] == curves[1]
    assert kept(tmp_path / "True" / "run" / "align_audit")
    assert not kept(tmp_path / "False")


def test_nothing_to_keep_is_an_error() -> None:
    for patching, words in (
        ({}, "set exact_pairs"),
        ({"exact_pairs": 8, "attribution_path": "layer"}, "attribution_path='joint'"),
        ({"exact_pairs": 8, "attribution_points": (0.5,)}, r"0\.0 among"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            AuditConfig.from_dict({"patching": {"keep_reference": True, **patching}})
