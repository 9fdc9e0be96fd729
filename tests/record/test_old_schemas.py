"""Records written by every older version are read: their numbers lie where today's schema says, and mean what it says.

What the files in ``data`` are, and how they were made, stands in its README.md.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from align_audit import AuditRecord, AuditRun
from align_audit.errors import RecordError
from align_audit.record.audit_record import SCHEMA_VERSION
from align_audit.record.estimate import Estimate
from align_audit.record.schema import Migration, Stored
from tests.helpers.make_record import make_record
from tests.record.test_reasons import unexplained

DATA = Path(__file__).parent / "data"
VERSIONS = (1, 2, 3, 4, 5, 6, 7)


def read(version: int) -> tuple[AuditRecord, Any]:
    """The checked-in record, as read today and as plain JSON."""
    path = DATA / f"schema-{version}.json"
    return AuditRecord.load(path), json.loads(path.read_text(encoding="utf-8"))


def between() -> list[tuple[AuditRecord, Any]]:
    """The same of the other forms in which versions were written."""
    lines = (DATA / "between.records.jsonl").read_text(encoding="utf-8").splitlines()
    return [(AuditRecord.from_json(line), json.loads(line)) for line in lines]


def same(estimate: Estimate, written: dict[str, Any]) -> bool:
    numbers = [float(written[name]) for name in ("mean", "low", "high")]
    return bool(np.array_equal([estimate.mean, estimate.low, estimate.high], numbers, equal_nan=True))


def check_common(version: int) -> tuple[AuditRecord, Any]:
    """What all versions wrote."""
    record, written = read(version)
    assert written["schema_version"] == record.schema_version == version
    assert record.step == written["step"] == 2
    assert record.margins.shift.mean == written["margins"]["shift"]["mean"] > 1
    assert same(record.margins.kl, written["margins"]["kl"])
    assert record.patching is not None
    assert len(record.patching.effect) == 3
    for name in ("effect", "layer_gain", "block_transplant"):
        assert all(map(same, getattr(record.patching, name), written["patching"][name]))
    assert record.patching.peak_layer == written["patching"]["peak_layer"] == 1
    # Since version 6 nothing is judged by pairs of four prompts.
    expected = "passed" if version < 6 else "not_run"
    assert record.controls.reverse.verdict == written["controls"]["reverse"]["verdict"] == expected
    curve, stored = record.low_rank["shift"][1], written["low_rank"]["shift"]["1"]
    assert curve.ranks == [1, 2]
    assert all(map(same, curve.effect_fraction, stored["effect_fraction"]))
    assert record.spinal is not None
    assert record.spinal.policy.contraction == written["spinal"]["policy"]["contraction"]
    assert record.provenance.policy_hash == written["provenance"]["policy_hash"]
    return record, written


def test_version_1() -> None:
    """It knew neither layouts, nor estimators, nor pairs per control, nor sites, nor findings."""
    record, written = check_common(1)
    assert not {"shared_prompts", "layout_reason"} & set(written["provenance"])
    assert not {"finding", "sites"} & set(written)
    assert record.provenance.shared_prompts is False
    assert record.patching is not None
    assert (record.patching.estimator, record.attribution, record.patching.standing_out) == ("exact", None, None)
    assert (record.finding, record.sites, record.controls.noise.pairs) == (None, [], None)
    assert record.controls.permuted_targets.verdict == "not_run"
    curve = record.low_rank["shift"][1]
    assert math.isnan(curve.rank_95_low)
    assert "version that wrote this record" in record.reasons["low_rank.shift.1.rank_95_low"]


def test_version_2() -> None:
    """Some pairs patched, the others attributed at one point."""
    record, written = check_common(2)
    stored = written["patching"]["attribution"]
    assert not {"points", "path", "joint_correlation", "patched_pairs"} & set(stored)
    attribution = record.attribution
    assert attribution is not None
    assert (attribution.exact_pairs, attribution.pairs) == (stored["exact_pairs"], stored["pairs"]) == (8, 10)
    assert all(map(same, attribution.mean, stored["mean"]))
    assert (attribution.points, attribution.path, attribution.joint_correlation) == ([0.0], "joint", [])
    assert record.provenance.shared_prompts is written["provenance"]["shared_prompts"] is True
    assert record.controls.reverse.pairs == written["controls"]["reverse"]["pairs"] == 8
    assert record.provenance.probe_name is None
    assert "version that wrote this record" in record.reasons["low_rank.activation.1.rank_95_high"]


def test_version_3() -> None:
    """Layers stood out by nats; today's separation is a ratio, so that one is not known."""
    record, written = check_common(3)
    assert record.provenance.probe_name == written["provenance"]["probe_name"] == "stories"
    assert [curve.site for curve in record.sites] == ["attention_output", "block"]
    assert all(map(same, record.sites[1].necessity, written["sites"][1]["necessity"]))
    assert record.finding is not None
    assert record.finding.words == written["finding"]["words"]
    assert record.patching is not None
    found, stored = record.patching.standing_out, written["patching"]["standing_out"]
    assert found is not None
    assert found.layers == stored["layers"] == [1]
    assert same(found.gain, stored["gain"])
    assert found.stability == stored["stability"]
    assert stored["separation"]["mean"] > 1
    assert math.isnan(found.separation.mean)
    assert math.isnan(found.separation.low)
    assert "nats" in (found.separation.reason or "")
    assert record.low_rank["shift"][1].rank_95_low == float(written["low_rank"]["shift"]["1"]["rank_95_low"])
    assert "low_rank.shift.1.rank_95_low" not in record.reasons


@pytest.mark.parametrize("version", [4, 5])
def test_versions_4_and_5(version: int) -> None:
    """They did not count groups of pairs that share a prompt; nothing else is migrated."""
    record, written = check_common(version)
    assert "groups" not in written["patching"]
    assert "groups" not in written["provenance"]
    assert (record.provenance.groups, record.methods_version) == (None, 1)
    assert record.extra == written.get("extra", {})
    assert record.patching is not None
    assert record.patching.groups is None
    found, stored = record.patching.standing_out, written["patching"]["standing_out"]
    assert found is not None
    assert same(found.separation, stored["separation"])
    assert found.separation.low > 1
    assert all(map(same, found.contribution, stored["contribution"]))
    assert record.attribution is not None
    assert record.attribution.patched_pairs == written["patching"]["attribution"]["patched_pairs"] == [8, 8, 8]
    assert record.attribution.points == [0.0, 0.5]
    assert record.reasons == written["reasons"]


def test_version_6() -> None:
    """It knew one kind of audit, no continuations, and alerts without a life."""
    record, written = check_common(6)
    assert not {"kind", "occasion", "generations"} & set(written)
    assert (record.kind, record.occasion, record.generations) == ("full", None, None)
    assert record.methods_version == written["methods_version"] == 2
    assert record.provenance.groups == written["provenance"]["groups"]
    assert record.patching is not None
    assert record.patching.groups == written["patching"]["groups"] == 4
    for alert, stored in zip(record.alerts, written["alerts"], strict=True):
        assert (alert.rule, alert.event, alert.since, alert.looks) == (stored["rule"], "opened", None, 1)
    assert record.reasons == written["reasons"]


def test_version_7() -> None:
    """Its transport was measured on all rows of the spectra, and it did not say what an audit cost in training pairs."""
    record, written = check_common(7)
    assert record.kind == written["kind"] == "full"
    assert record.occasion is not None
    assert record.occasion.training_pair_seconds == written["occasion"]["training_pair_seconds"] > 0
    assert not {"transport_rows", "transport_change_stderr", "delta_align_stderr"} & set(written["spinal"])
    assert "transport_stderr" not in written["spinal"]["policy"]
    assert record.spinal is not None
    assert record.spinal.policy.transport == written["spinal"]["policy"]["transport"]
    assert (record.spinal.transport_rows, record.spinal.delta_align_stderr) == (None, None)
    assert record.spinal.policy.transport_stderr == record.spinal.transport_change_stderr == []
    assert record.reasons == written["reasons"]


def test_every_older_version_has_its_file() -> None:
    assert set(VERSIONS) >= set(range(1, SCHEMA_VERSION))


def test_the_forms_that_versions_went_through_are_read() -> None:
    """Version 3 with a ratio keeps it; the one with nats does not; those without either have no layer set."""
    seen = []
    for record, written in between():
        assert record.schema_version == written["schema_version"]
        assert record.margins.shift.mean == written["margins"]["shift"]["mean"]
        assert record.patching is not None
        found = record.patching.standing_out
        stored = written["patching"].get("standing_out")
        seen.append((record.schema_version, found and math.isfinite(found.separation.mean)))
        assert found is None or math.isnan(found.separation.mean) or same(found.separation, stored["separation"])
    assert seen == [(2, None), (3, None), (3, None), (3, False), (3, True), (4, True)]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_old_records_do_not_hold_has_a_reason_and_survives_saving(version: int, tmp_path: Path) -> None:
    records = AuditRun.load(DATA / f"schema-{version}.records.jsonl").records
    for record in [*records, *(record for record, _ in between())]:
        assert unexplained(record) == []
        record.save(tmp_path / "again.json")
        again = AuditRecord.load(tmp_path / "again.json")
        assert again.to_json() == record.to_json()


def test_a_log_of_all_versions_is_read_side_by_side(tmp_path: Path) -> None:
    """As a run looks that was resumed with one version after the other."""
    lines = [(DATA / f"schema-{version}.records.jsonl").read_bytes() for version in VERSIONS]
    (tmp_path / "records.jsonl").write_bytes(b"".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = AuditRun.load(tmp_path)
    assert [record.step for record in run.records] == [0] * len(VERSIONS) + [2] * len(VERSIONS)
    assert sorted(record.schema_version for record in run.records) == sorted(VERSIONS * 2)
    for record in run.records[len(VERSIONS) :]:
        alone, _ = read(record.schema_version)
        assert record.to_json() == alone.to_json()
    table = run.to_pandas()
    # The same run each time; what computes it was made anew in between, which rounds otherwise.
    shifts = table["margins.shift.mean"][table.step == 2]
    assert shifts.max() == pytest.approx(shifts.min(), rel=1e-6)
    assert shifts.min() > 1
    layers = run.to_pandas(layers=True)
    assert len(layers) == 2 * len(VERSIONS) * 3
    assert layers.effect.notna().all()


def rename(old: str, new: str) -> Migration:
    return lambda values: {new if name == old else name: value for name, value in values.items()}


class Kept(Stored):
    """A record of a third version; its field had another name in the second, and another in the first."""

    newest: ClassVar[int] = 3
    migrations: ClassVar[Mapping[int, Migration]] = {2: rename("second", "third"), 1: rename("first", "second")}

    schema_version: int = 3
    third: str


@pytest.mark.parametrize(("version", "name"), [(1, "first"), (2, "second"), (3, "third")])
def test_migrations_run_one_after_the_other_from_the_version_that_wrote(version: int, name: str) -> None:
    record = Kept.from_json(json.dumps({"schema_version": version, name: "kept"}))
    assert (record.third, record.schema_version) == ("kept", version)


def test_a_migration_is_not_run_on_what_came_after_it() -> None:
    with pytest.raises(RecordError, match="is not a valid record"):
        Kept.from_json('{"schema_version": 2, "first": "a name that version 2 does not know"}')


@pytest.mark.parametrize(
    "part",
    [
        '"patching": []',
        '"patching": {"standing_out": 3}',
        '"patching": {"standing_out": {"layers": [1]}}',
        '"low_rank": [1]',
        '"low_rank": {"shift": 1}',
        '"low_rank": {"shift": {"1": 2}}',
        '"low_rank": {"shift": {"1": {}}}, "reasons": 5',
    ],
)
def test_what_is_no_record_is_refused_as_one_and_breaks_no_migration(part: str) -> None:
    with pytest.raises(RecordError, match="is not a valid record"):
        AuditRecord.from_json(f'{{"schema_version": 3, {part}}}')


@pytest.mark.parametrize("version", [4.0, "4", True, None, [4]])
def test_a_version_that_is_no_whole_number_is_no_reason_to_upgrade(version: object) -> None:
    values = json.loads(make_record(1, layers=2).to_json()) | {"schema_version": version}
    with pytest.raises(RecordError, match="expected a whole number up to") as caught:
        AuditRecord.from_json(json.dumps(values))
    assert "Upgrade" not in str(caught.value)


def test_a_newer_version_is_a_reason_to_upgrade() -> None:
    values = json.loads(make_record(1, layers=2).to_json()) | {"schema_version": 99}
    with pytest.raises(RecordError, match=r"schema version 99; this align_audit reads up to \d+\. Upgrade"):
        AuditRecord.from_json(json.dumps(values))


@pytest.mark.parametrize("name", ["effect_fraction", "explained_variance_ratio"])
def test_sequences_that_do_not_fit_their_ranks_are_no_record(name: str) -> None:
    values = json.loads(make_record(50, layers=3).to_json())
    (curve,) = list(values["low_rank"]["shift"].values())[:1]
    curve[name] = curve[name][:-1]
    with pytest.raises(RecordError, match=f"{name} has 4 values, ranks 5: expected one for each"):
        AuditRecord.from_json(json.dumps(values))
