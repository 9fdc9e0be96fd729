"""Several named probe sets during training, and from the command line."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

import align_audit.auditing.audit
import align_audit.monitoring.monitor
from align_audit import AlignmentAuditCallback, AuditConfig, AuditRecord, AuditRun, TransferRecord
from align_audit.auditing.request import AuditRequest
from align_audit.errors import ProbeError
from align_audit.measures.subspace import principal_angles
from align_audit.writers.scalars import scalars
from tests.cli.conftest import command  # noqa: F401
from tests.helpers.callback_runs import CREATED, event_files, events, poison, quick, steps
from tests.helpers.callback_runs import At as AtEvent
from tests.helpers.dpo import ROWS, build

SETS = {"harmless": ROWS[16:20], "helpful-1.0": ROWS[20:]}


LOW_RANK: dict[str, Any] = {"enabled": True, "layers": [1], "ranks": [1, 2], "random_draws": 0}


# -- during training ---------------------------------------------------------------------------------------------------


def train(output: Path, config: AuditConfig, probes: Any, others: Any = (), resume: Any = None, **options: Any) -> Any:
    callback = AlignmentAuditCallback(probes=probes, config=config)
    trained = build(output, CREATED, [*others, callback], **options)
    callback.attach(trained.trainer)
    with contextlib.redirect_stdout(None):
        trained.trainer.train(resume_from_checkpoint=resume)
    return SimpleNamespace(trained=trained, callback=callback)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two steps, two named sets, audited at 0, 1 and 2."""
    output = tmp_path_factory.mktemp("sets") / "out"
    config = quick(
        tensorboard="auto", tensorboard_scalars="all", tensorboard_images=False, schedule={"every_n_steps": 1},
        low_rank=LOW_RANK,
    )  # fmt: skip
    made = train(
        output, config, SETS, max_steps=2, save_steps=1, report_to=["tensorboard"], lr_scheduler_type="constant"
    )
    return SimpleNamespace(output=output, config=config, **vars(made))


def test_every_set_is_audited_at_every_audit(trained: Any) -> None:
    run = AuditRun.load(trained.output)
    assert run.probe_names == list(SETS)
    assert steps(trained.output) == [0, 0, 1, 1, 2, 2]
    hashes = set()
    for name in SETS:
        view = run.select(name)
        assert [record.step for record in view.records] == [0, 1, 2]
        (probe_hash,) = {record.provenance.probe_hash for record in view.records}
        hashes.add(probe_hash)
        for record in view.records:
            arrays = view.load_arrays(record.step, "arrays")
            assert float(arrays["per_pair.effect"][:, -1].mean()) == pytest.approx(record.patching.effect[-1].mean)
            assert (trained.output / "align_audit" / f"step-{record.step}" / f"arrays-{name}.safetensors").exists()
    assert len(hashes) == 2
    effects = {record.patching.effect[-1].mean for record in run.records if record.step == 2}
    assert len(effects) == 2, "the sets are not one and the same"


def test_principal_angles_are_to_the_same_sets_subspace_before(trained: Any) -> None:
    run = AuditRun.load(trained.output)
    for name in SETS:
        view = run.select(name)
        curves = [record.low_rank["activation"][1] for record in view.records]
        assert curves[0].principal_angles is None
        bases = [torch.from_numpy(view.load_arrays(step, "arrays")["subspace.activation.1"]) for step in (0, 1, 2)]
        for step in (1, 2):
            assert curves[step].principal_angles == pytest.approx(
                principal_angles(bases[step - 1], bases[step]), abs=1e-9
            )


def test_the_tags_of_a_set_stand_under_its_name(trained: Any) -> None:
    (file,) = event_files(trained.output)
    board = events(file.parent)
    emitted = {tag for tag in board.Tags()["scalars"] if tag.startswith("align_audit/")}
    run = AuditRun.load(trained.output)
    assert emitted == {tag for record in run.records for tag in scalars(record)}
    assert {tag.split("/")[1] for tag in emitted} == set(SETS)
    for name in SETS:
        tag = f"align_audit/{name}/patching/effect/layer_02"
        stored = [record.patching.effect[2].mean for record in run.select(name).records]
        assert [event.step for event in board.Scalars(tag)] == [0, 1, 2]
        assert [event.value for event in board.Scalars(tag)] == pytest.approx(stored, rel=1e-6, abs=1e-9)
        assert f"align_audit/{name}/controls/text_summary" in board.Tags()["tensors"]


def test_the_layout_groups_the_charts_of_each_set(trained: Any) -> None:
    (file,) = event_files(trained.output)
    board = events(file.parent)
    (event,) = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(tensor_util.make_ndarray(event.tensor_proto).item())
    emitted = set(board.Tags()["scalars"])
    for name in SETS:
        own = [category for category in layout.category if category.title.startswith(f"align_audit/{name}: ")]
        assert len(own) == 5
        shown = set()
        for chart in (chart for category in own for chart in category.chart):
            shown |= {
                tag for series in chart.margin.series for tag in (series.value, series.lower, series.upper)
            } & emitted
            patterns = [re.compile(pattern) for pattern in chart.multiline.tag]
            shown |= {tag for tag in emitted if any(pattern.match(tag) for pattern in patterns)}
        assert f"align_audit/{name}/margins/shift" in shown
        assert f"align_audit/{name}/patching/block_transplant/layer_01" in shown
        assert all(tag.startswith(f"align_audit/{name}/") for tag in shown)
    assert len(layout.category) == 10


def test_resuming_audits_the_sets_that_are_not_in_the_log(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill between two sets of one step: the log holds one of them."""
    path = trained.output / "align_audit" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    missing = AuditRecord.from_json(lines[-1])
    calls: list[tuple[int, str | None]] = []
    real = align_audit.monitoring.monitor.run_audit

    def counted(models: Any, request: AuditRequest, *rest: Any) -> Any:
        calls.append((request.step, request.probe_name))
        return real(models, request, *rest)

    monkeypatch.setattr(align_audit.monitoring.monitor, "run_audit", counted)
    checkpoint = str(trained.output / "checkpoint-1")
    train(trained.output, trained.config, SETS, max_steps=2, resume=checkpoint, lr_scheduler_type="constant")
    assert calls == [(2, "helpful-1.0")]
    again = AuditRun.load(trained.output).records[-1]
    assert again.key == missing.key
    for basis in ("activation", "shift"):  # with the angles to the step before
        assert again.low_rank[basis][1].model_dump_json() == missing.low_rank[basis][1].model_dump_json()


def test_the_trainers_eval_sets_are_taken_by_their_names(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(config=quick())
    made = build(tmp_path / "out", CREATED, [callback], max_steps=1)
    made.trainer.eval_dataset = {
        name: made.trainer._prepare_dataset(
            Dataset.from_list(rows), made.trainer.processing_class, made.trainer.args, name
        )
        for name, rows in {"harmless": ROWS[16:20], "to help": ROWS[20:]}.items()
    }
    callback.attach(made.trainer)
    with contextlib.redirect_stdout(None):
        made.trainer.train()
    run = AuditRun.load(tmp_path / "out")
    assert run.probe_names == ["harmless", "to_help"]
    sources = [record.provenance.probe_source for record in run.records[:2]]
    assert sources == ["the trainer's eval set 'harmless'", "the trainer's eval set 'to help'"]
    assert all(record.provenance.probe_held_out for record in run.records)


def test_a_set_that_breaks_leaves_the_others_and_an_alert_on_any_set_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = align_audit.monitoring.monitor.run_audit

    def fails(models: Any, request: AuditRequest, *rest: Any) -> Any:
        if request.probe_name == "harmless" and request.step == 1:
            raise ZeroDivisionError("planted")
        return real(models, request, *rest)

    monkeypatch.setattr(align_audit.monitoring.monitor, "run_audit", fails)
    config = quick(strict=False, schedule={"every_n_steps": 1}, alerts={"action": "stop"})
    made = train(
        tmp_path / "out", config, SETS, others=[AtEvent("on_step_end", 1, poison)], max_steps=3, save_strategy="no"
    )
    assert made.trained.trainer.state.global_step == 1, "the second set's weights are not finite: training stops"
    run = AuditRun.load(tmp_path / "out")
    assert [(record.step, record.provenance.probe_name) for record in run.records] == [
        (0, "harmless"), (0, "helpful-1.0"), (1, "helpful-1.0"),
    ]  # fmt: skip
    (failure,) = run.failures
    assert (failure.step, failure.probe_name) == (1, "harmless")
    assert "ZeroDivisionError: planted" in failure.error


def test_an_unnamed_log_is_not_gone_on_with_under_names(tmp_path: Path) -> None:
    first = quick(schedule={"on_save": False, "on_last_step": False})
    train(tmp_path / "out", first, ROWS[16:20], max_steps=1, save_strategy="no")
    with pytest.warns(UserWarning, match="previous-1"):
        train(tmp_path / "out", first, {"harmless": ROWS[16:20]}, max_steps=1, save_strategy="no")
    assert AuditRun.load(tmp_path / "out").probe_names == ["harmless"]


def test_a_table_is_not_taken_for_named_sets(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(probes={"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, config=quick())
    made = build(tmp_path / "out", CREATED, [callback])
    with pytest.raises(ProbeError, match="found a single dict with the keys prompt, chosen, rejected"):
        callback.attach(made.trainer)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    found = {}
    for name, rows in SETS.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    quick(low_rank=LOW_RANK).to_yaml(folder / "audit.yaml")
    found["options"] = folder / "audit.yaml"
    return found


@pytest.fixture(scope="module")
def enough(files: dict[str, Path]) -> dict[str, Path]:
    """The same, with as many harmless pairs as an interval needs: a transfer is refused where no set has one."""
    folder = files["options"].parent
    path, options = folder / "eight.jsonl", folder / "eight.yaml"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[12:20]), encoding="utf-8")
    quick(low_rank=LOW_RANK, max_pairs=8).to_yaml(options)
    return {**files, "harmless": path, "options": options}


def asked(files: dict[str, Path], trained: Any, output: Path, *more: Any) -> list[Any]:
    sets = [word for name in SETS for word in ("--probes", f"{name}={files[name]}")]
    base = trained.output.parent / "base"
    return [*sets, "--config", files["options"], "--reference", base, "--output", output, *more]


def test_saved_checkpoints_are_audited_on_every_named_set(
    command: Any,  # noqa: F811
    files: dict[str, Path],
    trained: Any,
    tmp_path: Path,
) -> None:
    arguments = ["run", trained.output, *asked(files, trained, tmp_path / "out")]
    done = command(*arguments)
    assert done.code == 0, done.err
    run = AuditRun.load(tmp_path / "out")
    during = AuditRun.load(trained.output)
    for name in SETS:
        assert f"align_audit step 2 on '{name}'  " in done.out
        view = run.select(name)
        assert [record.step for record in view.records] == [1, 2]
        assert [r.key for r in view.records] == [r.key for r in during.select(name).records[1:]]
        assert view.records[1].low_rank["activation"][1].principal_angles is not None
    log = tmp_path / "out" / "align_audit" / "records.jsonl"
    before = log.read_bytes()
    assert command(*arguments).code == 0
    assert log.read_bytes() == before, "nothing was audited twice"

    path = files["harmless"]
    changed = ["run", trained.output, "--probes", f"harmless={files['helpful-1.0']}", "--output", tmp_path / "out"]
    refused = command(*changed, "--config", files["options"], "--reference", trained.output.parent / "base")
    assert refused.code == 2
    assert "on other probe pairs called 'harmless'" in refused.err
    nameless = command("run", trained.output, "--probes", path, "--probes", path)
    assert nameless.code == 2
    assert "has no name; expected name=path" in nameless.err


def test_transfer_from_the_command_line(
    command: Any,  # noqa: F811
    enough: dict[str, Path],
    trained: Any,
    tmp_path: Path,
) -> None:
    common = asked(enough, trained, tmp_path / "out")
    done = command("transfer", trained.output / "checkpoint-2", *common, "--layer", "0,2", "--basis", "shift")
    assert done.code == 0, done.err
    record = TransferRecord.load(tmp_path / "out" / "transfer.json")
    assert record.step == 2
    assert (record.probe_names, record.layers, list(record.cells)) == (list(SETS), [0, 2], ["shift"])
    assert record.reference_source == "loaded from base"
    during = AuditRun.load(trained.output).records[-1].provenance
    assert record.provenance["helpful-1.0"].policy_hash == during.policy_hash
    for words in ("layer 2, shift basis", "on harmless", "on helpful-1.0", "random", "largest angle between"):
        assert words in done.out
    for layer in (0, 2):
        picture = tmp_path / "out" / "pictures" / f"transfer_shift_layer_{layer:02d}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "transfer in" in done.out

    (tmp_path / "file").touch()
    blocked = asked(enough, trained, tmp_path / "file" / "out")
    one = ["transfer", trained.output / "checkpoint-2", "--probes", f"harmless={enough['harmless']}"]
    for arguments, words in (
        (one, "a transfer is between at least two probe sets"),
        (["transfer", trained.output / "checkpoint-2", *blocked], "choose another --output"),
        (["transfer", trained.output, *common], "holds 2 checkpoints, and a transfer is of one policy"),
        (
            ["transfer", trained.output / "checkpoint-2", *common, "--layer", "top"],
            "--layer: expected N, N,M, all or auto",
        ),
        (
            ["transfer", trained.output / "checkpoint-2", *common, "--basis", "all"],
            "--basis: expected shift, activation or",
        ),
    ):
        refused = command(*arguments)
        assert refused.code == 2
        assert words in refused.err
