"""What the arguments of a training script say of the run that it would make."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from align_audit.cli.options import device_option
from align_audit.errors import ConfigurationError, pass_exit_on, plain

if TYPE_CHECKING:
    from align_audit.monitoring.doctor import Plan

_TRIED = ("dtype", "torch_dtype", "revision", "attn_implementation", "trust_remote_code", "device_map", "use_cache")
"""The ``model_init_kwargs`` that the model is opened with here, or that change nothing of what is tried."""


def plan_of_script(arguments: Sequence[str], common: dict[str, Any]) -> Plan:
    """What the arguments of a training script say, read by TRL's own parser as ``trl dpo`` reads them.

    Args:
        common: values of the plan that were given beside them, which hold in place of theirs; None: nothing was given.

    Raises:
        ConfigurationError: TRL refuses them, or they name no model.
    """
    from align_audit.monitoring.doctor import Plan

    script, training, model, launch = _parsed(arguments)
    if not model.model_name_or_path:
        raise ConfigurationError("the arguments after -- name no model; expected --model_name_or_path")
    given = {name: value for name, value in common.items() if value is not None}
    loading = _loading(training, model)
    # Where TRL keeps it has changed.
    trusts = any(bool(getattr(part, "trust_remote_code", False)) for part in (training, model))
    given["trust_remote_code"] = (
        bool(given.get("trust_remote_code")) or trusts or bool(loading.get("trust_remote_code"))
    )
    given.setdefault("device", "cpu" if training.use_cpu else device_option("auto"))
    pairs = training.per_device_train_batch_size * training.gradient_accumulation_steps
    given.setdefault("processes", _processes(training, launch))
    steps = _Steps.of(training, script, given["processes"], given.get("max_steps"))
    counted = {"max_steps": steps.max_steps, "pairs_per_step": pairs, **steps.events(training)}
    unforeseen = tuple(words for name, words in steps.unforeseen(training).items() if name not in given)
    read: dict[str, Any] = {
        "model": model.model_name_or_path,
        **counted,
        "output_dir": Path(training.output_dir) if training.output_dir else None,
        "report_to": tuple(training.report_to or ()),
        "lora": bool(model.use_peft),
        "gradient_checkpointing": bool(training.gradient_checkpointing),
        "beta": training.beta,
        "dtype": _dtype(loading.get("dtype", loading.get("torch_dtype"))),
        "mixed_precision": "bfloat16" if training.bf16 else "float16" if training.fp16 else None,
        "revision": None if loading["revision"] == "main" else loading["revision"],
        "attention": loading["attn_implementation"],
        "max_length": training.max_length,
        "truncation_mode": str(getattr(training, "truncation_mode", "keep_start")),
        "resumes": bool(training.resume_from_checkpoint),
        "untried": (*_untried(training, model, loading), *_untried_launch(launch)),
        "unforeseen": unforeseen,
    }
    return Plan(**{**read, **given})


def _parsed(arguments: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """The script's, the trainer's and the model's arguments; and those that ``trl`` hands on to ``accelerate launch``."""
    from accelerate.commands.launch import launch_command_parser
    from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser

    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig), prog="align-audit doctor … --")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # libraries, of each other's names
            script, training, model, rest = parser.parse_args_and_config(list(arguments), return_remaining_strings=True)
        # TRL's own name for it.
        rest = ["--config_file" if word == "--accelerate_config" else word for word in rest]
        launch = launch_command_parser().parse_args([*rest, "script"])
    except SystemExit as error:
        pass_exit_on(error)
        raise ConfigurationError(
            "the arguments after -- are not those of a DPO script; expected what `trl dpo` takes (its reason stands above)"
        ) from None
    except (ValueError, OSError, TypeError) as error:
        # TRL's default asks for what only a GPU computes.
        hint = " (without a GPU add --bf16 False, or --use_cpu)" if "bf16" in str(error) else ""
        raise ConfigurationError(f"the arguments after -- cannot be read: {error}{hint}") from None
    return script, training, model, launch


def _loading(training: Any, model: Any) -> dict[str, Any]:
    """What the model is opened with, put together as ``trl dpo`` does it."""
    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return options | dict(training.model_init_kwargs or {})


def _dtype(value: Any) -> str | None:
    """A dtype by its name; what transformers takes as it is saved is None."""
    return None if value in (None, "auto") else str(value).removeprefix("torch.")


def _untried(training: Any, model: Any, loading: dict[str, Any]) -> list[str]:
    """What the script does to its models that the doctor does not do to them."""
    said = [
        f"{name} (the model is opened unquantized)" for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)
    ]
    said += [f"model_init_kwargs: {name}" for name in loading if name not in _TRIED]
    if getattr(training, "sync_ref_model", False):
        said.append(f"sync_ref_model (the reference moves every {training.ref_model_sync_steps} steps)")
    said += [name for name in ("deepspeed", "fsdp") if getattr(training, name, None)]
    if getattr(training, "auto_find_batch_size", False):
        said.append("auto_find_batch_size (steps are counted with the batch that was given)")
    return said


def _untried_launch(launch: Any) -> list[str]:
    """What the script is launched with that is not looked at here."""
    said = [name for name in ("use_deepspeed", "use_fsdp", "mixed_precision") if getattr(launch, name, None)]
    if (path := _launch_file(launch)) is not None:
        said.append(f"accelerate's configuration file {plain(path)} (of it only how many processes it names is read)")
    return said


def _launch_file(launch: Any) -> str | None:
    """The file that ``accelerate launch`` reads: one that is named, else that of ``accelerate config``, where there is one."""
    from accelerate.commands.config.config_args import default_config_file

    path = launch.config_file or default_config_file
    return str(path) if launch.config_file or os.path.isfile(path) else None


def _processes(training: Any, launch: Any) -> int:
    """How many ``accelerate launch`` starts, which ``trl`` hands on to: as is said to it, else one for each GPU."""
    if launch.num_processes:
        return int(launch.num_processes)
    if (path := _launch_file(launch)) is not None:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
            return max(1, int(yaml.safe_load(Path(path).read_text(encoding="utf-8"))["num_processes"]))
    import torch

    gpus = 0 if training.use_cpu else torch.cuda.device_count()
    return max(1, int(training.world_size), gpus)


@dataclass(frozen=True)
class _Steps:
    """How long a run is.

    Attributes:
        max_steps, per_epoch: optimizer steps; None: the data cannot be counted from here.
    """

    max_steps: int | None
    per_epoch: int | None

    @classmethod
    def of(cls, training: Any, script: Any, processes: int, given: int | None) -> _Steps:
        """As transformers' Trainer counts them.

        Args:
            given: a length that was given beside the script's arguments.
        """
        by_epoch = "epoch" in (str(training.save_strategy.value), str(training.eval_strategy.value))
        max_steps = given or (int(training.max_steps) if training.max_steps > 0 else None)
        per_epoch = None
        if max_steps is None or by_epoch:
            count = _pairs_in(script)
            if count is not None:
                batch = training.per_device_train_batch_size * processes
                batches = count // batch if training.dataloader_drop_last else math.ceil(count / batch)
                per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
        if max_steps is None and per_epoch is not None:
            max_steps = math.ceil(training.num_train_epochs * per_epoch)
        return cls(max_steps, per_epoch)

    def events(self, training: Any) -> dict[str, int | None]:
        """Steps between checkpoints and between evaluations; None: none that can be foreseen."""
        return {
            "save_steps": self._every(training.save_strategy.value, training.save_steps),
            "eval_steps": self._every(training.eval_strategy.value, training.eval_steps),
        }

    def unforeseen(self, training: Any) -> dict[str, str]:
        """Which of :meth:`events` there are, at steps that cannot be told from here; in words."""
        asked = {
            "save_steps": ("checkpoints", "--save_strategy", training.save_strategy.value, training.save_steps),
            "eval_steps": ("evaluations", "--eval_strategy", training.eval_strategy.value, training.eval_steps),
        }
        return {
            name: f"{what} of {option} {strategy}" + (f" every {steps:g} of the run" if strategy == "steps" else "")
            for name, (what, option, strategy, steps) in asked.items()
            if strategy != "no" and self._every(strategy, steps) is None and (strategy != "steps" or steps)
        }

    def _every(self, strategy: str, steps: float | None) -> int | None:
        if strategy == "epoch":
            return self.per_epoch
        if strategy != "steps" or not steps:
            return None
        if steps >= 1:
            return int(steps)
        return None if self.max_steps is None else math.ceil(self.max_steps * steps)


def _pairs_in(script: Any) -> int | None:
    """Pairs that are trained on; None: the data cannot be counted from here."""
    from datasets import load_dataset

    try:
        return len(load_dataset(script.dataset_name, name=script.dataset_config, split=script.dataset_train_split))
    except Exception:  # whatever a data set's loader raises: the length of the run is then not known
        return None
