"""Makes the demo model: a byte-pair tokenizer and a small Llama, trained on :mod:`align_audit.lab.corpus`.

    python -m align_audit.lab.pretrain --out DIR

A few minutes on one CPU core. The same seed, steps and number of threads give the same weights bit for bit on the same
machine; on another machine or version of torch the last bits may differ, and the model is as good.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align_audit.lab.corpus import stories

UNK, PAD, BOS, EOS = "<unk>", "<pad>", "<bos>", "<eos>"
VOCABULARY = 768
CONTEXT = 256
TRAIN_SEED, HELD_OUT_SEED = 1, 2

STEPS = 1400
BATCH = 16
LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05

IGNORED = -100
"""Label of a position that the loss leaves out, as transformers has it."""


def train_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding of at most ``vocabulary`` tokens, learnt from ``texts``.

    It puts BOS before every text by itself, so whoever tokenizes plainly (a trainer, say) sees what pretraining saw. It
    does not add EOS: a trainer appends ``eos_token`` as text, and the tokenizer knows it there as one token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Printable ASCII only: rows for the 160 other bytes would never be trained; what needs them becomes UNK. (The
    # letter that stands for the space in byte-level encoding comes in with the texts.)
    alphabet = [chr(code) for code in range(33, 127)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[UNK, PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama for ``tokenizer``: 6 layers of width 96, 6 heads on 3 key-value heads, tied embeddings.

    The default initialization learns the grammar of a sentence in minutes but not, in that time, to look back for who the
    story is about. What helps (measured: repeated nouns at chance without it, at 0.1 nats after 450 steps with it):
    embeddings large enough to tell the names of people apart, heads that start as copiers (the output projection
    is the transpose of the value projection), and MLPs that start silent.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.get_input_embeddings().weight.normal_(std=0.25)
        begin_as_copiers(model)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    return model


def begin_as_copiers(model: Any) -> None:
    """Starting weights in place, of a model with separate projections and gated MLPs: every head's output projection is
    the transpose of its value projection; queries, keys, gates and what they gate keep the size of what they read."""
    config = model.config
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj, mlp.gate_proj, mlp.up_proj):
            projection.weight.normal_(std=config.hidden_size**-0.5)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        value_heads = attention.v_proj.weight.view(config.num_key_value_heads, -1, config.hidden_size)
        shared_by = config.num_attention_heads // config.num_key_value_heads
        per_query_head = value_heads.repeat_interleave(shared_by, dim=0).flatten(0, 1)
        attention.o_proj.weight.copy_(0.3 * per_query_head.T)


def batches(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded batches of one story per row, EOS last: token ids and labels, both (size, longest row), int64.

    No attention mask is needed: with causal attention no story sees the padding behind it, and its labels are ignored.
    """
    pad = tokenizer.pad_token_id
    for start in range(0, len(texts), size):
        rows = tokenizer([text + EOS for text in texts[start : start + size]])["input_ids"]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])
        yield ids, labels


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Mean next-token cross-entropy over all tokens of ``texts``, in nats per token."""
    total, count = 0.0, 0
    for ids, labels in batches(tokenizer, texts, 64):
        tokens = int((labels[:, 1:] != IGNORED).sum())
        total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * tokens
        count += tokens
    return total / count


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    batch: int = BATCH,
    log_every: int = 100,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Next-token prediction in place: ``steps`` of AdamW, warm-up then a cosine to a tenth; each story is seen once."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    # Rows of a batch are padded to the longest: neighbours of similar length waste less, and a shuffle of the batches
    # (which the seed fixes) keeps short and long stories mixed in time.
    texts = stories(steps * batch, TRAIN_SEED)
    pool = 32 * batch
    texts = [text for start in range(0, len(texts), pool) for text in sorted(texts[start : start + pool], key=len)]
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(TRAIN_SEED)).tolist()
    texts = [text for index in order for text in texts[index * batch : (index + 1) * batch]]
    model.train()
    started = time.perf_counter()
    for step, (ids, labels) in enumerate(batches(tokenizer, texts, batch)):
        rate = learning_rate * _schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % log_every == 0:
            print(f"step {step + 1:5d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at ``step`` of ``steps``."""
    warmup = min(WARMUP_STEPS, max(steps // 5, 1))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def pretrain(out: Path, steps: int = STEPS, seed: int = 0, threads: int = 1) -> float:
    """Train tokenizer and model and save both into ``out``; returns the held-out loss in nats per token.

    Sets the number of torch's threads, on which the last bits of the weights depend.
    """
    torch.set_num_threads(threads)
    tokenizer = train_tokenizer(stories(4000, TRAIN_SEED))
    model = build_model(tokenizer, seed)
    train(model, tokenizer, steps)
    loss = held_out_loss(model, tokenizer, stories(100, HELD_OUT_SEED))
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return loss


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m align_audit.lab.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the model and the tokenizer")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    loss = pretrain(arguments.out, arguments.steps, arguments.seed, arguments.threads)
    print(f"held-out loss {loss:.3f} nats per token; saved to {arguments.out}")


if __name__ == "__main__":
    main()
