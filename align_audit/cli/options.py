"""What the commands share of their options: checkpoints, probe sets, layers, devices and audit settings, read from text."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from align_audit.errors import SHOWN, ConfigurationError, first_line, listed, plain, quoted
from align_audit.files import try_to_write
from align_audit.models.folders import can_be_hub_name, holds_model, is_folder, lack_of_model, models_in, near_path
from align_audit.probes.names import check_names
from align_audit.record.checkpoint_names import checkpoint_step, step_of

if TYPE_CHECKING:
    from align_audit.cli.gates import Demands
    from align_audit.config import AuditConfig
    from align_audit.monitoring.checkpoints import Turn

ReferenceOption = Annotated[
    str | None,
    typer.Option(help="The model training started from: a folder or a hub name. Left out: an adapter's base."),
]
ConfigOption = Annotated[Path | None, typer.Option(help="A YAML file of audit options.")]
MaxLengthOption = Annotated[int | None, typer.Option(help="Tokens per sequence, as in training (DPOConfig).")]
StepOption = Annotated[
    int | None, typer.Option(min=0, help="The step to record; by default N of checkpoint-N, else 0.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or float64; left out: what the policy is saved in.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that is saved with a model (auto_map).")
]

FailOnOption = Annotated[
    str | None,
    typer.Option(
        help="error or warning: exit with status 2 where a checkpoint has an open alert so serious, or is BLIND."
    ),
]
GateOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A number that every checkpoint has to keep, such as 'kl<=0.5' or 'margins.shift.low>0'; several "
        "times. Exit status 2 where one is broken; a number that is not known breaks it."
    ),
]
RunReportOption = Annotated[
    str | None,
    typer.Option(
        "--report",
        metavar="[FILE]",
        help="Where the run as a page goes, one HTML file, besides report.html beside the log; without FILE, or without the "
        "option, it is written there alone.",
    ),
]
PickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read weights that are pickles (pytorch_model.bin, adapter_model.bin), which can run code when they are opened.",
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume/--fresh",
        help="Go on with the log in --output: what was audited already, with the same weights and pairs, is not audited again. "
        "--fresh sets the log aside and audits all.",
    ),
]


class ReportMayBeBare(TyperCommand):
    """A command whose ``--report`` may stand without a value, which is then empty."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As of any command, with the value that is left out."""
        following = [*args, "--"][1:]
        filled = [
            "--report=" if word == "--report" and after.startswith("-") else word
            for word, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, filled)


def read_arguments(arguments: Sequence[str]) -> dict[str, Path] | Path:
    """What ``--probes`` was given: one path without a name, or paths by name (``name=path``).

    A text that is the path of something that exists is a path, whatever characters it holds; and so is one with a
    separator before its ``=``.

    Raises:
        ConfigurationError: several sets of which one has no name, or bad names.

    Example:
        >>> read_arguments(["harmless=a.jsonl", "helpful=b.jsonl"])["helpful"].name
        'b.jsonl'
    """
    sources: list[tuple[str | None, Path]] = []
    for text in arguments:
        name, equals, path = text.partition("=")
        plain = not equals or Path(text).exists() or "/" in name or "\\" in name
        sources.append((None, Path(text)) if plain else (name, Path(path)))
    if len(sources) == 1 and sources[0][0] is None:
        return sources[0][1]
    nameless = [str(path) for name, path in sources if name is None]
    if nameless:
        raise ConfigurationError(
            f"found {len(sources)} probe sets, of which {listed(nameless)} has no name; expected name=path for each, such "
            "as --probes harmless=a.jsonl --probes helpful=b.jsonl"
        )
    check_names(name for name, _ in sources)
    return {name: path for name, path in sources if name is not None}


def layers_option(text: str | None) -> str | tuple[int, ...] | None:
    if text is None or text in ("auto", "all"):
        return text
    if re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text) is None:
        raise ConfigurationError(f"--layer: expected N, N,M, all or auto; found {quoted(text)}")
    return tuple(int(number) for number in text.split(","))


def bases_option(name: str | None) -> tuple[str, ...] | None:
    if name is None:
        return None
    if name == "both":
        return ("activation", "shift")
    if name not in ("activation", "shift"):
        raise ConfigurationError(f"--basis: expected shift, activation or both; found {quoted(name)}")
    return (name,)


_EXPECTED = "expected what the trainer or save_pretrained writes"


def find_checkpoints(path: Path) -> list[Path]:
    """The saved models at ``path``: itself, or the ``checkpoint-N`` folders in it, by N.

    Raises:
        ConfigurationError: neither is there, or two of the folders say the same step.
    """
    if not is_folder(path):
        raise ConfigurationError(
            f"no checkpoint at {plain(path)}{near_path(path)}: expected a folder with a saved model, or of checkpoint-N folders"
        )
    numbered = _numbered(path)
    if not numbered:
        if holds_model(path):
            return [path]
        inside = models_in(path)
        todo = f"the models in it are called {listed(inside)}: name one" if inside else _EXPECTED
        raise ConfigurationError(
            f"{plain(path)} holds no config.json, no adapter_config.json and no checkpoint-N folder; {todo}"
        )
    for first, second in itertools.pairwise(numbered):
        if step_of(first) == step_of(second):
            raise ConfigurationError(
                f"{plain(path)} holds {plain(first.name)} and {plain(second.name)}, both of step {step_of(first)}; expected "
                "one checkpoint of a step: rename one, or name the one that is meant"
            )
    return numbered


def left_out(path: Path, checkpoints: Sequence[Path]) -> list[str]:
    """Names of what lies beside the checkpoints of a folder, is called much as they are, and has no N: ``checkpoint-best``.

    One that is a link to a checkpoint of them is none.
    """
    meant = set(map(os.path.realpath, checkpoints))
    return [
        name
        for name in models_in(path)
        if name.startswith("checkpoint")
        and checkpoint_step(name) is None
        and os.path.realpath(path / name) not in meant
    ]


def note_reference(reference: str | None, run: Path) -> None:
    """Say it where a reference is the folder of a run itself: a trainer saves its last model there."""
    if reference is not None and is_folder(Path(reference)) and Path(reference).resolve() == run.resolve():
        complain(
            f"--reference {plain(reference)} is the folder that the checkpoints lie in; where training saved its last model "
            "there, they are compared with that one. Expected the model that training started from"
        )


def check_files(sets: Mapping[str, Path] | Path, config: Path | None, reference: str | None = None) -> None:
    """Refuse files, and a reference's folder, that are not there before anything heavy loads.

    Raises:
        ConfigurationError: there is none; with the nearest name in its folder.
    """
    paths = {
        "--probes": [sets] if isinstance(sets, Path) else list(sets.values()),
        "--config": [config] if config else [],
    }
    for option, given in paths.items():
        for path in given:
            near = near_path(path)
            if near:
                raise ConfigurationError(f"{option}: {plain(path)}: no such file{near}")
    # What may be a hub name is for the loader to look for.
    if reference is not None and not can_be_hub_name(reference):
        folder = Path(reference)
        if not folder.exists():
            raise ConfigurationError(
                f"--reference: {plain(folder)}: no such folder{near_path(folder)}; expected a saved model, or a hub name"
            )
    if reference is not None and is_folder(Path(reference)) and (lack := lack_of_model(Path(reference))) is not None:
        raise ConfigurationError(f"--reference: {lack}. Expected the model that training started from")


def check_page(option: str, page: Path) -> None:
    """Refuse a page that could not be written before anything is read or audited for it.

    Raises:
        ConfigurationError: a folder is named, or a file of a folder that is not there or takes no files.
    """
    if page.is_dir():
        raise ConfigurationError(
            f"{option} {plain(page)} is a folder; expected a file, such as {plain(page / 'report.html')}"
        )
    if not page.parent.is_dir():
        raise ConfigurationError(
            f"{option}: cannot write the report to {plain(page)}, since there is no folder {plain(page.parent)}; make it, or "
            "choose a file in a folder that exists"
        )
    try:
        try_to_write(page.parent)
    except OSError as error:
        raise ConfigurationError(
            f"{option}: cannot write the report to {plain(page)}: {first_line(error)}; choose a file in a folder that can be "
            "written to"
        ) from None


def complain(words: str) -> None:
    """Say on stderr what is not as it should be. Paths and names in it came from outside: no terminal obeys them."""
    typer.echo("align-audit: " + "\n".join(map(plain, words.split("\n"))), err=True)


def refuse(words: str) -> None:
    """Say on stderr why the command ends here. What :func:`complain` says ends nothing."""
    complain(f"error: {words}")


def _numbered(path: Path) -> list[Path]:
    # By what they are called here: one that is a link to a store has another name there.
    numbered = [folder for folder in path.glob("checkpoint-*") if checkpoint_step(folder.name) is not None]
    return sorted(numbered, key=lambda folder: (step_of(folder), folder.name))


def settings(
    config: Path | None,
    max_pairs: int | None,
    max_length: int | None,
    low_rank: dict[str, Any] | None = None,
    *,
    verbose: bool = False,
) -> AuditConfig:
    from align_audit.config import AuditConfig

    # The parts themselves and no stored form of them, which has no secrets.
    values: dict[str, Any] = dict(AuditConfig.from_yaml(config)) if config is not None else {}
    for name, value in (("max_pairs", max_pairs), ("max_length", max_length), ("verbose", verbose or None)):
        if value is not None:
            values[name] = value
    if low_rank:
        values["low_rank"] = {**dict(values.get("low_rank", {})), **low_rank}
    return AuditConfig.from_dict(values)


def demands_option(gates: Sequence[str] | None, fail_on: str | None) -> Demands | None:
    """What checkpoints have to keep; None: nothing."""
    if not gates and fail_on is None:
        return None
    from align_audit.cli.gates import Demands

    return Demands.parse(gates or (), fail_on)


def announce(turn: Turn) -> None:
    """Say on stderr which checkpoint comes next, and about how long it and the rest will take."""
    from align_audit.writers.words import duration  # loads the records

    left = "" if turn.seconds_left is None else f", about {duration(turn.seconds_left)} left"
    typer.echo(f"{plain(turn.folder.name)}, {turn.number} of {turn.count}{left}", err=True)


def dtype_option(name: str | None) -> str | None:
    if name not in (None, "float32", "bfloat16", "float16", "float64"):
        raise ConfigurationError(f"--dtype: expected float32, bfloat16, float16 or float64; found {quoted(name)}")
    return name


def device_option(name: str) -> str:
    """The device that models are loaded on. transformers' bars of loading them are off from here on, but not those of
    downloads: a command has lines of its own.

    Raises:
        ConfigurationError: there is no such device.
    """
    import torch
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # of downloads too
    if downloads:
        enable_progress_bars()
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device {plain(name, SHOWN)} cannot be used: {first_line(error)}") from None
    return name
