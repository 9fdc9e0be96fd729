"""What changed in text, on disk: it comes back as it was, beside its record and no other one."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import FOLDER, RunLog
from align_audit.record.pair_texts import PairText, PairTexts, TokenChange
from align_audit.record.run import AuditRun
from tests.record.test_log import small

HOSTILE = [
    "</script><script>alert(1)</script>", "\x00\x1b[31m\x07", "\u2028\u2029\u202e", '"\\\n\r\t', "⟨id 1⟩", "😀\ufeff", "[bold]",
]  # fmt: skip


def texts(word: str = "a", change: float = -1.25) -> PairTexts:
    tokens = [TokenChange(text=word, change=change), TokenChange(text=" b", change=0.5)]
    pair = PairText(pair=3, prompt="Why?", shift=-2.0, chosen=tokens, rejected=tokens[:1], rejected_tokens=400)
    return PairTexts(lost=[pair], gained=[])


def of_set(record: AuditRecord, **provenance: object) -> AuditRecord:
    return record.model_copy(update={"provenance": record.provenance.model_copy(update=provenance)})


@pytest.mark.parametrize("word", HOSTILE)
def test_foreign_text_comes_back_as_it_was(word: str, tmp_path: Path) -> None:
    log, record = RunLog(tmp_path), small(5)
    log.append(record)
    path = log.save_texts(record, texts(word))
    assert path == tmp_path / FOLDER / "step-5" / "texts.json"
    run = AuditRun.load(tmp_path)
    stored = run.pair_texts(run.records[0])
    assert stored is not None
    assert (stored.lost, stored.gained) == (texts(word).lost, [])
    assert stored.lost[0].chosen[0].text == word


@pytest.mark.parametrize(("change", "written"), [(math.nan, None), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_a_change_that_is_no_number_is_json_all_the_same(change: float, written: object, tmp_path: Path) -> None:
    log, record = RunLog(tmp_path), small(5)
    path = log.save_texts(record, texts(change=change))

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    values = json.loads(path.read_text(), parse_constant=refused)
    assert values["lost"][0]["chosen"][0]["change"] == written
    stored = AuditRun.of(log).pair_texts(record)
    assert stored is not None
    np.testing.assert_equal(stored.lost[0].chosen[0].change, change)


def test_an_older_log_has_none_and_nothing_is_said(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append(small(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AuditRun.load(tmp_path).pair_texts(small(5)) is None
    assert not (log.directory / "step-5").exists(), "looking must not make folders"


def test_each_probe_set_has_its_texts_and_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for name in ("harmless", "helpful"):
        log.save_texts(of_set(small(5), probe_name=name), texts(name))
    assert sorted(path.name for path in log.step_dir(5).iterdir()) == ["texts-harmless.json", "texts-helpful.json"]
    run = AuditRun.load(tmp_path)
    for name in ("harmless", "helpful"):
        stored = run.pair_texts(of_set(small(5), probe_name=name))
        assert stored is not None
        assert stored.lost[0].chosen[0].text == name
    assert run.pair_texts(small(5)) is None, "the set without a name has none"
    with pytest.raises(ValueError, match="plain name"):
        log.save_texts(of_set(small(5), probe_name="../../escape"), texts())
    with pytest.warns(UserWarning, match="plain name"):
        assert run.pair_texts(of_set(small(5), probe_name="../../escape")) is None


@pytest.mark.parametrize("changed", ["policy_hash", "reference_hash", "probe_hash"])
def test_texts_of_another_audit_of_the_step_are_not_this_records(changed: str, tmp_path: Path) -> None:
    log, record = RunLog(tmp_path), small(5)
    log.save_texts(record, texts())
    run = AuditRun.load(tmp_path)
    assert run.pair_texts(record) is not None
    assert run.pair_texts(of_set(record, **{changed: "another"})) is None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'{"schema_version": 1}', b"\xff\xfe", b"[" * 100_000,
        b'{"schema_version": 1, "lost": 5, "gained": []}',
    ],
    ids=range(8),
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_left_out_and_said(content: bytes, tmp_path: Path) -> None:
    log, record = RunLog(tmp_path), small(5)
    log.save_texts(record, texts()).write_bytes(content)
    with pytest.warns(UserWarning, match=r"what changed in text is left out: .*texts\.json"):
        assert AuditRun.load(tmp_path).pair_texts(record) is None


def test_a_newer_file_is_left_out_and_says_what_to_do(tmp_path: Path) -> None:
    log, record = RunLog(tmp_path), small(5)
    path = log.save_texts(record, texts())
    path.write_text(path.read_text().replace('"schema_version":1', '"schema_version":99'))
    with pytest.warns(UserWarning, match=r"schema version 99.*Upgrade"):
        assert AuditRun.load(tmp_path).pair_texts(record) is None


def test_texts_are_written_whole_with_the_mode_of_arrays_and_set_aside_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, record = RunLog(tmp_path), small(5)
    mask = os.umask(0o077)
    try:
        arrays, path = log.save_arrays(5, "arrays", {"x": np.ones(1)}), log.save_texts(record, texts("first"))
    finally:
        os.umask(mask)
    assert path.stat().st_mode == arrays.stat().st_mode
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            log.save_texts(record, texts("second"))
    assert sorted(each.name for each in path.parent.iterdir()) == ["arrays.safetensors", "texts.json"]
    log.append(record)
    aside = log.set_aside()
    earlier = AuditRun.load(aside)
    stored = earlier.pair_texts(earlier.records[0])
    assert stored is not None
    assert stored.lost[0].chosen[0].text == "first"
    assert AuditRun.of(log).pair_texts(record) is None
