"""``align-audit watch``: a screen over the logs of runs, and its options as a side process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_audit.cli import watch_screen
from align_audit.cli.watch_screen import Board, look_at_runs
from align_audit.errors import ConfigurationError
from align_audit.record.log import RunLog
from tests.cli.commands import refused
from tests.helpers.alert_cases import with_part
from tests.helpers.screens import a_run, calm

RUINED, WELL = a_run("ruined"), a_run("well")


def store(folder: Path, records: list[Any]) -> None:
    log = RunLog(folder)
    for record in records:
        log.append(record)
    log.close()


def append_half(folder: Path) -> None:
    """Half a record, as a reader may see it."""
    with (folder / "align_audit" / "records.jsonl").open("a") as file:
        file.write('{"step": 3, "sch')


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    store(tmp_path / "runs" / "bad", RUINED[:3])
    store(tmp_path / "runs" / "sweep" / "good", WELL)
    return tmp_path / "runs"


class Screen:
    """``look_at_runs`` until its script is over: what happens between two looks, one function each."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.said: list[str] = []

    def look(self, place: Path, *script: Any, as_json: bool = False, command: str | None = None) -> list[str]:
        """What was printed at each look."""
        steps, shown = iter(script), []

        def wait(seconds: float) -> None:
            shown.append(self._capsys.readouterr().out)
            try:
                next(steps)()
            except StopIteration:
                raise KeyboardInterrupt from None

        self._capsys.readouterr()
        status = look_at_runs(
            [place], every=0.0, once=False, as_json=as_json, command=command, tell=self.said.append, wait=wait
        )
        assert status == 0
        return shown


@pytest.fixture
def screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setattr(watch_screen, "_SEARCH_SHARE", 1e9)  # looks for runs at every look
    return Screen(capsys)


def test_once_the_exit_status_tells(command: Any, runs: Path) -> None:
    done = command("watch", runs, "--once")
    assert done.code == 0, done.err
    assert "2 runs: 2 HEALTHY" in done.out and "sweep/good" in done.out
    store(runs / "bad", RUINED[3:])
    done = command("watch", runs, "--once")
    assert done.code == 1
    assert done.out.index("bad") < done.out.index("sweep/good")
    assert command("watch", runs / "sweep", "--once").code == 0


def test_once_as_json_for_scripts(command: Any, runs: Path) -> None:
    store(runs / "bad", RUINED[3:])
    done = command("watch", runs, "--once", "--json")
    told = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 1
    assert [(each["run"], each["status"], each["since"], each["step"]) for each in told] == [
        ("bad", "ERROR", 20, 40), ("sweep/good", "HEALTHY", 0, 40)
    ]  # fmt: skip
    assert told[0]["folder"] == str(runs / "bad")


def test_runs_that_come_change_and_go(screen: Screen, runs: Path) -> None:
    shown = screen.look(
        runs,
        lambda: None,
        lambda: store(runs / "bad", RUINED[3:]),
        lambda: store(runs / "new", [calm(0)]),
        lambda: shutil.rmtree(runs / "sweep"),
        lambda: append_half(runs / "new"),
    )
    assert "2 HEALTHY" in shown[0]
    assert shown[1] == "", "nothing has changed"
    assert "1 ERROR, 1 HEALTHY" in shown[2]
    assert "3 runs" in shown[3] and "new" in shown[3]
    assert "2 runs" in shown[4] and "sweep/good is gone" in shown[4]
    assert shown[5] == "", "half a line is no news"


def test_a_folder_that_is_still_empty_is_watched(screen: Screen, tmp_path: Path) -> None:
    shown = screen.look(tmp_path, lambda: store(tmp_path / "run", [calm(0)]))
    assert "no run yet" in shown[0]
    assert "1 run: 1 HEALTHY" in shown[1]


def test_what_breaks_with_one_run_ends_no_screen(screen: Screen, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row_of_run = watch_screen.row_of_run

    def breaks(run: Any, name: str, trouble: Any) -> Any:
        if name == "bad":
            raise ZeroDivisionError("by \x1b[31mzero")
        return row_of_run(run, name, trouble)

    monkeypatch.setattr(watch_screen, "row_of_run", breaks)
    (shown,) = screen.look(runs)
    assert "1 BLIND, 1 HEALTHY" in shown
    assert "ZeroDivisionError: by \\x1b[31mzero" in shown


def test_json_again_whenever_it_changes(screen: Screen, runs: Path) -> None:
    first, second, third = screen.look(runs, lambda: None, lambda: store(runs / "bad", RUINED[3:]), as_json=True)
    assert len(first.splitlines()) == 2
    assert second == ""
    assert [json.loads(line)["status"] for line in third.splitlines()] == ["ERROR"]


def test_a_command_for_each_alert_that_is_news(screen: Screen, runs: Path, tmp_path: Path) -> None:
    store(runs / "old", RUINED)
    script = tmp_path / "notify.py"
    script.write_text(
        "import os\nwith open('told.txt', 'a') as file:\n"
        "    file.write(os.environ['ALIGN_AUDIT_RUN'] + ' ' + os.environ['ALIGN_AUDIT_STEP'] + '\\n')\nraise SystemExit(3)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        screen.look(
            runs,
            lambda: store(runs / "bad", RUINED[3:4]),
            lambda: store(runs / "bad", RUINED[4:]),
            lambda: None,
            as_json=True,
            command=f"{sys.executable} {script}",
        )
    assert (tmp_path / "told.txt").read_text().splitlines() == [f"{runs / 'bad'} 20"]
    assert len(screen.said) == 1 and "ended with status 3" in screen.said[0]


# -- refused -----------------------------------------------------------------------------------------------------------


def test_nothing_to_watch(command: Any, tmp_path: Path) -> None:
    refused(command("watch", tmp_path, "--once"), "no run in", "align_audit")
    refused(command("watch", tmp_path / "nowhere"), "no folder at")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reference", "base"], "--reference needs --probes"),
        (["--idle", "3"], "--idle needs --probes"),
        (["--trust-remote-code"], "--trust-remote-code needs --probes"),
        (["--every", "inf"], "--every"),
        (["--every", "1e12"], "--every"),
        (["--once", "--exec", "true"], "--exec runs a command for alerts that come while it watches"),
        (["--exec", "'"], "--exec: No closing quotation"),
        (["--probes", "pairs.jsonl", "--once"], "--once needs no --probes"),
        (["--probes", "pairs.jsonl", "other"], "found 2 folders; with --probes expected one"),
        (["--probes", "pairs.jsonl", "--dtype", "int8"], "--dtype: expected float32"),
        (["--probes", "lost.jsonl"], "lost.jsonl: no such file"),
    ],
)
def test_options_that_do_not_go_together(command: Any, runs: Path, options: list[str], words: str) -> None:
    refused(command("watch", runs, *options), words)


def test_runs_have_the_same_names_by_way_of_the_folder_above(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/dpo", "b/dpo", "here"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a/dpo", "b/dpo"):
        store(tmp_path / name, a_run("well"))
    monkeypatch.chdir(tmp_path / "here")
    said = [
        [json.loads(line)["run"] for line in command("watch", place, "--once", "--json").out.splitlines()]
        for place in ("..", tmp_path, "../here/..")
    ]
    assert said == [["a/dpo", "b/dpo"]] * 3


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="no folder at"):
        look_at_runs([tmp_path / "file"], every=1.0, once=True, as_json=False, command=None, tell=print)


def test_help_shows_examples(command: Any) -> None:
    done = command("watch", "--help")
    for words in ("align-audit watch runs --once --json", "--probes held-out.jsonl --reference", "exit status is 1"):
        assert words in " ".join(done.out.split())


def test_the_screen_loads_no_torch(runs: Path) -> None:
    program = f"""
import sys
sys.argv = ["align-audit", "watch", {str(runs)!r}, "--once"]
from align_audit.cli.app import main
try:
    main()
finally:
    print(*{{name.split(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "2 runs: 2 HEALTHY" in done.stdout
    assert not {"torch", "transformers", "sklearn", "matplotlib", "numpy"} & set(done.stdout.splitlines()[-1].split())


# -- the side process --------------------------------------------------------------------------------------------------


def test_checkpoints_of_a_training_as_the_callback_had_them(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    done = command(
        "watch", place.full, "--probes", place.probes, "--config", place.options, "--reference", place.base,
        "--output", tmp_path / "out", "--every", "0.1", "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "training ended at step 2, and all its checkpoints are done; checkpoints: 2 audited" in done.out
    assert [line.split()[:3] for line in done.out.splitlines() if line.startswith("align_audit step")] == [
        ["align_audit", "step", "1"], ["align_audit", "step", "2"]
    ]  # fmt: skip
    assert "latest healthy: checkpoint-" in done.out


def test_one_that_cannot_be_audited_is_an_exit_status(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(place.full, tmp_path / "run", ignore=shutil.ignore_patterns("align_audit"))
    (tmp_path / "run" / "checkpoint-1" / "config.json").write_text("{}")
    state = tmp_path / "run" / "checkpoint-1" / "trainer_state.json"
    state.write_bytes(state.read_bytes())
    done = command(
        "watch", tmp_path / "run", "--probes", place.probes, "--config", place.options, "--reference", place.base,
        "--every", "0.1", "--device", "cpu",
    )  # fmt: skip
    assert done.code == 1, done.err
    assert "checkpoint-1 is passed over: cannot load" in done.err
    assert "checkpoints: 1 audited, 1 passed over" in done.out


def test_a_run_that_is_found_later_tells_what_happens_from_then_on(tmp_path: Path) -> None:
    """One that was moved here, or comes back, has alerts as old as itself."""
    told: list[Any] = []
    board = Board([tmp_path], lambda folder, alert: told.append(alert.rule))
    board.refresh()
    store(tmp_path / "moved", a_run())
    board._next_search = 0.0
    board.refresh()
    assert board.rows and told == []
    now = datetime.now(UTC).isoformat(timespec="seconds")
    begun = [with_part(record, "provenance", created=now) for record in a_run()]
    store(tmp_path / "begun", begun)
    board._next_search = 0.0
    board.refresh()
    assert told != []
    (tmp_path / "begun").rename(tmp_path / "renamed")
    before = list(told)
    board._next_search = 0.0
    board.refresh()
    assert told == before
