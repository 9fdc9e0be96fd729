from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from align_audit.errors import ConfigurationError
from align_audit.record.audit_record import AuditRecord, Control, Estimate
from align_audit.record.run import AuditRun
from align_audit.writers import tensorboard
from align_audit.writers.plots import gallery
from align_audit.writers.scalars import not_known, scalars
from align_audit.writers.tensorboard import TensorBoard, custom_scalars_layout
from tests.helpers.make_record import FEW_VALUES, NO_SHIFT, make_record, make_run

NO_RUN = AuditRun(Path("nowhere"), [], [], [])
LAYOUT_TAG = "custom_scalars__config__"


@pytest.fixture
def summary_writer(tmp_path: Path) -> Iterator[SummaryWriter]:
    writer = SummaryWriter(str(tmp_path))
    yield writer
    writer.close()


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def text(events: EventAccumulator, tag: str) -> dict[int, str]:
    found = events.Tensors(f"align_audit/{tag}/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found}


def board(summary_writer: Any, **options: Any) -> TensorBoard:
    """A writer beside this one of a trainer."""
    return TensorBoard("nowhere", lambda: summary_writer, **options)


class Recorder:
    """Stands in for a summary writer; remembers the calls."""

    def __init__(self, broken: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            self.calls.append((name, args))
            if name == self.broken:
                raise RuntimeError("disk full")

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args in self.calls if called == name]


def test_what_is_written_can_be_read_back(summary_writer: SummaryWriter, tmp_path: Path) -> None:
    run = make_run("destabilizing", 3, 5)
    for record in run[:2]:
        board(summary_writer, images=False).record(record, run)
    board(summary_writer).record(run[2], run)

    events = read(tmp_path)  # nobody closed the writer: it was flushed
    tags = events.Tags()
    expected = {tag for record in run for tag in scalars(record)}
    assert set(tags["scalars"]) == expected
    for tag in expected:
        values = {event.step: event.value for event in events.Scalars(tag)}
        assert set(values) == {record.step for record in run if tag in scalars(record)}
        for record in run:
            if record.step in values:
                assert values[record.step] == np.float32(scalars(record)[tag])
                assert math.isfinite(values[record.step])

    assert set(tags["images"]) == {
        "align_audit/margins/margins_over_steps",
        "align_audit/patching/recovery_by_layer_and_step",
        "align_audit/patching/layer_gain_by_layer_and_step",
        "align_audit/patching/block_transplants",
        "align_audit/low_rank/low_rank_curve",
        "align_audit/spinal/depth_trace",
    }
    for tag in tags["images"]:
        (event,) = events.Images(tag)
        assert event.step == 100
        image = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert image.shape == (event.height, event.width, 3)
        assert image.std() > 10, "not blank"

    alerts = text(events, "alerts")
    assert set(alerts) == {record.step for record in run if record.alerts} == {100}
    for alert in run[2].alerts:
        assert f"**{alert.level.upper()}: {alert.rule}**" in alerts[100]
        assert alert.message in alerts[100]
        assert alert.suggestion in alerts[100]
    assert "| noise | **FAILED** |" in text(events, "controls")[100]
    assert "| noise | not run |" in text(events, "controls")[0]
    assert f"| `patching.recovery` | layers 0–4 | {NO_SHIFT} |" in text(events, "not_known")[0]


def test_the_layout_is_written_once_and_its_charts_find_their_curves(
    summary_writer: SummaryWriter, tmp_path: Path
) -> None:
    writer = board(summary_writer, images=False)
    first = make_record(100, layers=12)
    # In the other, the activation basis reaches 95 % as well.
    reached = {k: curve.model_copy(update={"rank_95": 16.0}) for k, curve in first.low_rank["activation"].items()}
    records = [
        first,
        make_record(150, layers=12, low_rank=False).model_copy(update={"low_rank": {"activation": reached}}),
    ]
    for record in records:
        writer.record(record, [])
    events = read(tmp_path)
    (event,) = events.Tensors(LAYOUT_TAG)
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    emitted = events.Tags()["scalars"]
    charts = 0
    for category in layout.category:
        for chart in category.chart:
            charts += 1
            for pattern in chart.multiline.tag:
                # As TensorBoard's custom-scalars plugin matches.
                matched = [tag for tag in emitted if re.compile(pattern).match(tag)]
                assert matched, f"{chart.title}: nothing matches {pattern}"
                assert not any(tag.endswith(("_low", "_high")) for tag in matched), chart.title
                if r"layer_\d+$" in pattern:
                    assert len(matched) in (11, 12)
            for series in chart.margin.series:
                assert {series.value, series.lower, series.upper} <= set(emitted), chart.title
    assert charts == sum(len(charts) for charts in custom_scalars_layout().values()) > 15


@pytest.mark.parametrize(("layers", "last"), [(5, "layer_04"), (36, "layer_35"), (120, "layer_119")])
def test_layers_are_padded_so_that_tags_sort_by_layer(layers: int, last: str) -> None:
    record = make_record(100, layers=layers)
    tags = [tag for tag in scalars(record) if re.fullmatch(r"align_audit/patching/effect/layer_\d+", tag)]
    assert tags == sorted(tags)
    assert tags[-1].endswith(f"/{last}")
    assert record.patching is not None
    assert [scalars(record)[tag] for tag in tags] == [estimate.mean for estimate in record.patching.effect]


def test_estimates_stand_beside_the_ends_of_their_interval() -> None:
    record = make_record(100, layers=5)
    values = scalars(record)
    shift = record.margins.shift
    found = [values[f"align_audit/margins/shift{suffix}"] for suffix in ("", "_low", "_high")]
    assert found == [shift.mean, shift.low, shift.high]
    assert record.patching is not None
    effect = record.patching.effect[3]
    assert values["align_audit/patching/effect/layer_03"] == effect.mean
    assert not any("/layer_" in tag.rpartition("/")[2] and tag.endswith(("_low", "_high")) for tag in values)


def test_tags_are_those_of_the_documentation() -> None:
    """Every group, and every per-layer name the module's docstring promises, is emitted; and no other group."""
    record = make_record(100, layers=12, kind="destabilizing", progress=0.9)
    values = scalars(record)
    groups = {tag.split("/")[1] for tag in values}
    assert groups == {"margins", "patching", "controls", "localization", "low_rank", "spinal", "alerts", "cost"}
    assert record.patching is not None
    peak = record.patching.peak_layer
    for tag, value in {
        "patching/peak_layer": peak,
        "patching/effect_p_adjusted/layer_07": record.patching.effect_p_adjusted[7],
        "controls/noise/passed": 0,
        "controls/reverse/passed": 1,
        "controls/noise/effect/layer_07": record.controls.noise.effect[7].mean,  # type: ignore[index]
        "controls/random_subspace/effect/rank_08": record.controls.random_subspace.effect[3].mean,  # type: ignore[index]
        "controls/split_half/value": record.controls.split_half.value,
        "localization/selection_frequency/layer_07": record.localization.selection_frequency[7],  # type: ignore[union-attr]
        "localization/selected_layers": len(record.localization.selected_layers),  # type: ignore[union-attr]
        "localization/null_cv_r2_max": max(record.localization.null_cv_r2),  # type: ignore[union-attr]
        f"low_rank/shift/layer_{peak:02d}/full_effect": record.low_rank["shift"][peak].full_effect.mean,  # type: ignore[index]
        f"low_rank/shift/layer_{peak:02d}/effect_fraction/rank_08": record.low_rank["shift"][peak]
        .effect_fraction[3]
        .mean,  # type: ignore[index]
        f"low_rank/shift/layer_{peak:02d}/largest_principal_angle": 0.9,
        "spinal/policy/transport/layer_07": record.spinal.policy.transport[7],  # type: ignore[union-attr]
        "spinal/reference/contraction_r2/layer_07": record.spinal.reference.contraction_r2[7],  # type: ignore[union-attr]
        "alerts/error": 2,
        "alerts/info": 0,
        "cost/seconds": record.cost.seconds,
    }.items():
        assert values[f"align_audit/{tag}"] == value, tag
    assert "align_audit/spinal/policy/transport/layer_11" not in values, "nothing lies above the last layer"
    assert "align_audit/controls/noise/passed" not in scalars(make_record(0, progress=0.0)), "not run is no verdict"


def test_what_is_not_known_is_left_out_and_listed_with_its_reason() -> None:
    record = make_record(0, layers=36, progress=0.0)
    values = scalars(record)
    assert all(math.isfinite(value) for value in values.values())
    assert not any("recovery" in tag or "peak_layer" in tag for tag in values)
    listed = not_known(record)
    assert listed["patching.recovery", NO_SHIFT] == list(range(36))
    assert listed["patching.peak_layer", "policy and reference are equal bit by bit"] == []
    # R² says why with the reason of its slope.
    assert listed["spinal.policy.contraction", FEW_VALUES] == listed["spinal.policy.contraction_r2", FEW_VALUES] == [0]
    assert listed["low_rank", NO_SHIFT] == []
    assert "the record gives no reason" not in str(listed)


def test_infinities_and_unknown_intervals_are_not_drawn_either() -> None:
    record = make_record(100, layers=2)
    margins = record.margins.model_copy(
        update={
            "kl": Estimate(mean=math.inf, low=0.1, high=math.inf),
            "shift": Estimate(mean=1.0, low=math.nan, high=math.nan, reason="one pair has no interval"),
        }
    )
    record = record.model_copy(update={"margins": margins})
    values = scalars(record)
    assert values["align_audit/margins/shift"] == 1.0
    assert not {"align_audit/margins/kl", "align_audit/margins/shift_low", "align_audit/margins/kl_high"} & set(values)
    assert ("margins.shift", "one pair has no interval") in not_known(record)
    assert ("margins.kl", "the value is inf") in not_known(record)


def test_a_complete_record_has_nothing_to_list() -> None:
    record = make_record(100, layers=12, low_rank=False, reasons={})
    assert not_known(record) == {}
    recorder = Recorder()
    board(recorder, images=False).record(record, [])
    assert {args[0] for args in recorder.named("add_text")} == {"align_audit/controls"}


def test_parts_that_were_switched_off_give_their_reason_and_no_picture() -> None:
    record = make_record(10, layers=3, patching=False, localization=False, low_rank=False, spinal=False)
    recorder = Recorder()
    board(recorder).record(record, [])
    assert [args[0] for args in recorder.named("add_image")] == ["align_audit/margins/margins_over_steps"]
    written = {args[0]: args[1] for args in recorder.named("add_text")}
    for part in ("patching", "localization", "spinal"):
        assert f"| `{part}` |  | switched off in the configuration |" in written["align_audit/not_known"]


def test_the_given_writer_is_flushed_and_never_closed() -> None:
    recorder, other = Recorder(), Recorder()
    trainers = [recorder, recorder, other]
    writer = TensorBoard("nowhere", lambda: trainers.pop(0), images=False)  # type: ignore[arg-type, return-value]
    writer.start(NO_RUN)
    writer.record(make_record(10, layers=2), [])
    assert recorder.calls[-1][0] == "flush"
    assert not recorder.named("close")
    assert len(recorder.named("add_custom_scalars")) == 1

    writer.record(make_record(20, layers=2), [])
    writer.close()
    assert not recorder.named("close")
    assert not other.named("close")
    assert {args[2] for args in other.named("add_scalar")} == {20}
    assert not other.named("add_custom_scalars"), "the same log has its layout"

    failing = Recorder(broken="add_text")
    with pytest.raises(RuntimeError, match="disk full"):
        board(failing, images=False).record(make_record(10, layers=2), [])
    assert failing.calls[-1][0] == "flush", "what was written before the break is kept"


def test_it_goes_on_in_the_same_folder_when_the_trainer_has_closed_its_writer(tmp_path: Path) -> None:
    first, second, third = make_run("healthy", 3, 2)
    trainers: list[SummaryWriter | None] = [SummaryWriter(str(tmp_path / "runs" / "today"))]
    writer = TensorBoard(tmp_path, lambda: trainers[0], images=False)
    writer.start(NO_RUN)
    writer.record(first, [])
    assert trainers[0] is not None
    trainers[0].close()
    trainers[0] = None
    writer.record(second, [])
    writer.record(third, [])
    writer.close()
    files = list(tmp_path.rglob("events.out.*"))
    assert sorted(file.name.endswith(".align_audit") for file in files) == [False, True]
    assert {file.parent for file in files} == {tmp_path / "runs" / "today"}
    shown = read(tmp_path / "runs" / "today").Scalars("align_audit/margins/shift")
    assert [event.step for event in shown] == [0, 50, 100]


def test_without_a_trainers_log_it_has_a_folder_of_its_own_or_refuses(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path, lambda: None)
    assert not (tmp_path / "align_audit").exists(), "nothing is opened before the start"
    writer.start(NO_RUN)
    writer.close()
    assert len(list((tmp_path / "align_audit" / "tensorboard").iterdir())) == 1

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"cannot write TensorBoard curves below .*tensorboard=\"off\""):
        TensorBoard(tmp_path / "file", lambda: None).start(NO_RUN)


def test_pictures_show_the_history_up_to_the_record_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("healthy", 4, 2)
    drawn: list[list[int]] = []

    def margins_over_steps(records: Sequence[AuditRecord]) -> Any:
        drawn.append([record.step for record in records])
        raise StopIteration

    monkeypatch.setitem(gallery.PICTURES, "margins_over_steps", gallery.Picture("margins", margins_over_steps))
    for history in ([], run[:2], run[:3], run):
        with pytest.raises(StopIteration):
            board(Recorder()).record(run[2], history)
    assert drawn == [[100], [0, 50, 100], [0, 50, 100], [0, 50, 100]]


def test_tables_survive_bars_and_line_breaks() -> None:
    record = make_record(100, layers=6)
    noise = Control(verdict="failed", reason="log p(y|x)\nbroke")
    record = record.model_copy(update={"controls": record.controls.model_copy(update={"noise": noise})})
    table = tensorboard.controls_table(record)
    assert "| noise | **FAILED** | log p(y\\|x) broke |" in table.splitlines()
    assert table.startswith("**Finding:** localized in layers 2–4 (")
    assert len(table.splitlines()) == 11  # the finding, an empty line, head, rule, six controls, the reference


def test_an_alert_without_numbers_shows_none() -> None:
    alert = make_record(100, kind="destabilizing", progress=1.0).alerts[0]
    assert "*Numbers:* value -2.25, baseline 0, threshold -1" in tensorboard.alert_text(alert)
    bare = alert.model_copy(update={"value": math.nan, "baseline": None, "threshold": None})
    assert "Numbers" not in tensorboard.alert_text(bare)
