"""Benchmark commands on the smallest job that they take: each follows what it measures, and comes to its end.

Most take longer than a test may: ``pytest tests/benchmarks/test_small_runs.py -m slow``, some ten minutes on one core. Their
figures are of no use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--layers 2 --width 64"

AT_ONCE = [
    "evidence/transport_interval.py --pairs 8 --draws 5",
    f"cost/spinal_trace.py {SMALL} --pairs 2 --vocab 3000 --repeats 1 --one trace",
    f"cost/health.py {SMALL} --vocabulary 3000 --pairs 8 --repeats 1",
]
LONGER = [
    f"cost/streaming.py {SMALL} --pairs 2",
    "evidence/null_audits.py --audits 1 --pairs 8",
    "evidence/interval_coverage.py --models demo --steps 2 --pairs 16 --draws 3",
    "evidence/planted.py --plantings 1",
    "evidence/equal_width.py --steps 2 --pairs 16",
    "evidence/reliability.py",
    "evidence/ruined_runs.py --kind healthy --limit 1 --pairs 8",
    "evidence/rounding_noise.py",
    "evidence/kills.py --kills 1",
    "evidence/control_variate.py --repetitions 1",
    f"cost/spinal_trace.py {SMALL} --pairs 2 --vocab 3000 --repeats 1",
    f"cost/overhead.py {SMALL} --steps 4 --plain-steps 2 --probes 8",
    "cost/bfloat16.py --steps 2 --pairs 8",
    f"cost/equal_width_speed.py {SMALL} --steps 2 --settings 8:8 --peer-pairs 2 --contenders align_audit hooks",
    "cost/log_loading.py --records 5 --layers 2",
    f"cost/memory.py {SMALL} --pairs 8 --length 16",
    "cost/vocabulary.py --pairs 8",
    f"engine {SMALL} --vocab 3000 --pairs 2 --sweeps layers --contenders hooks align_audit --repeats 1",
    "distributed/speedup.py --pairs 8 --repeats 1",
    "distributed/uneven.py --runs 1",
]


@pytest.mark.parametrize("command", [*AT_ONCE, *(pytest.param(each, marks=pytest.mark.slow) for each in LONGER)])
def test_a_benchmark_comes_to_its_end(command: str, tmp_path: Path) -> None:
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
