"""Finer sites in pictures, scalars and on the terminal: every number has one place, and what is unknown is said."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from align_audit.record.audit_record import SCHEMA_VERSION, AuditRecord, site_name, site_names
from align_audit.writers.plots import gallery as plots
from align_audit.writers.plots.canvas import pixels
from align_audit.writers.plots.sites import head_map, site_curves, site_figures
from align_audit.writers.scalars import not_known, scalars
from align_audit.writers.tensorboard import TensorBoard, custom_scalars_layout
from tests.helpers.make_record import make_record, make_sites
from tests.writers.test_tensorboard import read
from tests.writers.test_terminal import print_record


@pytest.fixture
def record() -> AuditRecord:
    return make_record(100, layers=12, sites=make_sites())


def test_names_tell_curves_apart(record: AuditRecord) -> None:
    assert site_names(record.sites) == [
        "attention_output", "mlp_output_completion", "head_attribution", "block_width_2"
    ]  # fmt: skip
    assert site_names([record.sites[0]] * 3) == [
        "attention_output",
        "attention_output_again_2",
        "attention_output_again_3",
    ]
    assert [site_name(curve) for curve in record.sites] == [
        "attention output", "MLP output, completion", "heads", "windows of 2 layers"
    ]  # fmt: skip


def test_every_unit_is_a_curve(record: AuditRecord) -> None:
    exact = record.model_copy(
        update={"sites": [curve.model_copy(update={"estimator": "exact"}) for curve in record.sites]}
    )
    found = scalars(exact)
    attention, _, heads, windows = exact.sites
    for layer in range(12):
        assert found[f"align_audit/sites/attention_output/layer_{layer:02d}"] == attention.sufficiency[layer].mean
        assert (
            found[f"align_audit/sites/attention_output/necessity/layer_{layer:02d}"] == attention.necessity[layer].mean
        )
    assert found["align_audit/sites/head/layer_05_head_02"] == heads.sufficiency[5 * 8 + 2].mean == 1.2
    assert found["align_audit/sites/head/correlation/layer_05_head_02"] == heads.correlation[5 * 8 + 2]
    assert found["align_audit/sites/block_width_2/layer_10"] == windows.sufficiency[10].mean
    assert "align_audit/sites/block_width_2/layer_11" not in found
    assert "align_audit/sites/head/layer_00_head_00" not in found
    assert not_known(exact)["sites.2.sufficiency", "1 of 64 values are not finite"] == [0]


def test_each_curve_has_a_chart(record: AuditRecord, tmp_path: Path) -> None:
    charts = custom_scalars_layout(sites=record.sites)["align_audit: finer sites"]
    assert len(charts) == 4
    assert "align_audit: finer sites" not in custom_scalars_layout()
    writer = SummaryWriter(tmp_path)
    TensorBoard(tmp_path, lambda: writer).record(record, [])
    writer.close()
    tags = read(tmp_path).Tags()
    assert {tag for tag in tags["images"] if "/sites/" in tag} == {
        "align_audit/sites/head_attribution_map", "align_audit/sites/site_curves"
    }  # fmt: skip


def test_the_terminal_names_the_peaks(record: AuditRecord) -> None:
    out = io.StringIO()
    print_record(record, Console(file=out, width=140))
    text = out.getvalue()
    assert "attention output" in text
    assert "peak layer 5: +1.2" in text
    assert "peak layer 5, head 2: +1.2" in text
    assert "(attribution, correlation 0.9" in text
    assert "peak layers 5–6" in text or "peak layers 5-6" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layers", [3, 48])
def test_pictures_of_every_depth(layers: int) -> None:
    record = make_record(100, layers=layers, sites=make_sites(layers, heads=4 * layers, peak=1))
    for name, draw in site_figures(record).items():
        image = pixels(draw(record))
        assert image.std() > 10, name
    assert set(plots.draw_all([record])) >= {"head_attribution_map", "site_curves"}
    assert "site_curves" not in plots.draw_all([make_record(100)])


def test_a_map_is_of_heads(record: AuditRecord) -> None:
    with pytest.raises(ValueError, match="expected a curve of heads at place 0; found one of attention_output"):
        head_map(record, 0)
    assert pixels(site_curves(make_record(100))).any()


def test_records_with_sites_survive_storing(record: AuditRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "record.json")
    again = AuditRecord.load(tmp_path / "record.json")
    assert again.sites[0] == record.sites[0]
    assert again.sites[2].units == record.sites[2].units
    assert math.isnan(again.sites[2].sufficiency[0].mean)
    assert again.schema_version == SCHEMA_VERSION
