"""Probes are token for token what ``DPOTrainer`` trains on: what it prepares, and what its collator makes of that."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, ProcessorMixin
from trl import DPOConfig, DPOTrainer

from align_audit.probes.pairs import EQUAL, EQUAL_TRUNCATED, PROMPT_FILLS, UNSCORABLE, ProbePair, ProbeSet
from tests.helpers.probe_tokenizer import DIVERGING_TEMPLATE, EOS, TEMPLATE, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")

DATA = Path(os.environ.get("ALIGN_AUDIT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
LONG = "the little dog sat in the little house and looked at the world " * 3

# (prompt, chosen, rejected): lengths on both sides of the limit, EOS already there, a merge over the boundary
# ("wor" + "ld"), a completion without text, a long shared beginning, equal completions.
TEXTS = [
    ("What is the capital of France?", " The capital of France is Paris.", " The sky is blue."),
    ("Hello wor", "ld, wonderful world.", "n out dog."),
    ("A little dog", f" sat.{EOS}", f" looked at the world.{EOS}"),
    ("The sky is", f" blue{EOS} ", " round"),
    (LONG, " Paris.", " round."),
    ("Hello", f" {LONG} end", " world."),
    ("Hello", f" {LONG} blue", f" {LONG} round"),
    ("Where?", "", " In the house."),
    ("Same", " answer.", " answer."),
    ("Ünïcode 🙂 prompt:", " ja 🙂", " nein 🙃"),
    ("The world", " is round", " is"),
    ("Hello wor", "n out dog.", "ld, wonderful world."),
]


def text_rows(implicit: bool) -> list[dict[str, Any]]:
    if implicit:
        return [{"chosen": prompt + chosen, "rejected": prompt + rejected} for prompt, chosen, rejected in TEXTS]
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in TEXTS]


def conversation_rows(implicit: bool) -> list[dict[str, Any]]:
    rows = []
    for number, (prompt, chosen, rejected) in enumerate(TEXTS):
        messages = [{"role": "user", "content": prompt}]
        if number % 3 == 1:
            messages = [{"role": "system", "content": "Be kind."}, *messages]
        if number % 3 == 2:
            messages = [*messages, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And?"}]
        chosen_turn, rejected_turn = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        if implicit:
            rows.append({"chosen": messages + chosen_turn, "rejected": messages + rejected_turn})
        else:
            rows.append({"prompt": messages, "chosen": chosen_turn, "rejected": rejected_turn})
    return rows


@pytest.fixture
def trainer_for(tmp_path: Path) -> Any:
    """A real DPOTrainer over ``rows``; the data set gets a column ``row`` that survives the trainer's filter."""

    def build(rows: Any, tokenizer: Any, *, stream: bool = False, **options: Any) -> DPOTrainer:
        dataset = Dataset.from_list([{**row, "row": number} for number, row in enumerate(rows)])
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2048,
        )
        arguments = DPOConfig(
            output_dir=str(tmp_path / "out"),
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_steps=1,
            dataloader_pin_memory=False,
            **options,
        )
        return DPOTrainer(
            model=LlamaForCausalLM(config),
            ref_model=LlamaForCausalLM(config),
            args=arguments,
            train_dataset=dataset.to_iterable_dataset() if stream else dataset,
            processing_class=tokenizer,
        )

    return build


def fed(trainer: DPOTrainer, row: dict[str, Any]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Chosen ids, chosen completion mask, rejected ids, rejected mask of one row, out of the trainer's collator."""
    batch = trainer.data_collator([{key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")}])
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    ids = [batch["input_ids"][side, :length].tolist() for side, length in enumerate(lengths)]
    masks = [batch["completion_mask"][side, :length].tolist() for side, length in enumerate(lengths)]
    return ids[0], masks[0], ids[1], masks[1]


def fed_by_probe(pair: ProbePair) -> tuple[list[int], list[int], list[int], list[int]]:
    def mask(ids: tuple[int, ...], start: int) -> list[int]:
        return [int(place >= start) for place in range(len(ids))]

    return (
        list(pair.chosen_ids),
        mask(pair.chosen_ids, pair.chosen_start),
        list(pair.rejected_ids),
        mask(pair.rejected_ids, pair.rejected_start),
    )


def drop_reason(trainer: DPOTrainer, row: dict[str, Any]) -> str | None:
    """Why a row that the trainer keeps is no use as a probe, judged from what the collator feeds."""
    if row["chosen_ids"] == row["rejected_ids"]:
        return EQUAL
    chosen, chosen_mask, rejected, rejected_mask = fed(trainer, row)
    if not any(chosen_mask[1:]) or not any(rejected_mask[1:]):
        return UNSCORABLE
    return EQUAL_TRUNCATED if (chosen, chosen_mask) == (rejected, rejected_mask) else None


def assert_same(trainer: DPOTrainer, rows: list[dict[str, Any]], tokenizer: Any) -> ProbeSet:
    """Every row of the data set is fed as the trainer feeds it, or dropped for the reason seen in the trainer."""
    max_length, mode = trainer.args.max_length, trainer.args.truncation_mode
    probes = ProbeSet.from_dataset(rows, tokenizer, len(rows), max_length, mode)
    prepared = {row["row"]: row for row in trainer.train_dataset}
    expected_drops: dict[str, int] = {}
    expected = {}
    for number in range(len(rows)):
        reason = drop_reason(trainer, prepared[number]) if number in prepared else PROMPT_FILLS
        if reason is None:
            expected[number] = fed(trainer, prepared[number])
        else:
            expected_drops[reason] = expected_drops.get(reason, 0) + 1
    assert {pair.index: fed_by_probe(pair) for pair in probes} == expected
    assert probes.dropped == expected_drops
    # The same through what the trainer has prepared, without a tokenizer: only the rows' numbers differ.
    again = ProbeSet.from_dataset(trainer.train_dataset, None, len(rows), max_length, mode)
    if isinstance(trainer.train_dataset, Dataset):
        assert again.content_hash == probes.content_hash
    return probes


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_equals_the_trainer(trainer_for: Any, kind: str, implicit: bool, mode: str) -> None:
    rows = (text_rows if kind == "text" else conversation_rows)(implicit)
    tokenizer = make_tokenizer()
    trainer = trainer_for(rows, tokenizer, max_length=24, truncation_mode=mode)
    probes = assert_same(trainer, rows, tokenizer)
    assert len(probes) >= 5
    assert probes.dropped[EQUAL] == 1
    assert (PROMPT_FILLS in probes.dropped) == (mode == "keep_start")
    # Where the prompt is implicit in a text, it takes in the long beginning that the completions share.
    assert (EQUAL_TRUNCATED in probes.dropped) == (mode == "keep_start" and not (implicit and kind == "text"))
    assert any(len(pair.chosen_ids) == 24 for pair in probes), "nothing was truncated: the case tests too little"


def test_without_truncation(trainer_for: Any) -> None:
    tokenizer = make_tokenizer()
    probes = assert_same(trainer_for(text_rows(False), tokenizer, max_length=None), text_rows(False), tokenizer)
    assert max(len(pair.chosen_ids) for pair in probes) > 40
    # EOS is appended once: not after a completion that ends in it, but after one that only contains it.
    eos = tokenizer.eos_token_id
    assert [list(pair.chosen_ids).count(eos) for pair in probes if pair.index in (0, 2, 3)] == [1, 1, 2]


def test_nothing_to_score(trainer_for: Any) -> None:
    rows = [
        {"prompt": "", "chosen": "", "rejected": " The sky."},
        {"prompt": "", "chosen": "a", "rejected": " The sky."},
    ]
    tokenizer = make_tokenizer()
    probes = assert_same(trainer_for(rows, tokenizer), rows, tokenizer)
    assert probes.dropped == {UNSCORABLE: 1}
    assert probes[0].chosen_start == 0
    assert probes[0].chosen_predictions == range(0, 1)


def test_boundary_moves_where_tokens_merge(trainer_for: Any) -> None:
    tokenizer = make_tokenizer()
    probes = assert_same(trainer_for(text_rows(False), tokenizer), text_rows(False), tokenizer)
    merged = next(pair for pair in probes if pair.index == 1)
    assert merged.chosen_start < len(tokenizer("Hello wor")["input_ids"])


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_template_that_diverges_after_the_prompt(trainer_for: Any, mode: str) -> None:
    tokenizer = make_tokenizer(DIVERGING_TEMPLATE)
    rows = conversation_rows(False)
    assert_same(trainer_for(rows, tokenizer, max_length=30, truncation_mode=mode), rows, tokenizer)


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_arguments(trainer_for: Any, as_json: bool) -> None:
    tool = [{"type": "function", "function": {"name": "search", "description": "looks at the world"}}]
    tools = '[{"type": "function", "function": {"name": "search"}}]' if as_json else tool
    rows = [{**row, "tools": tools, "chat_template_kwargs": {"style": "blue"}} for row in conversation_rows(False)]
    tokenizer = make_tokenizer()
    probes = assert_same(trainer_for(rows, tokenizer), rows, tokenizer)
    shown = tokenizer.decode(probes[0].chosen_ids)
    assert '"search"' in shown
    assert "<|style|>blue" in shown


def test_tokenizer_that_adds_bos_and_truncates(trainer_for: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<|system|>", eos_token=EOS, pad_token="<|user|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    state = tokenizer.backend_tokenizer.to_str()
    probes = ProbeSet.from_dataset(text_rows(False), tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == state
    assert probes[0].chosen_ids[0] == tokenizer.bos_token_id
    trainer = trainer_for(text_rows(False), tokenizer)
    assert assert_same(trainer, text_rows(False), tokenizer).content_hash == probes.content_hash


def test_streams(trainer_for: Any) -> None:
    tokenizer = make_tokenizer()
    rows = text_rows(True)
    trainer = trainer_for(rows, tokenizer, stream=True, max_length=24)
    assert isinstance(trainer.train_dataset, IterableDataset)
    probes = assert_same(trainer, rows, tokenizer)
    streamed = ProbeSet.from_dataset(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, 64, 24)
    assert streamed.pairs == probes.pairs


class TextProcessor(ProcessorMixin):
    """As the processors of vision-language models answer: a batch, even for one text."""

    def __init__(self, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    def __call__(self, text: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("images", None)
        return self.tokenizer([text] if isinstance(text, str) else text, **kwargs)


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_processor_with_text_only_data(trainer_for: Any, kind: str) -> None:
    template = TEMPLATE.replace("message.content", "message.content[0].text")
    processor = TextProcessor(make_tokenizer(template), chat_template=template)
    rows = (text_rows if kind == "text" else conversation_rows)(False)
    assert_same(trainer_for(rows, processor, max_length=24), rows, processor)


def test_precomputed_reference_log_probabilities(trainer_for: Any) -> None:
    tokenizer = make_tokenizer()
    trainer = trainer_for(text_rows(False), tokenizer, max_length=24, precompute_ref_log_probs=True)
    probes = ProbeSet.from_dataset(trainer.train_dataset, None, max_length=24)
    for pair in probes:
        row = trainer.train_dataset[pair.index]
        assert pair.reference_logps == (row["ref_chosen_logps"], row["ref_rejected_logps"])
    # They are the sums over the positions that the pair calls its predictions.
    pair = probes[0]
    with torch.no_grad():
        for ids, predictions, expected in zip(
            (pair.chosen_ids, pair.rejected_ids),
            (pair.chosen_predictions, pair.rejected_predictions),
            pair.reference_logps or (),
            strict=True,
        ):
            logits = trainer.ref_model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
            total = sum(float(logits[place, ids[place + 1]]) for place in predictions)
            assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.real_data
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_real_dialogues(trainer_for: Any, mode: str) -> None:
    pairs, model = DATA / "hh-harmless" / "pairs.jsonl.gz", DATA / "stories260k"
    if not pairs.exists() or not model.exists():
        pytest.skip(f"no real data in {DATA}; set ALIGN_AUDIT_DATA to where it is")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with gzip.open(pairs, "rt", encoding="utf-8") as lines:
        everything = Dataset.from_list([json.loads(line) for line in lines])
    rows = everything.select(range(60)).to_list()
    trainer = trainer_for(rows, tokenizer, max_length=256, truncation_mode=mode)
    probes = assert_same(trainer, rows, tokenizer)
    assert len(probes) > 25
    drawn = ProbeSet.from_dataset(pairs, tokenizer, 8, 256, mode)
    assert len(drawn) == 8
    assert drawn.pairs == ProbeSet.from_dataset(everything, tokenizer, 8, 256, mode).pairs
