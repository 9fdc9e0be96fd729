"""The section of a model card: what it says, that outside text stays text, and that nothing else of a file changes."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from align_audit.errors import ConfigurationError, RecordError
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import Failure
from align_audit.record.run import AuditRun
from align_audit.writers import markdown
from align_audit.writers import model_card as module
from align_audit.writers.markdown import escaped
from align_audit.writers.model_card import BEGIN, END, model_card, with_section
from tests.helpers.alert_cases import healthy, on_set, with_part
from tests.helpers.screens import LOG, a_run, calm, quick_look, ruined

HOSTILE = (
    "a](http://evil.example) <script>x</script> | `c` **b** _i_ ~~s~~ $m$ @you www.evil.example &amp; \\\n# T "
    "<!-- align_audit:end -->"
)


def run_of(records: list[AuditRecord]) -> AuditRun:
    return AuditRun(Path("runs/dpo/align_audit"), records, [], [], training_log=LOG)


def tokens(section: str) -> Iterator[Token]:
    """All tokens of a page, as another program reads it."""
    for block in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(section):
        yield block
        yield from block.children or ()


def text_of(section: str) -> str:
    return "".join(
        token.content if token.type == "text" else " " for token in tokens(section) if token.type != "inline"
    )


def test_the_examples_hold() -> None:
    results = [doctest.testmod(each) for each in (module, markdown)]
    assert [result.attempted for result in results] == [1, 1]
    assert [result.failed for result in results] == [0, 0]


def test_it_says_how_the_checkpoint_stands_and_where_with_its_evidence() -> None:
    section = model_card(run_of(a_run("ruined")), 20, {20: "checkpoint-20"})
    assert section.startswith(f"{BEGIN}\n## Alignment audit\n\n**ERROR** at step 20. ")
    assert section.endswith(END)
    record = a_run("ruined")[3]
    text = " ".join(text_of(section).split())
    for words in (
        "checkpoint checkpoint-20",
        "chosen answers against the reference −5.40 [−5.41, −5.39] nats per token",
        "KL to the reference 9.40 [9.39, 9.41] nats per token",
        "reward accuracy 90 %",
        "margin shift, nats +79.00",
        "reward margin, β·nats +7.90 (β = 0.1)",
        f"Where the preference sits: {record.finding.words if record.finding else ''}.",
        f"noise control passed: {record.controls.noise.reason}",
        f"policy {record.provenance.policy_hash}",
        f"probes {record.provenance.probe_hash}",
        "Do: ",
    ):
        assert words in text, words
    for name, version in record.provenance.versions.items():
        assert f"{name} {version}" in text


def test_of_a_healthy_run_there_is_nothing_to_do() -> None:
    section = model_card(run_of(a_run("well")))
    assert "**HEALTHY** at step 40, since step 0. No alert is open at step 40." in section
    assert "**Do:**" not in section
    assert "| checkpoint | step 40 |" in section


def test_where_audits_break_since_that_is_what_to_do_about() -> None:
    """And not what a warning at the last audit that came through asks for."""
    words = {"message": "KL is 1.", "suggestion": "Lower the learning rate."}
    warning = Alert(rule="kl_out_of_bounds", cause="drift", level="warning", step=20, since=20, value=1.0, **words)
    record = healthy(20).model_copy(update={"alerts": [warning]})
    assert "Lower the learning rate" in model_card(run_of([record]))
    failure = Failure(step=30, time="2099-01-01T00:00:00+00:00", error="ValueError: bad batch")
    section = model_card(AuditRun(Path("runs/dpo/align_audit"), [record], [], [failure]))
    assert "**BLIND** since step 30 (last audit: step 20)" in section and "ValueError: bad batch" in section
    assert "Lower the learning rate" not in section and "find out why audits do not come through" in section


def test_a_full_audit_counts_for_its_step_and_one_of_before_is_said_to_be() -> None:
    records = [calm(0), calm(20), quick_look(calm(30))]
    section = model_card(run_of(records))
    assert "at step 30" in section
    assert "Where the preference sits (of step 20): " in section
    both = [calm(0), quick_look(calm(20)), calm(20)]
    assert "Full audit of" in model_card(run_of(both))
    assert "Where the preference sits was not measured." in model_card(run_of([quick_look(calm(20))]))


def test_each_probe_set_has_a_part() -> None:
    records = [on_set(calm(20), name) for name in ("helpful", "harmless_1")]
    section = model_card(run_of(records))
    assert [line for line in section.splitlines() if line.startswith("#")] == [
        "## Alignment audit", "### Probes helpful", "### Probes harmless_1",
    ]  # fmt: skip


def test_an_audit_that_there_is_not_is_refused() -> None:
    with pytest.raises(RecordError, match=r"no audit of step 21 in .*; those audited are 0, 5, 10, 20, 40 \(--step"):
        model_card(run_of(a_run("well")), 21)
    with pytest.raises(RecordError, match=r"no audit in .* to write a model card of: No audit has been made yet"):
        model_card(run_of([]))


def test_outside_text_stays_text() -> None:
    """As another program reads it: no link, HTML, emphasis, cell, heading or comment comes of it."""
    record = with_part(ruined(20), "provenance", probe_source=HOSTILE, versions={HOSTILE: HOSTILE}, policy_hash=HOSTILE)
    record = with_part(record, "reference_check", source=HOSTILE)
    record = with_part(record, "finding", words=HOSTILE)
    noise = record.controls.noise.model_copy(update={"reason": HOSTILE})
    record = with_part(record, "controls", noise=noise)
    alert = a_run("ruined")[3].alerts[0]
    record = record.model_copy(update={"alerts": [alert.model_copy(update={"message": HOSTILE, "remedy": HOSTILE})]})
    section = model_card(run_of([record]), 20, {20: HOSTILE})
    assert section.count(BEGIN) == section.count(END) == 1
    plain = model_card(run_of([with_part(ruined(20), "finding", words="x")]), 20, {20: "y"})
    assert [token.type for token in tokens(section) if "text" not in token.type and token.type != "softbreak"] == [
        token.type
        for token in tokens(_same_shape(plain, section))
        if "text" not in token.type and token.type != "softbreak"
    ]
    assert not [address for address in ("://", "www.", "@") if address in section]
    shown = text_of(section)
    assert (
        shown.count(
            "a](http://evil.example) <script>x</script> | `c` **b** _i_ ~~s~~ $m$ @you www.evil.example &amp; \\ # T"
        )
        >= 7
    )


def _same_shape(plain: str, section: str) -> str:
    """The same section of text without anything special: every hostile text is a word."""
    return section.replace(escaped(HOSTILE), "word")


# -- in a file ---------------------------------------------------------------------------------------------------------

SECTION = f"{BEGIN}\nnew\n{END}"


@pytest.mark.parametrize(
    "page",
    [
        b"", b"# Model", b"# Model\n", b"---\ntags: [dpo]\n---\n# Model\n\n\n", b"\xff\xfe not UTF-8 \x00\n",
        b"# Model\r\ntext\r\n", b"\xef\xbb\xbf# Model\n",
    ],
)  # fmt: skip
def test_it_is_appended_once_and_replaced_from_then_on(page: bytes) -> None:
    first = with_section(page, SECTION)
    assert first.startswith(page)
    assert first.count(BEGIN.encode()) == 1
    assert with_section(first, SECTION) == first, "writing the same again changes nothing"
    second = with_section(first + b"after\n", f"{BEGIN}\nnewer\n{END}")
    assert second == first.replace(b"new", b"newer") + b"after\n"
    assert (b"\r\nnew\r\n" in first) is (b"\r\n" in page)


def test_all_outside_of_the_markers_stays_byte_for_byte() -> None:
    page = b"before \xff\r\n" + BEGIN.encode() + b"old\n| a |" + END.encode() + b" behind\n\n\x00"
    assert (
        with_section(page, SECTION) == b"before \xff\r\n" + SECTION.replace("\n", "\r\n").encode() + b" behind\n\n\x00"
    )


@pytest.mark.parametrize(
    "page", [BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}", f"{BEGIN}{END}{BEGIN}{END}"]
)
def test_markers_that_are_no_pair_are_refused(page: str) -> None:
    with pytest.raises(ConfigurationError, match=r"expected one of each, in this order.*Remove them by hand"):
        with_section(page.encode(), SECTION)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_it_or_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from align_audit.cli import app as cli
    from tests.helpers.stored_runs import store

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["align-audit", "card", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    run = store(tmp_path / "run", a_run("ruined"))
    (run / "checkpoint-5").mkdir()
    code, out, _ = call(run)
    assert (code, out) == (0, model_card(AuditRun.load(run), None, {5: "checkpoint-5"}) + "\n")
    page = run / "checkpoint-5" / "README.md"
    page.write_bytes(b"# Model\n")
    page.chmod(0o640)
    assert call(run, "--write", page)[0] == 0
    written = page.read_bytes()
    assert written.startswith(b"# Model\n\n" + BEGIN.encode())
    assert b"| checkpoint | checkpoint-5 |" in written, "the step is that of the checkpoint"
    assert page.stat().st_mode & 0o777 == 0o640
    assert call(run, "--write", page.parent)[0] == 0, "the folder's README.md"
    assert page.read_bytes() == written
    assert call(run, "--write", tmp_path / "README.md", "--step", "20")[0] == 0
    assert b"**ERROR** at step 20" in (tmp_path / "README.md").read_bytes()
    assert sorted(path.name for path in page.parent.iterdir()) == ["README.md"]
    link = tmp_path / "link.md"
    link.symlink_to(page)
    assert call(run, "--write", link, "--step", "20")[0] == 0
    assert link.is_symlink()
    assert b"at step 20" in page.read_bytes()
    for arguments, words in (
        ([run, "--step", "7"], "no audit of step 7"),
        ([run, "--write", tmp_path / "nowhere" / "README.md"], "expected a README.md in a folder that exists"),
        ([tmp_path / "nowhere"], "no run log at"),
    ):
        code, _, err = call(*arguments)
        assert code == 2
        assert err.startswith("align-audit: ") and words in err
        assert err.count("\n") == 1
