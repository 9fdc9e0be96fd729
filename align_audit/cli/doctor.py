"""``align-audit doctor``: before training, would the audit work here, and what would it cost?"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_audit.cli.options import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    MaxLengthOption,
    ReferenceOption,
    TrustOption,
    device_option,
    dtype_option,
    read_arguments,
    settings,
)
from align_audit.errors import ConfigurationError, plain, quoted

if TYPE_CHECKING:
    from align_audit.monitoring.doctor import Check, Plan

_SIGNS = {"green": ("ok", "green"), "yellow": ("note", "yellow"), "red": ("stop", "red")}


def doctor(
    probes: Annotated[
        list[str],
        typer.Option(help="Held-out preference pairs, as `align-audit run` takes them; several as NAME=PATH."),
    ],
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="The model that training starts from; or, after --, the arguments of the training script as `trl dpo` takes "
            "them.",
            metavar="MODEL | -- SCRIPT ARGUMENTS",
        ),
    ] = None,
    reference: ReferenceOption = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the run.", min=1)] = None,
    pairs_per_step: Annotated[int, typer.Option(help="Pairs of an optimizer step, on one process.", min=1)] = 8,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0: none.", min=0)] = 500,
    output_dir: Annotated[Path | None, typer.Option(help="Where the run will write.")] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="A tracker, as report_to of the trainer; several times.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Adapters will be trained.")] = False,
    config: ConfigOption = None,
    max_pairs: Annotated[int | None, typer.Option(help="Probe pairs to draw.")] = None,
    max_length: MaxLengthOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """Before training: does the audit work with this model, these pairs and this machine, and what will it cost?

    Everything is tried for real on a few pairs. The exit status is 0 when a run can begin, 1 when something has to be changed
    first.

    Example: align-audit doctor base-model --probes held-out.jsonl --steps 1000

    Example: align-audit doctor --probes held-out.jsonl -- --model_name_or_path base-model --max_steps 1000 --use_peft
    """
    given = list(model or [])
    if not given:
        raise ConfigurationError(
            "found no model; expected a folder or hub name, or -- and the arguments of the training script, which name one"
        )
    script = given[0].startswith("-")
    if not script and len(given) > 1:
        raise ConfigurationError(f"expected one model; found {len(given)}, such as {quoted(given[1])}")
    sets = read_arguments(probes)
    options = settings(config, max_pairs, max_length)
    from align_audit.monitoring.doctor import (
        Plan,
        examine,
        verdict,
    )  # loads torch: after what can be refused without it

    common: dict[str, Any] = {
        "probes": sets,
        "device": device_option(device),
        "dtype": dtype_option(dtype),
        "trust_remote_code": trust_remote_code,
    }
    if script:
        plan = plan_of_script(given, common)
    else:
        plan = Plan(
            model=given[0],
            reference=reference,
            max_steps=steps,
            pairs_per_step=pairs_per_step,
            save_steps=save_steps or None,
            output_dir=output_dir,
            report_to=tuple(report_to or ()),
            lora=lora,
            **common,
        )
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    checks: list[Check] = []
    for check in examine(plan, options, tell=_nothing if as_json else _progress):
        checks.append(check)
        typer.echo(json.dumps(asdict(check), ensure_ascii=False) if as_json else _line(check))
    first = verdict(checks)
    if not as_json:
        typer.echo(typer.style("ready", fg="green", bold=True) if first is None else _to_change(first))
    if first is not None:
        raise typer.Exit(1)


def plan_of_script(arguments: Sequence[str], common: dict[str, Any]) -> Plan:
    """What the arguments of a training script say, read by TRL's own parser as ``trl dpo`` reads them.

    Raises:
        ConfigurationError: TRL refuses them, or they name no model.
    """
    from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser

    from align_audit.monitoring.doctor import Plan

    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig), prog="align-audit doctor … --")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # libraries, of each other's names
            script, training, model, *_ = parser.parse_args_and_config(list(arguments), fail_with_unknown_args=False)
    except SystemExit:
        raise ConfigurationError(
            "the arguments after -- are not those of a DPO script; expected what `trl dpo` takes (its reason stands above)"
        ) from None
    except (ValueError, OSError, TypeError) as error:
        raise ConfigurationError(f"the arguments after -- cannot be read: {error}") from None
    if not model.model_name_or_path:
        raise ConfigurationError("the arguments after -- name no model; expected --model_name_or_path")
    pairs = training.per_device_train_batch_size * training.gradient_accumulation_steps
    # Where TRL keeps it has changed.
    trusts = any(bool(getattr(part, "trust_remote_code", False)) for part in (training, model))
    saves = training.save_strategy == "steps" and training.save_steps >= 1
    evaluates = training.eval_strategy == "steps" and bool(training.eval_steps) and training.eval_steps >= 1
    return Plan(
        model=model.model_name_or_path,
        max_steps=_steps_of(training, script, pairs),
        pairs_per_step=pairs,
        save_steps=int(training.save_steps) if saves else None,
        eval_steps=int(training.eval_steps) if evaluates else None,
        output_dir=Path(training.output_dir) if training.output_dir else None,
        report_to=tuple(training.report_to or ()),
        lora=bool(model.use_peft),
        gradient_checkpointing=bool(training.gradient_checkpointing),
        beta=training.beta,
        **{**common, "trust_remote_code": common["trust_remote_code"] or trusts},
    )


def _steps_of(training: Any, script: Any, pairs: int) -> int | None:
    """Optimizer steps, on one process; None: the data cannot be counted from here."""
    if training.max_steps > 0:
        return int(training.max_steps)
    from datasets import load_dataset

    try:
        data = load_dataset(script.dataset_name, name=script.dataset_config, split=script.dataset_train_split)
        return max(1, int(training.num_train_epochs * len(data) / pairs))
    except Exception:  # whatever a data set's loader raises: the length of the run is then not known
        return None


def _line(check: Check) -> str:
    word, color = _SIGNS[check.level]
    fix = f"\n        do: {plain(check.fix)}" if check.fix else ""
    return f"{typer.style(f'{word:>5}', fg=color, bold=True)}  {plain(check.name)}: {plain(check.found)}{fix}"


def _to_change(check: Check) -> str:
    return typer.style("not ready", fg="red", bold=True) + f": {plain(check.name)}; {plain(check.fix)}"


def _progress(words: str) -> None:
    typer.echo(typer.style(f"      … {words}", dim=True), err=True)


def _nothing(words: str) -> None:
    return None
