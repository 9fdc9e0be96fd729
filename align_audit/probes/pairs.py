"""Probe pairs: preference pairs tokenized exactly as ``DPOTrainer`` feeds them to the model.

These are not linear probes: a :class:`ProbeSet` is the fixed set of pairs on which every audit of a run reads the
models, so it is small, immutable, reproducible from (data, tokenizer, seed) and can be saved beside the run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from align_audit.errors import ProbeError, counted, first_line, plain, quoted
from align_audit.probes.digests import digest, hash_of_prompt
from align_audit.probes.sources import Source, open_source, text_of
from align_audit.probes.tokens import PairTokenizer, TokenizedPair, shared_prefix, tokenizer_untouched, truncate

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

FORMAT_VERSION = 2
"""Of files that hold a prompt's hash; those without are written as of version 1, which earlier versions read."""
TRUNCATION_MODES = ("keep_start", "keep_end")

PROMPT_FILLS = "prompt fills max_length"
EQUAL = "equal completions"
UNSCORABLE = "no completion token left to score"
EQUAL_TRUNCATED = "equal after truncation"
REPEATED = "repeats another pair"


@dataclass(frozen=True)
class ProbePair:
    """One preference pair as two token sequences, each prompt + completion after truncation.

    Attributes:
        index: position in the source data set, by which messages name the pair.
        chosen_ids, rejected_ids: token ids as the trainer's collator feeds them, without padding.
        chosen_start, rejected_start: index of the first completion token; 0 where ``keep_end`` cut the whole prompt.
        reference_logps: the trainer's precomputed summed log-probabilities (nats) of chosen and rejected under the
            reference, where its data set has them. They belong to the trainer's own truncation.
        prompt_hash: 63 bits made of the whole prompt, where that is not what stands before the completion: it was cut from the
            left, or its last token is another one with a completion behind it. None: it stands there.

    Raises:
        ProbeError: a side has no *scoreable* token, that is, no completion token at a position above 0 (the token at
            position 0 is predicted by nothing), or a number below 0 among its tokens.
    """

    index: int
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_start: int
    rejected_start: int
    reference_logps: tuple[float, float] | None = None
    prompt_hash: int | None = None

    def __post_init__(self) -> None:
        for side in ("chosen", "rejected"):
            length, start = len(getattr(self, f"{side}_ids")), getattr(self, f"{side}_start")
            if start < 0 or max(start, 1) >= length:
                raise ProbeError(
                    f"pair {self.index}: {side} has {length} tokens with its completion starting at {start}; expected "
                    "a completion token at a position of at least 1"
                )
            if (lowest := min(getattr(self, f"{side}_ids"))) < 0:
                raise ProbeError(
                    f"pair {self.index}: {side} holds {lowest}, which is no token's id; expected ids of tokens, without those "
                    "that mask a label (-100)"
                )

    @cached_property
    def identity(self) -> int:
        """63 bits made of the tokens: the same pair wherever it stands, and what its random draws depend on."""
        return digest([self.chosen_ids, self.rejected_ids, self.chosen_start, self.rejected_start])

    @cached_property
    def group(self) -> int:
        """63 bits made of the prompt: pairs that share it are not independent of each other, and are resampled together.

        A prompt of no token, or of one (which begins every sequence of many tokenizers), is none: such a pair is a group of
        its own.
        """
        if self.prompt_hash is not None:
            return self.prompt_hash
        return self.identity if self.chosen_start < 2 else hash_of_prompt(self.chosen_ids[: self.chosen_start])

    @property
    def sequences(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both, which make a pair the same as another one wherever their completions are said to begin."""
        return self.chosen_ids, self.rejected_ids

    @cached_property
    def common_prefix(self) -> int:
        """Number of leading tokens that ``chosen_ids`` and ``rejected_ids`` share; may reach into the completions."""
        return shared_prefix(self.chosen_ids, self.rejected_ids)

    @property
    def chosen_predictions(self) -> range:
        """Positions of ``chosen_ids`` whose next token is a completion token."""
        return range(max(self.chosen_start, 1) - 1, len(self.chosen_ids) - 1)

    @property
    def rejected_predictions(self) -> range:
        """Positions of ``rejected_ids`` whose next token is a completion token."""
        return range(max(self.rejected_start, 1) - 1, len(self.rejected_ids) - 1)


@dataclass(frozen=True, repr=False)
class ProbeSet:
    """At least one probe pair, and where the pairs came from.

    Attributes:
        pairs: ordered by ``ProbePair.index`` when built by :meth:`from_dataset`.
        source: in words, such as "eval set of the trainer".
        dropped: reason → number of pairs that were met while drawing and could not be used.
        max_length, truncation_mode: as in ``DPOConfig``; ``max_length`` in tokens, None for no truncation.
        held_out: whether the policy does not train on these pairs; None when unknown.
        tokenizer: what tells the text of the tokens, where they are shown; None: nothing does. It is not part of what the set
            is (of equality, hash and what :meth:`save` writes), and the callback gives the trainer's to a set without one.

    Example:
        >>> rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [3, 5]}]
        >>> probes = ProbeSet.from_dataset(rows, tokenizer=None)
        >>> probes[0].chosen_ids, probes[0].chosen_start, probes[0].common_prefix
        ((1, 2, 3, 4), 2, 3)
    """

    pairs: tuple[ProbePair, ...]
    source: str
    dropped: Mapping[str, int] = field(hash=False)
    max_length: int | None
    truncation_mode: str
    held_out: bool | None
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ProbeError("a ProbeSet needs at least one pair; found none")
        _check_truncation(self.max_length, self.truncation_mode)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset | IterableDataset | list[dict[str, Any]] | str | Path,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
        max_pairs: int = 64,
        max_length: int | None = 1024,
        truncation_mode: str = "keep_start",
        seed: int = 0,
        *,
        source: str | None = None,
        held_out: bool | None = None,
    ) -> Self:
        """Draw up to ``max_pairs`` usable pairs and tokenize them as ``DPOTrainer`` (TRL 1.16) does.

        Records may be plain text or conversational, with a ``prompt`` column or with the prompt as the shared start
        of ``chosen`` and ``rejected``; ``tools`` and ``chat_template_kwargs`` columns are used as in training. Records
        with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` (a data set the trainer has prepared, which is exact
        under any version of TRL) are taken as they are, and ``ref_chosen_logps``/``ref_rejected_logps`` with them.

        The draw depends on data and seed alone. A ``Dataset``, list or file is walked along a seeded permutation
        until enough usable pairs are found. A stream is read in order, ``4 * max_pairs`` records at a time (each such
        buffer is permuted), and no buffer is read while the one before has pairs left; after 16 buffers the draw ends
        with what it has. Neither the tokenizer nor any global random state is changed. A chat template that prints
        today's date makes tokens that depend on the day: :meth:`save` the probes to compare over several days.

        Args:
            dataset: a ``datasets.Dataset`` or ``IterableDataset``, a list of dicts, or a path: ``.jsonl`` or ``.json``
                (also with ``.gz``), ``.parquet``, or a directory written by ``save_to_disk``.
            tokenizer: the trainer's ``processing_class``; None is fine for prepared columns.
            max_pairs: at least 1.
            max_length: of prompt + completion in tokens, at least 2; None for no truncation.
            truncation_mode: ``keep_start`` or ``keep_end``.
            seed: of the draw, at least 0.
            source: what to call the data; by default the kind or the file name.
            held_out: whether the policy does not train on these pairs, if known.

        Returns:
            The usable pairs, ordered by index, and counts of those met and dropped: a pair whose two sequences repeat
            another's token for token; under ``keep_start`` a prompt that
            alone fills ``max_length`` (the trainer drops these too); completions that are equal; a side without a
            completion token that could be scored; sequences that truncation made equal.

        Raises:
            ProbeError: nothing usable is left, or the data, a file, or an argument is not as expected.
        """
        _check_whole("max_pairs", max_pairs, 1)
        _check_whole("seed", seed, 0)
        _check_truncation(max_length, truncation_mode)
        opened = open_source(dataset, max_pairs, seed)
        tokenize = PairTokenizer(tokenizer, opened.first)
        with nullcontext() if tokenizer is None else tokenizer_untouched(tokenizer):
            pairs, dropped = _draw(opened, tokenize, max_pairs, max_length, truncation_mode)
        if not pairs:
            raise ProbeError(_explain_nothing_left(opened.description, dropped, max_length))
        source = source or opened.description
        return cls(pairs, source, dropped, max_length, truncation_mode, held_out, tokenizer)

    @cached_property
    def content_hash(self) -> str:
        """16 hex digits that identify the token ids and completion starts, in order, and nothing else."""
        content = [[pair.chosen_ids, pair.rejected_ids, pair.chosen_start, pair.rejected_start] for pair in self.pairs]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()[:16]

    @cached_property
    def groups(self) -> int:
        """How many of the pairs are independent of each other: those that share a prompt, or repeat each other, count once."""
        return len({pair.group for pair in self.pairs})

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, chosen and rejected, without padding."""
        return sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self.pairs)

    def subsample(self, n: int, seed: int) -> Self:
        """``n`` pairs drawn without replacement, in the present order; all of them when there are no more."""
        _check_whole("n", n, 1)
        _check_whole("seed", seed, 0)
        return self._take(np.random.default_rng(seed).permutation(len(self))[:n])

    def split(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Two disjoint random parts that make up the set; the first has about ``fraction`` of it, both at least one.

        Raises:
            ProbeError: fewer than two pairs, or ``fraction`` outside (0, 1).
        """
        _check_whole("seed", seed, 0)
        if not 0.0 < fraction < 1.0:
            raise ProbeError(f"fraction: expected a number between 0 and 1, found {fraction!r}")
        if len(self) < 2:
            raise ProbeError(f"a split needs at least 2 pairs, found {len(self)}; draw more with max_pairs")
        order = np.random.default_rng(seed).permutation(len(self))
        size = min(max(round(fraction * len(self)), 1), len(self) - 1)
        return self._take(order[:size]), self._take(order[size:])

    def _take(self, places: np.ndarray) -> Self:
        return replace(self, pairs=tuple(self.pairs[place] for place in sorted(places.tolist())))

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[ProbePair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, place: int) -> ProbePair: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> ProbePair | Self:
        """A pair, or for a slice a ProbeSet (an empty slice is a ProbeError)."""
        return replace(self, pairs=self.pairs[place]) if isinstance(place, slice) else self.pairs[place]

    def summary(self) -> str:
        """One line for logs: size, truncation, origin and what was dropped."""
        cut = "not truncated" if self.max_length is None else f"at most {self.max_length} each, {self.truncation_mode}"
        parts = [f"{counted(len(self), 'pair')}, {counted(self.num_tokens, 'token')} ({cut})", f"from {self.source}"]
        if self.groups < len(self):
            parts.append(f"{self.groups} independent of each other (those that share a prompt count once)")
        if self.held_out is not None:
            parts.append("held out" if self.held_out else "trained on")
        if self.dropped:
            parts.append(f"dropped {_list_counts(self.dropped)}")
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"ProbeSet({self.summary()}; {self.content_hash})"

    def save(self, path: str | Path) -> None:
        """Write as JSON, gzipped when ``path`` ends in ``.gz``; the file appears whole or not at all."""
        path = Path(path)
        version = 1 if all(pair.prompt_hash is None for pair in self) else FORMAT_VERSION
        content: dict[str, Any] = {"format_version": version, "content_hash": self.content_hash}
        content |= {name: getattr(self, name) for name in _SAVED_FIELDS}
        content["dropped"] = dict(self.dropped)
        content["pairs"] = [_stored_pair(pair) for pair in self]
        data = json.dumps(content, separators=(",", ":")).encode()
        if path.name.endswith(".gz"):
            data = gzip.compress(data, mtime=0)  # the same probes give the same bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ProbeError: unreadable, not a saved ProbeSet, damaged, or written by a newer align_audit.
        """
        path = Path(path)
        try:
            with text_of(path, is_zipped=path.name.endswith(".gz")) as text:
                content = json.loads(text.read())
        except (ValueError, RecursionError) as error:
            raise ProbeError(f"{plain(path)}: cannot be read as a saved ProbeSet: {first_line(error)}") from error
        if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
            raise ProbeError(
                f"{plain(path)}: not a saved ProbeSet (no format_version); for preference pairs use ProbeSet.from_dataset"
            )
        if content["format_version"] > FORMAT_VERSION:
            raise ProbeError(
                f"{plain(path)}: has format version {quoted(content['format_version'])}, this align_audit reads up to "
                f"{FORMAT_VERSION}; upgrade align_audit or draw the probes again"
            )
        try:
            pairs = tuple(_load_pair(pair) for pair in content["pairs"])
            probes = cls(pairs, **{name: content[name] for name in _SAVED_FIELDS})
            intact = probes.content_hash == content["content_hash"]
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ProbeError(f"{plain(path)}: damaged ProbeSet ({reason}); draw the probes again") from error
        if not intact:
            raise ProbeError(
                f"{plain(path)}: damaged ProbeSet: the pairs do not match the stored content hash "
                f"{quoted(content['content_hash'])}; draw the probes again"
            )
        return probes


def in_canonical_order(pairs: Sequence[ProbePair]) -> tuple[tuple[ProbePair, ...], np.ndarray]:
    """Pairs without repetitions in an order that only their tokens decide: groups one behind the other.

    Whatever goes by place then goes by what a pair is, and no number depends on the order in which the pairs were given.

    Returns:
        the pairs, and for each given one the place of it, or of the one it repeats, among them: int64 ``[N]``.
    """
    distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], ProbePair] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.group, pair.identity)):
        distinct.setdefault(pair.sequences, pair)
    order = {sequences: place for place, sequences in enumerate(distinct)}
    return tuple(distinct.values()), np.array([order[pair.sequences] for pair in pairs], dtype=np.int64)


_SAVED_FIELDS = ("source", "dropped", "max_length", "truncation_mode", "held_out")


def _draw(
    source: Source, tokenize: PairTokenizer, max_pairs: int, max_length: int | None, truncation_mode: str
) -> tuple[tuple[ProbePair, ...], dict[str, int]]:
    """The first ``max_pairs`` usable pairs of a source, ordered by index, and how many were dropped on the way, by reason."""
    pairs: list[ProbePair] = []
    dropped: dict[str, int] = {}
    met: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for index, record in source.records:
        pair = _make_pair(index, tokenize(index, record), max_length, truncation_mode)
        if not isinstance(pair, str) and pair.sequences in met:
            pair = REPEATED
        if isinstance(pair, str):
            dropped[pair] = dropped.get(pair, 0) + 1
            continue
        pairs.append(pair)
        met.add(pair.sequences)
        if len(pairs) == max_pairs:
            break
    return tuple(sorted(pairs, key=lambda pair: pair.index)), dict(sorted(dropped.items()))


def _make_pair(index: int, row: TokenizedPair, max_length: int | None, truncation_mode: str) -> ProbePair | str:
    """The truncated pair, or the reason to drop it."""
    if max_length is not None and truncation_mode == "keep_start" and len(row.prompt_ids) >= max_length:
        return PROMPT_FILLS
    if row.chosen_ids == row.rejected_ids:
        return EQUAL
    chosen = truncate(row.prompt_ids, row.chosen_ids, max_length, truncation_mode)
    rejected = truncate(row.prompt_ids, row.rejected_ids, max_length, truncation_mode)
    if any(max(start, 1) >= len(ids) for ids, start in (chosen, rejected)):
        return UNSCORABLE
    if chosen == rejected:  # its margin would be 0 under any model
        return EQUAL_TRUNCATED
    prompt = row.prompt_ids if row.whole_prompt is None else row.whole_prompt
    stands = len(prompt) < 2 or list(chosen[0][: chosen[1]]) == prompt
    prompt_hash = None if stands else hash_of_prompt(prompt)
    return ProbePair(index, chosen[0], rejected[0], chosen[1], rejected[1], row.reference_logps, prompt_hash)


def _stored_pair(pair: ProbePair) -> dict[str, Any]:
    values = {name: getattr(pair, name) for name in ProbePair.__dataclass_fields__}
    if pair.prompt_hash is None:
        del values["prompt_hash"]  # earlier versions, which do not know it, read the file
    return values


def _load_pair(values: dict[str, Any]) -> ProbePair:
    values = dict(values)
    for name in ("chosen_ids", "rejected_ids"):
        values[name] = tuple(values[name])
    if values["reference_logps"] is not None:
        values["reference_logps"] = tuple(values["reference_logps"])
    prompt_hash = values.get("prompt_hash", 0)
    if type(prompt_hash) is not int or not 0 <= prompt_hash < 2**63:
        raise ValueError(f"expected a prompt_hash of 63 bits, found {quoted(prompt_hash)}")
    return ProbePair(**values)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ProbeError(f"{name}: expected a whole number of at least {least}, found {value!r}")


def _check_truncation(max_length: Any, truncation_mode: Any) -> None:
    if max_length is not None:
        _check_whole("max_length (None for no truncation)", max_length, 2)
    if truncation_mode not in TRUNCATION_MODES:
        raise ProbeError(f"truncation_mode: expected {' or '.join(TRUNCATION_MODES)}, found {truncation_mode!r}")


def remedy_of(reason: str, max_length: int | None) -> str:
    """What to do about pairs that were dropped for a reason of :attr:`ProbeSet.dropped`, as a clause."""
    if reason == EQUAL:
        return "pass pairs whose chosen and rejected differ"
    if reason == REPEATED:
        return "pass each pair once"
    if max_length is None:
        return "pass pairs with non-empty completions"
    return f"raise max_length (now {max_length}) or try the other truncation_mode"


def _explain_nothing_left(description: str, dropped: Mapping[str, int], max_length: int | None) -> str:
    advice = [
        remedy_of(reason, max_length)
        for reason in (PROMPT_FILLS, UNSCORABLE, EQUAL_TRUNCATED, EQUAL)
        if reason in dropped
    ]
    if UNSCORABLE in dropped:
        advice.append(remedy_of(UNSCORABLE, None))
    return f"{description}: no usable pair left; dropped {_list_counts(dropped)}. To do: {'; '.join(dict.fromkeys(advice))}"


def _list_counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} ({reason})" for reason, count in sorted(dropped.items()))
