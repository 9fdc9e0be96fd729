from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from align_audit.record.audit_record import AuditRecord, Control, Estimate
from align_audit.writers.plots import gallery as plots
from align_audit.writers.plots.canvas import RED, pixels
from tests.helpers.make_record import NO_SHIFT, make_record, make_run

NAMES = {
    "margins_over_steps",
    "recovery_by_layer_and_step",
    "layer_gain_by_layer_and_step",
    "block_transplants",
    "low_rank_curve",
    "depth_trace",
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    # Matplotlib warns of layouts that collapse, missing glyphs and empty legends.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def texts(figure: Figure) -> str:
    """All that is written in a figure, lines joined as they were before wrapping."""
    return " ".join(artist.get_text() for artist in figure.findobj(Text) if artist.get_text())


def main_axes(figure: Figure) -> Axes:
    return figure.axes[0]


def heat(figure: Figure) -> np.ma.MaskedArray[Any, Any]:
    return np.ma.asarray(main_axes(figure).images[0].get_array())


def error_bars(axes: Axes) -> dict[str, list[tuple[float, float, float, float]]]:
    """Label → (x, mean, low, high) of each point with a bar."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        line, _, (bars,) = container.lines
        points = zip(*line.get_data(), bars.get_segments(), strict=True)
        found.setdefault(container.get_label(), []).extend(
            (float(x), float(y), float(segment[0, 1]), float(segment[1, 1])) for x, y, segment in points
        )
    return found


def broken(record: AuditRecord, **controls: Control) -> AuditRecord:
    return record.model_copy(update={"controls": record.controls.model_copy(update=controls)})


FAILED = Control(verdict="failed", reason="noise does the same")


@pytest.mark.parametrize(("layers", "audits"), [(5, 1), (36, 3)])
def test_every_picture_is_drawn_and_nothing_runs_out_of_it(layers: int, audits: int) -> None:
    run = make_run("destabilizing", 3, layers)[-audits:]
    figures = plots.draw_all(run)
    assert set(figures) == NAMES
    for name, figure in figures.items():
        image = pixels(figure)
        assert image.std() > 10, f"{name} is blank"
        height, width = image.shape[:2]
        for artist in figure.findobj(Text):
            if not artist.get_text().strip() or not artist.get_visible():
                continue
            box = artist.get_window_extent()
            inside = box.x0 > -2 and box.x1 < width + 2 and box.y0 > -2 and box.y1 < height + 2
            # Ticks outside of the view are kept by matplotlib and not drawn.
            assert inside or artist in tick_labels_out_of_view(figure), f"{name}: {artist.get_text()!r} at {box}"


def tick_labels_out_of_view(figure: Figure) -> set[Text]:
    found = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found |= {
                label
                for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
                if not low <= tick.get_loc() <= high
                for label in (tick.label1, tick.label2)
            }
    return found


def test_save_all_writes_png_files(tmp_path: Path) -> None:
    run = make_run("healthy", 4, 5)
    paths = plots.save_all(run, tmp_path / "new" / "folder")
    assert set(paths) == NAMES
    for name, path in paths.items():
        assert path == tmp_path / "new" / "folder" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
    assert plots.save_all([], tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


def test_pictures_of_no_record_are_refused() -> None:
    for draw in (
        plots.recovery_by_layer_and_step,
        plots.layer_gain_by_layer_and_step,
        plots.block_transplants,
        plots.margins_over_steps,
    ):
        with pytest.raises(ValueError, match="no records to draw"):
            draw([])


def test_pyplot_is_never_loaded() -> None:
    code = (
        "import sys\n"
        "from align_audit.writers.plots import gallery as plots\n"
        "from tests.helpers.make_record import make_run\n"
        "from align_audit.writers.plots.canvas import pixels\n"
        "pixels(plots.block_transplants(make_run(audits=2, layers=2)))\n"
        "print('matplotlib.pyplot' in sys.modules, 'matplotlib.figure' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.split() == ["False", "True"]


def test_a_users_style_neither_leaks_in_nor_is_changed() -> None:
    run = make_run(audits=2, layers=2)
    with matplotlib.rc_context({"figure.facecolor": "black", "axes.facecolor": "black", "text.color": "white"}):
        before = dict(matplotlib.rcParams)
        figure = plots.margins_over_steps(run)
        assert dict(matplotlib.rcParams) == before
        assert to_rgb(figure.get_facecolor()) == (1, 1, 1)
        assert pixels(figure).mean() > 200


@pytest.mark.parametrize(
    ("draw", "field", "below", "above"),
    [
        (plots.recovery_by_layer_and_step, "recovery", None, None),
        (plots.layer_gain_by_layer_and_step, "layer_gain", "embedding_gain", "head_gain"),
        (plots.block_transplants, "block_transplant", "embedding_transplant", "head_transplant"),
    ],
)
def test_a_heat_map_shows_the_records_numbers(draw: Any, field: str, below: str | None, above: str | None) -> None:
    run = make_run("destabilizing", 4, 6)
    figure = draw([run[2], run[0], run[3], run[1]])  # in any order
    expected = []
    for record in run:
        patching = record.patching
        assert patching is not None
        column = [getattr(patching, below).mean] if below else []
        column += [estimate.mean for estimate in getattr(patching, field)]
        column += [getattr(patching, above).mean] if above else []
        expected.append(column)
    shown = heat(figure)
    assert shown.shape == np.array(expected).T.shape
    np.testing.assert_array_equal(shown.filled(math.nan), np.array(expected).T)
    bottom, top = main_axes(figure).get_ylim()
    assert bottom < top, "layer 0 lies at the bottom"
    assert main_axes(figure).images[0].origin == "lower"
    norm = main_axes(figure).images[0].norm
    assert norm.vmin == -norm.vmax, "the diverging map is centred on 0"
    labels = [label.get_text() for label in main_axes(figure).get_yticklabels()]
    assert labels == ["embedding"] * bool(below) + [str(layer) for layer in range(6)] + ["head"] * bool(above)
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0", "50", "100", "150"]


def test_the_peak_layer_is_marked_in_its_row() -> None:
    run = make_run("destabilizing", 3, 6)
    figure = plots.block_transplants(run)
    (dots,) = main_axes(figure).collections
    rows = [int(y) for _, y in np.asarray(dots.get_offsets())]
    peaks = [record.patching.peak_layer for record in run[1:] if record.patching is not None]
    assert rows == [peak + 1 for peak in peaks if peak is not None]  # the embedding is row 0
    assert len(rows) == 2


def test_what_is_unknown_is_masked_and_said() -> None:
    run = make_run("healthy", 3, 5)
    run[2] = make_record(100, layers=5, patching=False)
    figure = plots.recovery_by_layer_and_step(run)
    assert heat(figure).mask.all(axis=0).tolist() == [True, False, True]
    said = texts(figure)
    assert f"Hatched is not known (step 0): {NO_SHIFT}." in said
    assert "Hatched is not known (step 100): switched off in the configuration." in said
    assert main_axes(figure).patch.get_hatch()


def test_failed_controls_are_said_in_red_and_stand_under_their_columns() -> None:
    run = make_run("healthy", 4, 5)
    run[3] = broken(run[3], noise=FAILED)
    figure = plots.recovery_by_layer_and_step(run)
    (warning,) = [t for t in figure.findobj(Text) if t.get_text() == "Not evidence at step 150: noise control failed"]
    assert warning.get_color() == RED
    strip = figure.axes[1]
    names = [label.get_text() for label in strip.get_yticklabels()]
    verdicts = np.asarray(strip.images[0].get_array())
    assert names == ["noise", "reverse", "identity", "split half"]
    assert verdicts[0].tolist() == [2, 0, 0, 1]  # not run, passed, passed, failed
    assert verdicts[2].tolist() == [0, 0, 0, 0]

    calm = texts(plots.recovery_by_layer_and_step(make_run("healthy", 4, 5)))
    assert "Not evidence" not in calm
    # Unstable halves doubt the peak, which this picture does not show.
    halves = texts(plots.recovery_by_layer_and_step([*run[:3], broken(run[2], split_half=FAILED)]))
    assert "Not evidence" not in halves
    peaks = texts(plots.block_transplants([*run[:2], broken(run[2], split_half=FAILED)]))
    assert "Peak layer is not evidence at step 100: split half control failed" in peaks


def test_one_audit_falls_back_to_a_curve_with_intervals() -> None:
    record = make_record(70, layers=5)
    patching = record.patching
    assert patching is not None
    axes = main_axes(plots.block_transplants([record]))
    shown = error_bars(axes)["block transplant, with interval"]
    expected = [(float(layer), e.mean, e.low, e.high) for layer, e in enumerate(patching.block_transplant)]
    np.testing.assert_allclose(shown, expected, rtol=1e-12)
    (ring,) = [artist for artist in axes.collections if artist.get_label() == f"peak layer {patching.peak_layer}"]
    assert np.asarray(ring.get_offsets())[0, 0] == patching.peak_layer

    curve = main_axes(plots.recovery_by_layer_and_step([record]))
    noise = record.controls.noise.effect
    assert noise is not None
    shown = error_bars(curve)["noise of the same size"]
    shift = record.margins.shift.mean
    np.testing.assert_allclose(shown, [(i, e.mean / shift, e.low / shift, e.high / shift) for i, e in enumerate(noise)])


def test_one_audit_with_a_failed_control_or_nothing_known() -> None:
    record = broken(make_record(70, layers=5), noise=Control(verdict="failed", reason="so says a test", effect=None))
    assert "Not evidence: noise control failed (so says a test)" in texts(plots.layer_gain_by_layer_and_step([record]))
    said = texts(plots.recovery_by_layer_and_step([make_record(0, layers=5, progress=0.0)]))
    assert "not known (reason below)" in said
    assert f"Hatched is not known: {NO_SHIFT}." in said


def test_runs_without_a_part_say_so() -> None:
    bare = make_record(20, layers=3, patching=False, localization=False, low_rank=False, spinal=False)
    for name, figure in plots.draw_all([bare]).items():
        if name != "margins_over_steps":
            assert "not measured: switched off in the configuration" in texts(figure), name


def test_columns_of_another_model_are_left_out() -> None:
    run = [*make_run("healthy", 3, 4), make_record(150, layers=6), make_record(200, layers=6, progress=1.0)]
    assert heat(plots.recovery_by_layer_and_step(run)).shape == (6, 2)


def test_a_runaway_value_does_not_bleach_a_large_map() -> None:
    run = make_run("healthy", 30, 20)
    patching = run[5].patching
    assert patching is not None
    wild = [Estimate(mean=1e6, low=9e5, high=2e6), *patching.layer_gain[1:]]
    run[5] = run[5].model_copy(update={"patching": patching.model_copy(update={"layer_gain": wild})})
    figure = plots.layer_gain_by_layer_and_step(run)
    assert main_axes(figure).images[0].norm.vmax < 1
    assert main_axes(figure).images[0].colorbar.extend == "both"


def test_a_long_run_of_a_deep_model_stays_readable() -> None:
    figure = plots.block_transplants(make_run("destabilizing", 200, 48))
    pixels(figure, dpi=60)
    for labels in (main_axes(figure).get_yticklabels(), figure.axes[1].get_xticklabels()):
        assert 3 < len(labels) <= 20
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_the_depth_trace_shows_both_models_and_the_terminal_block() -> None:
    record = make_record(100, layers=36, kind="destabilizing", progress=0.8)
    spinal = record.spinal
    assert spinal is not None
    figure = plots.depth_trace(record)
    upper, lower, plane = figure.axes
    for axes, name in ((upper, "contraction"), (lower, "transport")):
        lines = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
        np.testing.assert_array_equal(lines["policy"], getattr(spinal.policy, name))
        np.testing.assert_array_equal(lines["reference"], getattr(spinal.reference, name))
    block = upper.patches[0].get_extents().transformed(upper.transData.inverted())
    assert (round(block.x0, 6), round(block.x1, 6)) == (
        spinal.terminal_layers[0] - 0.5,
        spinal.terminal_layers[-1] + 0.5,
    )
    assert any(patch.get_hatch() for patch in upper.patches), "layer 0 is not known"
    assert not any(patch.get_hatch() for patch in lower.patches)
    assert "Hatched is not known (contraction, layer 0): the window holds 11 singular values" in texts(figure)
    inner = spinal.terminal_layers[:-1]
    paths = [np.asarray(line.get_xydata()) for line in plane.lines]
    ours = np.column_stack([spinal.policy.contraction[:-1], spinal.policy.transport])
    assert any(path.shape == ours[inner].shape and np.array_equal(path, ours[inner]) for path in paths)
    assert f"coherence {spinal.coherence:.3g}" in texts(figure)


def test_the_low_rank_curve_shows_fractions_control_and_rank_95() -> None:
    record = make_record(100, layers=12)
    assert record.patching is not None
    peak = record.patching.peak_layer
    assert peak is not None
    figure = plots.low_rank_curve(record)
    panels = {axes.get_title(loc="left").split(":")[0]: axes for axes in figure.axes}
    assert set(panels) == {f"layer {layer}, {basis} basis" for basis, by in record.low_rank.items() for layer in by}
    for basis, by_layer in record.low_rank.items():
        for layer, curve in by_layer.items():
            axes = panels[f"layer {layer}, {basis} basis"]
            bars = error_bars(axes)
            np.testing.assert_allclose(
                bars["share of the effect"],
                [(k, e.mean, e.low, e.high) for k, e in zip(curve.ranks, curve.effect_fraction, strict=True)],
            )
            lines = {line.get_label(): line for line in axes.lines}
            np.testing.assert_array_equal(lines["explained variance"].get_ydata(), curve.explained_variance_ratio)
            if math.isnan(curve.rank_95):
                assert "rank 95" not in lines
                assert axes.get_title(loc="left").endswith("rank 95 not known")
            else:
                assert list(lines["rank 95"].get_xdata()) == [curve.rank_95] * 2
            # The control belongs to the shift basis at the peak layer, and is in nats there.
            assert ("random subspaces" in bars) == ((basis, layer) == ("shift", peak))
    random = record.controls.random_subspace.effect
    assert random is not None
    full = record.low_rank["shift"][peak].full_effect.mean
    shown = error_bars(panels[f"layer {peak}, shift basis"])["random subspaces"]
    np.testing.assert_allclose([y for _, y, _, _ in shown], [estimate.mean / full for estimate in random])
    assert "no evaluated rank reaches 95 % of the effect" in texts(figure)


@pytest.mark.parametrize(("most", "said"), [(3.7, True), (1.2, False)])
def test_a_share_far_above_1_is_pointed_out(most: float, said: bool) -> None:
    record = make_record(100, layers=12)
    layer, curve = next(iter(record.low_rank["activation"].items()))
    shares = [Estimate(mean=share, low=share, high=share) for share in np.linspace(0.96, most, len(curve.ranks))]
    changed = curve.model_copy(update={"effect_fraction": shares, "rank_95": float(curve.ranks[0])})
    low_rank = {"activation": {layer: changed}, "shift": record.low_rank["shift"]}
    figure = plots.low_rank_curve(record.model_copy(update={"low_rank": low_rank}))
    titles = {axes.get_title(loc="left") for axes in figure.axes}
    assert f"layer {layer}, activation basis: rank 95 is {curve.ranks[0]}" + (", overshoots" if said else "") in titles
    words = f"In the activation basis the share reaches {most:g} (layer {layer})"
    assert (words in texts(figure).replace("\n", " ")) == said

    many = make_record(100, layers=20, low_rank="all")
    bases = {**many.low_rank, "activation": {**many.low_rank["activation"], 3: changed}}
    figure = plots.low_rank_curve(many.model_copy(update={"low_rank": bases}))
    assert (f"the share reaches {most:g} (layer 3)" in texts(figure).replace("\n", " ")) == said
    rings = [tuple(place) for found in figure.axes[0].collections for place in np.asarray(found.get_offsets())]
    assert ((0, 3) in rings) == (not said)


def test_many_layers_of_low_rank_become_a_map() -> None:
    record = make_record(100, layers=20, low_rank="all")
    figure = plots.low_rank_curve(record)
    for axes, (basis, by_layer) in zip(figure.axes, record.low_rank.items(), strict=False):
        assert axes.get_title(loc="left") == f"{basis} basis"
        expected = [[estimate.mean for estimate in by_layer[layer].effect_fraction] for layer in range(20)]
        np.testing.assert_array_equal(np.ma.asarray(axes.images[0].get_array()).filled(math.nan), expected)
        rings = axes.collections[0].get_offsets() if axes.collections else []
        assert len(rings) == sum(not math.isnan(curve.rank_95) for curve in by_layer.values())


def test_margins_over_steps_show_the_curves_bands_and_alerts() -> None:
    run = make_run("destabilizing", 11, 3)
    figure = plots.margins_over_steps(run)
    strip, shift, change, kl, share = figure.axes
    steps = [record.step for record in run]
    for axes, name, label in (
        (shift, "shift", "margin shift"),
        (change, "chosen_logp_change_per_token", "chosen"),
        (change, "rejected_logp_change_per_token", "rejected"),
        (kl, "kl", "KL"),
        (share, "accuracy", "pairs with a margin shift > 0"),
    ):
        line = next(line for line in axes.lines if line.get_label() == label)
        assert list(line.get_xdata()) == steps
        assert list(line.get_ydata()) == [getattr(record.margins, name).mean for record in run]
    band = shift.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == max(record.margins.shift.high for record in run)

    alerts = [alert for record in run for alert in record.alerts]
    rules = [label.get_text() for label in strip.get_yticklabels()]
    assert set(rules) == {alert.rule for alert in alerts}
    marks = {
        (str(marks.get_label()), rules[int(y)], int(x))
        for marks in strip.collections
        for x, y in np.asarray(marks.get_offsets())
    }
    assert marks == {(alert.level, alert.rule, alert.step) for alert in alerts}
    first = min(alert.step for alert in alerts if alert.level == "error")
    assert any(line.get_color() == RED and list(line.get_xdata()) == [first] * 2 for line in shift.lines)


def test_a_healthy_run_has_no_alert_strip_and_an_unknown_margin_is_hatched() -> None:
    run = make_run("healthy", 3, 2)
    lost = run[1].margins.model_copy(update={"kl": Estimate.unknown("logits overflowed")})
    run[1] = run[1].model_copy(update={"margins": lost})
    figure = plots.margins_over_steps(run)
    shift, _, kl, _ = figure.axes
    assert [bool(patch.get_hatch()) for patch in kl.patches] == [True]
    assert not shift.patches
    assert "Hatched is not known (KL, step 50): logits overflowed." in texts(figure)


def test_margins_of_one_audit_show_every_interval_and_its_alerts() -> None:
    record = make_record(70, layers=3, kind="destabilizing", progress=1.0)
    figure = plots.margins_over_steps([record])
    points = [container.lines[0].get_xdata()[0] for axes in figure.axes for container in axes.containers]
    expected = [
        getattr(record.margins, name).mean for name in ("shift", "chosen_logp_change_per_token", "kl", "accuracy")
    ]
    assert set(expected) <= {float(point) for point in points}
    for alert in record.alerts:
        assert alert.rule in texts(figure)
