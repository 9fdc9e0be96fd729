from __future__ import annotations

import math
import subprocess
import sys

import pytest

from align_audit.record.audit_record import Estimate
from align_audit.record.numbers import span, why_unknown
from align_audit.record.run import one_per_step
from tests.helpers.make_record import make_record, make_run


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([], "none"),
        ([3], "3"),
        ([4, 3], "3, 4"),
        ([0, 1, 2, 5], "0–2, 5"),
        ([1, 1, 2, 3], "1–3"),
        (list(range(0, 40, 2)), "0, 2, 4, 6, 8, …, 38"),
    ],
)
def test_span(numbers: list[int], words: str) -> None:
    assert span(numbers) == words


def test_the_nearest_reason_is_given() -> None:
    reasons = {"spinal": "off", "spinal.policy.contraction": "no rows", "spinal.policy.contraction.3": "too few"}
    record = make_record(layers=2, reasons=reasons)
    assert why_unknown(record, "spinal.policy.contraction.3") == "too few"
    assert why_unknown(record, "spinal.policy.contraction.30") == "no rows"
    assert why_unknown(record, "spinal.score") == "off"
    assert why_unknown(record, "margins.kl", Estimate.unknown("own")) == "own"
    assert "no reason" in why_unknown(record, "margins.kl", math.nan)


def test_the_latest_audit_of_a_step_counts() -> None:
    first, second = make_run(audits=2, layers=2)
    again = first.model_copy(
        update={"provenance": first.provenance.model_copy(update={"created": "2031-01-01T00:00:00+00:00"})}
    )
    assert one_per_step([again, second, first]) == [again, second]


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
