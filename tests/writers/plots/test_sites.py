"""Pictures of finer sites: a map of heads, and curves of all others."""

from __future__ import annotations

import pytest

from align_audit.record.audit_record import AuditRecord
from align_audit.writers.plots.canvas import pixels
from align_audit.writers.plots.gallery import draw_all
from align_audit.writers.plots.sites import head_map, site_curves, site_figures
from tests.helpers.make_record import make_record, make_sites

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.fixture
def record() -> AuditRecord:
    return make_record(100, layers=12, sites=make_sites())


@pytest.mark.parametrize("layers", [3, 48])
def test_pictures_of_every_depth(layers: int) -> None:
    record = make_record(100, layers=layers, sites=make_sites(layers, heads=4 * layers, peak=1))
    for name, draw in site_figures(record).items():
        image = pixels(draw(record))
        assert image.std() > 10, name
    assert set(draw_all([record])) >= {"head_attribution_map", "site_curves"}
    assert "site_curves" not in draw_all([make_record(100)])


def test_a_map_is_of_heads(record: AuditRecord) -> None:
    with pytest.raises(ValueError, match="expected a curve of heads at place 0; found one of attention_output"):
        head_map(record, 0)
    assert pixels(site_curves(make_record(100))).any()
