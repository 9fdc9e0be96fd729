"""The reference model, wherever it lives: one object whose context manager puts the model in the reference's state."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from align_audit.errors import ReferenceUnavailableError
from align_audit.models.adapters import AdapterSwitch, adapters_kept, is_merged
from align_audit.models.anatomy import is_peft, unwrap_only
from align_audit.models.guard import untouched
from align_audit.models.loading import load_model, loader_errors
from align_audit.models.verify import Verified
from align_audit.models.weights.fingerprint import WeightSums, belongs_to
from align_audit.models.weights.from_disk import open_streamed
from align_audit.models.weights.sharded import is_spread
from align_audit.models.weights.streaming import NotStreamable, close, files_of
from align_audit.models.weights.zero3 import loading_whole
from align_audit.ranks import Ranks

logger = logging.getLogger(__name__)

REFERENCE_ADAPTER = "ref"
"""The name under which DPOTrainer keeps a frozen copy of a pretrained adapter, in memory and in its checkpoints."""


_PADDED = 128
"""Rows that an embedding is padded by at most, for speed; of a large one, a hundredth."""


class Reference:
    """Where the reference is and how to reach it.

    Args:
        stream: opens the model with its layers left on disk; ``load`` is for when that cannot be.
        whole: the source in words where ``load`` had to be taken.

    Attributes:
        source: in words, for the record; says why, where a reference could not be streamed.
        own_source: it is read from where the policy says that it was loaded from.
        shares_weights: True when it is the policy's own module in another adapter state.
    """

    def __init__(
        self,
        source: str,
        model: nn.Module | None = None,
        load: Callable[[], nn.Module] | None = None,
        adapter_of: nn.Module | None = None,
        stream: Callable[[], nn.Module] | None = None,
        source_loaded: str | None = None,
        own_source: bool = False,
    ) -> None:
        self.source = source
        self.own_source = own_source
        self._stream = stream
        self._source_loaded = source_loaded
        self._model = model
        self._load = load
        self._policy = adapter_of
        self._switch: AdapterSwitch | None = None
        self._hashed: tuple[Hashable, str] | None = None
        """The weights' hash that was taken last, and the stamp that they had then."""
        self.verified: dict[str, Verified] = {}
        """What was found out of how policy and reference compute, by how they are built, for audits that follow."""

    @property
    def shares_weights(self) -> bool:
        """Whether policy and reference are one module in two adapter states."""
        return self._policy is not None

    def model(self) -> nn.Module:
        """The module; opened or loaded from disk now if it is not in memory (see :meth:`release`)."""
        if self._policy is not None:
            return self._policy
        if self._model is None:
            self._model = self._open()
        return self._model

    def _open(self) -> nn.Module:
        assert self._load is not None
        with untouched(), loading_whole():
            if self._stream is None:
                return self._load()
            try:
                return self._stream()
            except NotStreamable as error:
                reason = str(error)
            model = self._load()
        self._stream = None
        self.source = f"{self._source_loaded} (whole, not layer by layer: {reason})"
        logger.warning("align_audit holds the whole reference in memory instead of streaming its layers: %s", reason)
        return model

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The module computes as the reference inside, and as before after."""
        if self._policy is None:
            yield
        elif self._switch is not None:
            with self._switch.on():
                yield
        else:
            with adapters_kept(self._policy), self._switched():
                yield

    @contextlib.contextmanager
    def often_active(self) -> Iterator[None]:
        """Inside, which has to stand in an ``untouched`` of the module, :meth:`active` may be entered again and again.

        Nobody else adds, removes or merges an adapter there.
        """
        if self._policy is not None:
            self._switch = AdapterSwitch(self._policy, self._switched)
        try:
            yield
        finally:
            self._switch = None

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        """PEFT's own switch to the reference; who enters it gives back the adapters."""
        policy: Any = self._policy
        if REFERENCE_ADAPTER in policy.peft_config:
            policy.base_model.set_adapter(REFERENCE_ADAPTER)
            yield
        else:
            with policy.disable_adapter():
                yield

    def fingerprint(self, ranks: Ranks | None = None, read: WeightSums | None = None) -> str:
        """Hash of the weights the reference computes with: inactive adapters do not count.

        Args:
            ranks: the processes that weights are spread over.
            read: what was just read of the policy's weights for its own hash; those that both models have are not read again.
        """
        model = self.model()
        if self._policy is not None and is_merged(model):
            with adapters_kept(model):  # the weights without what is merged into them
                return WeightSums(model, ranks).hash(self._inactive())
        sums = read if read is not None and read.model is model else WeightSums(model, ranks)
        return sums.hash(self._inactive())

    def _inactive(self) -> tuple[str, ...]:
        """The adapters that the reference does not compute with."""
        model: Any = self.model()
        if not is_peft(model):
            return ()
        active = {REFERENCE_ADAPTER} if self._policy is not None else set(model.active_adapters)
        return tuple(sorted(set(model.peft_config) - active))

    def stamp(self) -> Hashable | None:
        """What stays as it is while the weights do, without a look at them; None: nothing does.

        Of files, which they are and when they were written; of parameters, which objects they are, where they lie and how
        often they were written to. What is written through ``parameter.data`` does not count there, which is how trainers
        synchronize a reference: of one that may move, and from time to time of any, take :meth:`fingerprint`.
        """
        model = self.model()
        files = files_of(model)
        if files is not None:
            return files
        if self._load is not None:
            return None  # read anew each time
        inactive = self._inactive()
        parameters = [
            (name, parameter) for name, parameter in model.named_parameters() if not belongs_to(model, name, inactive)
        ]
        if any(
            type(each) is not nn.Parameter or is_spread(each) or each.is_inference() or each.is_meta
            for _, each in parameters
        ):
            return None  # spread, quantized or absent: such a tensor knows nothing of what is written to it
        return tuple((name, id(parameter), parameter.data_ptr(), parameter._version) for name, parameter in parameters)

    def hash_at(self, stamp: Hashable | None) -> str | None:
        """The hash that the weights had at that stamp; None: it was not taken."""
        return self._hashed[1] if stamp is not None and self._hashed is not None and self._hashed[0] == stamp else None

    def remember_hash(self, stamp: Hashable | None, hashed: str) -> None:
        """Keep what :meth:`fingerprint` gave of weights with that :meth:`stamp`."""
        self._hashed = None if stamp is None else (stamp, hashed)

    def release(self) -> None:
        """Let go of a model that was loaded or streamed for one audit; no thread of it is left."""
        if self._load is not None and self._model is not None:
            close(self._model)
            self._model = None
            gc.collect()
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def policy_fingerprint(policy: nn.Module, ranks: Ranks | None = None, read: WeightSums | None = None) -> str:
    """Hash of the weights the policy computes with; a frozen reference adapter beside it does not count.

    Args:
        ranks: the processes that weights are spread over.
        read: keeps what is read of the policy, for the hash of a reference that has weights in common with it.
    """
    policy = unwrap_only(policy)
    inactive: set[str] = set()
    if is_peft(policy):
        inactive = set(policy.peft_config) - set(policy.active_adapters)  # type: ignore[arg-type]
    return (read or WeightSums(policy, ranks)).hash(tuple(sorted(inactive)))


def fingerprints(policy: nn.Module, reference: Reference) -> tuple[str, str]:
    """The hashes of policy and reference. What they have in common, as an adapter's base, is read once."""
    read = WeightSums(policy)
    return policy_fingerprint(policy, read=read), reference.fingerprint(read=read)


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    reference: Any = None,
) -> nn.Module:
    """A saved policy; the frozen reference adapter of a trainer's checkpoint comes with it, inactive.

    Args:
        dtype: of the weights; None: as :func:`~align_audit.models.loading.load_model`.
        reference: what the policy is compared with. Where it is a path, an adapter whose base has moved finds it there.

    Raises:
        ReferenceUnavailableError: as :func:`~align_audit.models.loading.load_model`.
    """
    base = reference if isinstance(reference, str | Path) else None
    policy = load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code, base=base)
    frozen = Path(path) / REFERENCE_ADAPTER
    if is_peft(policy) and (frozen / "adapter_config.json").is_file():
        with untouched(), loader_errors(frozen):
            cast(Any, policy).load_adapter(frozen, adapter_name=REFERENCE_ADAPTER)
        policy.eval()
    return policy


def resolve_reference(
    policy: nn.Module,
    given: nn.Module | str | Path | None = None,
    trainer_reference: nn.Module | None = None,
    trust_remote_code: bool = False,
    *,
    stream: bool = True,
    revision: str | None = None,
) -> Reference:
    """Find the reference of ``policy`` (DESIGN, "Which reference").

    The order: ``given``; the trainer's ``ref_model``; the policy's ``"ref"`` adapter; its adapters switched off; the
    path or hub name the policy itself came from.

    Args:
        stream: a reference on disk leaves its decoder layers there and reads them as they are called, where that can
            be done exactly; else it is loaded whole, and its ``source`` says why. False: always loaded whole.
        revision: at which the policy was loaded from its own source, where its configuration does not keep that.

    Raises:
        ReferenceUnavailableError: none of these can be had.
    """
    policy = unwrap_only(policy)  # adapters are found inside a compiled or data-parallel model, too
    if isinstance(given, nn.Module):
        return _passed(policy, given, "a model that was passed")
    if given is not None:
        return _saved(
            given, Path(given).name, policy, trust_remote_code, stream, own_source=_is_source_of(policy, given)
        )
    if trainer_reference is not None:
        return _passed(policy, trainer_reference, "the trainer's ref_model")
    if is_peft(policy):
        if REFERENCE_ADAPTER in policy.peft_config:  # type: ignore[operator]
            return Reference(f"the policy's {REFERENCE_ADAPTER!r} adapter", adapter_of=policy)
        return Reference("the policy with its adapters off", adapter_of=policy)
    config = getattr(policy, "config", None)
    path = getattr(config, "_name_or_path", "")
    if path:
        where = f"the policy's own source, {Path(path).name}"
        place = _snapshot(path, getattr(config, "_commit_hash", None) or revision)
        return _saved(place, where, policy, trust_remote_code, stream, own_source=True)
    raise ReferenceUnavailableError(
        "no reference model can be had: none was passed, the trainer holds none, the policy has no adapters, and it "
        "was not loaded from a path. Pass `reference=` (a model, a directory or a hub name) to AlignmentAuditCallback "
        "or audit, or call `callback.attach(trainer)` if the trainer holds the reference."
    )


def _passed(policy: nn.Module, model: nn.Module, source: str) -> Reference:
    """A reference in memory, which must not be the policy in another guise.

    PEFT puts adapters into the very model object that it is given, so whoever keeps that object keeps the policy. What it
    was before training is the policy with its adapters off, and that is what is taken.

    Raises:
        ReferenceUnavailableError: it is the policy itself, or holds parameters of the policy that train.
    """
    model = unwrap_only(model)
    if model is policy:
        raise ReferenceUnavailableError(
            f"the reference ({source}) is the policy itself; expected another model, a path, or None to let it be found"
        )
    if is_peft(policy) and any(model is part for part in policy.modules()):
        peft: Any = policy
        if REFERENCE_ADAPTER in peft.peft_config:
            raise ReferenceUnavailableError(
                f"the reference ({source}) is the policy's own base model, while the policy holds a {REFERENCE_ADAPTER!r} "
                "adapter that training compares it with; leave the reference out, and that adapter is taken"
            )
        return Reference(f"the policy with its adapters off ({source} is its own base)", adapter_of=policy)
    trained = {id(parameter): name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    shared = [trained[id(parameter)] for parameter in model.parameters() if id(parameter) in trained]
    if shared:
        raise ReferenceUnavailableError(
            f"the reference ({source}) shares {len(shared)} parameters with the policy that training moves, such as "
            f"{shared[0]}; expected a model of its own (a deep copy, or loaded a second time), or a path"
        )
    return Reference(source, model=model)


def refuse_itself(policy_hash: str, reference: Reference, reference_hash: str) -> None:
    """Refuse to compare a policy after training with itself, read once more from where it was loaded from.

    Raises:
        ReferenceUnavailableError: the reference is at the path that the policy was loaded from, and is the policy.
    """
    if reference.own_source and policy_hash == reference_hash:
        reference.release()
        raise ReferenceUnavailableError(
            f"no reference: the one that was named or found, {reference.source.partition(' from ')[2] or reference.source}, "
            "holds the policy itself (equal weights). A saved full model does not say what it was trained from; pass that "
            "model as `reference` (an object, a directory or a hub name)"
        )


def _is_source_of(policy: nn.Module, path: str | Path) -> bool:
    """Whether ``path`` is where the policy says that it was loaded from."""
    source = str(getattr(getattr(policy, "config", None), "_name_or_path", ""))
    return bool(source) and (source == str(path) or Path(source).resolve() == Path(path).resolve())


def _snapshot(path: str, revision: str | None) -> str | Path:
    """The folder in the cache of a hub name at a revision; anything else as it is.

    A name alone means the newest revision, and the policy may have been loaded at another.
    """
    if revision is None or Path(path).exists():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        return path
    return Path(config).parent if isinstance(config, str) else path


def _saved(
    path: str | Path,
    where: str,
    policy: nn.Module,
    trust_remote_code: bool,
    stream: bool,
    *,
    own_source: bool = False,
) -> Reference:
    """A reference on disk, in the policy's dtype, on its device and with its attention."""
    # PEFT's wrapper hides the model's own attributes; the embedding says dtype and device for both.
    core = policy.get_base_model() if is_peft(policy) else policy  # type: ignore[operator]
    weight = next(parameter for parameter in core.parameters() if parameter.is_floating_point())
    options: dict[str, Any] = {
        "dtype": weight.dtype,
        "device": weight.device,
        "attention": getattr(core.config, "_attn_implementation", None),
        "trust_remote_code": trust_remote_code,
    }
    loaded = f"loaded from {where}"
    if not stream or (Path(path) / "adapter_config.json").is_file():
        return Reference(loaded, load=lambda: load_model(path, **options), own_source=own_source)
    return Reference(
        f"streamed from {where}",
        load=lambda: load_model(path, **options),
        stream=lambda: open_streamed(path, **options),
        source_loaded=loaded,
        own_source=own_source,
    )


def check_fit(policy: Any, reference: Any) -> None:
    """Refuse a reference whose streams cannot be compared with the policy's (arguments: ``Anatomy``s).

    Vocabularies may differ by as much as embeddings are padded by, or resized for some added tokens: each model has to know
    the probes' tokens, and distributions are compared over the tokens that both have.
    """
    sizes = policy.vocab_size, reference.vocab_size
    padded = abs(sizes[0] - sizes[1]) <= max(_PADDED, max(sizes) // 100)
    fields = [("num_layers", "decoder layers"), ("hidden_size", "width"), ("vocab_size", "vocabulary size")]
    for field, words in fields[: 2 if padded else 3]:
        of_policy, of_reference = getattr(policy, field), getattr(reference, field)
        if of_policy != of_reference:
            raise ReferenceUnavailableError(
                f"the reference does not fit the policy: {words} {of_reference} against the policy's {of_policy}. Expected the "
                "model that training started from; pass that one as `reference=` (or as the trainer's `ref_model`)."
            )
