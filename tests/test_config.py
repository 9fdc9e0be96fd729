"""Every option that is a number with a fraction, at its limits: infinity is itself again when it was stored, NaN is refused."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from align_audit import AuditConfig, AuditRecord, AuditRun
from align_audit.errors import ConfigurationError
from align_audit.options.rules import LIMITS
from tests.helpers.callback_runs import quick, run
from tests.helpers.make_record import make_record

MAY_BE_INFINITE = {f"alerts.{name}" for name, limit in LIMITS.items() if not limit.bounded}
"""Limits that are switched off so."""


def float_options(part: type[BaseModel] = AuditConfig, inside: str = "") -> Iterator[str]:
    """The dotted names of all options that hold floats, alone or several."""
    for name, field in part.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from float_options(kind, f"{inside}{name}.")
        elif "float" in str(kind):
            yield inside + name


def values(option: str, number: float) -> dict[str, Any]:
    """The nested options in which this one is ``number``; where it is several, the last of them is."""
    default: Any = AuditConfig()
    for name in option.split("."):
        default = getattr(default, name)
    value: Any = [*default[:-1], number] if isinstance(default, tuple) else number
    for name in reversed(option.split(".")):
        value = {name: value}
    return value


OPTIONS = list(float_options())


def test_the_walk_sees_all_kinds() -> None:
    assert {"spinal.weights", "spinal.window", "patching.attribution_points", "spinal.terminal_fraction"} < set(OPTIONS)
    assert set(OPTIONS) > MAY_BE_INFINITE


@pytest.mark.parametrize("option", OPTIONS)
def test_an_infinite_option_is_the_same_when_it_was_stored_or_is_refused(option: str, tmp_path: Path) -> None:
    wanted = values(option, math.inf)
    if option not in MAY_BE_INFINITE:
        with pytest.raises(ConfigurationError, match=option.partition(".")[2] if option.count(".") else option):
            AuditConfig.from_dict(wanted)
        return
    config = AuditConfig.from_dict(wanted)
    assert AuditConfig.from_dict(config.to_dict()) == config
    config.to_yaml(tmp_path / "a.yaml")
    assert AuditConfig.from_yaml(tmp_path / "a.yaml") == config
    part, name = option.split(".")
    (tmp_path / "b.yaml").write_text(f"{part}:\n  {name}: .inf\n")
    assert AuditConfig.from_yaml(tmp_path / "b.yaml") == config
    json.dumps(config.to_dict(), allow_nan=False)
    record = make_record(0, layers=2)
    record = record.model_copy(update={"provenance": record.provenance.model_copy(update={"config": config.to_dict()})})
    assert AuditRecord.from_json(record.to_json()).provenance.config == config.to_dict()


@pytest.mark.parametrize("number", [math.nan, -math.inf])
@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_no_number_is_refused(option: str, number: float) -> None:
    with pytest.raises(ConfigurationError, match=r"invalid audit configuration:\n  (\w+\.\w+|budget)"):
        AuditConfig.from_dict(values(option, number))


def test_a_run_with_every_limit_off_goes_on_with_its_own_log(tmp_path: Path) -> None:
    off = {name.partition(".")[2]: math.inf for name in MAY_BE_INFINITE}
    config = quick(
        alerts=off, tensorboard="auto", tensorboard_images=True, schedule={"on_save": False, "on_last_step": False}
    )
    run(tmp_path / "run", config, max_steps=1)
    (began,) = AuditRun.load(tmp_path / "run").records
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*earlier run")
        run(tmp_path / "run", config, max_steps=1)
    (again,) = AuditRun.load(tmp_path / "run").records
    assert again.to_json() == began.to_json()
    assert not list((tmp_path / "run" / "align_audit").glob("previous-*"))


def test_what_is_shown_makes_no_other_audit() -> None:
    stored = AuditConfig().to_dict()
    assert AuditConfig(verbose=True, tensorboard_scalars="all", progress=False, tensorboard="off").measures_as(stored)
    older = {name: value for name, value in stored.items() if name not in ("verbose", "tensorboard_scalars")}
    assert AuditConfig().measures_as(older)
    assert not AuditConfig(max_pairs=3).measures_as(stored)
    assert AuditConfig.from_dict({"examples": {"pairs": 0}}).measures_as(stored), "what is kept as text is no number"
