"""Policy and reference, opened between their layers and given back as they were."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from align_audit.auditing.session.memory import MemoryBounds
from align_audit.errors import AnatomyError, ConfigurationError, ReferenceUnavailableError
from align_audit.models.anatomy import Anatomy, check_kind, unwrap, unwrap_only
from align_audit.models.build import build_fingerprint
from align_audit.models.guard import untouched
from align_audit.models.positions import learned_positions
from align_audit.models.precision import rounding
from align_audit.models.reference import Reference, check_fit, policy_fingerprint
from align_audit.models.replay import Replay
from align_audit.models.verify import Verified, open_replay
from align_audit.models.weights.fingerprint import WeightSums
from align_audit.models.weights.from_host import placed
from align_audit.models.weights.gathered import GatheredLayers, gathered_by_layer
from align_audit.models.weights.sharded import has_engine, plain_class, reshard
from align_audit.models.weights.streaming import stream_of
from align_audit.models.wrapper import check_wrapper
from align_audit.probes.batches import make_batch
from align_audit.ranks import Ranks

if TYPE_CHECKING:
    from align_audit.probes.pairs import ProbePair


_AT_LENGTH = (0, 2)
"""How often a run has opened its models before it tries them at length: before training begins; and, after the look before the
first step, at the first one after some, where what began at zero has moved."""


class OpenModels:
    """Both models of an audit, opened by the first that needs them and kept open for other probe sets.

    Everything is let go of, and given back as it was, on leaving. When both are one module in two adapter states, only one
    of them can compute at a time: every use of a replay stands inside :meth:`as_policy` or :meth:`as_reference`.

    Args:
        autocast: makes the context the trainer computes in.
        anatomy: where the decoder layers are, for a model in which they cannot be found.
        keep_loaded: a reference that was loaded for this stays in memory, for the audit that follows.
        ranks: the processes that do this together. Weights may be spread over them.
        rehash: False: weights of the reference that show no sign of a change since they were hashed for an earlier audit are
            not read for it again.
        hashes: of the weights of policy and reference, where somebody has just read them.

    Attributes:
        policy, reference: each open between its layers, once :meth:`open` was called.
        alike: both are built the same: what holds for how one computes holds for the other.
        bounds: what running out of memory has taught.
        spread: weights of either are spread over the processes, which therefore call the same layers in the same order.
    """

    policy: Replay
    reference: Replay
    alike: bool

    def __init__(
        self,
        policy: nn.Module,
        reference: Reference,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        anatomy: Anatomy | None = None,
        keep_loaded: bool = False,
        ranks: Ranks | None = None,
        rehash: bool = True,
        hashes: tuple[str, str] | None = None,
    ) -> None:
        self.ranks = ranks if ranks is not None else Ranks()
        self.policy_model = policy = unwrap_only(policy)
        self.source = reference
        self.bounds = MemoryBounds()
        self.spread = False
        self._gathered: list[GatheredLayers | None] = []
        self._autocast = autocast
        self._anatomy = anatomy
        self._keep_loaded = keep_loaded
        self._rehash = rehash
        self._hashes = hashes
        self._read = WeightSums(policy, self.ranks)
        self._stamp: Hashable | None = None
        """What tells that the reference's weights are those of an earlier hash."""
        self._stack = contextlib.ExitStack()
        self._opened = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def open(self) -> Self:
        """Open both, the first time; checked as :func:`~align_audit.models.verify.open_replay` says.

        Raises:
            AnatomyError: a model cannot be opened between its layers, or its weights are not in memory.
            ReferenceUnavailableError: the reference cannot be had, or does not fit the policy.
        """
        if not self._opened:
            self._enter()
            self._open_replays()
            self._opened = True
        return self

    def _enter(self) -> None:
        check_in_memory(self.policy_model, "policy")
        stack = self._stack
        if not self._keep_loaded:
            stack.callback(self.source.release)
        models = [self.policy_model]
        reference = self.source.model()
        self._stamp = self.source.stamp()  # now: below, weights may be copied to where they compute
        if reference is not self.policy_model:
            check_in_memory(reference, "reference")
            stack.enter_context(placed(reference, next(self.policy_model.parameters()).device))
            models.append(reference)
        stack.enter_context(untouched(*models))
        for model in models:
            reshard(model)
        self.spread = any(map(has_engine, models))
        if self.spread:
            self.hashes  # noqa: B018  (now: they are of the shards, not of what is gathered and cast to compute with)
        layers = None if self._anatomy is None else self._anatomy.layers
        for number, model in enumerate(models):
            self._gathered.append(stack.enter_context(gathered_by_layer(model, self.ranks, layers, number=number)))
        stack.enter_context(self.source.often_active())
        stack.enter_context(torch.no_grad())

    def _open_replays(self) -> None:
        source = self.source
        self.policy = self._open_one(self.policy_model, "policy", self._anatomy, self._autocast)
        if not source.shares_weights:
            check_dtype(self.policy, source.model())
        with source.active():
            self.alike = source.shares_weights or _built_alike(self.policy.model, source.model())
            self.reference = self._open_one(
                source.model(),
                "reference",
                self.policy.anatomy if source.shares_weights else self._anatomy,
                self.policy.autocast,
                Verified.of(self.policy) if self.alike and not source.shares_weights else None,
            )
        check_fit(self.policy.anatomy, self.reference.anatomy)
        for replay, gathered in ((self.policy, self._gathered[0]), (self.reference, self._gathered[-1])):
            if gathered is not None and gathered.holds(replay.layers):
                replay.hold = gathered.need

    def _open_one(
        self,
        model: nn.Module,
        role: str,
        anatomy: Anatomy | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        like: Verified | None = None,
    ) -> Replay:
        """One of both, tried at length at some times that a run opens it (:data:`_AT_LENGTH`); all processes together."""
        check_kind(unwrap(model))
        place = next((str(each.device) for each in model.parameters()), None)
        form = _digest(f"{role}{place}{_form(unwrap(model))}")
        earlier = self.source.verified.get(form)
        times = 0 if earlier is None else earlier.times
        like = like or (None if times in _AT_LENGTH else earlier)
        if self.ranks.any(like is None):
            like = None
        replay = open_replay(model, anatomy, autocast, like)
        self.source.verified[form] = Verified.of(replay, times + 1)
        return replay

    def rest(self) -> None:
        """Hold no layer of weights that are spread: where processes have left their work midway, each may hold another."""
        for gathered in self._gathered:
            if gathered is not None:
                gathered.rest()

    @functools.cached_property
    def hashes(self) -> tuple[str, str]:
        """Of the weights of policy and reference."""
        if self._hashes is not None:
            return self._hashes
        # The reference first: a streamed one holds no layer while the policy is read.
        reference = self._reference_hash()
        return self.policy_hash, reference

    @functools.cached_property
    def policy_hash(self) -> str:
        """Of the policy's weights; also before the models are open."""
        return policy_fingerprint(self.policy_model, read=self._read) if self._hashes is None else self._hashes[0]

    def _reference_hash(self) -> str:
        # Weights that are spread are hashed by all processes or by none, and are in memory.
        if not self._rehash and not self.spread:
            hashed = self.source.hash_at(self._stamp)
            if hashed is not None:
                return hashed
        hashed = self.source.fingerprint(self.ranks, self._read)
        self.source.remember_hash(self._stamp, hashed)
        return hashed

    @functools.cached_property
    def reference_build(self) -> str:
        """Hash of what the reference computes with beside its parameters."""
        with self.as_reference() as replay:
            return build_fingerprint(replay.model)

    @functools.cached_property
    def policy_form(self) -> str:
        """Hash of how the policy is built: its modules, configuration and attention, and the dtype that it computes in."""
        return _digest(f"{_form(self.policy.model)}{self.policy.compute_dtype}")

    @contextlib.contextmanager
    def as_policy(self) -> Iterator[Replay]:
        """Inside, the policy computes."""
        yield self.policy

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Replay]:
        """Inside, the reference computes."""
        with self.source.active():
            yield self.reference

    @property
    def num_layers(self) -> int:
        """L."""
        return self.policy.num_layers

    @property
    def device(self) -> torch.device:
        """Where the policy is, and so both models compute."""
        return self.policy.device

    @property
    def layer_tokens(self) -> int:
        """Layer calls × tokens of both so far."""
        return self.policy.layer_tokens + self.reference.layer_tokens


def check_in_memory(model: nn.Module, role: str) -> None:
    """Refuse a model that accelerate has offloaded, or that was never loaded.

    Args:
        role: what the model is, for the message.

    Raises:
        AnatomyError: some of its weights are on the meta device. Those of a reference that is streamed by us may be.
    """
    if stream_of(model) is not None:
        return
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise AnatomyError(
            f"{len(absent)} of the {len(tensors)} tensors of the {role} hold no data, such as {absent[0]}: they were "
            "offloaded (device_map) or never loaded; expected all weights in memory. Load the model without offloading, on "
            "one device or a larger machine; a reference may be passed as a path, and is then read layer by layer"
        )


def check_dtype(policy: Replay, reference: nn.Module) -> None:
    """Refuse a reference of another dtype, whose layers cannot take the policy's streams.

    Inside autocast both compute in its dtype, whatever their weights are stored in.

    Raises:
        ReferenceUnavailableError: the weights' dtypes differ and there is no autocast.
    """
    with policy.autocast():
        if torch.is_autocast_enabled(policy.device.type):
            return
    policy_dtype, reference_dtype = (
        next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
        for model in (unwrap(policy.model), unwrap(reference))
    )
    if policy_dtype != reference_dtype:
        raise ReferenceUnavailableError(
            f"the policy computes in {_plain(policy_dtype)}, the reference in {_plain(reference_dtype)}; expected one dtype "
            f"for both. Load the reference with dtype={policy_dtype} (nothing is lost in a wider one), or pass its path: it is "
            "then loaded so"
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_vocabulary(pairs: Sequence[ProbePair], models: OpenModels) -> None:
    """Refuse probe pairs that were tokenized for a larger vocabulary than a model's.

    Raises:
        ConfigurationError: a token id is not in the policy's vocabulary, or not in the reference's.
    """
    largest = max(max(*pair.chosen_ids, *pair.rejected_ids) for pair in pairs)
    policy, reference = models.policy.anatomy.vocab_size, models.reference.anatomy.vocab_size
    if largest >= policy:
        raise ConfigurationError(
            f"the probes hold token id {largest}, the policy's vocabulary has {policy}: they were tokenized with "
            "another model's tokenizer"
        )
    if largest >= reference:
        raise ConfigurationError(
            f"the probes hold token id {largest}, which the policy (vocabulary of {policy}) has and the reference "
            f"({reference}) has not: they use tokens that were added for training, of which the reference says nothing. "
            "Give it the same tokens before training starts (resize_token_embeddings), or probes without them"
        )


def check_positions(pairs: Sequence[ProbePair], models: OpenModels) -> None:
    """Refuse probe pairs that are longer than a model's table of positions: on a CUDA device to look behind its last row ends
    the process, and training with it.

    Raises:
        ConfigurationError: a sequence has more tokens than the policy has positions, or the reference.
    """
    longest = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    for replay, role in ((models.policy, "policy"), (models.reference, "reference")):
        limit = learned_positions(replay.model)
        if limit is not None and longest > limit:
            raise ConfigurationError(
                f"the probes hold a sequence of {longest} tokens, and the {role} has {limit} positions (a table that was "
                f"learned); expected no longer ones. Set max_length={limit} or less, or pass shorter probes"
            )


_CALLED = 512
"""Tokens, at most, that a wrapper is called with whole: all its logits are in memory then."""


def check_wrappers(pairs: Sequence[ProbePair], models: OpenModels) -> None:
    """Refuse a model around which something computes that an audit would not call, seen on one of the ``pairs``.

    At every audit: what an adapter does at a call may change nothing before it is trained.

    Raises:
        AnatomyError: as :func:`~align_audit.models.wrapper.check_wrapper` says.
    """
    index = min(range(len(pairs)), key=lambda i: (len(pairs[i].chosen_ids), i))  # all its logits will be in memory
    row = make_batch([pairs[index]], [index], 0).only_row(0).to(models.device)
    inputs = {name: values[:, :_CALLED] for name, values in row.model_inputs().items()}
    with models.as_policy() as replay:
        tolerance = rounding(64, models.device.type, replay.compute_dtype)
        check_wrapper(models.policy_model, replay, inputs, tolerance)
    if not models.source.shares_weights:
        with models.as_reference() as replay:
            check_wrapper(unwrap_only(models.source.model()), replay, inputs, tolerance)


def _built_alike(policy: nn.Module, reference: nn.Module) -> bool:
    """Whether the reference is built just as the (unwrapped) policy is."""
    return _form(policy) == _form(unwrap(reference))


def _digest(words: str) -> str:
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()


_ELSEWHERE = (
    "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
"""What of a configuration changes no forward. A trainer writes the tokenizer's special tokens into the policy's alone."""


def _of_a_forward(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _of_a_forward(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _ELSEWHERE
    }


def _form(model: Any) -> tuple[Any, ...]:
    """How an unwrapped model is built, whatever its weights are."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
    # Saving a model writes its class and the version into its configuration; classes are compared by themselves.
    return (
        [(name, plain_class(module)) for name, module in model.named_modules()],
        _of_a_forward(config),
        # Two models may share a configuration, which then says what was done to the last one that was resized.
        tuple(model.get_input_embeddings().weight.shape),
        getattr(model.config, "_attn_implementation", None),
    )
