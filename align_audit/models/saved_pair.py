"""What the folders of a saved policy and of its reference say before either is loaded, which takes minutes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_audit.errors import ReferenceUnavailableError, plain
from align_audit.models.loading import base_of, check_place

_SIZES = {
    "decoder layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "width": ("hidden_size", "n_embd", "d_model"),
}
"""What configurations call the sizes that a policy and its reference have in common."""


def check_saved(policy: str | Path, reference: str | Path | None) -> None:
    """Refuse a saved policy and a reference that cannot be compared, as names and configurations tell it.

    Args:
        policy: a folder or hub name; that it can be loaded is for loading it to find out.
        reference: a folder or hub name; None: what the policy comes with.

    Raises:
        ReferenceUnavailableError: there is no reference, it is the policy itself, nothing can be loaded from its path, or it is
            of another size than the policy.
    """
    folder = Path(policy)
    if reference is None:
        # A saved full model names its own folder as its source: that is the policy again, not its reference.
        if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise ReferenceUnavailableError(
                f"{plain(folder.name)} is a full model and does not say what it was trained from; pass --reference (in Python: "
                "`reference`) with the model that training started from"
            )
        return
    if str(reference) == str(policy) or (folder.is_dir() and folder.resolve() == Path(reference).resolve()):
        raise ReferenceUnavailableError(
            f"the reference is {plain(folder.name)} itself, the checkpoint to be audited; expected the model that its training "
            "started from"
        )
    check_place(reference)
    _check_sizes(_configuration(policy), _configuration(reference))


def _configuration(place: str | Path) -> Mapping[str, Any]:
    """Of a saved model, or of the base of an adapter; empty where it cannot be read."""
    from transformers import PretrainedConfig

    try:
        values = PretrainedConfig.get_config_dict(base_of(Path(place)) or str(place))[0]
    except Exception:  # each library's own kind; loading says what is wrong
        return {}
    return values if isinstance(values, Mapping) else {}


def _check_sizes(policy: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Models of one kind are of one size where their configurations say the same; of two kinds, names may mean other things."""
    if policy.get("model_type") != reference.get("model_type"):
        return
    for words, names in _SIZES.items():
        of_policy, of_reference = ({name: _size(each, name) for name in names} for each in (policy, reference))
        for name in names:
            pair = of_policy[name], of_reference[name]
            if None not in pair and pair[0] != pair[1]:
                raise ReferenceUnavailableError(
                    f"the reference does not fit the policy: {words} {pair[1]} against the policy's {pair[0]}. Expected the "
                    "model that training started from"
                )


def _size(configuration: Mapping[str, Any], name: str) -> int | None:
    """A size, also of the language model in one of text and images; None: the configuration does not say it as a number."""
    text = configuration.get("text_config")
    value = (text if isinstance(text, Mapping) else configuration).get(name)
    return value if isinstance(value, int) else None
