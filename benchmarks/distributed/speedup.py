"""How much faster the passes of an audit are on two processes than on one, on this machine, one thread a process.

    python benchmarks/distributed/speedup.py [--pairs 64] [--repeats 3]

The ranks are forked from this process. Printed: for each number of processes the shortest time of the repeats, and the ratio.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from align_audit.auditing.measurements.attribution import Attribution
from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.measurement import AuditTask
from align_audit.auditing.measurements.patching import Patching
from align_audit.auditing.passes import first_pass
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.models.reference import resolve_reference
from align_audit.ranks import Ranks
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


def passes(ranks: Ranks, pairs: int) -> float:
    """Seconds of the first pass over the pairs: recordings, every layer patched, read, and brought together."""
    policy = tiny_model("llama", dtype=torch.float32, hidden_size=256, intermediate_size=704, num_hidden_layers=8)
    config = AuditConfig.from_dict({"batch_tokens": 128})
    probes = random_pairs(pairs, longest=16)
    with OpenModels(policy, resolve_reference(policy, perturbed(policy)), ranks=ranks) as models:
        session = Session(models, probes.pairs, config)
        task = AuditTask(session, AuditRequest(probes, config), ReferenceCache())
        task.begin((Behaviour, Attribution, Patching))
        ranks.gather(None)
        began = time.perf_counter()
        first_pass(task)
        return time.perf_counter() - began


def _rank(rank: int, size: int, port: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    ranks = Ranks.of_this_run()
    seconds = min(passes(ranks, arguments.pairs) for _ in range(arguments.repeats))
    if rank == 0:
        Path(arguments.out).write_text(str(seconds))
    dist.barrier()
    os._exit(0)


def measure(size: int, arguments: argparse.Namespace) -> float:
    """Seconds of the fastest repeat on so many processes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _rank(rank, size, port, arguments)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return float(Path(arguments.out).read_text())


def main() -> None:
    """Measure both, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="/tmp/align_audit_speedup.txt", help="where the first process leaves its time")
    arguments = parser.parse_args()
    one, two = measure(1, arguments), measure(2, arguments)
    print(f"one process {one:.2f} s, two processes {two:.2f} s: {one / two:.2f} times as fast")


if __name__ == "__main__":
    main()
