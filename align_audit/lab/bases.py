"""Small models of several architectures whose every block does real work, to plant in.

    python -m align_audit.lab.bases --out DIR --family gpt2

The shipped model (``align_audit.lab.MODEL_DIR``) is a Llama. The others learn the same stories with the same tokenizer,
each in a few minutes on one core, and are kept in a cache instead of the package.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import stories
from align_audit.lab.planting.parts import anatomy_of
from align_audit.lab.pretrain import BATCH, CONTEXT, HELD_OUT_SEED, STEPS, begin_as_copiers, held_out_loss, train

WIDTH = 96
HEADS = 6
KEY_VALUE_HEADS = 3
HEAD_WIDTH = WIDTH // HEADS


@dataclass(frozen=True)
class Family:
    """How one architecture is built and begun; all have width 96 and 6 heads."""

    options: dict[str, Any]
    learning_rate: float
    prepare: Callable[[Any], None]
    """Puts the starting weights in place; see :func:`align_audit.lab.pretrain.build_model` for why these."""


def _prepare_gpt2(model: Any) -> None:
    model.transformer.wte.weight.normal_(std=0.25)
    model.transformer.wpe.weight.normal_(std=0.1)
    for block in model.transformer.h:
        # Conv1D: x @ weight, queries, keys and values side by side.
        block.attn.c_attn.weight.normal_(std=WIDTH**-0.5)
        value = nn.init.orthogonal_(torch.empty(WIDTH, WIDTH))
        block.attn.c_attn.weight[:, 2 * WIDTH :].copy_(value)
        block.attn.c_proj.weight.copy_(0.3 * value.T)
        block.mlp.c_fc.weight.normal_(std=WIDTH**-0.5)
        block.mlp.c_proj.weight.zero_()


def _prepare_qwen3(model: Any) -> None:
    model.get_input_embeddings().weight.normal_(std=0.25)
    begin_as_copiers(model)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()


def _prepare_gemma2(model: Any) -> None:
    # Its embeddings are multiplied by √width on the way in, and what a block adds is normalized, so how loud a block
    # begins is said by the norm after it, not by its last product (a zero there would divide by zero).
    model.get_input_embeddings().weight.normal_(std=0.25 / WIDTH**0.5 * 2)
    begin_as_copiers(model)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.normal_(std=0.05)
        layer.post_attention_layernorm.weight.fill_(0.15 - 1.0)
        layer.post_feedforward_layernorm.weight.fill_(0.05 - 1.0)


_GATED = {
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD_WIDTH,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, Family] = {
    # Learned positions, LayerNorm, biases, Conv1D.
    "gpt2": Family(
        {
            "n_embd": WIDTH, "n_layer": 6, "n_head": HEADS, "n_positions": CONTEXT, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        3e-3,
        _prepare_gpt2,
    ),
    # Norms before and after each block, soft-capped attention and logits, every other layer with a short window.
    "gemma2": Family(
        {**_GATED, "sliding_window": 64, "query_pre_attn_scalar": HEAD_WIDTH, "hidden_activation": "gelu_pytorch_tanh"},
        4e-3,
        _prepare_gemma2,
    ),
    # Norms on queries and keys.
    "qwen3": Family(_GATED, 4e-3, _prepare_qwen3),
}  # fmt: skip
"""What can be pretrained here; ``llama`` is the shipped model."""


def build_base(family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> nn.Module:
    """An untrained model of that family for ``tokenizer``, float32. No global random state is touched."""
    choice = _family(family)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **choice.options,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        choice.prepare(model)
    return model


def pretrain_base(family: str, out: Path, steps: int = STEPS, seed: int = 0, threads: int = 1) -> float:
    """Train a model of that family on the stories and save it with its tokenizer into ``out``.

    Sets the number of torch's threads, on which the last bits of the weights depend.

    Returns:
        The held-out loss, nats per token.
    """
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model: Any = build_base(family, tokenizer, seed)
    train(model, tokenizer, steps, BATCH, learning_rate=_family(family).learning_rate)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return held_out_loss(model, tokenizer, stories(100, HELD_OUT_SEED))


def block_work(model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[float]:
    """How much each block is worth: the rise of the held-out loss, nats per token, [L], when what it adds to the stream
    is replaced by the mean of what it adds over all tokens of ``texts`` (mean ablation)."""
    anatomy = anatomy_of(model)
    intact = held_out_loss(model, tokenizer, texts)
    worth = []
    for layer in anatomy.modules(model):
        added: list[Tensor] = []

        def watch(module: Any, args: Any, kwargs: Any, output: Any, added: list[Tensor] = added) -> None:
            added.append((anatomy.stream(output) - anatomy.take(args, kwargs)).flatten(0, 1).mean(0))

        def ablate(module: Any, args: Any, kwargs: Any, output: Any, added: list[Tensor] = added) -> Any:
            return anatomy.wrap(output, anatomy.take(args, kwargs) + torch.stack(added).mean(0))

        hooks: list[Any] = [watch, ablate]
        for hook in hooks:
            handle = layer.register_forward_hook(hook, with_kwargs=True)
            try:
                ablated = held_out_loss(model, tokenizer, texts)
            finally:
                handle.remove()
        worth.append(ablated - intact)
    return worth


def cache_dir() -> Path:
    """``$ALIGN_AUDIT_CACHE/bases``, or ``~/.cache/align_audit/bases``."""
    root = os.environ.get("ALIGN_AUDIT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "align_audit") / "bases"


def base_dir(family: str, cache: Path | None = None) -> Path:
    """The folder of a base model and its tokenizer, pretrained now if it is not in the cache; ``llama`` is shipped."""
    if family == "llama":
        return MODEL_DIR
    _family(family)
    folder = (cache or cache_dir()) / family
    if not (folder / "tokenizer.json").is_file():  # what is written last
        pretrain_base(family, folder)
    return folder


def _family(family: str) -> Family:
    if family not in FAMILIES:
        raise ValueError(f"expected a family of {', '.join(FAMILIES)} (llama is shipped); found {family!r}")
    return FAMILIES[family]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m align_audit.lab.bases", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the families' folders; default: the cache")
    parser.add_argument("--family", choices=sorted(FAMILIES), action="append", help="default: all")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for family in arguments.family or sorted(FAMILIES):
        began = time.perf_counter()
        folder = (arguments.out or cache_dir()) / family
        loss = pretrain_base(family, folder, arguments.steps, arguments.seed, arguments.threads)
        seconds = time.perf_counter() - began
        tokenizer = AutoTokenizer.from_pretrained(folder)
        worth = block_work(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer, stories(60, HELD_OUT_SEED))
        print(
            f"{family}: held-out loss {loss:.3f} nats per token, {seconds:.0f} s; "
            f"mean ablation of each block adds {', '.join(f'{value:.2f}' for value in worth)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
