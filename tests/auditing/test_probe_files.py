"""``audit`` and ``transfer`` of paths alone: the pairs are read with the tokenizer that lies beside the policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditConfig, ProbeSet, audit, transfer
from align_audit.auditing.probe_files import opened, read_probes
from align_audit.errors import ConfigurationError, ProbeError
from align_audit.models.loading import load_tokenizer
from tests.helpers.audits import QUICK
from tests.helpers.dpo import ROWS, saved_model
from tests.helpers.tiny import tiny_model

CONFIG = AuditConfig.from_dict(QUICK)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A policy and its reference, each with its tokenizer, and a file of pairs."""
    folder = tmp_path_factory.mktemp("paths")
    policy, reference = Path(saved_model(folder / "policy", seed=3)), Path(saved_model(folder / "reference"))
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:6]), encoding="utf-8")
    return policy, reference, pairs


def test_three_paths_are_an_audit(folders: tuple[Path, Path, Path]) -> None:
    policy, reference, pairs = folders
    drawn = ProbeSet.from_dataset(pairs, load_tokenizer([policy]), max_pairs=CONFIG.max_pairs, seed=CONFIG.seed)
    record = audit(str(policy), reference, str(pairs), CONFIG)
    assert record.provenance.probe_hash == drawn.content_hash
    assert record.margins.shift.mean != 0.0
    by_name = audit(policy, reference, {"file": pairs, "drawn": drawn}, CONFIG)
    assert [each.provenance.probe_hash for each in by_name.values()] == [drawn.content_hash] * 2
    assert by_name["file"].margins == record.margins


def test_the_step_is_that_of_the_checkpoints_name(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """As ``align-audit run`` records it; a step that is given holds, and a model has none."""
    policy, reference, _ = folders
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    saved = shutil.copytree(policy, tmp_path / "checkpoint-40")
    assert audit(saved, reference, pairs, CONFIG).step == 40
    assert audit(str(saved), reference, pairs, CONFIG, step=0).step == 0
    assert audit(policy, reference, pairs, CONFIG).step == 0
    more = AuditConfig.from_dict({**QUICK, "max_pairs": 24})
    assert transfer(saved, reference, {"a": pairs, "b": pairs}, more).step == 40


def test_the_references_tokenizer_does_where_the_policy_has_none(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    policy, reference, pairs = folders
    bare = shutil.copytree(policy, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    assert opened({None: pairs}, bare, reference, CONFIG)[None].pairs
    with pytest.raises(ConfigurationError, match="no tokenizer found in bare"):
        opened({None: pairs}, bare, None, CONFIG)


@pytest.mark.parametrize("call", [audit, transfer])
def test_paths_that_cannot_be_read_are_refused(call: Any, folders: tuple[Path, Path, Path]) -> None:
    policy, reference, pairs = folders
    with pytest.raises(ProbeError, match=r"lost\.jsonl: no such file"):
        call(policy, reference, {"a": pairs, "b": pairs.with_name("lost.jsonl")}, CONFIG)
    with pytest.raises(ConfigurationError, match="neither policy nor reference is one beside which a tokenizer"):
        call(tiny_model("llama"), None, {"a": pairs, "b": pairs}, CONFIG)
    with pytest.raises(ConfigurationError, match="expected a ProbeSet or the path of preference pairs, found list"):
        call(policy, reference, {"a": pairs, "b": ROWS}, CONFIG)


def test_the_trainings_length_holds_where_the_options_say_none(folders: tuple[Path, Path, Path]) -> None:
    policy, _, pairs = folders

    def longest(config: AuditConfig, **training: Any) -> int:
        (probes,) = read_probes(pairs, [policy], None, config, **training).values()
        return max(len(pair.chosen_ids) for pair in probes.pairs)

    free = CONFIG.model_copy(update={"max_length": None})
    tokens = longest(free, max_length=None)
    assert longest(free, max_length=tokens - 1) == tokens - 1
    cut = free.model_copy(update={"max_length": tokens - 2})
    assert longest(cut, max_length=tokens - 1) == tokens - 2
