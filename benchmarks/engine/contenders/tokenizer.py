"""A tokenizer without a model, for the tools that will not wrap a model without one. Nothing is tokenized with it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from typing import Any


def word_tokenizer() -> Any:
    """Words split at spaces; three special tokens, all others unknown."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    # A tool may load it once more by its path, so it has to come from one.
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
