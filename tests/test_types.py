"""What a type checker says of a user's code: options have types, and one that does not exist is an error."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy comes with the extra dev")

REPOSITORY = Path(__file__).resolve().parents[1]

SETTINGS = """\
[mypy]
strict = true
[mypy-torch.*,transformers.*,trl.*,datasets.*,peft.*,scipy.*,sklearn.*,matplotlib.*,pandas.*]
follow_imports = skip
[mypy-numpy.*,rich.*,yaml.*,tensorboard.*,accelerate.*,safetensors.*,tokenizers.*,huggingface_hub.*]
follow_imports = skip
"""
"""Of a user without pydantic's plugin; large libraries are not read, since nothing here depends on them."""

GOOD = """\
from align_audit import AuditConfig
from align_audit.config import AlertConfig, ExamplesConfig, PatchingConfig, ScheduleConfig, SiteConfig, WebhookConfig

options = AuditConfig(
    max_pairs=32,
    patching=PatchingConfig(exact_pairs="auto"),
    sites=(SiteConfig(site="head", heads=(0, 1)),),
    alerts=AlertConfig(kl_warning=0.5, action="save", rules={"entropy": "off"}, webhook="https://a.b"),
    schedule=ScheduleConfig(first_health=10),
    examples=ExamplesConfig(pairs=3),
)
limit: float = options.alerts.kl_warning
hook: WebhookConfig | None = options.alerts.webhook
on_save: bool = options.schedule.on_save
pairs: int = options.max_pairs
"""

WRONG = {
    'AuditConfig(max_pairs="many")': "arg-type",
    "AuditConfig(max_pair=32)": "call-arg",
    "AuditConfig(32)": "call-arg",
    'PatchingConfig(positions="nowhere")': "arg-type",
    'SiteConfig(site="neuron")': "arg-type",
    "SiteConfig()": "call-arg",
    "options.max_pair": "attr-defined",
}
"""A line after the good ones, and the code of mypy's error there."""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, set[str]]:
    """Codes of mypy's errors by line of the program of all lines above."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    program = folder / "program.py"
    program.write_text(GOOD + "\n".join(WRONG) + "\n", encoding="utf-8")
    # What mypy reads of libraries is the same the next time; it looks whether it still is.
    cache = REPOSITORY / ".mypy_cache" / "user"
    arguments = ["--config-file", folder / "mypy.ini", "--cache-dir", cache, "--python-executable", sys.executable]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # In a process of its own: in this one it would raise the limit of recursion, and undo what keeps garbage collection short.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, arguments), str(program)],
        env={**environment, "MYPYPATH": str(REPOSITORY)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.stderr
    out = done.stdout
    seen: dict[int, set[str]] = {}
    for line, code in re.findall(r"^.*program\.py:(\d+): error: .*\[([\w-]+)\]$", out, re.MULTILINE):
        seen.setdefault(int(line), set()).add(code)
    assert seen, out
    return seen


def test_good_options_have_no_errors(errors: dict[int, set[str]]) -> None:
    assert min(errors) > GOOD.count("\n")


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_option_is_an_error(line: str, errors: dict[int, set[str]]) -> None:
    assert errors.get(GOOD.count("\n") + list(WRONG).index(line) + 1) == {WRONG[line]}
