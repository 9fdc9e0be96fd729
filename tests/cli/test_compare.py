"""``align-audit compare``: a sentence first, the tables, JSON, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from align_audit.cli import console
from tests.cli.commands import refused
from tests.helpers.alert_cases import on_set
from tests.helpers.pages import data_in
from tests.helpers.screens import a_run
from tests.helpers.stored_runs import record_of, store, store_path, values_of_pairs


def test_the_first_line_says_who_is_not_well_and_what_each_has_paid(command: Any, tmp_path: Path) -> None:
    well, broken = store(tmp_path / "well", a_run("well")), store(tmp_path / "broken", a_run("ruined"))
    done = command("compare", well, broken)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == (
        "broken is in ERROR since step 20 (the policy is leaving its language), well is HEALTHY; "
        "at equal reward margin +0.50 well has moved KL 0.04, broken 0.04."
    )
    assert "At the last common step, 40" in lines
    status, margin = lines[4].split(), lines[5].split()
    assert status == ["status", "at", "this", "step", "HEALTHY", "ERROR"]
    assert margin[:4] == ["reward", "margin", "+0.50", "+7.90"]
    assert any(line.startswith("  ") and "no interval: cannot read the arrays" in line for line in lines)


def test_differences_have_intervals_where_pairs_are_common(command: Any, tmp_path: Path) -> None:
    folders = [store_path(tmp_path / name, [0.0, 1.0], [0.0, kl]) for name, kl in (("a", 0.1), ("b", 0.4))]
    done = command("compare", *folders)
    (row, _) = [line for line in done.out.splitlines() if line.startswith("KL")]
    assert re.fullmatch(r"KL \(nats/token\) +0\.\d+ +0\.\d+ +\+0\.\d+ \[0\.\d+, 0\.\d+\]", row.strip())


def test_names_that_a_terminal_has_no_room_for_are_letters(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tells the runs of a sweep apart is at the end of their names, which is where a column is cut."""
    names = [f"sweep_lr1e-{rate}_beta0.1_seed0" for rate in range(4, 9)]
    folders = [store_path(tmp_path / name, [0.0, 1.0], [0.0, 0.1]) for name in names]
    wide = command("compare", *folders).out
    monkeypatch.setattr(console, "_UNBROKEN", 80)
    narrow = command("compare", *folders).out
    assert "sweep_lr1e-4_beta0.1_seed0  sweep_lr1e-5" in wide and "A: sweep" not in wide
    for letter, name in zip("ABCDE", names, strict=True):
        assert f"  {letter}: {name}" in narrow
    assert any(line.split()[:5] == list("ABCDE") for line in narrow.splitlines())
    assert "A: " in narrow and "…_beta0.1_seed0" not in narrow


def test_json_has_the_same_with_reasons(command: Any, tmp_path: Path) -> None:
    folders = [store_path(tmp_path / name, [0.0, 1.0], [0.0, kl]) for name, kl in (("a", 0.1), ("b", 0.4))]
    values = json.loads(command("compare", *folders, "--json").out)
    assert [run["name"] for run in values["runs"]] == ["a", "b"]
    kl = values["at_step"]["figures"]["kl"]
    assert kl["differences"]["b"]["value"] == pytest.approx(kl["runs"]["b"]["value"] - kl["runs"]["a"]["value"])
    assert kl["differences"]["b"]["low"] < kl["differences"]["b"]["value"] < kl["differences"]["b"]["high"]
    assert values["at_step"]["figures"]["delta_align"]["differences"]["b"]["low"] is None
    assert "no mean over pairs" in values["at_step"]["figures"]["delta_align"]["differences"]["b"]["reason"]
    assert values["sentence"] == command("compare", *folders).out.splitlines()[0]


def test_runs_of_several_probe_sets_are_compared_set_by_set(command: Any, tmp_path: Path) -> None:
    arrays = values_of_pairs(10.0, 0.2)
    sets = {"a": ("x", "y"), "b": ("y", "x", "z"), "c": ("z", "w")}
    folders = {
        name: store(tmp_path / name, [on_set(record_of(10, arrays), each) for each in names])
        for name, names in sets.items()
    }
    done = command("compare", folders["a"], folders["b"])
    assert [line for line in done.out.splitlines() if line.startswith("Probes")] == ["Probes 'x'", "Probes 'y'"]
    assert set(json.loads(command("compare", folders["a"], folders["b"], "--json").out)["probes"]) == {"x", "y"}
    refused(
        command("compare", folders["a"], folders["c"]), "no probe set is common to the runs (a: 'x', 'y'; c: 'z', 'w')"
    )


def test_what_cannot_be_compared_is_refused_in_a_line(command: Any, tmp_path: Path) -> None:
    folder = store_path(tmp_path / "a", [0.0], [0.0])
    refused(command("compare", folder), "expected at least two runs to compare, found ")
    refused(command("compare", folder, tmp_path / "nowhere"), "no run log at", "nowhere")
    failed = tmp_path / "failed" / "align_audit"
    failed.mkdir(parents=True)
    (failed / "failures.jsonl").touch()
    refused(command("compare", folder, failed), "failed has no audit to compare: No audit has been made yet.")


def test_a_folder_of_runs_names_those_in_it_and_what_to_type(command: Any, tmp_path: Path) -> None:
    runs = [store_path(tmp_path / "runs" / f"a run {number:02}", [0.0], [0.0]) for number in range(13)]
    first = f"'{runs[0]}'"
    for name in ("report", "card"):
        lines = command(name, tmp_path / "runs").err.splitlines()
        assert lines[0] == f"align-audit: error: {tmp_path / 'runs'} is no run itself, and holds 13 runs; expected one:"
        assert lines[1] == f"  align-audit {name} {first}"
        assert len(lines) == 12 and lines[-1] == "  and 3 more"
    for given in ([tmp_path / "runs"], [tmp_path / "runs", runs[0]]):
        done = command("compare", *given)
        lines = done.err.splitlines()
        assert done.code == 2 and "expected at least two of them" in lines[0]
        assert lines[1] == f"  align-audit compare {first} '{runs[1]}'"
        assert len(lines) == 12 and lines[-1] == "  and 2 more"
    alone = command("report", store_path(tmp_path / "one" / "b", [0.0], [0.0]).parent).err
    assert alone.splitlines() == [
        f"align-audit: error: {tmp_path / 'one'} is no run itself, and holds a run; expected one:",
        f"  align-audit report {tmp_path / 'one' / 'b'}",
    ]


def test_the_page_goes_where_it_is_asked_for(command: Any, tmp_path: Path) -> None:
    folders = [store_path(tmp_path / name, [0.0, 1.0], [0.0, kl]) for name, kl in (("a", 0.1), ("b", 0.4))]
    page = tmp_path / "comparison.html"
    done = command("compare", *folders, "--report", page)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"the comparison as a page is {page} (1.6 MB)"
    said = data_in(page.read_text(encoding="utf-8"))
    assert [side["name"] for side in said["sides"]] == ["a", "b"]
    spoken = done.out.splitlines()[0]
    assert said["said"]["sets"][0]["sentence"].replace("A ", "a ").replace("B ", "b ").replace("B", "b") == spoken
    as_json = command("compare", *folders, "--json", "--report", page)
    assert json.loads(as_json.out)["sentence"] and str(page) in as_json.err
    refused(command("compare", *folders, "--report", tmp_path), f"--report {tmp_path} is a folder; expected a file")
    refused(command("compare", *folders, "--report", tmp_path / "no" / "c.html"), "there is no folder", "make it")


def test_json_is_ascii_whatever_runs_are_called(command: Any, tmp_path: Path) -> None:
    folders = [store_path(tmp_path / name, [0.0, 1.0], [0.0, 0.1]) for name in ("größer", "b")]
    done = command("compare", *folders, "--json")
    assert done.out.isascii()
    assert [run["name"] for run in json.loads(done.out)["runs"]] == ["größer", "b"]


def test_names_of_runs_are_shown_as_text(command: Any, tmp_path: Path) -> None:
    folders = [store_path(tmp_path / name, [0.0, 1.0], [0.0, 0.1]) for name in ("a\x1b[31m[bold]", "b")]
    done = command("compare", *folders)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out
    assert "a\\x1b[31m[bold] is HEALTHY" in done.out
