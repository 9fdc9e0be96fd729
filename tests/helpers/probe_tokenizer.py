"""A small byte-level BPE tokenizer with a chat template, built from a few sentences; shared by the probe tests."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<eos>"
SENTENCES = [
    "The world is round and the sky is blue.",
    "What is the capital of France? The capital of France is Paris.",
    "A little dog sat in the little house and looked at the world.",
    "Hello world, hello world, wonderful world.",
]
TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}{{ eos_token }}{% endif %}"
    "{% if style %}<|style|>{{ style }}{{ eos_token }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As some reasoning models do: the generation prompt ends in something the full conversation does not have there.
DIVERGING_TEMPLATE = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think></think>{% endif %}")


def make_tokenizer(template: str | None = TEMPLATE, **special_tokens: str) -> PreTrainedTokenizerFast:
    """No BOS, no pad token; ``eos_token`` unless other special tokens are given."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    roles = [f"<|{name}|>" for name in ("system", "user", "assistant", "tool", "tools", "style")]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[EOS, *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **(special_tokens or {"eos_token": EOS}))
    tokenizer.chat_template = template
    return tokenizer
