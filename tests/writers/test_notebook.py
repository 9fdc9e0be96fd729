"""A run and a record in a prompt and in a notebook: a line, a table, a text, and pictures by name."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from align_audit import AuditRun
from align_audit.record.run import AuditRun as StoredRun
from align_audit.writers.plots.gallery import PICTURES
from tests.helpers.alert_cases import health, on_set, with_part
from tests.helpers.make_record import make_record, make_run, make_sites
from tests.helpers.screens import LOG, a_run, calm
from tests.helpers.stored_runs import store
from tests.writers.test_closing_table import shown

HOSTILE = "<script>alert(1)</script>\x1b[2J&"


def run_of(records: list[Any], **more: Any) -> AuditRun:
    return AuditRun(Path("runs/dpo/align_audit"), records, [], [], training_log=LOG, **more)


class Tags(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_is_a_line() -> None:
    line = repr(run_of(a_run("ruined")))
    assert line == "<AuditRun runs/dpo/align_audit: 5 audits, steps 0 to 40, ERROR since step 20>"
    assert repr(run_of([calm(5)])) == "<AuditRun runs/dpo/align_audit: 1 audit, step 5, HEALTHY since step 5>"
    assert repr(run_of([])) == "<AuditRun runs/dpo/align_audit: 0 audits, BLIND>"
    several = run_of([on_set(calm(5), name) for name in ("a", "b")])
    assert repr(several) == "<AuditRun runs/dpo/align_audit: 2 audits on 'a', 'b', step 5, HEALTHY since step 5>"
    assert repr(several.select("b")) == "<AuditRun runs/dpo/align_audit: 1 audit on 'b', step 5, HEALTHY since step 5>"
    odd = StoredRun(Path("runs/a\x1b[2J\nb"), [calm(5)], [], [])
    assert "\x1b" not in repr(odd) and "\n" not in repr(odd)


def test_a_record_is_a_line() -> None:
    (record,) = a_run("ruined")[3:4]
    line = repr(record)
    assert line.startswith("<AuditRecord step 20, full, 64 pairs: margin shift +79 nats, KL 9.4 nats/token, ")
    assert line.endswith(f", alerts: {record.alerts[0].rule}>")
    assert str(record) == line
    assert "localized in layers" in repr(make_run()[-1]) or "no localization claimed" in repr(make_run()[-1])
    assert repr(on_set(health(calm(5)), "helpful")) == (
        "<AuditRecord step 5, health, 64 pairs of 'helpful': margin shift +5 nats, KL 0.04 nats/token>"
    )
    odd = with_part(record, "finding", words=f"localized in {HOSTILE}\n", localized=True)
    assert "\x1b" not in repr(odd) and "\n" not in repr(odd)


def test_a_notebook_shows_tables_in_which_all_text_is_text() -> None:
    record = with_part(on_set(a_run("ruined")[3], "helpful"), "provenance", probe_source=HOSTILE, model_type=HOSTILE)
    record = with_part(record, "finding", words=HOSTILE)
    alert = record.alerts[0].model_copy(update={"rule": HOSTILE, "message": HOSTILE})
    record = record.model_copy(update={"alerts": [alert]})
    for page, expected in ((record._repr_html_(), 3), (run_of([record])._repr_html_(), 1)):
        read = Tags(page)
        assert set(read.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "b", "br"}
        assert read.text.count("<script>alert(1)</script>") >= expected
        assert "\x1b" not in page
    read = Tags(run_of(a_run("ruined"))._repr_html_())
    assert read.tags.count("tr") == 6
    assert "latest healthy: step 10 (no checkpoint of it was kept)" in read.text


def test_the_summary_is_what_training_ends_with(tmp_path: Path) -> None:
    records = a_run("ruined")
    assert run_of(records).summary().splitlines() == shown(records, width=100)
    folder = store(tmp_path, records)
    (folder / "checkpoint-10").mkdir()
    assert AuditRun.load(folder).summary().splitlines()[-1] == "latest healthy: checkpoint-10"
    assert run_of([]).summary() == "BLIND: No audit has been made yet."


def test_every_picture_of_a_run_is_drawn_by_its_name() -> None:
    run = run_of([make_record(0, progress=0.0), make_record(50, sites=make_sites())])
    names = [name for name in dir(run.plot) if not name.startswith("_")]
    assert set(PICTURES) < set(names), "and those of its finer sites"
    for name in ("depth_trace", "margins_over_steps"):
        figure = getattr(run.plot, name)()
        assert isinstance(figure, Figure)
    assert run.plot.depth_trace.__name__ == "depth_trace"
    assert "depth_trace" in repr(run.plot)


def test_another_name_is_refused_with_the_nearest() -> None:
    run = run_of([calm(5)])
    with pytest.raises(
        AttributeError, match=r"no picture 'depth_trase' \(did you mean 'depth_trace'\?\); the pictures of this"
    ):
        run.plot.depth_trase  # noqa: B018
    assert not hasattr(run.plot, "_repr_html_"), "what notebooks ask for is no picture"


def test_a_run_of_several_sets_has_pictures_set_by_set() -> None:
    run = run_of([on_set(calm(5), name) for name in ("a", "b")])
    with pytest.raises(ValueError, match=r"AuditRun.select\(name\)"):
        run.plot.margins_over_steps()
    assert isinstance(run.select("a").plot.margins_over_steps(), Figure)


def test_what_is_loaded_shows_itself(tmp_path: Path) -> None:
    run = AuditRun.load(store(tmp_path, [calm(5)]))
    assert isinstance(run, AuditRun) and isinstance(run.select(None), AuditRun)
    assert run.plot.depth_trace
