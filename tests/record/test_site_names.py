"""Curves of finer sites in a record: names that tell them apart, and storing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from align_audit.record.audit_record import SCHEMA_VERSION, AuditRecord
from align_audit.record.site_names import site_name, site_names
from tests.helpers.make_record import make_record, make_sites


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


def test_records_with_sites_survive_storing(record: AuditRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "record.json")
    again = AuditRecord.load(tmp_path / "record.json")
    assert again.sites[0] == record.sites[0]
    assert again.sites[2].units == record.sites[2].units
    assert math.isnan(again.sites[2].sufficiency[0].mean)
    assert again.schema_version == SCHEMA_VERSION
