"""What a page says below its panels: texts, where the preference sits with its evidence, and what is folded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from align_audit.record.audit_record import IN_TRAINING, NO_TRAINER, Control
from align_audit.record.log import RunLog
from align_audit.record.pair_texts import TokenChange
from align_audit.record.run import AuditRun
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.web.folded_data import unknown_data
from align_audit.writers.web.json_values import lines, number, text
from tests.helpers.alert_cases import with_part
from tests.helpers.make_record import make_record
from tests.helpers.pages import (
    HOSTILE,
    as_run,
    first,
    harmless,
    healthy_run,
    ruined_run,
    strings,
    texts_run,
)

# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_those_of_the_last_audit_that_kept_some(tmp_path: Path) -> None:
    texts = first(texts_run(tmp_path))["texts"]
    assert texts["step"] == 40
    assert [(pair["pair"], pair["shift"]) for pair in (*texts["lost"], *texts["gained"])] == [
        (7, -6.0),
        (1, 8.0),
        (2, 3.0),
    ]
    lost = texts["lost"][0]
    assert lost["prompt"] == "How are you?\n fine"
    assert lost["chosen"] == {
        "tokens": [
            {"text": "It", "change": 0.4}, {"text": " fine", "change": -3.0}, {"text": "↵", "change": None},
            {"text": ".", "change": -0.1},
        ],
        "length": None,
    }  # fmt: skip
    assert (len(lost["rejected"]["tokens"]), lost["rejected"]["length"]) == (2, 300)
    assert first(healthy_run())["texts"] is None


def test_texts_are_not_shown_where_the_last_audit_was_told_to_keep_none(tmp_path: Path) -> None:
    run = texts_run(tmp_path)
    last = run.records[-1]
    none = with_part(last, "provenance", config={**last.provenance.config, "examples": {"pairs": 0}}, created="2026-02")
    later = none.model_copy(update={"step": 50})
    assert first(replace(run, records=[*run.records, later]))["texts"] is None


def test_what_became_impossible_is_said_to_be_so(tmp_path: Path) -> None:
    run = texts_run(tmp_path)
    texts = run.pair_texts(run.records[-1])
    assert texts is not None
    changes = (-math.inf, math.inf, math.nan)
    tokens = [TokenChange(text="x", change=change) for change in changes]
    pair = texts.lost[0].model_copy(update={"chosen": tokens, "shift": -math.inf})
    log = RunLog(tmp_path)
    log.save_texts(run.records[-1], texts.model_copy(update={"lost": [pair]}))
    log.close()
    lost = first(AuditRun.load(tmp_path))["texts"]["lost"][0]
    assert (lost["shift"], lost["says"]) == (None, "−∞")
    assert [(token["change"], token.get("says")) for token in lost["chosen"]["tokens"]] == [
        (None, "−∞"), (None, "∞"), (None, None),
    ]  # fmt: skip


def test_words_of_every_script_are_as_they_are() -> None:
    for words in ("می\u200cخواهم", "क्\u200dष", "👩\u200d💻", "a\u00a0b\u3000c", "❤\ufe0f"):
        assert text(words) == lines(words) == words
    assert lines("a\tb") == "a\tb"
    for letter in "\u202e\u2066\u200f\u061c\x1b\x85\x00\u2028\ufeff\ud800":
        assert letter not in text(f"a{letter}b") + lines(f"a{letter}b")


def test_foreign_tokens_hold_no_control_characters(tmp_path: Path) -> None:
    words = list(strings(first(texts_run(tmp_path, HOSTILE))["texts"]))
    assert any("\\x1b[31m" in word for word in words)
    assert all(harmless(letter) or letter == "\n" for word in words for letter in word)


# --- where and evidence -----------------------------------------------------------------------------------------------


def test_layers_are_those_of_the_records() -> None:
    run = healthy_run()
    where = first(run)["where"]
    patched = [record for record in run.records if record.patching is not None]
    assert where["steps"] == [record.step for record in patched]
    for place, record in enumerate(patched):
        assert record.patching is not None and record.finding is not None
        assert where["transplant"][place]["mean"] == [number(each.mean) for each in record.patching.block_transplant]
        assert where["gain"][place]["high"] == [number(each.high) for each in record.patching.layer_gain]
        assert where["sentences"][place].lower() == record.finding.words.lower()
        assert where["claims"][place] == record.finding.layers
    assert where["unknown"][0] != ""
    assert [site["name"] for site in where["sites"]] == [
        "Attention output", "MLP output, completion", "Heads", "Windows of 2 layers",
    ]  # fmt: skip


def test_evidence_is_of_each_full_audit_with_its_reasons() -> None:
    run = healthy_run()
    evidence = first(run)["evidence"]
    assert [each["step"] for each in evidence] == first(run)["where"]["steps"]
    chips = {chip["name"]: chip for chip in evidence[-1]["chips"]}
    assert len(chips) == 6
    assert chips["split half"]["reason"] == run.records[-1].controls.split_half.reason
    assert not any(chip["broken"] for chip in chips.values())


def test_only_a_broken_identity_control_is_marked_as_such() -> None:
    record = make_record(20)
    failed = Control(verdict="failed", reason="it moves by 0.1")
    everything = dict.fromkeys(type(record.controls).model_fields, failed)
    data = first(as_run([record.model_copy(update={"controls": record.controls.model_copy(update=everything)})]))
    assert [chip["name"] for chip in data["evidence"][0]["chips"] if chip["broken"]] == ["identity"]
    assert data["status"]["word"] == "BLIND"
    assert "trust nothing" in data["status"]["do"]["words"].lower()


# --- folded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"delta_align": -0.05}, "No SPINAL signature: Δalign −0.05, coherence 0.30 (reference 0.30)"),
        ({"delta_align": 0.01}, "No SPINAL signature: Δalign +0.01, coherence 0.30 (reference 0.30)"),
        ({"delta_align": 0.4, "coherence": 0.1}, "No SPINAL signature: Δalign +0.40, coherence 0.10 (reference 0.30)"),
        (
            {"delta_align": 0.4},
            "Δalign is positive, as in SPINAL's signature: Δalign +0.40, coherence 0.30 (reference 0.30)",
        ),
        ({"delta_align": math.nan}, "SPINAL: not known (the record gives no reason)"),
    ],
)
def test_a_title_states_the_finding(changes: dict[str, float], title: str) -> None:
    record = make_record(20)
    assert record.spinal is not None
    spinal = record.spinal.model_copy(update={"coherence": 0.3, "reference_coherence": 0.3} | changes)
    assert first(as_run([record.model_copy(update={"spinal": spinal})]))["more"]["spinal"]["title"] == title


def test_a_rank_is_not_claimed_where_random_subspaces_do_as_well() -> None:
    record = make_record(20)
    failed = record.controls.model_copy(update={"random_subspace": Control(verdict="failed", reason="they do as well")})
    title = first(as_run([record.model_copy(update={"controls": failed})]))["more"]["low_rank"]["title"]
    assert title == "No low-rank subspace claimed: random subspaces do as well"


def test_a_transfer_beside_the_log_is_shown(transfer_record: TransferRecord, tmp_path: Path) -> None:
    run = replace(as_run([make_record(20)]), directory=tmp_path / "align_audit")
    transfer_record.save(tmp_path / "transfer.json")
    shown = first(run)["more"]["transfer"]
    assert shown["title"] == "Transfer between probe sets at step 30"
    assert len(shown["cells"]) == 9
    cell = next(each for each in shown["cells"] if (each["fitted"], each["patched"]) == ("harmless", "helpful-v1.1"))
    stored = transfer_record.cells["shift"][1]["harmless"]["helpful-v1.1"]
    assert (cell["rank"], cell["fraction"]["mean"]) == (4, number(stored.effect_fraction[-1].mean))
    (tmp_path / "transfer.json").write_text("{}")
    broken = first(run)["more"]["transfer"]
    assert broken["title"].startswith("The transfer record cannot be read") and broken["cells"] == []


def test_provenance_cost_and_what_is_not_known() -> None:
    more = first(ruined_run())["more"]
    assert dict(more["provenance"])["model"] == "llama, 12 layers, 512 wide"
    assert more["cost"]["title"] == "5 audits took 78 s"
    assert all(each["reason"] and each["paths"] for each in more["unknown"])


def test_what_an_audit_cost_is_nothing_that_it_could_not_know_of_the_models() -> None:
    record = make_record(20, layers=4)
    alone = record.model_copy(update={"reasons": record.reasons | dict.fromkeys(IN_TRAINING, NO_TRAINER)})
    assert unknown_data(alone) == unknown_data(record)
    assert unknown_data(alone.model_copy(update={"reasons": alone.reasons | {"spinal": "switched off"}}))
