"""Seconds from opening TensorBoard's tab "Align audit" to its first chart, and to all four health panels; and what the report
of one of the runs takes.

    python benchmarks/cost/tab.py                                   # 20 runs of 50 audits of 32 layers
    python benchmarks/cost/tab.py --runs 3 --audits 10 --layers 6   # a quick look
    python benchmarks/cost/tab.py --heads 32                        # audits of every attention head, ten times as long

The audits are made in memory, half of the runs of a policy that is being ruined. The report is that of the last run, made from
its log as ``align-audit report`` makes it. A ``tensorboard`` is started on them, and a headless Chromium opens the tab by its
address: once when nobody has asked for anything yet, and once more. A chart counts when its curve is drawn. Needs ``chromium``,
``chromium-driver`` and selenium.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from align_audit.record.log import RunLog
from align_audit.writers.web.report_writer import report_of
from tests.helpers.browser import Browser, open_browser
from tests.helpers.make_record import make_run, make_sites
from tests.helpers.tensorboard import Server, open_tab, tensorboard

DRAWN = (
    "return ['chosen', 'kl', 'tokens', 'accuracy'].filter(name => [...document.querySelectorAll("
    "`[data-chart='${name}'] .scatterlayer .js-line`)].some(line => line.getBoundingClientRect().width > 0)).length"
)
"""How many of the four health panels have drawn their curves."""


def write_runs(folder: Path, runs: int, audits: int, layers: int, heads: int) -> int:
    """Logs of so many runs; returns their bytes."""
    size = 0
    for place in range(runs):
        kind = "destabilizing" if place % 2 else "healthy"
        options = {"sites": make_sites(layers, heads), "low_rank": "all"} if heads else {}
        log = RunLog(folder / f"run-{place:02}")
        for record in make_run(kind, audits, layers, seed=place, **options):
            log.append(record)
        log.close()
        size += (log.directory / "records.jsonl").stat().st_size
    return size


def time_to_charts(browser: Browser, server: Server) -> dict[str, float]:
    """Seconds until the list, the first curve, and the curves of all panels are there.

    Raises:
        RuntimeError: they are not in five minutes.
    """
    began = time.perf_counter()
    open_tab(browser, server)
    seen: dict[str, float] = {"frame": time.perf_counter() - began}
    waited = {
        "list of runs": ("return document.querySelectorAll('.run').length", 1),
        "first chart": (DRAWN, 1),
        "all health panels": (DRAWN, 4),
    }
    for name, (code, least) in waited.items():
        while browser.js(code) < least:
            if time.perf_counter() - began > 300:
                raise RuntimeError("the tab draws nothing")
            time.sleep(0.02)
        seen[name] = time.perf_counter() - began
    return seen


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--audits", type=int, default=50, help="of each run")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=0, help="audited in each layer; 0: none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        logs, scratch = Path(place) / "logs", Path(place) / "scratch"
        scratch.mkdir()
        size = write_runs(logs, arguments.runs, arguments.audits, arguments.layers, arguments.heads)
        print(
            f"{arguments.runs} runs of {arguments.audits} audits of {arguments.layers} layers, {size / 2**20:.0f} MiB"
        )
        began = time.perf_counter()
        _, page, written = report_of(logs / f"run-{arguments.runs - 1:02}", scratch / "report.html")
        print(f"report of one run, {page.name}: {time.perf_counter() - began:.1f} s, {written / 1e6:.2f} MB")
        began = time.perf_counter()
        with tensorboard(logs, scratch) as server, open_browser() as browser:
            print(f"tensorboard and Chromium started in {time.perf_counter() - began:.1f} s")
            for title in ("opened first", "opened again"):
                seen = time_to_charts(browser, server)
                print(f"{title}: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in seen.items()), flush=True)


if __name__ == "__main__":
    main()
