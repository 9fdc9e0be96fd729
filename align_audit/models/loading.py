"""Load a policy or reference from a path, and its tokenizer: a saved model, or a PEFT adapter on top of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align_audit.errors import ConfigurationError, ReferenceUnavailableError


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal LM in eval mode from a directory or hub name; one with ``adapter_config.json`` becomes a PEFT model.

    Raises:
        ReferenceUnavailableError: nothing loadable is there; the message keeps the loader's own reason.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    folder = Path(path)
    adapter = folder / "adapter_config.json"
    if folder.exists() and not folder.is_dir():
        raise ReferenceUnavailableError(f"{path} is a file; expected a directory with a saved model, or a hub name")
    try:
        if adapter.is_file():
            from peft import PeftModel

            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            if not base:
                raise ReferenceUnavailableError(
                    f"{adapter} names no base model; load the adapter yourself and pass the model instead of the path"
                )
            inner = AutoModelForCausalLM.from_pretrained(base, **options)
            model = PeftModel.from_pretrained(inner, folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(str(path), **options)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ReferenceUnavailableError):
            raise
        raise ReferenceUnavailableError(
            f"cannot load a causal language model from {path}: {error}. Expected a directory saved with "
            "`save_pretrained` (or a checkpoint of the trainer), or the name of a model that is in reach."
        ) from error
    if device is not None:
        model = model.to(device)
    return model.eval()


def base_of(folder: Path) -> str | None:
    """What an adapter's folder names as its base model."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None  # no adapter, or a damaged one: loading it says so
    return base or None


def load_tokenizer(places: list[Any]) -> Any:
    """The tokenizer of the first place that has one.

    Raises:
        ConfigurationError: none has.
    """
    from transformers import AutoTokenizer

    reasons = []
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(str(place))
        except (OSError, ValueError) as error:
            reasons.append(f"{Path(str(place)).name}: {str(error).splitlines()[0]}")
    raise ConfigurationError(
        "no tokenizer found in " + "; ".join(reasons) + ". Save it beside the model (processing_class.save_pretrained)"
    )
