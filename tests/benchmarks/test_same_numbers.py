"""The comparison of records before and after a change: it sees what differs, and passes over only what it says it does."""

from __future__ import annotations

import copy
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import same_numbers

from tests.helpers.make_record import make_record

BEFORE_HOUSE = Path(same_numbers.__file__).parent / "before_house"


@pytest.fixture
def values() -> Any:
    """A record as parsed JSON, with NaN in it."""
    record = json.loads(make_record(step=3, layers=4).to_json())
    record["spinal"]["score"] = "NaN"
    return record


def folder(path: Path, **documents: Any) -> Path:
    path.mkdir()
    for name, document in documents.items():
        (path / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(document).encode()))
    return path


def test_equal_records_do_not_differ_and_nan_equals_nan(values: Any) -> None:
    found = same_numbers.compare_values(values, copy.deepcopy(values))
    assert found.paths == []
    assert found.largest == 0.0
    assert found.leaves > 300
    assert same_numbers.compare_values({"a": math.nan}, {"a": "NaN"}).paths == []


def test_the_last_bit_of_one_leaf_is_found(values: Any) -> None:
    after = copy.deepcopy(values)
    estimate = after["patching"]["effect"][2]
    estimate["low"] = math.nextafter(estimate["low"], math.inf)
    found = same_numbers.compare_values(values, after)
    assert len(found.paths) == 1
    assert found.paths[0].startswith("patching.effect.2.low: ")
    assert 0 < found.largest < 1e-15


@pytest.mark.parametrize("value", [0.0, "Infinity", None, "unknown", True])
def test_nan_equals_nothing_else(values: Any, value: Any) -> None:
    after = copy.deepcopy(values)
    after["spinal"]["score"] = value
    assert [path.partition(":")[0] for path in same_numbers.compare_values(values, after).paths] == ["spinal.score"]


def test_ignored_fields_are_ignored_and_no_others(values: Any) -> None:
    after = copy.deepcopy(values)
    after["provenance"]["created"] = "another day"
    after["provenance"]["versions"] = {"torch": "0.0", "something": "1.0"}
    after["cost"]["seconds"] += 1
    after["cost"]["peak_memory"] += 1
    assert same_numbers.compare_values(values, after).paths == []
    after["cost"]["forward_equivalents"] += 1
    after["provenance"]["seed"] += 1
    after["step"] += 1
    found = same_numbers.compare_values(values, after).paths
    assert [path.partition(":")[0] for path in found] == ["step", "provenance.seed", "cost.forward_equivalents"]


def test_missing_and_new_leaves_are_found(values: Any) -> None:
    after = copy.deepcopy(values)
    del after["margins"]["kl"]["low"]
    after["spinal"]["new"] = 1.0
    after["patching"]["recovery"].pop()
    found = {path.partition(":")[0] for path in same_numbers.compare_values(values, after).paths}
    assert found == {"margins.kl.low", "spinal.new"} | {
        f"patching.recovery.3.{name}" for name in ("mean", "low", "high", "reason")
    }


def test_an_emptied_list_is_found() -> None:
    assert same_numbers.compare_values({"alerts": [{"step": 1}]}, {"alerts": []}).paths == [
        "alerts.0.step: 1 → nothing", "alerts: nothing → []",
    ]  # fmt: skip


def test_paths_that_two_leaves_share_are_refused() -> None:
    with pytest.raises(ValueError, match="two leaves have the path"):
        same_numbers.compare_values({"a.b": 1, "a": {"b": 2}}, {"a.b": 1, "a": {"b": 3}})


def test_names_change_only_as_the_tables_say(values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    after = copy.deepcopy(values)
    after["margins"]["kl_policy"] = after["margins"].pop("kl")
    after["spinal"]["new"] = {"inner": 1.0}
    assert len(same_numbers.compare_values(values, after).paths) == 9
    monkeypatch.setattr(same_numbers, "RENAMED", {r"^margins\.kl\.": "margins.kl_policy."})
    monkeypatch.setattr(same_numbers, "EXPECTED", {r"spinal\.new": "it is new"})
    found = same_numbers.compare_values(values, after)
    assert (found.paths, found.expected) == ([], 1)
    after["margins"]["kl_policy"]["mean"] += 1
    after["spinal"]["newer"] = 1.0
    assert len(same_numbers.compare_values(values, after).paths) == 2


def test_a_tolerance_holds_for_numbers_also_in_words_and_passes_over_hashes(values: Any) -> None:
    after = copy.deepcopy(values)
    after["margins"]["kl"]["mean"] *= 1 + 1e-7
    after["provenance"]["policy_hash"] = "other bits"
    values["reasons"], after["reasons"] = (
        {"a": "the fraction is 0.2500001 < 0.95"},
        {"a": "the fraction is 0.25 < 0.95"},
    )
    assert len(same_numbers.compare_values(values, after).paths) == 3
    found = same_numbers.compare_values(values, after, tolerance=1e-6)
    assert found.paths == []
    assert 0 < found.largest < 1e-6
    assert len(same_numbers.compare_values(values, after, tolerance=1e-8).paths) == 2
    after["reasons"]["a"] = "the share is 0.25 < 0.95"
    after["provenance"]["probe_hash"] = "other pairs"
    assert len(same_numbers.compare_values(values, after, tolerance=1e-6).paths) == 2


def test_the_command_says_what_differs(values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = copy.deepcopy(values)
    changed["margins"]["shift"]["mean"] *= 2
    before = folder(tmp_path / "before", one=values, two=values, other={"curve": [1.0]})
    assert same_numbers.main(["compare", str(before), str(before)]) == 0
    assert "3 files, " in capsys.readouterr().out
    after = folder(tmp_path / "after", one=values, two=changed, other={"curve": [1.0]})
    assert same_numbers.main(["compare", str(before), str(after)]) == 1
    said = capsys.readouterr().out
    assert "margins.shift.mean" in said.partition("two: ")[2]
    assert "largest relative difference 0.5" in said
    # Once as written, once as it is read today.
    assert said.splitlines()[-1].endswith("leaves, 2 differ")
    assert same_numbers.main(["compare", str(before), str(after), "--only", "o*"]) == 0
    assert same_numbers.main(["compare", str(before), str(after), "--tolerance", "0.6"]) == 0


def test_a_file_that_is_absent_or_cannot_be_read_is_a_difference(
    values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = values | {"field_of_a_future_version": 1}
    before = folder(tmp_path / "before", one=unknown, two=values)
    after = folder(tmp_path / "after", one=unknown)
    assert same_numbers.main(["compare", str(before), str(after)]) == 1
    said = capsys.readouterr().out
    assert "cannot be loaded" in said
    assert f"two: no such file in {after}" in said
    assert said.splitlines()[-1].endswith(", 2 differ")
    with pytest.raises(SystemExit, match="expected a folder that `make` wrote"):
        same_numbers.main(["compare", str(tmp_path / "nothing"), str(after)])


def test_an_array_is_described_so_that_any_bit_shows() -> None:
    array = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    other = array.copy()
    other[3, 4] = np.nextafter(other[3, 4], np.float32(2))
    found = same_numbers.compare_values(same_numbers.described(array), same_numbers.described(other))
    assert "sha256" in {path.partition(":")[0] for path in found.paths}
    swapped = array[::-1]
    found = same_numbers.compare_values(same_numbers.described(array), same_numbers.described(swapped))
    assert {path.partition(":")[0] for path in found.paths} == {"sha256", "weighted"}
    small = same_numbers.described(np.array([[1.0, math.nan]]))
    assert small["values"][0][0] == 1.0
    assert small["shape"] == [1, 2]
    assert same_numbers.compare_values(small, same_numbers.described(np.array([[1.0, math.nan]]))).paths == []


def test_what_was_kept_from_before_is_whole_and_read_today(capsys: pytest.CaptureFixture[str]) -> None:
    assert same_numbers.main(["compare", str(BEFORE_HOUSE), str(BEFORE_HOUSE)]) == 0
    said = capsys.readouterr().out
    for name in ("demo-healthy.step-60", "demo-ruined.step-40", "run-lora.step-6", "audit-exact-auto", "transfer-all"):
        assert f"{name}: " in said
    assert said.count("as read today") > 40
