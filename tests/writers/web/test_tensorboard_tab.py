"""What the tab's routes answer, without a browser; and that TensorBoard lives where the plugin cannot."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.plugins.base_plugin import TBContext, TBLoader
from werkzeug.test import Client, TestResponse

from align_audit.cli.intervals import interval
from align_audit.cli.tensorboard_entry import TabLoader
from align_audit.record import followed
from align_audit.record.log import FOLDER, RunLog
from align_audit.record.run import AuditRun
from align_audit.record.training_log import TrainingLog
from align_audit.writers.web import shown_runs, static
from align_audit.writers.web.comparison_data import comparison_data
from align_audit.writers.web.page_data import page_data
from align_audit.writers.web.tensorboard_tab import FILES, AlignAuditTab
from tests.helpers.pages import FAILED, HOSTILE
from tests.helpers.screens import a_run
from tests.helpers.stored_runs import store_path
from tests.helpers.tensorboard import entry_points, tensorboard

ENTRY = "align_audit.cli.tensorboard_entry"


def context(logdir: Path) -> TBContext:
    return TBContext(logdir=str(logdir), flags=SimpleNamespace(logdir=str(logdir), logdir_spec=""))


class Tab:
    """The plugin on a log folder, asked as TensorBoard asks it."""

    def __init__(self, logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shown_runs, "_LOOK_SECONDS", 0.0)
        self.plugin = AlignAuditTab(context(logdir), interval)
        self.apps = self.plugin.get_plugin_apps()

    def get(self, route: str, **query: str | list[str]) -> TestResponse:
        return Client(self.apps[route]).get(route, query_string=query)

    def rows(self) -> list[dict[str, Any]]:
        answer = self.get("/runs")
        assert answer.status_code == 200
        rows: list[dict[str, Any]] = answer.get_json()["runs"]
        return rows

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.rows() if row["name"] == name)

    def data(self, name: str) -> dict[str, Any]:
        answer = self.get("/data", run=self.row(name)["key"])
        assert answer.status_code == 200
        data: dict[str, Any] = answer.get_json()
        return data


def write(folder: Path, ends: str = "well", records: int = 9) -> RunLog:
    log = RunLog(folder)
    for record in a_run(ends)[:records]:
        log.append(record)
    return log


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    """A healthy run, one that is being ruined, and one whose audits break."""
    write(tmp_path / "a").close()
    write(tmp_path / "b", "ruined").close()
    log = RunLog(tmp_path / "c")
    log.append_failure(FAILED.step, FAILED.error)
    log.close()
    return tmp_path


@pytest.fixture
def tab(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> Tab:
    return Tab(logdir, monkeypatch)


# --- rows and pages ---------------------------------------------------------------------------------------------------


def test_runs_are_listed_the_worst_first(tab: Tab) -> None:
    said = [(row["name"], row["word"], row["since"], row["step"]) for row in tab.rows()]
    assert said == [("b", "ERROR", 20, 40), ("c", "BLIND", None, None), ("a", "HEALTHY", None, 40)]
    assert tab.plugin.is_active()
    assert "no memory" in tab.row("c")["reason"]


def test_a_page_is_the_report_of_the_run(tab: Tab, logdir: Path) -> None:
    for name in ("a", "b", "c"):
        data = tab.data(name)
        assert data.pop("trouble") is None
        # As an answer gives it: tuples are lists there.
        assert data == json.loads(json.dumps(page_data(AuditRun.load(logdir / name), data["run"]["written"])))


def test_what_is_appended_appears_and_nothing_is_parsed_twice(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    head_of_line = followed.head_of_line
    monkeypatch.setattr(followed, "head_of_line", lambda line: parsed.append(line) or head_of_line(line))
    shutil.rmtree(logdir / "b")
    log = write(logdir / "b", "ruined", records=3)
    tab = Tab(logdir, monkeypatch)
    row = tab.row("b")
    assert (row["word"], row["step"]) == ("HEALTHY", 10)
    assert tab.data("b")["sets"][0]["panels"][0]["steps"] == [0, 5, 10]
    for record in a_run("ruined")[3:]:
        log.append(record)
    log.close()
    now = tab.row("b")
    assert (now["word"], now["step"], now["key"]) == ("ERROR", 40, row["key"])
    assert now["version"] != row["version"]
    assert tab.data("b")["sets"][0]["panels"][0]["steps"] == [0, 5, 10, 20, 40]
    assert len(parsed) == 5


def test_a_version_stays_while_a_page_does(tab: Tab, logdir: Path) -> None:
    """The training log grows all the time; its curves come with the next audit, as in the report."""
    earlier = [row["version"] for row in tab.rows()]
    TrainingLog(logdir / "a").append(41, {"loss": 0.5})
    assert [row["version"] for row in tab.rows()] == earlier


def test_silence_is_told_by_the_training_log_alone(tab: Tab, logdir: Path) -> None:
    earlier = tab.row("a")
    TrainingLog(logdir / "a").append(4000, {"loss": 0.5})
    now = tab.row("a")
    assert (now["word"], now["version"] == earlier["version"]) == ("BLIND", False)
    assert tab.data("a")["sets"][0]["status"]["word"] == "BLIND"


def test_runs_come_and_go(tab: Tab, logdir: Path) -> None:
    key = tab.row("b")["key"]
    write(logdir / "new" / "d").close()
    shutil.rmtree(logdir / "b")
    assert [row["name"] for row in tab.rows()] == ["c", "a", "new/d"]
    assert tab.get("/data", run=key).status_code == 404


def test_more_runs_than_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcdef":
        write(tmp_path / name, records=1).close()
    tab = Tab(tmp_path, monkeypatch)
    for name in "abcdefab":
        assert tab.data(name)["run"]["name"] == name
    assert len(tab.plugin.runs._pages) == shown_runs._OPEN


def test_many_browsers_at_once(tab: Tab) -> None:
    def look(place: int) -> tuple[str, int]:
        rows = tab.rows()
        return rows[0]["name"], len(tab.get("/data", run=rows[place % 3]["key"]).data)

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(look, range(24)))
    assert {name for name, _ in seen} == {"b"}
    assert len({size for _, size in seen}) == 3


def test_two_runs_are_compared_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [store_path(tmp_path / name, [0.0, 1.0], [0.0, kl]) for name, kl in (("first", 0.2), ("second", 6.0))]
    tab = Tab(tmp_path, monkeypatch)
    said = tab.get("/compare", run=[tab.row("second")["key"], tab.row("first")["key"]]).get_json()
    assert said == json.loads(json.dumps(comparison_data([AuditRun.load(run) for run in reversed(runs)], interval)))
    (shown,) = said["sets"]
    assert said["reason"] is None
    assert re.search(r"A has moved KL [56]\.\d+, B 0\.\d+", shown["sentence"])
    at_step, at_margin = shown["tables"]
    assert at_step["head"] == ["", "A", "B", "B − A [95 %]"]
    kl = next(row for row in at_step["rows"] if row[0].startswith("KL"))
    assert kl[3].startswith("−") and "[" in kl[3]
    assert at_margin["rows"]


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b", "c"], ["a", "nowhere"]])
def test_a_comparison_is_of_two_runs_that_are_there(tab: Tab, names: list[str]) -> None:
    keys = [tab.row(name)["key"] if name in "abc" else name for name in names]
    assert tab.get("/compare", run=keys).status_code == 404


def test_why_runs_cannot_be_compared_is_said(tab: Tab) -> None:
    said = tab.get("/compare", run=[tab.row("a")["key"], tab.row("c")["key"]]).get_json()
    assert said["sets"] == []
    assert said["reason"].startswith("B has no audit to compare")


# --- what is refused, and what is broken ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run", ["", "a", "../a", "..", "/etc/passwd", "a/align_audit", "..%2fsecret", "%00", "\u202e", "*", "0" * 16]
)
def test_a_run_is_no_path(tab: Tab, logdir: Path, run: str) -> None:
    for name in (run, f"{logdir}/a", str(logdir / "a" / FOLDER)):
        answer = tab.get("/data", run=name)
        assert answer.status_code == 404
        assert set(answer.get_json()) == {"error"}


def test_only_files_of_the_front_end_are_served(tab: Tab) -> None:
    assert set(tab.apps) == {"/runs", "/data", "/compare", *(f"/{name}" for name in FILES)}
    folder = Path(static.__file__).parent
    for name, kind in FILES.items():
        answer = tab.get(f"/{name}")
        assert answer.data == (folder / name).read_bytes()
        assert answer.mimetype == kind
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_all_that_the_front_end_loads_is_served() -> None:
    folder = Path(static.__file__).parent
    script = (folder / "tab.js").read_text()
    named = set(re.findall(r'"\.?/?([a-z_-]+(?:\.min)?\.(?:js|css))"', script))
    assert named == set(FILES) - {"tab.js"}
    assert tab_metadata().es_module_path.removeprefix("/") in FILES


def tab_metadata() -> Any:
    return AlignAuditTab(context(Path("/nowhere")), interval).frontend_metadata()


@pytest.mark.parametrize("line", ["no JSON", '{"schema_version": 999}', '{"step": 60', "\x00\x00"])
def test_a_log_that_cannot_be_read_is_no_healthy_run_and_hides_no_other(tab: Tab, logdir: Path, line: str) -> None:
    with (logdir / "a" / FOLDER / "records.jsonl").open("a") as file:
        file.write(f"{line}\n")
    assert [row["name"] for row in tab.rows()] == ["b", "a", "c"]
    row = tab.row("a")
    assert row["word"] == "BLIND"
    assert row["reason"].startswith("1 line at the end of the log cannot be read")
    data = tab.data("a")
    assert data["sets"][0]["status"]["word"] == data["run"]["status"]["word"] == "BLIND"
    assert data["sets"][0]["status"]["sentences"][0] == row["reason"]
    assert data["trouble"].startswith("1 line of records.jsonl cannot be read")
    assert data["sets"][0]["panels"][0]["steps"] == [0, 5, 10, 20, 40]
    assert tab.data("b")["trouble"] is None


def test_a_log_that_is_none_is_said_and_hides_no_other(tab: Tab, logdir: Path) -> None:
    records = logdir / "a" / FOLDER / "records.jsonl"
    records.unlink()
    (logdir / "a" / FOLDER / "alerts.jsonl").touch()
    records.mkdir()
    assert [row["name"] for row in tab.rows()] == ["b", "a", "c"]
    assert tab.row("a")["word"] == "BLIND"
    assert "IsADirectoryError" in tab.row("a")["reason"]
    assert tab.get("/data", run=tab.row("a")["key"]).status_code == 200


def test_what_breaks_is_said_in_the_answer(tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ValueError(HOSTILE)

    key = tab.row("a")["key"]
    monkeypatch.setattr(shown_runs, "page_data", broken)
    answer = tab.get("/data", run=key)
    assert (answer.status_code, answer.mimetype) == (500, "application/json")
    assert answer.get_json()["error"].startswith("align_audit cannot show this: ValueError: </script>")


def test_names_of_folders_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = HOSTILE.replace("/", "∕")
    write(tmp_path / name).close()
    tab = Tab(tmp_path, monkeypatch)
    row = tab.rows()[0]
    assert row["name"].isprintable() and "<img src=x" in row["name"]
    assert tab.get("/data", run=row["key"]).mimetype == "application/json"
    assert tab.get("/runs").mimetype == "application/json"


def test_a_name_that_is_no_text_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run\udcff").close()
    tab = Tab(tmp_path, monkeypatch)
    assert tab.rows()[0]["name"] == "run\\udcff"
    assert tab.data("run\\udcff")["run"]["status"]["word"] == "HEALTHY"


# --- nothing to show --------------------------------------------------------------------------------------------------


def test_where_there_is_no_run_it_says_where_runs_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tab = Tab(tmp_path, monkeypatch)
    assert not tab.plugin.is_active()
    said = tab.get("/runs").get_json()
    assert said["runs"] == []
    assert str(tmp_path.resolve()) in said["hint"] and "records.jsonl" in said["hint"]


def test_of_a_log_beside_the_log_folder_it_says_how_to_see_it(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (logdir / "a" / "runs").mkdir()
    tab = Tab(logdir / "a" / "runs", monkeypatch)
    assert tab.plugin.is_active()
    said = tab.get("/runs").get_json()
    assert said["runs"] == []
    assert f"tensorboard --logdir {(logdir / 'a').resolve()}" in said["hint"]


# --- the entry point --------------------------------------------------------------------------------------------------


def test_the_entry_point_is_a_loader() -> None:
    assert entry_points() == {"align_audit": f"{ENTRY}:TabLoader"}
    assert issubclass(TabLoader, TBLoader)
    plugin = TabLoader().load(context(Path("/nowhere")))
    assert plugin.plugin_name == "align_audit"
    assert plugin.frontend_metadata().tab_name == "Align audit"


def test_importing_the_entry_point_imports_nothing_that_could_break() -> None:
    program = f"import sys, {ENTRY}\nprint(*sorted(name for name in sys.modules if name.startswith('align_audit')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["align_audit", "align_audit.cli", ENTRY]


def test_a_loader_that_cannot_load_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = "align_audit.writers.web.tensorboard_tab"
    monkeypatch.setitem(sys.modules, broken, None)
    with caplog.at_level(logging.WARNING):
        assert TabLoader().load(context(Path("/nowhere"))) is None
    (record,) = caplog.records
    assert record.name == "tensorboard"
    assert "is missing, because align_audit cannot be loaded" in record.getMessage()
    assert broken in record.getMessage()


def test_tensorboard_lives_where_the_plugin_cannot(logdir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A real process, in which something that align_audit needs is broken."""
    broken = {"pydantic": "raise RuntimeError('broken beyond repair')"}
    with tensorboard(logdir, tmp_path_factory.mktemp("tensorboard"), modules=broken) as server:
        assert b"TensorBoard" in server.get("")
        listing = json.loads(server.get("data/plugins_listing"))
        assert "scalars" in listing and "align_audit" not in listing
        said = server.log.read_text()
        assert said.count("broken beyond repair") == 1
        assert 'The tab "Align audit" is missing' in said
