"""Where a run's time goes: torch.profiler's operators, put into a few groups."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from engine.job import JobSpec

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear", "mkldnn")
GROUPS = ("matrix products", "head products", "attention", "softmax", "copies", "elementwise", "python and the rest")


def profiled(work: Callable[[], Any], spec: JobSpec) -> tuple[Any, list[dict[str, Any]]]:
    """(result of ``work``, table): seconds and share of each group, and its three longest operators.

    Times are the calling thread's: an operator that uses several threads counts once, so that the groups add up to the
    wall time. What no operator accounts for is Python, the allocator, and the profiler itself. On an accelerator times
    are those of the kernels that an operator launched; what none accounts for, the device spent waiting.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_device = spec.device != "cpu"
    if on_device:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        began = time.perf_counter()
        result = work()
        if on_device:
            torch.cuda.synchronize(spec.device)
        wall = time.perf_counter() - began
    seconds: dict[str, float] = defaultdict(float)
    operators: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: its time is its operator's
        took = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        group = _group(event.key, event.input_shapes, spec)
        seconds[group] += took
        operators[group][event.key] += took
    seconds["python and the rest"] += max(0.0, wall - sum(seconds.values()))
    table = []
    for group in GROUPS:
        longest = sorted(operators[group].items(), key=lambda item: -item[1])[:3]
        table.append(
            {
                "group": group,
                "seconds": seconds[group],
                "share": seconds[group] / wall,
                "longest": {name: round(took, 3) for name, took in longest},
            }
        )
    return result, table


def _group(name: str, shapes: Any, spec: JobSpec) -> str:
    wide = any(spec.vocab in shape for shape in shapes or [] if isinstance(shape, list | tuple))
    if name.startswith(PRODUCTS):
        return "head products" if wide else "matrix products"
    if "scaled_dot_product" in name or "attention" in name:
        return "attention"
    if "softmax" in name or "logsumexp" in name or (wide and name in ("aten::exp", "aten::exp_", "aten::sum")):
        return "softmax"
    if any(word in name for word in ("copy", "clone", "cat", "index", "gather", "contiguous", "to")):
        return "copies"
    if name.startswith("aten::"):
        return "elementwise"
    return "python and the rest"
