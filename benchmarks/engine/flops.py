"""How many multiply-adds a sweep needs: of hooks as they run, and the least that gives the same numbers exactly.

Only matrix products are counted (linear layers, attention scores and values, the head), two operations for each
multiply-add. Norms, activations, softmax and rotary embeddings are not.

The floor of a layer sweep over N pairs, to the same numbers:

- a pair's shared prompt is computed once, nothing is padded, and no completion's last token is computed (it predicts
  nothing and nothing attends to it);
- a causal query meets only the keys up to its own position;
- the policy runs once, the reference once, and the stream patched after layer l runs layers l+1 … L−1 only;
- in the last layer keys and values are needed everywhere, queries, output projection and MLP at prediction positions only,
  and the head there only. The policy's head is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.contenders.common import PAIRS_PER_BATCH, Pair
from engine.job import JobSpec


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder with gated MLPs; ``query`` and ``key`` are heads times head width."""

    layers: int
    width: int
    query: int
    key: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, spec: JobSpec) -> Shape:
        config = spec.model_config()
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            query=head * config["num_attention_heads"],
            key=head * config["num_key_value_heads"],
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
        )

    # FLOPs of one token:

    @property
    def keys_values(self) -> int:
        return 2 * self.width * 2 * self.key

    @property
    def rest_of_layer(self) -> int:
        """Query and output projections, gate, up and down."""
        return 2 * self.width * (2 * self.query + 3 * self.intermediate)

    @property
    def layer(self) -> int:
        return self.keys_values + self.rest_of_layer

    @property
    def head(self) -> int:
        return 2 * self.width * self.vocab

    def attention(self, meetings: int) -> int:
        """Scores and weighted values of so many meetings of a query with a key, in all heads."""
        return 2 * 2 * self.query * meetings


@dataclass(frozen=True)
class Flops:
    """Of a sweep, by part."""

    layers: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.layers + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.layers + other.layers, self.attention + other.attention, self.head + other.head)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.layers * times, self.attention * times, self.head * times)


def padded_forward(shape: Shape, rows: int, width: int) -> Flops:
    """One full forward of ``rows`` rows of ``width`` tokens: every position attends to every position (masked)."""
    tokens = rows * width
    return Flops(
        layers=shape.layers * shape.layer * tokens,
        attention=shape.layers * shape.attention(rows * width * width),
        head=shape.head * tokens,
    )


def hooks_sweep(shape: Shape, pairs: Sequence[Pair], runs_per_layer: int = 1, batch: int = PAIRS_PER_BATCH) -> Flops:
    """The sweep as hooks run it: the policy, the reference, and ``runs_per_layer`` full forwards a layer."""
    once = Flops(0, 0, 0)
    for first in range(0, len(pairs), batch):
        group = pairs[first : first + batch]
        width = max(len(side) for pair in group for side in pair.sides)
        once += padded_forward(shape, 2 * len(group), width)
    return once * (2 + shape.layers * runs_per_layer)


def floor_sweep(shape: Shape, pairs: Sequence[Pair], runs_per_layer: int = 1, *, embedding: bool = False) -> Flops:
    """The least for the same numbers, exactly. ``embedding``: with the patch below layer 0 that an audit also reports."""
    last = shape.layers - 1
    # How often the full layers, and the trimmed last one, are computed: by policy, reference, and patched streams.
    streams = [*range(-1 if embedding else 0, shape.layers)] * runs_per_layer
    full = 2 * last + sum(max(0, last - 1 - start) for start in streams)
    trimmed = 1 + sum(start < last for start in streams)  # by those whose margin is read ...
    trimmed_heads = 1 + len(streams)
    # ... and by the policy, whose last stream is what the last patch writes.
    trimmed += 1
    total = Flops(0, 0, 0)
    for pair in pairs:
        total += _pair(shape, pair, full, trimmed, trimmed_heads)
    return total


def _pair(shape: Shape, pair: Pair, full: int, trimmed: int, heads: int) -> Flops:
    prompt = len(pair.prompt)
    completions = [len(pair.chosen) - 1, len(pair.rejected) - 1]
    tokens = prompt + sum(completions)
    # The last prompt token predicts the first token of both completions, from the same logits.
    predictions = 1 + sum(completions)
    meetings = _triangle(0, prompt) + sum(_triangle(prompt, count) for count in completions)
    read = prompt + sum(_triangle(prompt, count) for count in completions)
    return Flops(
        layers=full * shape.layer * tokens + trimmed * (shape.keys_values * tokens + shape.rest_of_layer * predictions),
        attention=full * shape.attention(meetings) + trimmed * shape.attention(read),
        head=heads * shape.head * predictions,
    )


def _triangle(before: int, count: int) -> int:
    """Meetings of ``count`` causal queries with the keys up to their own, ``before`` of them earlier than the first."""
    return count * before + count * (count + 1) // 2


def matmul_rates(
    shape: Shape, dtype: str, threads: int, device: str = "cpu", rows: Sequence[int] = (64, 256, 1024, 2048)
) -> list[dict]:
    """GFLOP/s of ``torch.nn.functional.linear`` at the job's shapes, by wall and by CPU time: the machine's rate."""
    import time

    import torch

    wait = (lambda: torch.cuda.synchronize(device)) if device.startswith("cuda") else (lambda: None)
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    named = {
        "d → d": (shape.width, shape.query),
        "d → mlp": (shape.width, shape.intermediate),
        "mlp → d": (shape.intermediate, shape.width),
        "d → vocabulary": (shape.width, shape.vocab),
    }
    table = []
    with torch.no_grad():
        for name, (inner, outer) in named.items():
            weight = torch.randn(outer, inner, dtype=kind, device=device)
            for count in rows:
                x = torch.randn(count, inner, dtype=kind, device=device)
                work = 2 * count * inner * outer
                times = max(3, min(200, int((1e10 if device == "cpu" else 1e12) / work)))
                torch.nn.functional.linear(x, weight)
                wait()
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(times):
                    torch.nn.functional.linear(x, weight)
                wait()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                table.append(
                    {
                        "product": name,
                        "rows": count,
                        "gflops_wall": work * times / wall / 1e9,
                        "gflops_per_cpu_second": work * times / cpu / 1e9,
                    }
                )
    return table
