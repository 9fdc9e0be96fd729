"""The command, called in this process, and a fine-tuning with what a command needs to audit it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from align_audit import AlignmentAuditCallback
from align_audit.cli import app as cli
from align_audit.writers.plots.gallery import save_all
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import ROWS, train


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``align-audit`` with these arguments, as the installed command runs it; drawing is slow, so only on demand."""

    def call(*arguments: Any, pictures: bool = False) -> SimpleNamespace:
        monkeypatch.setattr("align_audit.writers.plots.gallery.save_all", save_all if pictures else lambda *_: {})
        monkeypatch.setenv("COLUMNS", "400")  # a terminal that no path is too long for
        monkeypatch.setattr(sys, "argv", ["align-audit", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(bool(exit.code))
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Probe pairs and audit options as files, and a full fine-tuning with checkpoints 1 and 2, audited while it ran."""
    folder = tmp_path_factory.mktemp("cli")
    probes, options = folder / "probes.jsonl", folder / "audit.yaml"
    probes.write_text("".join(json.dumps(row) + "\n" for row in ROWS[16:]), encoding="utf-8")
    config = quick()
    config.to_yaml(options)
    full = folder / "full" / "out"
    callback = AlignmentAuditCallback(probes=str(probes), config=config)
    train(full, "ref_model made", callback, max_steps=2, save_steps=1)
    return SimpleNamespace(folder=folder, probes=probes, options=options, full=full, base=folder / "full" / "base")
