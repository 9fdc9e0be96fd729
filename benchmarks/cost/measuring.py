"""Jobs measured, and foreseen: CPU seconds of each process, which other work on the machine changes least."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from calibration import calibrate
from jobs import JobSpec, made_model, made_pairs, moved
from prices import Prices, between, seconds

from align_audit.auditing.audit import run_audit
from align_audit.auditing.costs.counting import count
from align_audit.auditing.costs.job import Assumed, Job
from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.memory import usual_working_bytes
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.session.room import Room
from align_audit.config import AuditConfig
from align_audit.models.reference import resolve_reference
from align_audit.probes.pairs import ProbeSet
from align_audit.ranks import Ranks
from align_audit.record.audit_record import AuditRecord

CONFIG = AuditConfig(progress=False)


def foreseen(spec: JobSpec, shape: ModelShape, assumed: Assumed, prices: Prices) -> list[dict[str, float]]:
    """Seconds of each part, by process."""
    kind: Any = "full" if spec.kind == "full" else "health"
    room = Room("cpu", usual_working_bytes(torch.device("cpu")))
    job = Job.on(shape, made_pairs(spec).pairs, CONFIG, room, ranks=spec.ranks, assumed=assumed)
    first = spec.kind != "later look"
    return [seconds(count(job, kind, first=first, rank=rank), shape, prices) for rank in range(spec.ranks)]


def shown(record: AuditRecord) -> Assumed:
    """What the audit has shown that its cost depends on, beside time."""
    peak = None if record.patching is None else record.patching.peak_layer
    layers = {layer for curves in record.low_rank.values() for layer in curves}
    rows = None if record.spinal is None else record.spinal.transport_rows
    return Assumed(peak_layer=-1 if peak is None else peak, low_rank_layers=tuple(sorted(layers)), transport_rows=rows)


def audited(models: tuple[Any, Any], probes: ProbeSet, spec: JobSpec, ranks: Ranks) -> tuple[float, float, AuditRecord]:
    """CPU seconds and wall seconds of one audit, models opened and closed."""
    policy, reference = models
    kind: Any = "full" if spec.kind == "full" else "health"
    cache = ReferenceCache()

    def audit() -> AuditRecord:
        with OpenModels(policy, resolve_reference(policy, reference), ranks=ranks, rehash=False) as opened:
            return run_audit(opened, AuditRequest(probes, CONFIG, kind=kind, probe_name="pairs"), cache).record

    if spec.kind == "later look":
        audit()
    ranks.gather(None)
    began, wall = time.process_time(), time.perf_counter()
    record = audit()
    return time.process_time() - began, time.perf_counter() - wall, record


def measured(spec: JobSpec, repeats: int, ranks: Ranks | None = None) -> dict[str, Any]:
    """The shortest of some audits on this process, and what it has shown."""
    ranks = ranks if ranks is not None else Ranks()
    policy = made_model(spec)
    models = (policy, moved(policy))
    probes = made_pairs(spec)
    audited(models, probes.subsample(2, 0), spec, ranks)  # what libraries load once is not the audit's
    spent = [audited(models, probes, spec, ranks) for _ in range(repeats)]
    assumed = shown(spent[0][2])
    return {
        "cpu": [cpu for cpu, _, _ in spent],
        "wall": [wall for _, wall, _ in spent],
        "assumed": {
            "peak_layer": assumed.peak_layer,
            "low_rank_layers": list(assumed.low_rank_layers or ()),
            "transport_rows": assumed.transport_rows,
        },
        "peak_memory": max(record.cost.peak_memory for _, _, record in spent),
    }


def compared(spec: JobSpec, repeats: int) -> dict[str, Any]:
    """A job as it is foreseen from the calibration, and as it is measured, on as many processes as it asks for."""
    torch.set_num_threads(1)
    earlier = calibrate(spec)
    runs = [measured(spec, repeats)] if spec.ranks == 1 else _on_ranks(spec, repeats)
    prices = between(earlier, calibrate(spec))
    said = runs[0]["assumed"]
    assumed = Assumed(said["peak_layer"], tuple(said["low_rank_layers"]), transport_rows=said["transport_rows"])
    shape = ModelShape.of(made_model(spec))
    parts = foreseen(spec, shape, assumed, prices)
    return {
        "title": spec.title,
        "foreseen": [sum(each.values()) for each in parts],
        "measured": [min(run["cpu"]) for run in runs],
        "spread": [max(run["cpu"]) / min(run["cpu"]) - 1 for run in runs],
        "parts": parts,
        "peak_memory": max(run["peak_memory"] for run in runs),
        "prices": vars(prices),
    }


def _on_ranks(spec: JobSpec, repeats: int) -> list[dict[str, Any]]:
    """Forked, one thread each, brought together by gloo."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"align-audit-cost-{os.getpid()}"
    folder.mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    children = []
    for rank in range(spec.ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                address = f"tcp://127.0.0.1:{port}"
                dist.init_process_group("gloo", init_method=address, rank=rank, world_size=spec.ranks)
                said = measured(spec, repeats, Ranks.of_this_run())
                (folder / f"{rank}.json").write_text(json.dumps(said), encoding="utf-8")
                dist.barrier()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(ended):
        raise RuntimeError(f"a rank broke (exit statuses {ended}); what it said stands above")
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(spec.ranks)]
