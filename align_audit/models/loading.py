"""Load a policy or reference from a path, and its tokenizer: a saved model, or a PEFT adapter on top of one.

Everything that transformers and peft read for us is read here, and whatever they raise leaves as one sentence.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from align_audit.errors import AlignAuditError, ConfigurationError, ReferenceUnavailableError, plain
from align_audit.models.folders import can_be_hub_name, holds_weights, lack_of_model, near_path
from align_audit.models.guard import untouched

logger = logging.getLogger(__name__)

_EXPECTED = (
    "Expected a directory saved with `save_pretrained` (or a checkpoint of the trainer), or the name of a model that is in "
    "reach"
)

_VOCABULARY_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "*.tiktoken",
)  # fmt: skip
"""What tokenizers keep their tokens in, beside the names that a tokenizer's class gives."""


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
    revision: str | None = None,
) -> nn.Module:
    """A causal LM in eval mode from a directory or hub name; one with ``adapter_config.json`` becomes a PEFT model.

    No random state is changed.

    Args:
        dtype: of the weights; None: as they are stored, and of an adapter's base at least the adapter's.
        attention: the attention implementation; None: transformers' choice.
        trust_remote_code: whether code that is saved with the model may run.
        base: where an adapter's base model is looked for if it is no longer where the adapter's folder says.
        revision: of a hub name: a branch, tag or commit; None: the newest. Folders have none.

    Raises:
        ReferenceUnavailableError: nothing loadable is there; the message keeps the loader's own reason.
    """
    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    folder = Path(path)
    _check_names(path)
    with untouched(), loader_errors(path):  # a new adapter's weights are drawn before those that were saved are read
        if (folder / "adapter_config.json").is_file():
            model: nn.Module = _load_adapted(folder, base, options)
        else:
            model = _load_whole(path, options if revision is None else {**options, "revision": revision})
        if device is not None:
            model = model.to(device)
    return model.eval()


def check_place(path: str | Path) -> None:
    """Refuse a path from which no model can be loaded, as names and configurations tell it; no weight is read.

    Raises:
        ReferenceUnavailableError: as :func:`load_model`.
    """
    _check_names(path)
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        with loader_errors(path):
            _find_base(folder, _named_base(folder), None)
        return
    if not folder.is_dir() and not _holds_model(path):
        raise ReferenceUnavailableError(
            f"cannot load a causal language model from {plain(path)}{near_path(folder)}: there is no such folder, and no model "
            f"of that name is in reach. {_EXPECTED}"
        )
    if folder.is_dir() and not holds_weights(folder):
        raise ReferenceUnavailableError(
            f"cannot load a causal language model from {plain(path)}: it holds a configuration, and no weights. {_EXPECTED}"
        )


def _check_names(path: str | Path) -> None:
    """Refuse what the names of files and folders tell to be no model."""
    folder = Path(path)
    if not folder.exists() and not can_be_hub_name(str(path)):
        raise ReferenceUnavailableError(
            f"cannot load a causal language model from {plain(path)}{near_path(folder)}: there is no such folder. {_EXPECTED}"
        )
    if folder.exists() and not folder.is_dir():
        raise ReferenceUnavailableError(f"{path} is a file; expected a directory with a saved model, or a hub name")
    if folder.is_dir() and (lack := lack_of_model(folder)) is not None:
        raise ReferenceUnavailableError(
            f"{lack}. Expected a directory saved with `save_pretrained` (or a checkpoint of the trainer)"
        )


@contextlib.contextmanager
def loader_errors(path: str | Path) -> Iterator[None]:
    """Whatever a library raises while it reads the model at ``path`` becomes one sentence that names the path.

    Raises:
        ReferenceUnavailableError: something was raised inside; the error it came from is its cause.
    """
    try:
        yield
    except AlignAuditError:
        raise
    except Exception as error:  # the kinds are the libraries' own: safetensors', json's, torch's size mismatches, …
        words = _first_words(error)
        if "trust_remote_code" in str(error):
            raise ReferenceUnavailableError(
                f"{path} comes with code of its own, which runs only where it is trusted. Pass --trust-remote-code to "
                "the command, or load the model yourself with trust_remote_code=True and pass the model"
            ) from error
        raise ReferenceUnavailableError(
            f"cannot load a causal language model from {path}: {words}. {_EXPECTED}"
        ) from error


def _first_words(error: BaseException) -> str:
    """The first line of what an error says; with the next one where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    words = words.rstrip(".")
    return words if words and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {words}"


def _load_whole(path: str | Path, options: dict[str, Any]) -> Any:
    """A saved model that is no adapter.

    Raises:
        ReferenceUnavailableError: weights that its class has are not in its files, and would be random.
    """
    model, report = _opener(path, options).from_pretrained(str(path), output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ReferenceUnavailableError(
            f"{path} lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}, which would be "
            "random. Expected a whole causal language model with its head; save it again with `save_pretrained`"
        )
    return model


def _opener(path: str | Path, options: dict[str, Any]) -> Any:
    """The class that opens a saved model as it was saved.

    That is ``AutoModelForCausalLM`` wherever it takes the configuration. A model of text and images (or sound) is opened
    by the class that its configuration names.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    named = {name: options[name] for name in ("trust_remote_code", "revision") if name in options}
    config = AutoConfig.from_pretrained(str(path), **named)
    written = getattr(config, "auto_map", None) or {}
    if type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in written:
        return AutoModelForCausalLM
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.GenerationMixin):
            return kind
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM  # which says what it takes


# -- adapters ----------------------------------------------------------------------------------------------------------


def base_of(folder: Path) -> str | None:
    """What an adapter's folder names as its base model."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # no adapter, or a damaged one: loading it says so
    return base or None


def _load_adapted(folder: Path, base: str | Path | None, options: dict[str, Any]) -> Any:
    """An adapter on top of its base model.

    Raises:
        ReferenceUnavailableError: the base is not to be had, or lacks embeddings that only training had.
    """
    from peft import PeftModel

    place, fault = _find_base(folder, _named_base(folder), base)
    if fault:
        logger.warning("align_audit reads the base of %s from %s%s", folder.name, place, fault)
    with loader_errors(place):
        inner = _load_whole(place, {**options, "dtype": _base_dtype(folder, place, options["dtype"])})
    resized = _resize(inner, folder)
    model = PeftModel.from_pretrained(inner, folder)
    if resized is not None and any(bool(parameter.isnan().any()) for parameter in model.parameters()):
        raise ReferenceUnavailableError(
            f"{folder} was trained on a base with {resized[1]} embeddings, {place} has {resized[0]}, and the adapter does "
            "not hold those that were added. Save the base with its resized embeddings, and name its folder as "
            "base_model_name_or_path in adapter_config.json"
        )
    return model


def _base_dtype(folder: Path, place: str, dtype: Any) -> Any:
    """In what an adapter's base is loaded: where ``"auto"`` was asked for, in float32 under an adapter that is stored so.

    A trainer of TRL reads a model in 16 bits as float32 and trains the adapter in that; the shift of a young adapter can be
    smaller than what 16 bits round off. Widening loses nothing.
    """
    from transformers import PretrainedConfig

    file = folder / "adapter_model.safetensors"
    if dtype != "auto" or not file.is_file():
        return dtype
    config = PretrainedConfig.get_config_dict(place)[0]
    narrow = config.get("dtype", config.get("torch_dtype")) in ("bfloat16", "float16")
    if not narrow or config.get("quantization_config") is not None:
        return dtype
    with safe_open(file, "pt") as opened:
        stored = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118  (no mapping)
    return torch.float32 if "F32" in stored else dtype


def _named_base(folder: Path) -> str | None:
    """What an adapter's configuration names as its base model. One that is damaged raises what its parser does."""
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    return named or None


def _find_base(folder: Path, named: str | None, instead: str | Path | None) -> tuple[str, str]:
    """Where an adapter's base is: where its folder says, else at ``instead``.

    Returns:
        The place; and what is wrong with that which the folder says, to be put behind it: empty where nothing is.
    """
    if named is not None and _holds_model(named):
        return named, ""
    if named is None:
        fault = ", which its adapter_config.json does not name"
        lack = f"{folder / 'adapter_config.json'} names no base model"
    else:
        fault = f": {named}, which its adapter_config.json names, is not there"
        lack = f"the base model of {folder}, {named}, is not there"
    if instead is not None and not (Path(instead) / "adapter_config.json").is_file() and _holds_model(instead):
        return str(instead), fault
    raise ReferenceUnavailableError(
        lack
        + (f", and {instead} holds no whole model" if instead is not None else "")
        + ". Pass its folder as --reference (in Python: `reference`), or correct base_model_name_or_path in "
        "adapter_config.json"
    )


def _holds_model(place: str | Path) -> bool:
    """Whether a configuration is at ``place``, readable or not: in a directory, or under a hub name in reach."""
    from transformers import PretrainedConfig

    if Path(place).is_dir():
        return (Path(place) / "config.json").is_file()
    try:
        return bool(PretrainedConfig.get_config_dict(str(place))[0])
    except Exception:  # a bad name, no network, no such model: each library's own kind
        return False


def _resize(base: Any, folder: Path) -> tuple[int, int] | None:
    """Give the base as many embeddings as the adapter was saved with: training had resized it. What is added is NaN.

    What is still NaN when the adapter is loaded was in neither.

    Returns:
        How many the base had, and how many it has now; None where nothing was to be done.
    """
    size = base.get_input_embeddings().weight.shape[0]
    sizes = _saved_sizes(base, folder)
    if len(sizes) != 1 or max(sizes) == size:
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        base.resize_token_embeddings(max(sizes), mean_resizing=False)
        for module in _ends(base):
            for parameter in module.parameters(recurse=False):
                if parameter.shape[0] == max(sizes):
                    parameter[size:] = torch.nan
    return size, max(sizes)


def _ends(model: Any) -> list[nn.Module]:
    """The input embedding and the output head."""
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


def _saved_sizes(base: Any, folder: Path) -> set[int]:
    """How many embeddings an adapter's file holds, in the input embedding and in the head."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return set()
    ends = _ends(base)
    names = tuple(f"{name}." for name, module in base.named_modules() if any(module is end for end in ends))
    width = base.get_input_embeddings().weight.shape[1]
    with safe_open(file, "pt") as opened:
        shapes = {
            key: tuple(opened.get_slice(key).get_shape())
            for key in opened.keys()  # noqa: SIM118  (no mapping)
            if key.endswith(".weight") and "lora_" not in key and any(name in key for name in names)
        }
    return {shape[0] for shape in shapes.values() if len(shape) == 2 and shape[1] == width}


# -- tokenizers --------------------------------------------------------------------------------------------------------


def load_tokenizer(places: Iterable[Any], *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of the first place that has one. A place that is passed over is named in a warning.

    For many kinds of models transformers makes a tokenizer of a folder that holds none: it has no tokens but special ones.
    Such a one is not taken.

    Args:
        revision: of the first place, where that is a hub name; None: the newest.

    Raises:
        ConfigurationError: no place has one.
    """
    reasons: list[str] = []
    for number, place in enumerate(dict.fromkeys(map(str, places))):
        name = Path(place).name
        try:
            tokenizer = _open_tokenizer(place, trust_remote_code, None if number else revision)
            lack = _lack(tokenizer, Path(place))
        except Exception as error:  # as in loader_errors
            lack = "its code is not trusted (--trust-remote-code)" if "trust_remote_code" in str(error) else None
            lack = lack or _lack_of_files(Path(place), ("tokenizer_config.json",)) or _first_words(error)
        if lack is None:
            if reasons:
                logger.warning("align_audit takes the tokenizer of %s; none in %s", name, "; ".join(reasons))
            return tokenizer
        reasons.append(f"{name}: {lack}")
    raise ConfigurationError(
        "no tokenizer found in " + "; ".join(reasons) + ". Save it beside the model (processing_class.save_pretrained)"
    )


def _open_tokenizer(place: str, trust_remote_code: bool, revision: str | None) -> Any:
    """The tokenizer that was saved, also where transformers would put the usual one of the model's kind in its place."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **at)
    saved, described = Path(place) / "tokenizer.json", Path(place) / "tokenizer_config.json"
    if saved.is_file() and described.is_file():
        kind = json.loads(described.read_text(encoding="utf-8")).get("tokenizer_class")
        # This class has no rules of its own: all that it does is in the file.
        if kind in ("TokenizersBackend", "PreTrainedTokenizerFast") and type(tokenizer) is not PreTrainedTokenizerFast:
            return PreTrainedTokenizerFast.from_pretrained(place)
    return tokenizer


def _lack(tokenizer: Any, folder: Path) -> str | None:
    """What a tokenizer that was made from ``folder`` lacks; None: nothing."""
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if len(tokenizer) <= len(special):
        return f"a tokenizer of {len(tokenizer)} tokens, all of them special"
    by_class = tuple((getattr(tokenizer, "vocab_files_names", None) or {}).values())
    # A tokenizer of bytes has no vocabulary to save.
    return _lack_of_files(folder, by_class or ("tokenizer_config.json",))


def _lack_of_files(folder: Path, names: Iterable[str]) -> str | None:
    """That a folder holds none of the files that tokenizers keep their tokens in, by their usual names and these."""
    if not folder.is_dir() or any(any(folder.glob(name)) for name in (*_VOCABULARY_FILES, *names)):
        return None
    return "no tokenizer files"
