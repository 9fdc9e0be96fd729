"""A model of a hub name is opened at the revision that training names, with the tokenizer of that revision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align_audit.errors import ReferenceUnavailableError
from align_audit.models.loading import load_model, load_tokenizer
from tests.helpers.probe_tokenizer import make_tokenizer
from tests.helpers.tiny import tiny_model

COMMITS = {"v1": "1" * 40, "main": "2" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name in a cache that holds two revisions of it: of other weights, and with another token each."""
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for number, (name, commit) in enumerate(COMMITS.items()):
        folder = repository / "snapshots" / commit
        tiny_model("llama", seed=number, dtype=torch.float32).save_pretrained(folder)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"<{name}>"])
        tokenizer.save_pretrained(folder)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return "someone/tiny"


@pytest.mark.parametrize(("revision", "number"), [("v1", 0), (None, 1)])
def test_a_hub_name_is_read_at_its_revision(hub: str, revision: str | None, number: int) -> None:
    expected = tiny_model("llama", seed=number, dtype=torch.float32)
    model = load_model(hub, revision=revision)
    assert torch.equal(*(dict(each.named_parameters())["lm_head.weight"] for each in (expected, model)))
    tokens = load_tokenizer([hub], revision=revision).get_added_vocab()
    assert [name for name in COMMITS if f"<{name}>" in tokens] == [list(COMMITS)[number]]


def test_a_revision_that_is_not_there_is_refused_by_the_models_name(hub: str) -> None:
    with pytest.raises(ReferenceUnavailableError, match="someone/tiny"):
        load_model(hub, revision="v7")
