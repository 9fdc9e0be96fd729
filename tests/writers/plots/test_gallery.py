"""Every picture of a run: drawn, saved and named once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from align_audit.record.audit_record import AuditRecord
from align_audit.writers.plots import gallery
from align_audit.writers.plots.canvas import pixels
from align_audit.writers.plots.layers import block_transplants, layer_gain_by_layer_and_step, recovery_by_layer_and_step
from align_audit.writers.plots.margins import margins_over_steps
from tests.helpers.figures import texts
from tests.helpers.make_record import make_record, make_run, make_sites

pytestmark = pytest.mark.usefixtures("no_warnings")


NAMES = {
    "margins_over_steps",
    "recovery_by_layer_and_step",
    "layer_gain_by_layer_and_step",
    "block_transplants",
    "low_rank_curve",
    "depth_trace",
}


@pytest.mark.parametrize(("layers", "audits"), [(5, 1), (36, 3)])
def test_every_picture_is_drawn_and_nothing_runs_out_of_it(layers: int, audits: int) -> None:
    run = make_run("destabilizing", 3, layers)[-audits:]
    figures = gallery.draw_all(run)
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
    paths = gallery.save_all(run, tmp_path / "new" / "folder")
    assert set(paths) == NAMES
    for name, path in paths.items():
        assert path == tmp_path / "new" / "folder" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
    assert gallery.save_all([], tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


def test_every_picture_is_of_a_part_that_a_record_may_lack(tmp_path: Path) -> None:
    record = make_record(100, layers=3, sites=make_sites(3, heads=3, peak=1))
    pictures = gallery.pictures_of([record])
    assert set(pictures) == NAMES | {"head_attribution_map", "site_curves"}
    bare = make_record(100, layers=3, patching=False, low_rank=False, spinal=False)
    for name, picture in pictures.items():
        assert picture.part in AuditRecord.model_fields
        assert picture.measured(record)
        assert picture.measured(bare) == (name == "margins_over_steps")
    assert set(gallery.pictures_of([bare])) == NAMES


def test_pictures_of_no_record_are_refused() -> None:
    for draw in (
        recovery_by_layer_and_step,
        layer_gain_by_layer_and_step,
        block_transplants,
        margins_over_steps,
    ):
        with pytest.raises(ValueError, match="no records to draw"):
            draw([])


def test_pyplot_is_never_loaded() -> None:
    code = (
        "import sys\n"
        "from align_audit.writers.plots import gallery\n"
        "from tests.helpers.make_record import make_run\n"
        "from align_audit.writers.plots.canvas import pixels\n"
        "pixels(gallery.block_transplants(make_run(audits=2, layers=2)))\n"
        "print('matplotlib.pyplot' in sys.modules, 'matplotlib.figure' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.split() == ["False", "True"]


def test_a_users_style_neither_leaks_in_nor_is_changed() -> None:
    run = make_run(audits=2, layers=2)
    with matplotlib.rc_context({"figure.facecolor": "black", "axes.facecolor": "black", "text.color": "white"}):
        before = dict(matplotlib.rcParams)
        figure = margins_over_steps(run)
        assert dict(matplotlib.rcParams) == before
        assert to_rgb(figure.get_facecolor()) == (1, 1, 1)
        assert pixels(figure).mean() > 200


def test_runs_without_a_part_say_so() -> None:
    bare = make_record(20, layers=3, patching=False, localization=False, low_rank=False, spinal=False)
    for name, figure in gallery.draw_all([bare]).items():
        if name != "margins_over_steps":
            assert "not measured: switched off in the configuration" in texts(figure), name
