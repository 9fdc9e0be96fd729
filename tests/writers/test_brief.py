"""What the terminal says of an audit: a line while all is well, five when not, and each alert once."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from align_audit.config import AlertConfig, AuditConfig
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, Control, Occasion
from align_audit.record.estimate import Estimate
from align_audit.writers.brief import what_to_do
from align_audit.writers.standing import limit_of, standing_at, where_in_short, where_in_words
from tests.helpers.alert_cases import about, health, judged, on_set, with_margins, with_part
from tests.helpers.make_record import make_record
from tests.helpers.screens import LOG, a_run, calm, quick_look, ruined, screen

RED_INK = "\x1b[1;31m"


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def audits(text: str) -> list[str]:
    """The first line of each audit."""
    return [line for line in text.splitlines() if line.startswith("align_audit step")]


def broken_identity(record: AuditRecord) -> AuditRecord:
    identity = Control(verdict="failed", reason="patching with itself moves the margin by 0.3 nats")
    return with_part(record, "controls", identity=identity)


def split_half_failed(record: AuditRecord) -> AuditRecord:
    return with_part(record, "controls", split_half=Control(verdict="failed", reason="61 of 100 halves agree"))


def test_a_healthy_run_is_a_line_an_audit() -> None:
    text = screen(a_run("well"))
    assert text.splitlines() == [
        "align_audit step 0  HEALTHY  policy and reference are equal before training: 64 held-out pairs, tokens 82 %   15.6 s",
        *(
            f"align_audit step {step}  HEALTHY  chosen +0.01, KL 0.04 (limit 0.35), tokens 82 %, reward margin +0.50   15.6 s"
            for step in (5, 10, 20, 40)
        ),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clean_step": 0}, "last clean audit: step 0, before training; start again from that model"),
        ({"clean_step": 0, "checkpoint": "checkpoint-0"}, "last clean audit: step 0; go back to checkpoint-0"),
        ({"clean_step": 10}, "last clean audit: step 10; no checkpoint from then or before was kept"),
        ({"clean_step": None}, "no clean audit before it"),
        ({"clean_step": None, "cause": "reference"}, "no clean audit before it"),
        ({"clean_step": None, "cause": "reference", "remedy": ""}, "Mend it"),
    ],
)
def test_what_to_do_names_what_there_is_to_go_back_to(changes: dict[str, Any], words: str) -> None:
    told = Alert(
        rule="r", cause="drift", level="error", step=20, since=20, value=1.0, message="M.", suggestion="Mend it"
    )
    told = told.model_copy(update={"remedy": "Mend it", **changes})
    record = ruined(20).model_copy(update={"alerts": [told]})
    standing = standing_at(record, [record])
    assert what_to_do(standing, command=False).startswith(words)


def test_an_error_that_was_not_seen_this_time_says_so_before_what_it_costs() -> None:
    """Figures beside it are healthy: whoever reads asks whether the tool is crying."""
    told = Alert(
        rule="r", cause="drift", level="error", event="open", step=20, since=10, looks=0, value=1.0, message="M.",
        suggestion="Mend it", remedy="Mend it", clean_step=5, observed_at=15,
    )  # fmt: skip
    due = Occasion(reason="at step 20", next_step=40)
    record = calm(20).model_copy(update={"alerts": [told], "occasion": due})
    standing = standing_at(record, [record])
    assert standing.headline() == "the policy is leaving its language, since step 10, last seen at step 15"
    assert what_to_do(standing).startswith(
        "wait for the next look, which ends this if it does not see it either; else last clean audit: step 5"
    )
    for occasion in (None, Occasion(reason="the last step", next_step=None)):
        last = record.model_copy(update={"occasion": occasion})
        assert what_to_do(standing_at(last, [last])).startswith("last clean audit: step 5"), "no look will come"


def test_an_error_behind_which_audits_break_says_both() -> None:
    record = a_run("ruined")[-1]
    status = replace(standing_at(record, [record]).status, blind="Audits break since step 60: ValueError: no.")
    standing = replace(standing_at(record, [record]), status=status)
    assert standing.headline().endswith(". Audits break since step 60: ValueError: no")


def test_figures_that_are_not_known_have_no_unit() -> None:
    record = with_margins(ruined(20), kl=Estimate.unknown("no"), chosen_logp_change_per_token=Estimate.unknown("no"))
    text = screen([*a_run("ruined")[:-1], record])
    assert "not known nats" not in text


def test_a_ruined_run_is_five_lines_and_its_alert() -> None:
    lines = screen(a_run("ruined")).splitlines()
    place = next(place for place, line in enumerate(lines) if "step 20" in line)
    assert lines[place] == "align_audit step 20  ERROR  the policy is leaving its language   15.6 s"
    chosen = "chosen answers −5.40 nats/token, less likely (limit −0.6)"
    assert " ".join(lines[place + 1].split()) == f"{chosen} next tokens right 40 % (reference 82 %)"
    kl = "KL to reference 9.40 nats/token (limit 0.7)"
    assert " ".join(lines[place + 2].split()) == f"{kl} reward margin +7.90 (training log: +4.90)"
    assert lines[place + 3].startswith("  where  peak at layer ")
    assert lines[place + 3].endswith("evidence  6 of 6 controls")
    assert lines[place + 4] == (
        "  do     last clean audit: step 10; no checkpoint from then or before was kept (save_steps, save_total_limit). "
        "Learning rate 0.003 → 0.0006 or lower, or beta 0.1 → 0.2 or higher"
    )
    columns = {
        line.index(label) for line, label in zip(lines[place + 1 :], ("next", "reward", "evidence"), strict=False)
    }
    assert len(columns) == 1, "what stands side by side is aligned"


def test_the_checkpoint_to_go_back_to_is_named_with_its_command() -> None:
    text = screen(a_run("ruined", checkpoints=["checkpoint-5", "checkpoint-20"]))
    go = "go back to checkpoint-5: trainer.train(resume_from_checkpoint='runs/dpo/checkpoint-5')"
    assert f"last clean audit: step 10; {go}. Learning rate" in text


def test_an_alert_is_told_in_whole_when_something_happens_to_it_and_not_at_each_audit() -> None:
    records = a_run("resolved")
    events = [(alert.event, record.step) for record in records for alert in record.alerts]
    assert events == [("opened", 20), ("open", 40), ("resolved", 59)], "what this test is about"
    text = screen(records)
    (opened,) = [alert for alert in records[3].alerts if alert.event == "opened"]
    assert text.count("To do: ") == 1
    assert text.count(f"ERROR {opened.rule} (step 20") == 1
    assert text.count(f"RESOLVED {opened.rule} (step 59, error since step 20") == 1
    assert text.index("RESOLVED") > text.index("align_audit step 59  HEALTHY")
    assert "align_audit step 40  ERROR  the policy is leaving its language, since step 20" in text


def test_a_warning_shows_the_limits_of_a_warning() -> None:
    record = with_margins(calm(20), kl=about(0.5, 0.05), chosen_logp_change_per_token=about(-0.1))
    text = screen(judged([calm(0), calm(5), calm(10), record]), tty=True, width=200)
    assert "KL to reference  " in plain(text)
    assert "0.50 nats/token (limit 0.35)" in plain(text)
    assert "step 20  WATCH  the policy is leaving its language" in plain(text)
    assert RED_INK not in text


def test_red_belongs_to_errors_and_to_a_broken_identity_control() -> None:
    failed = [split_half_failed(record) for record in a_run("well")[1:]]
    for verbose in (False, True):
        assert RED_INK not in screen(failed, tty=True, verbose=verbose)
        assert RED_INK in screen(a_run("ruined"), tty=True, verbose=verbose)
        assert RED_INK in screen([broken_identity(calm(10))], tty=True, verbose=verbose)


def test_a_broken_identity_control_is_no_health() -> None:
    text = screen([broken_identity(calm(10))])
    head, *lines = text.splitlines()
    assert head.startswith("align_audit step 10  BLIND  The identity control failed: patching with itself")
    assert len(lines) == 4
    assert lines[2].endswith("evidence  5 of 6 controls (not identity): the identity control failed")
    assert lines[3].startswith("  do     trust nothing that is said by layer")


def test_a_full_audit_after_a_health_audit_adds_where_and_evidence() -> None:
    *earlier, record = a_run("ruined")[:4]
    told = record.model_copy(update={"alerts": [alert.model_copy(update={"event": "open"}) for alert in record.alerts]})
    lines = screen([*earlier, quick_look(record), told]).splitlines()
    heads = audits("\n".join(lines))
    assert heads[-2].startswith("align_audit step 20  ERROR")
    assert heads[-1].startswith("align_audit step 20  where  peak at layer ")
    assert heads[-1].endswith("evidence  6 of 6 controls   15.6 s")
    assert lines[-1] == heads[-1]
    assert any("(step 10)" in line for line in lines if line.startswith("  where")), "of the last full audit"


def test_a_full_audit_that_finds_more_is_told_whole() -> None:
    *earlier, record = a_run("ruined")[:4]
    look = quick_look(record).model_copy(update={"alerts": []})
    heads = audits(screen([*earlier, look, record]))
    assert heads[-2].startswith("align_audit step 20  HEALTHY")
    assert heads[-1].startswith("align_audit step 20  ERROR")


def test_sets_are_told_apart_and_have_a_status_each() -> None:
    bad = a_run("ruined")[3]
    bad = on_set(bad.model_copy(update={"alerts": [a.model_copy(update={"probe_name": "b"}) for a in bad.alerts]}), "b")
    heads = audits(screen([on_set(calm(20), "a"), bad]))
    assert heads[0].startswith("align_audit step 20 on 'a'  HEALTHY")
    assert heads[1].startswith("align_audit step 20 on 'b'  ERROR")


def test_the_log_is_quoted_with_its_step_or_not_at_all() -> None:
    records = a_run("ruined")
    assert "(training log at step 5: +0.30)" in screen(records[:4], log=LOG[:1])
    text = screen(records, log=[])
    assert "training log" not in text
    assert "reward margin  +7.90\n" in text
    unknown = [with_part(record, "provenance", beta=None) for record in records]
    assert "margin shift  +79.00 nats" in screen(unknown)
    assert "margin shift +5.00 nats" in screen(unknown)


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_narrow_terminal_breaks_lines_and_loses_nothing(width: int) -> None:
    wide, narrow = (plain(screen(a_run("ruined"), width=w, tty=True, color_system=None)) for w in (400, width))
    assert max(map(len, narrow.splitlines())) <= width
    drop = str.maketrans("", "", "│╭╮╰╯─ \n")
    assert sorted(wide.translate(drop)) == sorted(narrow.translate(drop))


def test_off_a_terminal_lines_are_whole_and_plain() -> None:
    text = screen(a_run("ruined"), width=40)
    assert "\x1b" not in text
    assert not set(text) & set("─│╭╮╰╯")
    assert max(map(len, text.splitlines())) > 100, "a search in a log finds all of a line"
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = screen(a_run("ruined"), tty=True)
    assert "\x1b[1;31m" not in text
    assert "\x1b[33m" not in text
    assert "ERROR" in text


def test_names_and_messages_from_outside_are_shown_as_text() -> None:
    record = a_run("ruined")[3]
    alert = record.alerts[0].model_copy(update={"message": "a\x1b[2Jb [red]c[/red]", "checkpoint": None})
    record = on_set(record.model_copy(update={"alerts": [alert]}), "x\x1b]0;title\x07y")
    for tty in (False, True):
        text = screen([record], tty=tty, color_system=None, width=200)
        assert "\x1b[2J" not in text
        assert "\x1b]0" not in text
        assert "a\\x1b[2Jb [red]c[/red]" in text


def test_an_output_that_knows_no_unicode_is_no_problem() -> None:
    text = screen(a_run("ruined"), encoding="ascii")
    assert "-5.40 nats/token" in text
    assert "0.003 -> 0.0006" in text


def test_what_cannot_be_known_is_said_to_be_so() -> None:
    record = with_margins(calm(20), kl=Estimate.unknown("overflowed"), shift=Estimate.unknown("overflowed"))
    (line,) = screen([record]).splitlines()
    assert "KL not known (limit 0.35)" in line
    assert "reward margin not known" in line
    record = with_margins(calm(20), kl=Estimate(mean=math.inf, low=0.1, high=math.inf))
    assert "KL ∞ (limit" in screen([record])


@pytest.mark.parametrize(
    ("alerts", "option", "limit"),
    [
        ({}, "kl_warning", 0.35),
        ({"kl_warning": 0.5}, "kl_warning", 0.5),
        ({"kl_warning": 0.3, "kl_error": ".inf"}, "kl_error", None),
        ({"rules": {"kl": "off"}}, "kl_warning", None),
        ({"rules": {"kl": "off"}}, "chosen_drop_error", 0.6),
        ({"enabled": False}, "kl_warning", None),
    ],
)
def test_limits_are_those_of_the_stored_configuration(alerts: dict[str, Any], option: str, limit: float | None) -> None:
    values = {name: math.inf if value == ".inf" else value for name, value in alerts.items()}
    config = AuditConfig(alerts=AlertConfig(**values)).to_dict()
    assert limit_of(with_part(calm(20), "provenance", config=config), option) == limit
    assert limit_of(with_part(calm(20), "provenance", config={}), "kl_warning") == 0.35, "an older record's default"


@pytest.mark.parametrize(
    ("kl", "chosen", "shown"),
    [(0.2, 0.1, "0.35"), (0.5, 0.1, "0.7"), (0.5, -0.02, "0.7"), (0.5, -0.1, "0.35"), (0.5, math.nan, "0.35")],
)
def test_the_limit_of_kl_is_the_one_that_holds(kl: float, chosen: float, shown: str) -> None:
    """Up to its second limit KL opens nothing while the chosen completions are kept: HEALTHY beside a limit that is passed
    would be a riddle."""
    change = Estimate.unknown("too few") if math.isnan(chosen) else about(chosen)
    record = with_margins(calm(20), kl=about(kl), chosen_logp_change_per_token=change)
    assert f"KL {kl:.2f} (limit {shown})" in screen([record])


@pytest.mark.parametrize(("chosen", "opens"), [(0.1, False), (-0.1, True)])
def test_where_the_second_limit_of_kl_is_off_screen_and_rule_agree(chosen: float, opens: bool) -> None:
    alerts = AlertConfig(kl_error=math.inf)
    config = AuditConfig(alerts=alerts).to_dict()
    moved = with_margins(calm(20), kl=about(5.0), chosen_logp_change_per_token=about(chosen))
    (record,) = judged([with_part(moved, "provenance", config=config)], alerts)
    assert [alert.rule for alert in record.alerts] == (["kl_out_of_bounds"] if opens else [])
    assert ("(limit 0.35)" in screen([record])) == opens
    assert opens or "KL 5.00, tokens" in screen([record])


def test_where_is_of_the_last_full_audit() -> None:
    full = make_record(100, layers=6)
    words = where_in_words(full, 100)
    assert words.startswith("layers 2–4, ")
    assert words.endswith(" % of the gain")
    assert where_in_words(full, 120) == f"{words} (step 100)"
    assert where_in_short(full) == "layers 2–4"
    assert where_in_words(None, 5) == "not measured yet"
    assert where_in_words(calm(0), 0) == "nowhere: policy and reference are equal"
    assert where_in_words(calm(0), 5) == "not measured since training began"
    assert where_in_short(calm(0)) == "–"


def test_later_audits_and_those_of_other_sets_do_not_count() -> None:
    records = a_run("ruined")
    assert standing_at(records[1], records, LOG).status.word == "HEALTHY"
    assert standing_at(records[1], records, LOG).logged == LOG[0]
    elsewhere = [on_set(record, "other") for record in records]
    assert standing_at(calm(40), elsewhere).status.word == "HEALTHY"
    assert standing_at(health(calm(40)), elsewhere).full is None


def test_verbose_prints_the_table_and_how_the_run_stands() -> None:
    text = screen(a_run("ruined"), verbose=True)
    assert "align_audit, step 20: 64 pairs, llama with 12 layers" in text
    assert "ERROR since step 20" in text
    assert "margin shift" in text
    assert not audits(text)
