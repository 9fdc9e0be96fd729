"""What TensorBoard shows of a run: curves, pictures, texts and the layout of its charts."""

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
from align_audit.record.audit_record import AuditRecord, Control
from align_audit.record.run import AuditRun
from align_audit.writers import tensorboard
from align_audit.writers.few_scalars import few_scalars
from align_audit.writers.plots import gallery
from align_audit.writers.scalars import not_known, scalars
from align_audit.writers.standing import standing_at
from align_audit.writers.tensorboard import TensorBoard, custom_scalars_layout
from tests.helpers.alert_cases import on_set
from tests.helpers.make_record import make_record, make_run, make_sites
from tests.helpers.record_parts import NO_SHIFT
from tests.helpers.screens import a_run, quick_look

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
    """A writer beside this one of a trainer, of everything unless ``scalars`` says otherwise."""
    return TensorBoard("nowhere", lambda: summary_writer, **({"scalars": "all"} | options))


def few(record: AuditRecord, history: Sequence[AuditRecord]) -> dict[str, float]:
    """The curves that tell how a run stands."""
    return few_scalars(standing_at(record, history))


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
    expected = {record.step: scalars(record) | few(record, run) for record in run}
    assert set(tags["scalars"]) == {tag for values in expected.values() for tag in values}
    for tag in tags["scalars"]:
        values = {event.step: event.value for event in events.Scalars(tag)}
        assert set(values) == {step for step in expected if tag in expected[step]}
        for record in run:
            if record.step in values:
                assert values[record.step] == np.float32(expected[record.step][tag])
                assert math.isfinite(values[record.step])

    assert set(tags["images"]) == {
        "align_audit health/over_steps",
        "align_audit where/by_layer",
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


def test_a_complete_record_has_nothing_to_list() -> None:
    record = make_record(100, layers=12, low_rank=False, reasons={})
    assert not_known(record) == {}
    recorder = Recorder()
    board(recorder, images=False).record(record, [])
    assert {args[0] for args in recorder.named("add_text")} == {"align_audit/controls", "align_audit health/status"}


def test_parts_that_were_switched_off_give_their_reason_and_no_picture() -> None:
    record = make_record(10, layers=3, patching=False, localization=False, low_rank=False, spinal=False)
    recorder = Recorder()
    board(recorder).record(record, [])
    assert [args[0] for args in recorder.named("add_image")] == [
        "align_audit health/over_steps", "align_audit/margins/margins_over_steps"
    ]  # fmt: skip
    written = {args[0]: args[1] for args in recorder.named("add_text")}
    for part in ("patching", "localization", "spinal"):
        assert f"| `{part}` |  | switched off in the configuration |" in written["align_audit/not_known"]


def test_the_given_writer_is_flushed_and_never_closed() -> None:
    recorder, other = Recorder(), Recorder()
    trainers = [recorder, recorder, other]
    writer = TensorBoard("nowhere", lambda: trainers.pop(0), images=False, scalars="all")  # type: ignore[arg-type, return-value]
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
    writer = TensorBoard(tmp_path, lambda: trainers[0], images=False, scalars="all")
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
    # Files of one second are read in the order of a number in their names, as text: 10 before 9.
    assert sorted(event.step for event in shown) == [0, 50, 100]


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


def test_each_curve_of_a_finer_site_has_a_chart(tmp_path: Path) -> None:
    record = make_record(100, layers=12, sites=make_sites())
    charts = custom_scalars_layout(sites=record.sites)["align_audit: finer sites"]
    assert len(charts) == 4
    assert "align_audit: finer sites" not in custom_scalars_layout()
    writer = SummaryWriter(tmp_path)
    TensorBoard(tmp_path, lambda: writer, scalars="all").record(record, [])
    writer.close()
    tags = read(tmp_path).Tags()
    assert {tag for tag in tags["images"] if "/sites/" in tag} == {
        "align_audit/sites/head_attribution_map", "align_audit/sites/site_curves"
    }  # fmt: skip


# -- what is shown by default ------------------------------------------------------------------------------------------


def test_by_default_about_ten_curves_grouped_before_the_slash(summary_writer: SummaryWriter, tmp_path: Path) -> None:
    run = a_run("ruined")
    writer = board(summary_writer, scalars="few")
    for record in run[:-1]:
        writer.record(record, run)
    look = quick_look(run[-1])
    writer.record(look, [*run[:-1], look])
    events = read(tmp_path)
    tags = events.Tags()
    health = ("chosen_logp_change_per_token", "kl", "next_token_accuracy", "reward_accuracy", "entropy_ratio", "status")
    where = ("peak_layer", "peak_share", "additivity", "delta_align")
    assert set(tags["scalars"]) == {
        *(f"align_audit health/{name}" for name in health), *(f"align_audit where/{name}" for name in where)
    }  # fmt: skip
    assert [event.value for event in events.Scalars("align_audit health/status")] == [0.0, 0.0, 0.0, 2.0, 2.0]
    assert [event.step for event in events.Scalars("align_audit where/additivity")] == [5, 10, 20], "of full audits"
    assert set(tags["images"]) == {"align_audit health/over_steps", "align_audit where/by_layer"}
    assert [event.step for event in events.Images("align_audit health/over_steps")] == [0, 5, 10, 20], "of full audits"
    assert [event.step for event in events.Images("align_audit where/by_layer")] == [5, 10, 20]
    assert {(event.width, event.height) for tag in tags["images"] for event in events.Images(tag)} == {(640, 420)}
    assert set(tags["tensors"]) == {"align_audit health/status/text_summary"}, "no layout of curves that are not there"


def test_the_status_text_says_what_is_wrong_and_what_to_do(summary_writer: SummaryWriter, tmp_path: Path) -> None:
    run = a_run("ruined")
    for record in run:
        board(summary_writer, scalars="few", images=False).record(record, run)
    found = read(tmp_path).Tensors("align_audit health/status/text_summary")
    said = {event.step: event.tensor_proto.string_val[0].decode() for event in found}
    assert said[10].startswith("**HEALTHY** at step 10\n\nchosen +0.01, KL 0.04 (limit 0.35)")
    assert "Do:" not in said[10]
    assert said[20].startswith("**ERROR** at step 20: the policy is leaving its language\n\n")
    assert "**Do:** last clean audit: step 10; no checkpoint" in said[20]
    assert run[3].alerts[0].message in said[20]
    assert "*Evidence:* 6 of 6 controls." in said[20]


def test_a_named_set_has_its_curves_in_the_same_groups() -> None:
    record = on_set(a_run("well")[1], "harmless")
    tags = set(few(record, []))
    assert {tag.rsplit("/", 1)[0] for tag in tags} == {"align_audit health/harmless", "align_audit where/harmless"}
