"""``align-audit doctor``: before training, would the audit work here, and what would it cost?"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_audit.cli.options import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    MaxLengthOption,
    PickleOption,
    ReferenceOption,
    TrustOption,
    check_files,
    device_option,
    dtype_option,
    read_arguments,
    settings,
)
from align_audit.cli.training_script import plan_of_script
from align_audit.errors import ConfigurationError, plain, quoted
from align_audit.writers.words import SCRIPT

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.monitoring.doctor import Check, Plan

_SIGNS = {"green": ("ok", "green"), "yellow": ("note", "yellow"), "red": ("stop", "red")}

ProbesOption = Annotated[
    list[str], typer.Option(help="Held-out preference pairs, as `align-audit run` takes them; several as NAME=PATH.")
]
ModelArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="The model that training starts from; or, after --, the arguments of the training script as `trl dpo` takes "
        "them. An option that is given before -- holds in place of the script's.",
        metavar="MODEL | -- SCRIPT ARGUMENTS",
    ),
]
StepsOption = Annotated[int | None, typer.Option(help="Optimizer steps of the run.", min=1)]
PairsOption = Annotated[
    int | None, typer.Option(help="Pairs of an optimizer step, on one process; left out: 8.", min=1)
]
ProcessesOption = Annotated[int | None, typer.Option(help="Processes that train together; left out: 1.", min=1)]
SaveOption = Annotated[int | None, typer.Option(help="Steps between checkpoints; 0: none; left out: 500.", min=0)]
OutputOption = Annotated[Path | None, typer.Option(help="Where the run will write.")]
ReportOption = Annotated[list[str] | None, typer.Option(help="A tracker, as report_to of the trainer; several times.")]
LoraOption = Annotated[bool, typer.Option("--lora", help="Adapters will be trained.")]
MaxPairsOption = Annotated[int | None, typer.Option(help="Probe pairs to draw.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")]


def doctor(
    probes: ProbesOption,
    model: ModelArgument = None,
    reference: ReferenceOption = None,
    steps: StepsOption = None,
    pairs_per_step: PairsOption = None,
    processes: ProcessesOption = None,
    save_steps: SaveOption = None,
    output_dir: OutputOption = None,
    report_to: ReportOption = None,
    lora: LoraOption = False,
    config: ConfigOption = None,
    max_pairs: MaxPairsOption = None,
    max_length: MaxLengthOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
    as_json: JsonOption = False,
) -> None:
    """Before training: does the audit work with this model, these pairs and this machine, and what will it cost?

    Everything is tried for real on a few pairs. The exit status is 0 when a run can begin, 1 when something has to be changed
    first, 2 when the arguments cannot be read.

    Example: align-audit doctor base-model --probes held-out.jsonl --steps 1000

    Example: align-audit doctor --probes held-out.jsonl -- --model_name_or_path base-model --max_steps 1000 --use_peft
    """
    given = {
        "reference": reference, "max_steps": steps, "pairs_per_step": pairs_per_step, "processes": processes,
        "save_steps": save_steps, "output_dir": output_dir, "report_to": tuple(report_to) if report_to else None,
        "lora": lora or None, "dtype": dtype_option(dtype), "trust_remote_code": trust_remote_code or None,
        "allow_pickle": allow_pickle or None,
    }  # fmt: skip
    named = _named_model(list(model or []))
    sets = read_arguments(probes)
    check_files(sets, config, reference)
    options = settings(config, max_pairs, max_length)
    _examine(_plan(named, {"probes": sets, **given}, device), options, as_json)


def _named_model(words: list[str]) -> list[str]:
    """A model, or the arguments of a script.

    Raises:
        ConfigurationError: neither is there, or more than one model.
    """
    if not words:
        raise ConfigurationError(
            "found no model; expected a folder or hub name, or -- and the arguments of the training script, which name one"
        )
    if not words[0].startswith("-") and len(words) > 1:
        raise ConfigurationError(f"expected one model; found {len(words)}, such as {quoted(words[1])}")
    return words


def _plan(words: list[str], given: dict[str, Any], device: str) -> Plan:
    """The plan that a model, or a script's arguments, and the options come to."""
    if words[0].startswith("-"):
        return plan_of_script(words, {**given, "device": None if device == "auto" else device_option(device)})
    from align_audit.monitoring.doctor import Plan  # loads torch: after what can be refused without it

    values = {name: value for name, value in given.items() if value is not None}
    return Plan(model=words[0], device=device_option(device), **values)


def _examine(plan: Plan, options: AuditConfig, as_json: bool) -> None:
    from align_audit.monitoring.doctor import examine, verdict

    checks: list[Check] = []
    for check in examine(plan, options, tell=_nothing if as_json else _progress):
        checks.append(check)
        # Control characters in names that came from outside leave as escapes.
        typer.echo(json.dumps(asdict(check)) if as_json else _line(check))
    first = verdict(checks)
    if not as_json:
        if first is None:
            typer.echo(f"In the training script:\n{SCRIPT}")
        typer.echo(_styled("ready", fg="green", bold=True) if first is None else _to_change(first))
    if first is not None:
        raise typer.Exit(1)


def _styled(words: str, **style: Any) -> str:
    """With colours, unless nobody wants any (https://no-color.org); where none can be shown they are taken out later."""
    return words if os.environ.get("NO_COLOR") else typer.style(words, **style)


def _line(check: Check) -> str:
    word, color = _SIGNS[check.level]
    fix = f"\n        do: {plain(check.fix)}" if check.fix else ""
    return f"{_styled(f'{word:>5}', fg=color, bold=True)}  {plain(check.name)}: {plain(check.observation)}{fix}"


def _to_change(check: Check) -> str:
    return _styled("not ready", fg="red", bold=True) + f": {plain(check.name)}; {plain(check.fix)}"


def _progress(words: str) -> None:
    typer.echo(_styled(f"      … {words}", dim=True), err=True)


def _nothing(words: str) -> None:
    return None
