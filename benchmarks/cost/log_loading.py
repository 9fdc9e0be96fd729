"""Seconds and memory to open the log of a long run, and to read what most readers want of it.

    python benchmarks/cost/log_loading.py                              # 5,000 records of 28 layers
    python benchmarks/cost/log_loading.py --records 500 --layers 12    # a quick look

One audit of a randomly initialized Llama gives a record; it is written so many times, at steps of its own. Each row of the
table is a process of its own: seconds of processor time, and resident memory at the end above what it was before, in MiB. It
measures the ``align_audit`` of the current directory, so that one copy of this file measures any checkout. ``--json FILE``
writes the table too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import models, token_rows

TASKS = ("load", "alerts", "last record", "open for writing", "every record", "table")


def write_log(folder: Path, records: int, layers: int) -> int:
    """A log of so many records of one real audit; returns its bytes."""
    from align_audit import AuditConfig, ProbeSet, audit

    policy, reference = models(64, layers)
    config = AuditConfig.from_dict({"max_pairs": 8, "progress": False, "low_rank": {"ranks": [1, 2, 4, 8, 16]}})
    probes = ProbeSet.from_dataset(token_rows(8, 32), None, max_pairs=8)
    values = json.loads(audit(policy, reference, probes, config).to_json())
    values["alerts"] = [
        {
            "rule": "kl_high",
            "level": "warning",
            "step": 0,
            "value": 1.5,
            "threshold": 1.0,
            "message": "m",
            "suggestion": "s",
        }
    ]
    (folder / "align_audit").mkdir()
    with (folder / "align_audit" / "records.jsonl").open("w", encoding="utf-8") as file:
        for step in range(records):
            values["step"] = values["alerts"][0]["step"] = step
            values["provenance"]["policy_hash"] = f"{step:016x}"
            file.write(json.dumps(values, separators=(",", ":")) + "\n")
    return (folder / "align_audit" / "records.jsonl").stat().st_size


def measure(task: str, folder: Path) -> dict[str, float]:
    """One task, in this process."""
    import pandas
    import psutil

    from align_audit import AuditRun
    from align_audit.record.log import RunLog

    assert pandas is not None  # imported before the clock starts
    process = psutil.Process()
    start, began = process.memory_info().rss, time.process_time()
    kept: Any = RunLog(folder) if task == "open for writing" else AuditRun.load(folder)
    if task == "alerts":
        assert len(kept.alerts) == len(kept.records)
    elif task == "last record":
        assert kept.records[-1].step == len(kept.records) - 1
    elif task == "every record":
        assert sum(record.margins.kl.mean >= 0 for record in kept.records) == len(kept.records)
    elif task == "table":
        assert len(kept.to_pandas()) == len(kept.records)
    return {"seconds": time.process_time() - began, "mib": (process.memory_info().rss - start) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--only", choices=TASKS, nargs="+", default=list(TASKS), help="these rows of the table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("TASK", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        size = write_log(Path(place), arguments.records, arguments.layers)
        print(f"{arguments.records} records of {arguments.layers} layers, {size / 2**20:.0f} MiB")
        for task in arguments.only:
            command = [sys.executable, __file__, "--measure", task, place]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
            )
            seen = json.loads(done.stdout.splitlines()[-1])
            rows.append({"task": task, **seen})
            print(f"{task:17} {seen['seconds']:6.1f} s {seen['mib']:7.0f} MiB", flush=True)
    if arguments.json:
        log = {"records": arguments.records, "layers": arguments.layers, "bytes": size}
        arguments.json.write_text(json.dumps({**log, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
