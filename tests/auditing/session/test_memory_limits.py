"""Running out of memory halves the batch and breaks no audit; the operating system refuses the memory, nothing is faked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import json, logging, os, resource, sys
import numpy as np, scipy.linalg, torch
torch.set_num_threads(1)
from tests.helpers.tiny import perturbed, tiny_model
from align_audit import AuditConfig, ProbeSet
from tests.helpers.audits import QUICK_GENERATIONS, QUICK_LASSO, audited

sizes = dict(hidden_size=128, intermediate_size=256, max_position_embeddings=4096, num_hidden_layers=3)
reference = tiny_model("llama", dtype=torch.float32, **sizes)
policy = perturbed(reference)
plan = []
import align_audit.auditing.session.walk as sessions
class Seen(sessions.Session):
    def batch(self, group):
        plan.append(len(group))
        return super().batch(group)
import align_audit.auditing.audit as auditing
auditing.Session = Seen
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("align_audit").addHandler(handler)

def rows_of(pairs, length):
    generator = np.random.default_rng(0)
    tokens = lambda: generator.integers(3, 61, size=length).tolist()
    return [{"prompt_ids": tokens(), "chosen_ids": tokens(), "rejected_ids": tokens()} for _ in range(pairs)]

def run(rows, shared):
    probes = ProbeSet.from_dataset(rows, None, max_pairs=len(rows), max_length=None)
    config = AuditConfig.from_dict({
        "batch_tokens": 10**6, "share_prompts": shared, "working_memory_mb": 4096, "patching": {"noise_draws": 1},
        "low_rank": {"layers": (1,), "ranks": (1, 2)}, "statistics": {"bootstrap_resamples": 100},
        "localization": QUICK_LASSO, "generations": QUICK_GENERATIONS,
    })
    return audited(policy, reference, probes, config)

def outcome(spare, pairs, length, shared):
    rows = rows_of(pairs, length)
    status = open("/proc/self/status").read()
    size = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmSize"))) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + spare * 2**20, resource.RLIM_INFINITY))
    try:
        record, arrays = run(rows, shared)
        known = {name: bool(np.isfinite(values).all()) for name, values in arrays.items() if "identity" not in name}
        return {"plan": plan, "warnings": warnings, "known": known, "effect": arrays["per_pair.effect"].tolist(),
                "rows": record.spinal.rows, "available": record.spinal.rows_available}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "plan": plan}

run(rows_of(2, 8), True)  # what libraries allocate once
# Too short for NumPy's and SciPy's OpenBLAS to be called: each takes 32 MiB at its first product, and where it cannot
# it ends the process without a word to Python.
square = np.ones((256, 256))
square @ square
scipy.linalg.blas.dgemm(1.0, square, square)
plan.clear()
warnings.clear()

# Each in a process of its own, forked from this one, so that what all import is imported once.
for case in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        print(json.dumps(outcome(*case)), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(json.dumps({"error": "the process was ended"}), flush=True)
"""


@pytest.fixture(scope="module")
def audits() -> list[dict[str, Any]]:
    """Audits, each in a process that may take so many MiB more than it has when the audit begins.

    One that has all it wants; one that has too little for all pairs at once; one of long pairs that has too little for any.
    """
    cases = [(100_000, 24, 60, True), (80, 24, 60, True), (24, 2, 1500, False)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-len(cases) :]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(audits: list[dict[str, Any]]) -> None:
    free, tight, _ = audits
    assert free["plan"][0] == 24
    assert free["warnings"] == []
    assert "error" not in tight, tight
    assert tight["plan"][0] == 24
    assert 1 <= tight["plan"][-1] <= 12
    assert any("it goes on with half the batch" in words for words in tight["warnings"])
    assert all(tight["known"].values()), tight["known"]
    assert (tight["rows"], tight["available"]) == (free["rows"], free["available"])
    for one, other in zip(tight["effect"], free["effect"], strict=True):
        assert one == pytest.approx(other, abs=1e-3, rel=1e-4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_single_pair_that_does_not_fit_says_so(audits: list[dict[str, Any]]) -> None:
    found = audits[-1]
    assert found["error"].startswith("AuditMemoryError: out of memory with a single pair of 3000 and 3000 tokens"), (
        found
    )
    assert "a shorter max_length" in found["error"]
