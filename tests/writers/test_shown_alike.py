"""What several screens show of a run is the same on all of them, whatever was left, set aside, or is not there to compare."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from align_audit.cli.intervals import interval
from align_audit.cli.watch_screen import look_at_runs
from align_audit.errors import RecordError
from align_audit.record.audit_record import AuditRecord
from align_audit.record.checkpoint_names import checkpoints_in
from align_audit.record.compare import Side, compare
from align_audit.record.followed import FollowedRun
from align_audit.record.log import RunLog
from align_audit.record.run import AuditRun as StoredRun
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.closing_table import closing
from align_audit.writers.comparison import closing_notes, comparison_values
from align_audit.writers.few_pictures import drawn_records
from align_audit.writers.few_scalars import few_scalars
from align_audit.writers.model_card import model_card
from align_audit.writers.notebook import AuditRun
from align_audit.writers.plots import gallery
from align_audit.writers.runs_table import RunsTable, row_of_run
from align_audit.writers.standing import standing_at
from align_audit.writers.web.folded_data import TRANSFER
from align_audit.writers.web.log_folders import LogFolder, logs_in
from align_audit.writers.web.page_data import page_data
from align_audit.writers.web.shown_runs import ShownRuns
from tests.helpers.alert_cases import about, with_margins, with_part
from tests.helpers.pages import as_run, healthy_run
from tests.helpers.screens import a_run, calm


def with_identity_failed(record: AuditRecord) -> AuditRecord:
    """The same, measured by what cannot be trusted."""
    failed = record.controls.identity.model_copy(update={"verdict": "failed"})
    return record.model_copy(update={"controls": record.controls.model_copy(update={"identity": failed})})


def test_no_screen_gives_equal_models_an_accuracy() -> None:
    """Nothing has grown, so that the share of pairs whose margin has is 0, and says nothing."""
    record = with_margins(calm(0), accuracy=about(0.0))
    assert record.reference_check.same_weights
    run = as_run([record])
    assert [tag for tag in few_scalars(standing_at(record, [record])) if "accuracy" in tag] == [
        "align_audit health/next_token_accuracy"
    ]
    assert "| reward accuracy | not known (policy and reference are equal) |" in model_card(run)
    assert row_of_run(run, "dpo").as_json(datetime.now(UTC))["reward_accuracy"] is None
    assert page_data(run)["sets"][0]["panels"][3]["now"] == "not known"
    assert "0 %" not in closing(run, {})[0].html()
    accuracy = record._repr_html_().split("reward accuracy")[1].split("</tr>")[0]
    assert "nan" in accuracy


@pytest.mark.parametrize(
    ("records", "checkpoints", "words", "step"),
    [
        (a_run("ruined"), ["checkpoint-5", "checkpoint-20"], "checkpoint-5", 5),
        (a_run("ruined"), ["checkpoint-20"], "step 10 (no checkpoint of it was kept)", 10),
        (a_run("ruined"), [], "step 10", 10),
        ([calm(0), *a_run("ruined")[3:]], [], "step 0, the model that training started from", 0),
        (a_run("ruined")[3:], ["checkpoint-20"], "none of the audits", None),
        (
            [with_identity_failed(record) if record.step == 10 else record for record in a_run("ruined")],
            ["checkpoint-10"], "step 5 (no checkpoint of it was kept)", 5,
        ),
    ],
)  # fmt: skip
def test_every_screen_names_the_same_latest_healthy_audit(
    records: list[AuditRecord], checkpoints: list[str], words: str, step: int | None, tmp_path: Path
) -> None:
    folder = tmp_path / "dpo"
    log = RunLog(folder)
    for record in records:
        log.append(record)
    log.close()
    for name in checkpoints:
        (folder / name).mkdir()
    run = StoredRun.load(folder)
    # Of a mapping that is given everything is known.
    given = words if checkpoints or step in (0, None) else f"{words} (no checkpoint of it was kept)"
    assert closing(run, checkpoints_in(folder))[-1].words == f"latest healthy: {given}"
    assert page_data(run)["run"]["latest_healthy"] == words
    as_json = {"step": step, "checkpoint": words if words in checkpoints else None}
    row = row_of_run(run, "dpo")
    assert row.as_json(datetime.now(UTC))["latest_healthy"] == as_json
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(RunsTable([row], datetime.now(UTC)))
    assert f"latest healthy  {words}\n" in capture.get()
    compared = compare([Side("a", run), Side("b", run)], interval)
    assert comparison_values(compared)["runs"][1]["latest_healthy"] == as_json
    assert closing_notes(compared)[0] == f"Latest healthy: a {words}; b {words}."


def resumed() -> list[AuditRecord]:
    """Ruined at 20 and 40; then gone on with from 10, and well."""
    again = [
        with_part(
            record, "provenance", created=f"2026-02-01T00:{record.step:02}:00+00:00", policy_hash=f"new-{record.step}"
        )
        for record in a_run("well")
        if record.step > 10
    ]
    return sorted([*a_run("ruined"), *again], key=lambda record: (record.step, record.provenance.created))


def test_pictures_show_the_course_that_the_run_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    records = resumed()
    newest = max(records, key=lambda record: record.provenance.created)
    drawn = drawn_records(newest, records)
    assert [record.step for record in drawn] == [0, 5, 10, 20]
    assert {record.margins.kl.mean for record in drawn} == {0.04}

    given: list[AuditRecord] = []
    monkeypatch.setitem(
        gallery.PICTURES, "margins_over_steps", replace(gallery.PICTURES["margins_over_steps"], draw=given.extend)
    )
    AuditRun(Path("runs/dpo/align_audit"), records, [], []).plot.margins_over_steps()
    assert [(record.step, record.margins.kl.mean) for record in given] == [(step, 0.04) for step in (0, 5, 10, 20, 40)]


def test_a_run_that_was_set_aside_is_called_by_its_output_folder(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "dpo")
    for record in a_run("well"):
        log.append(record)
    aside = log.set_aside()
    log.append(calm(0))
    log.close()
    run, now = StoredRun.load(aside), StoredRun.load(tmp_path / "dpo")
    assert (run.output_dir, now.output_dir) == (tmp_path / "dpo", tmp_path / "dpo")
    assert [page_data(each)["run"]["name"] for each in (run, now)] == ["dpo (previous-1)", "dpo"]


@pytest.mark.parametrize("of_it", [True, False])
def test_beside_a_run_that_was_set_aside_stands_its_own_transfer(
    transfer_record: TransferRecord, tmp_path: Path, of_it: bool
) -> None:
    """It lies in the output folder, whatever run of that folder it was made of."""
    folder = tmp_path / "align_audit" / "previous-1"
    folder.mkdir(parents=True)
    transfer_record.save(tmp_path / TRANSFER)
    policy = next(iter(transfer_record.provenance.values())).policy_hash
    record = with_part(calm(20), "provenance", policy_hash=policy if of_it else "another")
    shown = page_data(replace(healthy_run(), directory=folder, records=[record]))["sets"][0]["more"]["transfer"]
    assert (shown is not None) == of_it


@pytest.mark.parametrize("lies_in", ["dpo/align_audit", "dpo", "dpo/align_audit/previous-1"])
@pytest.mark.parametrize("given", ["absolute", "relative", "from inside"])
def test_every_screen_names_the_folder_of_a_run_wherever_its_log_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lies_in: str, given: str
) -> None:
    """In ``align_audit``, copied out of it, or set aside in it."""
    log = RunLog(tmp_path / "made")
    for record in a_run("well"):
        log.append(record)
    log.close()
    place, run = tmp_path / lies_in, tmp_path / "dpo"
    place.parent.mkdir(parents=True, exist_ok=True)
    log.directory.rename(place)
    monkeypatch.chdir(place if given == "from inside" else tmp_path)
    path = {"absolute": place, "relative": Path(lies_in), "from inside": Path()}[given]
    stored = StoredRun.load(path)
    assert stored.output_dir.resolve() == run
    assert page_data(stored)["run"]["name"].split(" ")[0] == "dpo"
    (name, folder) = (row_of_run(stored, "dpo").as_json(datetime.now(UTC))[key] for key in ("run", "folder"))
    assert (name, Path(folder).resolve()) == ("dpo", run)
    assert look_at_runs([path], every=1, once=True, as_json=True, command=None, tell=print) == 0
    watched = json.loads(capsys.readouterr().out)
    assert (watched["run"], Path(watched["folder"]).resolve()) == ("dpo", run)
    if "previous" not in lies_in:
        assert [log.name for log in logs_in([LogFolder(run)])] == ["dpo"]


# --- a damaged log ----------------------------------------------------------------------------------------------------

BAD = b"no JSON\n"


def damaged(folder: Path, ends: str, where: str) -> Path:
    """The log of a run with a line that cannot be read: at its ``start``, ``middle`` or ``end``; ``all`` of it; or ``none``."""
    log = RunLog(folder / "dpo")
    for record in a_run(ends):
        log.append(record)
    log.close()
    path = log.directory / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    parts = {"start": [BAD, *lines], "middle": [*lines[:2], BAD, *lines[2:]], "end": [*lines, BAD], "all": [BAD, BAD]}
    path.write_bytes(b"".join(parts.get(where, lines)))
    return log.directory


@pytest.mark.filterwarnings("ignore:.* cannot be read and is skipped", "ignore:.* ends in the middle of a line")
@pytest.mark.parametrize(
    ("ends", "where", "word"),
    [
        ("well", "none", "HEALTHY"),
        ("well", "start", "HEALTHY"),
        ("well", "middle", "HEALTHY"),
        ("well", "end", "BLIND"),
        ("well", "all", "BLIND"),
        ("ruined", "middle", "ERROR"),
        ("ruined", "end", "ERROR"),
    ],
)
def test_a_damaged_log_stands_alike_on_every_screen(tmp_path: Path, ends: str, where: str, word: str) -> None:
    """Only what comes after the last record that can be read leaves it open how a run stands."""
    directory = damaged(tmp_path, ends, where)
    stored, followed = StoredRun.load(directory), FollowedRun(directory)
    followed.refresh()
    row = row_of_run(followed.run, "dpo", followed.trouble)
    tab = ShownRuns([LogFolder(tmp_path)], interval)
    (listed,) = tab.listing()["runs"]
    shown = json.loads(tab.page(listed["key"]) or b"")
    page = page_data(stored)
    words = {
        "load": stored.status.word,
        "select": stored.select(None).status.word if stored.records else word,
        "page": page["run"]["status"]["word"],
        "set of the page": page["sets"][0]["status"]["word"],
        "watch": row.status.word,
        "list of the tab": listed["word"],
        "page of the tab": shown["run"]["status"]["word"],
        "set of the tab": shown["sets"][0]["status"]["word"],
    }
    if stored.records:
        words["model card"] = re.findall(r"\b(?:HEALTHY|WATCH|ERROR|BLIND)\b", model_card(stored))[0]
        words["closing table"] = re.findall(r"\b(?:HEALTHY|WATCH|ERROR|BLIND)\b", closing(stored, {})[0].html())[-1]
    assert words == dict.fromkeys(words, word)
    reasons = {stored.status.reason, row.status.reason, listed["reason"], page["run"]["status"]["reason"]}
    assert len(reasons) == 1
    assert ("at the end of the log cannot be read" in reasons.pop()) == (word == "BLIND")
    assert (row.trouble is None) == (shown["trouble"] is None) == (where == "none"), "it is said all the same"


def test_a_log_that_heals_is_no_longer_blind(tmp_path: Path) -> None:
    directory = damaged(tmp_path, "well", "end")
    followed = FollowedRun(directory)
    followed.refresh()
    assert followed.run.status.word == "BLIND"
    with (directory / "records.jsonl").open("ab") as file:
        file.write(calm(60).to_json().encode() + b"\n")
    assert followed.refresh()[0]
    assert followed.run.status.word == "HEALTHY"


def test_a_file_that_cannot_be_read_makes_every_screen_that_follows_it_blind(tmp_path: Path) -> None:
    directory = damaged(tmp_path, "well", "none")
    followed = FollowedRun(directory)
    tab = ShownRuns([LogFolder(tmp_path)], interval)
    followed.refresh()
    (directory / "records.jsonl").unlink()
    (directory / "records.jsonl").mkdir()
    (directory / "alerts.jsonl").touch()
    followed.refresh()
    (listed,) = tab.listing()["runs"]
    row = row_of_run(followed.run, "dpo", followed.trouble)
    shown = json.loads(tab.page(listed["key"]) or b"")
    for status in (row.status.word, listed["word"], shown["run"]["status"]["word"]):
        assert status == "BLIND"
    assert row.status.reason == listed["reason"] == row.trouble
    with pytest.raises(RecordError, match="cannot read"):
        StoredRun.load(directory)


def test_a_failure_that_cannot_be_read_is_no_record(tmp_path: Path) -> None:
    directory = damaged(tmp_path, "well", "none")
    (directory / "failures.jsonl").write_bytes(BAD)
    followed = FollowedRun(directory)
    followed.refresh()
    assert (followed.skipped, followed.trouble) == (0, "1 line of failures.jsonl cannot be read.")
    assert followed.run.status.word == "HEALTHY"
