"""``docs/scale.md``: the cost model against measured jobs, and what it says of models that no machine here holds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerators import Accelerator, priced, training_seconds
from jobs import JobSpec, made_model, made_pairs
from prices import Prices, seconds
from transformers import AutoConfig, AutoModelForCausalLM

from align_audit.auditing.costs.counting import count
from align_audit.auditing.costs.job import Job
from align_audit.auditing.costs.memory import foresee_memory
from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.costs.work import total
from align_audit.auditing.session.memory import usual_working_bytes
from align_audit.auditing.session.room import Room
from align_audit.config import AuditConfig
from align_audit.record.audit_record import AuditKind

GPUS = (1, 2, 4, 8, 16, 32, 64)
TRAINED_PAIRS = 60_000
"""Of the run that shares are told of: one epoch of a usual preference data set."""
_PAIRS = JobSpec(1, 64, 32_000, 64, prompt=(128, 384), completion=(64, 448))
"""64 probe pairs of 512 tokens a sequence on average, prompts of 256 among them."""

CONFIGS: dict[str, dict[str, Any]] = {
    "1B": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
               intermediate_size=8192, vocab_size=128_256, tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
               intermediate_size=14_336, vocab_size=128_256, tie_word_embeddings=False),
    "70B": dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                intermediate_size=28_672, vocab_size=128_256, tie_word_embeddings=False),
}  # fmt: skip
"""Widths of the Llama 3 family's models of these sizes."""


def shape_of(size: str) -> ModelShape:
    """Of a model that is never made: its weights have shapes and no values."""
    config = AutoConfig.for_model("llama", **CONFIGS[size])
    with torch.device("meta"):
        return ModelShape.of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


@dataclass(frozen=True)
class Foreseen:
    """An audit on some GPUs.

    Attributes:
        parts: seconds, of the process that takes longest.
        run: seconds of the run that it is part of.
        device, host: GiB above the models, on one process.
        weights: GiB of weights, gradients and optimizer that training keeps on one process.
    """

    parts: dict[str, float]
    run: float
    device: float
    host: float
    weights: float

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(self.parts.values())

    @property
    def share(self) -> float:
        """Of the run's time."""
        return self.seconds / self.run

    @property
    def dominant(self) -> str:
        """The part that takes most, and its share."""
        part = max(self.parts, key=lambda name: self.parts[name])
        return f"{part.replace('_', ' ')} {self.parts[part] / self.seconds:.0%}"


def foresee(
    shape: ModelShape,
    device: Accelerator,
    gpus: int,
    kind: AuditKind,
    host: Prices,
    *,
    first: bool = True,
    config: AuditConfig | None = None,
) -> Foreseen:
    """An audit with default options or others, weights spread by FSDP2 over the GPUs."""
    config, pairs = config or AuditConfig(), made_pairs(_PAIRS).pairs
    room = Room("cuda", int(max(2**30, device.capacity // 16)))
    job = Job.on(shape, pairs, config, room, ranks=gpus, spread=gpus > 1)
    prices = priced(device, shape, host, gpus)
    ranks = {0, gpus - 1}  # the first has a batch in every turn, and makes the record
    parts = max((seconds(count(job, kind, first=first, rank=rank), shape, prices) for rank in ranks), key=_sum)
    memory = foresee_memory(job, kind)
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    trained = training_seconds(device, shape, tokens * TRAINED_PAIRS // len(pairs), gpus)
    weights = (16 + shape.value_bytes) * shape.weights / gpus / 2**30
    return Foreseen(parts, trained, memory.device / 2**30, memory.host / 2**30, weights)


def _sum(parts: dict[str, float]) -> float:
    return sum(parts.values())


# -- the document ------------------------------------------------------------------------------------------------------


def machine() -> str:
    """What it is, in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, torch {torch.__version__}, one thread a process"


def comparison(results: Sequence[dict[str, Any]]) -> str:
    """A row for each job."""
    lines = ["| job | foreseen, CPU s | measured | off by |", "|---|---|---|---|"]
    for result in results:
        for rank, (foreseen, measured) in enumerate(zip(result["foreseen"], result["measured"], strict=True)):
            title = result["title"] + (f": rank {rank}" if len(result["measured"]) > 1 else "")
            lines.append(f"| {title} | {foreseen:.2f} | {measured:.2f} | {foreseen / measured - 1:+.0%} |")
    return "\n".join(lines)


def largest_error(results: Sequence[dict[str, Any]]) -> float:
    """Of all jobs and ranks, as a share of what was measured."""
    pairs = [pair for each in results for pair in zip(each["foreseen"], each["measured"], strict=True)]
    return max(abs(foreseen / measured - 1) for foreseen, measured in pairs)


def size_table(size: str, device: Accelerator, host: Prices) -> str:
    """What audits of one model cost on so many GPUs."""
    shape = shape_of(size)
    lines = [
        "| GPUs | a later look, s | of the run | a full audit, s | of the run | most of it | device, GiB | host, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        look = foresee(shape, device, gpus, "health", host, first=False)
        full = foresee(shape, device, gpus, "full", host)
        star = "" if full.weights + full.device < device.capacity / 2**30 else " \\*"
        lines.append(
            f"| {gpus}{star} | {_number(look.seconds)} | {look.share:.2%} | {_number(full.seconds)} | "
            f"{full.share:.1%} | {full.dominant} | {full.device:.1f} | {full.host:.1f} |"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 10 else f"{value:,.0f}"


def parts_table(device: Accelerator, host: Prices, gpus: Sequence[int] = (1, 8, 64)) -> str:
    """Seconds by part of a full audit, by model and GPUs."""
    columns = [(size, count) for size in CONFIGS for count in gpus]
    audits = [foresee(shape_of(size), device, count, "full", host) for size, count in columns]
    names = sorted(
        {name for each in audits for name in each.parts}, key=lambda name: -max(a.parts.get(name, 0) for a in audits)
    )
    lines = ["| | " + " | ".join(f"{size}, {count}" for size, count in columns) + " |", "|---|" + "---|" * len(columns)]
    for name in names:
        lines.append(
            f"| {name.replace('_', ' ')} | " + " | ".join(_number(each.parts.get(name, 0.0)) for each in audits) + " |"
        )
    return "\n".join(lines)


def gathered(size: str, gpus: int) -> tuple[int, float]:
    """How many layers each process brings together in a full audit, and how many GiB that is."""
    shape = shape_of(size)
    room = Room("cuda", 80 * 2**30 // 16)
    job = Job.on(shape, made_pairs(_PAIRS).pairs, AuditConfig(), room, ranks=gpus, spread=True)
    work = total(count(job, "full").values())
    return work.gathers, work.gathered_weights * shape.value_bytes / 2**30


def tokens_a_pair() -> float:
    """Of the probe pairs that large models are foreseen on, both sequences."""
    pairs = made_pairs(_PAIRS).pairs
    return sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs) / len(pairs)


def memory_shares(results: Sequence[dict[str, Any]], jobs: Sequence[JobSpec]) -> tuple[float, float]:
    """The least and the most that an audit took of the memory that was foreseen."""
    shares = []
    for result, spec in zip(results, jobs, strict=True):
        room = Room("cpu", usual_working_bytes(torch.device("cpu")))
        job = Job.on(ModelShape.of(made_model(spec)), made_pairs(spec).pairs, AuditConfig(), room, ranks=spec.ranks)
        memory = foresee_memory(job, "full" if spec.kind == "full" else "health")
        shares.append(result["peak_memory"] / (memory.device + memory.host))
    return min(shares), max(shares)
