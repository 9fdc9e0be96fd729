"""A short calibration: what the units of an audit's work cost on this machine, in CPU seconds of one thread.

Each is measured on the code that an audit runs (a model's own layer, replayed; norm and head; what is read of logits), at the
shape of the model in question, and none is fitted to an audit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from jobs import JobSpec, made_model, made_pairs
from prices import Prices

from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.session.memory import usual_working_bytes
from align_audit.auditing.session.room import Room
from align_audit.config import AuditConfig
from align_audit.measures.draws import noise_directions
from align_audit.measures.layer_set import layer_set
from align_audit.measures.localization import lasso_localization
from align_audit.measures.margin import compare_readouts, token_logp, token_logp_gradient
from align_audit.measures.patching import summarize_patching
from align_audit.measures.transport import transport_distances
from align_audit.models.generation import continue_greedily
from align_audit.models.gradients import stream_gradients
from align_audit.models.replay import Recording, Replay, head_rows
from align_audit.models.verify import open_replay
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.probes.batches import make_batch

_LAYERS = 3
"""Of the model that is calibrated on: one layer's price is that of any."""
_WALKED = 6
"""Streams that take turns in a layer."""


def spent_on(work: Callable[[], Any], repeats: int = 5, least: float = 0.02) -> float:
    """CPU seconds of one call: the median of some repeats, each of as many calls as take ``least`` seconds.

    Not the shortest: an audit takes longer than a lucky moment.
    """
    work()
    began = time.process_time()
    work()
    times = max(1, round(least / max(time.process_time() - began, 1e-6)))
    measured = []
    for _ in range(repeats):
        began = time.process_time()
        for _ in range(times):
            work()
        measured.append((time.process_time() - began) / times)
    return median(measured)


@torch.no_grad()
def calibrate(spec: JobSpec) -> Prices:
    """Prices at the shape of a job's model, for batches such as the job has."""
    torch.manual_seed(0)
    model = made_model(spec, layers=_LAYERS)
    shape = ModelShape.of(model)
    replay = open_replay(model)
    layer = _layer(replay, spec, shape)
    head = _head(replay, shape)
    decoding = _decoding(spec)
    width = min(shape.width, 512)
    wide = float64_prices(width, rows=min(1024, 4 * width))
    return Prices(**layer, **head, **decoding, **wide, **_host(spec, shape), **_bytes(model, shape), **_no_messages())


def _layer(replay: Replay, spec: JobSpec, shape: ModelShape) -> dict[str, float]:
    """From calls of one layer with few tokens, many, and more in longer rows: a constant, a price a token and one a meeting.

    Batches are as large as the job's; several streams take turns, as in a walk, so that none of them stays in a cache.
    """
    pairs = made_pairs(spec, 24).pairs
    room = Room("cpu", usual_working_bytes(torch.device("cpu")))
    tokens = room.batch_tokens(AuditConfig(), spec.layers, shape.stream_bytes)
    longest = max(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    most = min(len(pairs), max(2, tokens // longest))
    samples = []
    for count in sorted({1, (most + 1) // 2, most}):
        for copies in (1, 3):
            inputs = make_batch(pairs[:count], range(count), 0, shared=True).model_inputs()
            if copies > 1:
                inputs = _longer(inputs, copies)
            recording = replay.record(inputs)
            streams = [recording.after(0) + 0.01 * place for place in range(_WALKED)]

            def walk(recording: Recording = recording, streams: list[torch.Tensor] = streams) -> None:
                for stream in streams:
                    replay.layer(1, stream, recording)

            rows, width = streams[0].shape[:2]
            spent = spent_on(walk) / _WALKED
            samples.append((1.0, rows * width * shape.layer_flops, rows * width**2 * shape.meeting_flops, spent))
    table = np.array(samples)
    call, token, meeting = _fitted(table[:, :3], table[:, 3])
    return {"call": call, "token_flop": token, "meeting_flop": meeting, "backward": _backward(replay, spec)}


def _longer(inputs: dict[str, torch.Tensor], copies: int) -> dict[str, torch.Tensor]:
    """Rows of ``copies`` times as many tokens, each seeing those before it."""
    ids = inputs["input_ids"].repeat(1, copies)
    width = ids.shape[1]
    visible = torch.ones(width, width, dtype=torch.bool).tril().expand(len(ids), 1, width, width)
    return {"input_ids": ids, "attention_mask": visible, "position_ids": torch.arange(width).expand(len(ids), width)}


def _fitted(columns: np.ndarray, spent: np.ndarray) -> list[float]:
    """Prices of at least 0 that come nearest, in relative terms."""
    from scipy.optimize import nnls

    scale = columns.max(axis=0)
    prices, _ = nnls(columns / scale / spent[:, None], np.ones_like(spent))
    return (prices / scale).tolist()


def _backward(replay: Replay, spec: JobSpec) -> float:
    """A layer's backward pass by its input, over a forward call of it."""
    pairs = made_pairs(spec, 4).pairs
    recording = replay.record(make_batch(pairs, range(4), 0, shared=True).model_inputs())
    stream = recording.after(0)

    def descend(objectives: int) -> float:
        return spent_on(
            lambda: [None for _ in stream_gradients(replay, recording, lambda top: [(top * top).sum()] * objectives)]
        )

    forward = spent_on(lambda: replay.layer(1, stream, recording))
    return (descend(2) - descend(1)) / (_LAYERS - 1) / forward


def _head(replay: Replay, shape: ModelShape) -> dict[str, float]:
    block = head_rows("cpu", shape.vocabulary)
    count = min(block, 1024)
    rows = torch.randn(count, shape.width)
    few = max(1, count // 8)
    most, least = spent_on(lambda: replay.head(rows)), spent_on(lambda: replay.head(rows[:few]))
    flop = max(most - least, 0.0) / ((count - few) * shape.head_flops)
    logits, others, target = replay.head(rows), replay.head(rows + 0.1), torch.zeros(count, dtype=torch.long)
    each = count * shape.vocabulary
    travelling = min(count, 128)
    step = [logits[:travelling], others[:travelling], replay.head(rows + 0.2)[:travelling]]
    return {
        "head_call": max(0.0, most - flop * count * shape.head_flops),
        "head_flop": flop,
        "scored": spent_on(lambda: token_logp(logits, target)) / each,
        "sloped": spent_on(lambda: token_logp_gradient(logits, target)) / each,
        "compared": spent_on(lambda: compare_readouts(logits, others, target)) / each,
        "travelled": spent_on(lambda: transport_distances(step)) / (3 * travelling * shape.vocabulary),
    }


def _decoding(spec: JobSpec) -> dict[str, float]:
    """From models of few layers and of some more: a layer's price in each step, and what a step takes beside them."""
    steps, prompts = 8, [list(range(3, 27))] * 8
    measured = []
    for layers in (1, 1 + _LAYERS):
        model = made_model(spec, layers=layers)
        device = torch.device("cpu")

        def write(new: int, model: Any = model, device: torch.device = device) -> float:
            return spent_on(lambda: continue_greedily(model, prompts, new, (), device), repeats=3, least=0.0)

        measured.append((write(2 * steps) - write(steps)) / steps)
    layer = max(0.0, measured[1] - measured[0]) / _LAYERS
    return {"decode_call": layer, "decode_step": max(0.0, measured[0] - layer)}


def float64_prices(width: int, rows: int) -> dict[str, float]:
    """Products and decompositions in float64, of so many rows of that width."""
    few, tall = torch.randn(256, width, dtype=torch.float64), torch.randn(rows, width, dtype=torch.float64)
    gram = tall.T @ tall
    repeats = 3 if width <= 512 else 1
    product = spent_on(lambda: few.T @ few) / (2 * 256 * width**2)
    return {
        "wide_flop": product,
        "cube": spent_on(lambda: torch.linalg.eigh(gram), repeats, 0.0) / width**3,
        "host_flop": product,
        "value_cube": spent_on(lambda: torch.linalg.eigvalsh(gram), repeats, 0.0) / width**3,
        "singular": spent_on(lambda: torch.linalg.svdvals(tall), repeats, 0.0) / (tall.numel() * min(tall.shape)),
    }


def _host(spec: JobSpec, shape: ModelShape) -> dict[str, float]:
    """What is made of the numbers of all pairs."""
    config, generator = AuditConfig(), np.random.default_rng(0)
    pairs, layers = min(spec.pairs, 24), min(spec.layers, 12)
    effects, moved = generator.normal(size=(pairs, layers + 1)), generator.normal(size=(pairs, layers + 2))
    shift = effects.sum(1)
    options: Any = dict(resamples=config.statistics.bootstrap_resamples, confidence=0.95, seed=0)
    estimating = spent_on(
        lambda: (
            summarize_patching(effects, moved, shift, method="percentile", **options),
            layer_set(moved[:, 1:-1], np.diff(effects, axis=1), **options),
        ),
        repeats=2,
        least=0.0,
    )
    # Distances of neighbouring layers are alike, which is what a path takes its time for.
    distances = np.cumsum(generator.normal(size=(pairs, layers)) ** 2, axis=1)
    localization = config.localization
    fitting = spent_on(
        lambda: lasso_localization(
            distances, shift, localization.folds, localization.selection_resamples, localization.permutations
        ),
        repeats=1,
        least=0.0,
    )
    paths = localization.folds * (5 + localization.permutations) + localization.selection_resamples
    return {
        "estimate": estimating / (12 * pairs * layers),
        "fit": fitting / (paths * pairs * layers),
        "normal": spent_on(lambda: noise_directions(0, [1, 2], 0, 0, 64, shape.width)) / (2 * 64 * shape.width),
    }


def _bytes(model: Any, shape: ModelShape) -> dict[str, float]:
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    first, second = torch.randn(2, 512, shape.width), torch.randn(2, 512, shape.width)
    mask = torch.rand(2, 512, 1) > 0.5
    streamed = spent_on(lambda: torch.where(mask, first, second)) / (3 * first.nbytes)
    copied = spent_on(lambda: torch.stack([first, second], dim=1)) / (2 * 2 * first.nbytes)
    return {
        "stream_byte": streamed,
        "kept_byte": copied,
        "hashed_byte": spent_on(lambda: fingerprint(model), repeats=3) / weights,
    }


def _no_messages() -> dict[str, float]:
    """On one machine's cores nothing is brought together; two ranks tell each other little, which is not counted here."""
    return {"gather": 0.0, "gathered_byte": 0.0, "exchange": 0.0, "brought_byte": 0.0, "audit": 0.05}
