"""One preference record to token ids, exactly as TRL's ``DPOTrainer`` prepares, truncates and drops it.

Follows TRL 1.16. Where the trainer decides something from the first record of the data set (is the prompt implicit,
does text get an EOS token), so does :class:`PairTokenizer`; where it decides per record, that is done per record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from align_audit.errors import ProbeError, listed, quoted
from align_audit.probes.sources import PREPARED_COLUMNS, REFERENCE_COLUMNS, VISION_COLUMNS, check_columns, shown

Format = Literal["text", "conversation"]


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of one pair before truncation: the columns that the trainer's prepared data set holds.

    Each completion starts where its sequence leaves the tokenized prompt, so ``prompt_ids`` is what prompt, chosen
    and rejected sequence have in common, and may be shorter than the tokenized prompt.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reference_logps: tuple[float, float] | None = None
    whole_prompt: list[int] | None = None
    """The tokenized prompt, where ``prompt_ids`` is shorter: its last tokens are others with a completion behind it."""


def truncate(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], max_length: int | None, truncation_mode: str
) -> tuple[tuple[int, ...], int]:
    """The whole sequence as the trainer's collator feeds it, and the index of its first completion token.

    The index is 0 where ``keep_end`` cut the whole prompt, and the length where no completion token is left.

    Example:
        >>> truncate([1, 2, 3], [4, 5], 4, "keep_start")
        ((1, 2, 3, 4), 3)
        >>> truncate([1, 2, 3], [4, 5], 4, "keep_end")
        ((2, 3, 4, 5), 2)
    """
    ids = (*prompt_ids, *completion_ids)
    start = len(prompt_ids)
    if max_length is None or len(ids) <= max_length:
        return ids, start
    if truncation_mode == "keep_start":
        return ids[:max_length], min(start, max_length)
    cut = len(ids) - max_length
    return ids[cut:], max(start - cut, 0)


def shared_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Number of leading tokens, or characters of two texts, that ``a`` and ``b`` have in common."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))


@contextmanager
def tokenizer_untouched(tokenizer: Any) -> Iterator[None]:
    """Leave a fast tokenizer as it was: each call of one clears the truncation and padding set in its backend."""
    from transformers import PreTrainedTokenizerFast

    inner = text_tokenizer(tokenizer)
    if not isinstance(inner, PreTrainedTokenizerFast):
        yield
        return
    backend = inner.backend_tokenizer
    truncation, padding, warned = backend.truncation, backend.padding, dict(inner.deprecation_warnings)
    try:
        yield
    finally:
        inner.deprecation_warnings = warned
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, also where a processor wraps it."""
    from transformers import ProcessorMixin

    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


class PairTokenizer:
    """Turns records into :class:`TokenizedPair`; what the first record decides is decided on construction.

    Args:
        tokenizer: the trainer's ``processing_class``; may be None for prepared columns.
        first: the record at index 0 of the data set.

    Raises:
        ProbeError: columns missing or of images, values of the wrong type, or no tokenizer (or one without an EOS
            token, or not a tokenizer at all) where one is needed.
    """

    def __init__(self, tokenizer: Any, first: Mapping[str, Any]) -> None:
        vision = [name for name in VISION_COLUMNS if name in first]
        if vision:
            raise ProbeError(
                f"found the column {vision[0]!r}: pairs with images are not supported; expected text-only pairs. "
                "Pass probes without that column"
            )
        self._tokenizer = tokenizer
        self._prepared = all(name in first for name in PREPARED_COLUMNS)
        if self._prepared:
            return
        check_columns(first)
        self._check_tokenizer()
        self._implicit_prompt = "prompt" not in first
        self._eos: str | None = None
        if self._format(0, first) == "text":
            eos = text_tokenizer(tokenizer).eos_token
            if eos is None:
                raise ProbeError(
                    "the tokenizer has no EOS token, which DPOTrainer appends to completions that are plain text; "
                    "set tokenizer.eos_token as for training"
                )
            self._eos = eos

    def __call__(self, index: int, record: Mapping[str, Any]) -> TokenizedPair:
        """Tokenize ``record``, which is at ``index`` of its data set; a record that cannot be is a ProbeError."""
        if self._prepared:
            return _read_prepared(index, record)
        kind = self._format(index, record)
        if self._eos is not None and kind == "conversation":
            raise ProbeError(
                f"record {index} is conversational while record 0 is plain text, a mixture that DPOTrainer cannot "
                "train on; pass data of one format"
            )
        prompt, chosen, rejected = self._texts(index, record)
        arguments: dict[str, Any] = {}
        if kind == "conversation":
            arguments = _template_arguments(index, record)
        elif self._eos is not None:
            chosen = chosen if chosen.endswith(self._eos) else chosen + self._eos
            rejected = rejected if rejected.endswith(self._eos) else rejected + self._eos
        try:
            if kind == "conversation":
                prompt_ids = self._encode(prompt, add_generation_prompt=True, **arguments)
            else:
                prompt_ids = self._encode(prompt)
            chosen_ids = self._encode(prompt + chosen, **arguments)
            rejected_ids = self._encode(prompt + rejected, **arguments)
        except Exception as error:  # templates raise what they like; the cause stays attached
            raise ProbeError(
                f"record {index} ({kind}) cannot be tokenized: {type(error).__name__}: {error}. Check the record and "
                "the tokenizer's chat template; DPOTrainer needs the same"
            ) from error
        length = min(shared_prefix(prompt_ids, chosen_ids), shared_prefix(prompt_ids, rejected_ids))
        cut = prompt_ids if length < len(prompt_ids) else None
        return TokenizedPair(prompt_ids[:length], chosen_ids[length:], rejected_ids[length:], whole_prompt=cut)

    def _check_tokenizer(self) -> None:
        if self._tokenizer is None:
            raise ProbeError(
                "no tokenizer was given and the pairs are not tokenized; pass the trainer's tokenizer, or the data set "
                f"the trainer prepared (columns {', '.join(PREPARED_COLUMNS)})"
            )
        from transformers import PreTrainedTokenizerBase, ProcessorMixin

        if not isinstance(self._tokenizer, PreTrainedTokenizerBase | ProcessorMixin):
            raise ProbeError(
                f"found {type(self._tokenizer).__name__} as the tokenizer; expected a transformers tokenizer or "
                "processor, the one the trainer has as processing_class"
            )

    def _format(self, index: int, record: Mapping[str, Any]) -> Format:
        """Text or conversation; insists that all columns of the record agree, since TRL looks at any one of them."""
        names = ("chosen", "rejected") if self._implicit_prompt else ("prompt", "chosen", "rejected")
        kinds = {name: _kind(index, name, record) for name in names}
        if len(set(kinds.values())) == 1:
            return kinds["chosen"]
        told = ", ".join(f"{name} is {'plain text' if kind == 'text' else 'messages'}" for name, kind in kinds.items())
        advice = "make them all one format"
        if kinds.get("prompt") == "text" and kinds["chosen"] == kinds["rejected"] == "conversation":
            advice += "; where chosen and rejected contain the prompt as their first messages, remove the prompt column"
        raise ProbeError(f"record {index}: {told}; expected the same format throughout: {advice}")

    def _texts(self, index: int, record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Prompt and both completions, all str or all lists of messages."""
        if not self._implicit_prompt:
            return record["prompt"], record["chosen"], record["rejected"]
        from trl import extract_prompt

        if not record["chosen"] or not record["rejected"]:
            raise ProbeError(
                f"record {index}: an empty text without a prompt column leaves no prompt to find; remove the record "
                "(DPOTrainer fails on it too)"
            )
        parts = extract_prompt({"chosen": record["chosen"], "rejected": record["rejected"]})
        if parts["prompt"] == []:
            raise ProbeError(
                f"record {index}: chosen and rejected share no message at their start, so there is no prompt; add a "
                "prompt column or remove the record (DPOTrainer fails on it too)"
            )
        return parts["prompt"], parts["chosen"], parts["rejected"]

    def _encode(self, text: str | list[Any], **arguments: Any) -> list[int]:
        """Token ids of a text or of a list of messages; ``arguments`` go to the chat template."""
        from transformers import ProcessorMixin

        is_processor = isinstance(self._tokenizer, ProcessorMixin)
        if isinstance(text, list):
            if is_processor:
                from trl import prepare_multimodal_messages

                text = prepare_multimodal_messages(text)
            encoded = self._tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **arguments)
        else:
            encoded = self._tokenizer(text=text)
        ids = encoded["input_ids"]
        return list(ids[0] if is_processor else ids)  # processors return a batch of one


def _kind(index: int, name: str, record: Mapping[str, Any]) -> Format:
    if name not in record:
        raise ProbeError(
            f"record {index}: column {name!r} is missing (found {listed(record) or 'none'}), though "
            "record 0 has it; complete or remove the record"
        )
    value = record[name]
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "role" in item for item in value):
        return "conversation"
    raise ProbeError(
        f"record {index}: column {name!r} holds {shown(value)}; expected text, or a non-empty list of messages such as "
        '[{"role": "user", "content": "Hi"}]'
    )


def _template_arguments(index: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the record adds to the chat template's arguments; ``tools`` may be JSON, as TRL allows."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ProbeError(
                f"record {index}: column 'tools' is not valid JSON: {error.msg} (column {error.colno})"
            ) from error
    extra = record.get("chat_template_kwargs", {})
    if not isinstance(extra, Mapping):
        raise ProbeError(
            f"record {index}: column 'chat_template_kwargs' holds {shown(extra)}; expected a dict, {{}} for none"
        )
    return {"tools": tools, **extra}


def _read_prepared(index: int, record: Mapping[str, Any]) -> TokenizedPair:
    prompt_ids, chosen_ids, rejected_ids = (_read_ids(index, name, record) for name in PREPARED_COLUMNS)
    logps = [record.get(name) for name in REFERENCE_COLUMNS]
    if None in logps:
        return TokenizedPair(prompt_ids, chosen_ids, rejected_ids)
    try:
        chosen_logp, rejected_logp = (float(value) for value in logps)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ProbeError(
            f"record {index}: {' and '.join(REFERENCE_COLUMNS)} hold {quoted(logps, 60)}; expected two numbers"
        ) from None
    return TokenizedPair(prompt_ids, chosen_ids, rejected_ids, (chosen_logp, rejected_logp))


def _read_ids(index: int, name: str, record: Mapping[str, Any]) -> list[int]:
    value: Any = record.get(name)
    if hasattr(value, "tolist"):  # a NumPy array or tensor
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(type(token) is int and token >= 0 for token in value):
        raise ProbeError(f"record {index}: column {name!r} holds {shown(value)}; expected a list of token ids")
    return list(value)
