"""The words of ``docs/scale.md``, around the tables of :mod:`scale`."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from accelerators import ACCELERATORS, BANDWIDTH, LINKS, NODE, PRODUCTS
from jobs import JobSpec
from prices import Prices
from scale import (
    CONFIGS,
    GPUS,
    TRAINED_PAIRS,
    comparison,
    foresee,
    gathered,
    largest_error,
    machine,
    memory_shares,
    parts_table,
    shape_of,
    size_table,
    tokens_a_pair,
)

from align_audit.config import AuditConfig

MEASURED = "## Against measured audits"
PREDICTED = "## Models of 1B, 8B and 70B: predicted, not measured"
FEWER_ROWS = 1024
"""Of ``spinal.max_rows``, beside its default."""


def document(results: Sequence[dict[str, Any]], jobs: Sequence[JobSpec], host: Prices) -> str:
    """All of it."""
    return "\n".join([_beginning(), _measured(results, jobs), _large(host), _breaks(host), ""])


def predicted_again(text: str, host: Prices) -> str:
    """The document with the same measurements, and with what is predicted as it is counted now.

    Raises:
        ValueError: the text has no part that was measured.
    """
    _, begin, rest = text.partition(MEASURED)
    measured, end, _ = rest.partition(PREDICTED)
    if not begin or not end:
        raise ValueError(f"expected a document with the headings {MEASURED!r} and {PREDICTED!r}")
    return "\n".join([_beginning(), begin + measured.rstrip("\n") + "\n", _large(host), _breaks(host), ""])


def _beginning() -> str:
    return """# What an audit costs at scale

*Written by `python benchmarks/cost/model.py --compare --write docs/scale.md`; without `--compare` what was measured stays, and
what is predicted is counted anew.*

What has been measured on small machines is in [performance.md](performance.md). This page says what models cost that
do not fit there. It has two parts that are not of one kind:

1. **Counts, and prices that were measured.** How often each layer is called and on how many tokens, how many rows go
   through the head, how many weights are hashed and brought together follows from the plan of an audit, and is
   counted without a model (`align_audit/auditing/costs`). Layer calls × tokens are exactly those that a record tells
   as `cost.forward_equivalents`, in tests over twenty configurations, on one process and on two (DDP and FSDP2).
   What a unit of it costs is measured in a calibration of some seconds, and the product is compared with audits below.
2. **A prediction for GPUs that nobody has measured yet.** The same counts, times published peak figures and a stated
   share of them. Expect it to be wrong by a factor of two in places; what dominates, and what grows how, should hold.
"""


def _measured(results: Sequence[dict[str, Any]], jobs: Sequence[JobSpec]) -> str:
    least, most = memory_shares(results, jobs)
    return f"""{MEASURED}

On {datetime.date.today().isoformat()}, on one machine without a GPU: {machine()}.

Untrained Llamas of a configuration, random tokens, default options; CPU seconds of one-thread processes on a machine
that is busy with other work, the shortest of three audits, calibrated before and after. No price is fitted to an
audit (the calibration itself was altered once, after a first look at five jobs: medians in place of the shortest times,
batches as large as the job's). What only an audit shows (peak layer, how many rows transport needs) is taken from it.
The largest error is **{largest_error(results):.0%}**.

{comparison(results)}

The second rank makes no record, and so no statistics. Memory above the models is foreseen roughly, and rather
too high: the resident memory of these audits rose by {least:.0%} to {most:.0%} of it.

`python benchmarks/cost/model.py --calibrate --layers 12 --width 512 --vocabulary 32000` prints the prices of your
machine at the shape of your model.
"""


def _large(host: Prices) -> str:
    first = ACCELERATORS[0]
    figures = "; ".join(
        f"{each.name}: {each.products / 1e12:.0f} TFLOP/s in bfloat16, {each.wide / 1e12:.1f} in float64, "
        f"{each.memory / 1e12:.2f} TB/s, links of {each.inside / 1e9:.0f} GB/s a device and "
        f"{each.between / 1e9:.0f} GB/s a node"
        for each in ACCELERATORS
    )
    pieces = [
        f"""{PREDICTED}

Widths of the Llama 3 family, bfloat16, vocabulary 128,256; 64 probe pairs of {tokens_a_pair():,.0f} tokens (both
sequences), default options, full fine-tuning, weights spread by FSDP2 over all GPUs (one: whole). Published peaks of
the SXM boards ({figures}), of which matrix products reach {PRODUCTS:.0%}, memory {BANDWIDTH:.0%}, links {LINKS:.0%};
{NODE} GPUs a node. What runs in the host's memory is priced as one thread of this machine, which is what `torchrun` gives
a process unless `OMP_NUM_THREADS` says more: {machine()} ({datetime.date.today().isoformat()}).

*Of the run*: one audit, of an epoch over {TRAINED_PAIRS:,} pairs of that length, at the same share of peak products
(10 FLOP a weight and token: forward, backward, activations computed again, and the reference). On many GPUs a small
model's run is a minute or two, and the share says more of the run than of the audit. *Device* and *host*: GiB above
the models on one process, rough and rather too high. A star: weights, gradients and AdamW's state (18 bytes a
weight) leave no room for it on {first.capacity / 2**30:.0f} GiB, so that this model is not
trained so. Adapters (LoRA) need far less of that; their audits cost nearly the same."""
    ]
    pieces += [f"### {size} on {first.name}\n\n{size_table(size, first, host)}" for size in CONFIGS]
    pieces.append(
        f"""### Which part takes it

Seconds of a full audit on {first.name}, by model and GPUs. *Opening* tries the models and the layout of the pairs;
*recordings* are one forward of each model; *low rank*, *controls* and *patching* are streams walked up the layers;
*messages* are layers that FSDP2 brings together, and what processes tell each other.

{parts_table(first, host)}"""
    )
    second = ACCELERATORS[1]
    rows = []
    for size in CONFIGS:
        for gpus in (8, 64):
            full = foresee(shape_of(size), second, gpus, "full", host)
            look = foresee(shape_of(size), second, gpus, "health", host, first=False)
            rows.append(
                f"| {size}, {gpus} | {look.seconds:,.1f} | {look.share:.2%} | {full.seconds:,.0f} | {full.share:.1%} | "
                f"{full.dominant} |"
            )
    pieces.append(
        f"""### On {second.name}

| | a later look, s | of the run | a full audit, s | of the run | most of it |
|---|---|---|---|---|---|
"""
        + "\n".join(rows)
    )
    return "\n\n".join(pieces) + "\n"


def _breaks(host: Prices) -> str:
    device = ACCELERATORS[0]
    shapes = {size: shape_of(size) for size in CONFIGS}
    fewer = AuditConfig.from_dict({"spinal": {"max_rows": FEWER_ROWS}})
    eight = {size: foresee(shape, device, 8, "full", host) for size, shape in shapes.items()}
    less = {size: foresee(shape, device, 8, "full", host, config=fewer) for size, shape in shapes.items()}
    alone = foresee(shapes["8B"], device, 1, "full", host)
    small = foresee(shapes["1B"], device, GPUS[-1], "full", host)
    walked = sum(eight["70B"].parts[part] for part in ("patching", "controls", "low_rank"))
    most = foresee(shapes["70B"], device, GPUS[-1], "full", host)
    look = foresee(shapes["70B"], device, GPUS[-1], "health", host, first=False)
    gathers, size = gathered("70B", GPUS[-1])
    share = alone.parts["spectra"] / alone.seconds
    return f"""## What would break first

In this order, by the prediction:

1. **Time: streams that are walked up the layers**, for patching and its controls: {walked:,.0f} of
   {eight["70B"].seconds:,.0f} s ({walked / eight["70B"].seconds:.0%}) for 70B on 8 GPUs. They grow with
   layers × layers × pairs: `patching.exact_pairs: 24` walks for 24 of the pairs, and fewer `control_pairs` for
   fewer controls. On one GPU singular values come first for 8B ({alone.parts["spectra"]:,.0f} of {alone.seconds:,.0f} s,
   {share:.0%}): of up to 4,096 token rows of every layer, in float64, on the device, where they read a matrix again for
   each of its columns. Processes share the layers. `spinal.max_rows: {FEWER_ROWS}` makes an audit on 8 GPUs
   {less["8B"].seconds:,.0f} s in place of {eight["8B"].seconds:,.0f} (8B).
2. **What no process shares.** Statistics, continuations and the calls of small kernels take as long on {GPUS[-1]} GPUs as
   on 8: a full audit of 1B takes {small.seconds:,.0f} s there, of a run that has become short.
3. **Messages, where weights are spread.** A full audit of 70B on {GPUS[-1]} GPUs brings {gathers:,} layers together
   on each process, {size / 1024:,.1f} TiB: {most.parts["messages"]:,.0f} of {most.seconds:,.0f} s. A look takes
   {look.seconds:,.0f} s, in which continuations bring every layer together for each new token: fewer
   `generations.max_new_tokens`, or `generations.enabled: false`.
4. **The budget.** By default audits take 5 % of a run. A full audit that does not fit is left out (a look is made in
   its place; at a checkpoint nothing, where not even that fits), but for the last step's, which is made where it
   takes a minute at most (`schedule.last_step_seconds`). A first one is judged before there was any, by a look's
   time and counted work; `align-audit doctor` says in advance how many fit.
5. **The device's memory** lasts longest: {eight["8B"].device:.0f} GiB a process for 8B and {eight["70B"].device:.0f}
   for 70B where weights are spread, of which what lies outside of the layers (embeddings and head of both models,
   whole on every process) is most. In the host's memory a process keeps the token rows of its own pairs,
   {alone.host:.1f} GiB for 8B on one GPU, {eight["8B"].host:.1f} on eight ({eight["70B"].host:.1f} for 70B).

Not in these counts: finer sites, pairs that `exact_pairs: auto` adds, what `keep_reference` saves, models with
experts (which are audited, and not foreseen), and time in which processes wait for each other.
"""
