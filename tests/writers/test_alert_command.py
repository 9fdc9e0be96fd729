"""A user's command for alerts: told through its environment, never through a shell, and in nobody's way."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from align_audit.errors import ConfigurationError
from align_audit.record.alert import Alert
from align_audit.writers.alert_command import AlertCommand

WILD = "a $(touch pwned) `touch pwned`; touch pwned \x1b[2J\x00 \ud800 'x\""


def alert(message: str = "KL is 9.4") -> Alert:
    return Alert(rule="kl_out_of_bounds", level="error", step=20, value=9.4, message=message, suggestion="stop")


def python(tmp_path: Path, code: str) -> str:
    script = tmp_path / "a script.py"
    script.write_text(code)
    return f"{sys.executable} '{script}'"


def test_what_it_is_about_stands_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Settings of ours that whoever runs the tests has are not what an alert tells.
    for name in [name for name in os.environ if name.startswith("ALIGN_AUDIT_")]:
        monkeypatch.delenv(name)
    code = "import json, os, sys; json.dump([dict(os.environ), sys.argv[1:]], open('told.json', 'w')); print('noise')"
    said: list[str] = []
    AlertCommand(python(tmp_path, code) + " 'two words' $HOME", said.append).run("runs/dpo", alert(WILD))
    environment, arguments = json.loads((tmp_path / "told.json").read_text())
    told = {name: value for name, value in environment.items() if name.startswith("ALIGN_AUDIT_")}
    message = told.pop("ALIGN_AUDIT_MESSAGE")
    assert told == {
        "ALIGN_AUDIT_RUN": "runs/dpo", "ALIGN_AUDIT_RULE": "kl_out_of_bounds", "ALIGN_AUDIT_LEVEL": "error",
        "ALIGN_AUDIT_STEP": "20",
    }  # fmt: skip
    assert message.startswith("a $(touch pwned) `touch pwned`; touch pwned \\x1b[2J")
    assert arguments == ["two words", "$HOME"]
    assert not (tmp_path / "pwned").exists()
    assert said == []


def test_what_fails_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    command = AlertCommand(
        python(tmp_path, "import sys; print('no \\x1b[31mroute', file=sys.stderr); sys.exit(4)"), said.append
    )
    for _ in range(3):
        command.run("run", alert())
    assert said == [f"--exec: {sys.executable} ended with status 4: no \\x1b[31mroute (said once)"]
    assert capfd.readouterr() == ("", "")


def test_what_is_not_there_or_does_not_end(tmp_path: Path) -> None:
    said: list[str] = []
    AlertCommand(str(tmp_path / "nowhere"), said.append).run("run", alert())
    AlertCommand(python(tmp_path, "import time; time.sleep(60)"), said.append, seconds=0.3).run("run", alert())
    assert "cannot be run" in said[0]
    assert "is still running after 0.3 s and was ended" in said[1]


@pytest.mark.parametrize("words", ["", "   ", "a 'b"])
def test_no_command(words: str) -> None:
    with pytest.raises(ConfigurationError, match="--exec"):
        AlertCommand(words, print)
