"""Writers."""

from __future__ import annotations

import subprocess
import sys


def test_writers_are_light_and_know_no_model() -> None:
    code = (
        "import sys, align_audit.record.log\n"
        "from align_audit.writers import tensorboard, terminal\n"
        "from align_audit.writers.plots import canvas, gallery\n"
        "heavy = {'torch', 'tensorboard', 'matplotlib', 'pandas', 'rich', 'transformers', 'numpy', 'tqdm'}\n"
        "own = {'align_audit.models', 'align_audit.measures', 'align_audit.auditing'}\n"
        "print(sorted((heavy | own) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
