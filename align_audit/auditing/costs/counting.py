"""What an audit computes, counted from its plan: the same batches, streams and layers as a session makes, and no model.

Every count of layer calls × tokens is the one that a record tells as ``cost.forward_equivalents``
(``tests/auditing/costs/test_counting.py``). What depends on what an audit shows is assumed (:class:`Assumed`). Not counted
are finer sites, pairs that ``exact_pairs: auto`` adds, and what ``keep_reference`` saves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from align_audit.auditing.costs.job import Group, Job, Laid
from align_audit.auditing.costs.tally import ModelName, Tally
from align_audit.auditing.costs.work import PartName, Work, total
from align_audit.auditing.session.layout import rows_tried
from align_audit.probes.prompts import distinct_prompts
from align_audit.record.audit_record import AuditKind

Parts = dict[PartName, Work]

_VERIFIED = 14
"""Tokens on which a model is tried between its layers when it is opened: at length before training begins, and in short by each
audit."""
_OPENING_CALLS = 3
"""Passes over the layers that this takes an audit of each model."""
_RESAMPLED = 12
"""Numbers of the record that have an interval, for each layer."""


def count(job: Job, kind: AuditKind, *, first: bool = True, rank: int = 0) -> Parts:
    """What an audit of a kind computes on one process, by part.

    Args:
        first: of a run: nothing of the reference is known yet.

    Raises:
        ValueError: there is no such process.
    """
    if not 0 <= rank < job.ranks:
        raise ValueError(f"expected a rank of 0 to {job.ranks - 1}; found {rank}")
    tally = Tally(job)
    _open(tally, first)
    if kind == "health":
        _health(tally, first, rank)
    else:
        _first_pass(tally, rank)
        _gather_rows(tally, rank)
        _spinal(tally, first, rank)
    _generations(tally, first)
    if kind == "full":
        _second_pass(tally, rank)
        if rank == 0:
            _statistics(tally)
    return tally.parts


def layer_tokens(job: Job, kind: AuditKind, *, first: bool = True) -> int:
    """Layer calls × tokens on all processes together."""
    return sum(total(count(job, kind, first=first, rank=rank).values()).layer_tokens for rank in range(job.ranks))


# -- opening -----------------------------------------------------------------------------------------------------------


def _open(tally: Tally, first: bool) -> None:
    """Models are hashed and tried, and the layout of the pairs where it is not known."""
    job, shape = tally.job, tally.job.shape
    share = job.ranks if job.spread else 1
    tally.add("hashing", hashed_bytes=(2 if first else 1) * shape.weights * shape.value_bytes // share)
    calls = 2 * _OPENING_CALLS * shape.layers
    tried = Laid(pairs=1, rows=2, width=_VERIFIED // 2, entries=0, read=0, longest=0)
    # These calls are no work of the audit's, and are not among its layer tokens: they are counted as continuations are.
    tally.add("opening", decode_calls=calls, decode_tokens=calls * tried.tokens)
    models: tuple[ModelName, ...] = ("policy", "reference") if job.spread else ()
    for model in models:
        for _ in range(_OPENING_CALLS):
            tally.hold("opening", model, range(shape.layers))
        tally.add("opening", gathers=1, gathered_weights=shape.outside_weights, exchanges=1)
    if first and job.config.share_prompts:
        _try_layout(tally)
    tally.rest()


def _try_layout(tally: Tally) -> None:
    """Two pairs, each in both layouts, in the reference (see :mod:`align_audit.auditing.session.layout`)."""
    job = tally.job
    pairs = job.pairs
    for place, sides in rows_tried(pairs):
        every = range(job.shape.layers)
        tally.up("opening", "reference", every, job.laid((place,), shared=True))
        for side in sides:
            ids = (pairs[place].chosen_ids, pairs[place].rejected_ids)[side]
            start = (pairs[place].chosen_start, pairs[place].rejected_start)[side]
            entries = len(ids) - max(start, 1)
            tally.up("opening", "reference", every, Laid(1, 1, len(ids), entries, entries, len(ids)))
            tally.read("opening", 2 * entries)  # in both layouts


# -- passes ------------------------------------------------------------------------------------------------------------


def _health(tally: Tally, first: bool, rank: int) -> None:
    job, every = tally.job, range(tally.job.shape.layers)
    spared = 0 if first else job.kept_logits(rank)
    for group, _ in job.dealt(rank):
        laid = job.laid(group)
        tally.up("recordings", "policy", every, laid)
        if first:
            tally.up("recordings", "reference", every, laid)
        _compare(tally, laid, spared=min(spared, laid.entries))
        spared -= min(spared, laid.entries)


def _compare(tally: Tally, laid: Laid, spared: int = 0) -> None:
    """Of so many entries the reference's logits are kept."""
    tally.read("margins", laid.entries, scored=0)
    tally.read("margins", laid.entries - spared, scored=0)
    tally.add("margins", compared=laid.entries)


def _first_pass(tally: Tally, rank: int) -> None:
    job = tally.job
    patching, layers = job.config.patching, job.shape.layers
    models: tuple[ModelName, ...] = ("policy", "reference")
    checked = dict.fromkeys(models, 0)
    for group, _ in job.dealt(rank):
        laid = job.laid(group)
        for model in models:
            tally.up("recordings", model, range(layers), laid)
        _compare(tally, laid)
        if patching.enabled and patching.exact_pairs is not None:
            _attribute(tally, laid)
        if patching.enabled and patching.transplants and job.is_exact(group):
            tally.up("transplants", "policy", range(layers), laid)
            tally.read("transplants", laid.entries)
        if job.config.spinal.enabled and job.config.spinal.gradient_concentration and job.is_control(group):
            tally.read("gradients", laid.entries, backward=True)
            tally.down("gradients", "policy", laid, objectives=2 if job.shared else 1, down_to=0)
        walks: dict[ModelName, Streams | None] = {
            "policy": _into_policy(job, group), "reference": _into_reference(job, group),
        }  # fmt: skip
        for model, streams in walks.items():
            if streams is not None:
                _check_replay(tally, model, checked, laid)
                tally.walk(streams, model, laid)
        if patching.enabled and patching.noise_draws and job.is_control(group):
            tally.add("controls", normals=layers * laid.pairs * laid.longest * job.shape.width)


def _check_replay(tally: Tally, model: ModelName, checked: dict[ModelName, int], laid: Laid) -> None:
    """A recording is replayed at every layer of the first batch, at one of each batch that follows, and at the last as walks
    run it."""
    layers = tally.job.shape.layers
    at = checked[model] % layers
    tally.up("controls", model, range(layers) if checked[model] == 0 else range(at, at + 1), laid)
    tally.up("controls", model, range(layers - 1, layers), laid)
    checked[model] += 1


Streams = list[tuple[PartName, int]]


def _into_policy(job: Job, group: Group) -> Streams | None:
    """What is walked through the policy: where it joins, and what for."""
    patching = job.config.patching
    if not (patching.enabled and patching.reverse and job.is_control(group)):
        return None
    return [("controls", layer) for layer in _layers_that_move(job, _patched_layers(job))]


def _into_reference(job: Job, group: Group) -> Streams | None:
    """The same of the reference."""
    patching, layers = job.config.patching, job.shape.layers
    if not patching.enabled:
        return None
    if not job.is_exact(group):
        wanted = [layer for layer in job.layers_of[group[0]] if layer >= 0 or patching.embedding]
        return [("patching", layer) for layer in _layers_that_move(job, wanted)] if wanted else None
    streams: Streams = [("patching", layer) for layer in _layers_that_move(job, _patched_layers(job))]
    if patching.transplants:
        streams += [("patching", layer) for layer in range(layers)]
        if patching.embedding and patching.positions != "all":
            streams += [("patching", layer) for layer in _layers_that_move(job, [-1])]
    if patching.noise_draws and job.is_control(group):
        streams += [("controls", layer) for layer in range(layers)]
    return streams


def _patched_layers(job: Job) -> list[int]:
    return list(range(-1 if job.config.patching.embedding else 0, job.shape.layers))


def _layers_that_move(job: Job, layers: Sequence[int]) -> list[int]:
    """Those whose patch is no patch are not walked: what enters layer 0, where embeddings are the same."""
    return [layer for layer in layers if layer >= 0 or job.assumed.embedding_moves]


def _attribute(tally: Tally, laid: Laid) -> None:
    patching, layers = tally.job.config.patching, tally.job.shape.layers
    lowest = -1 if patching.embedding else 0
    for _ in patching.attribution_points:
        for start in (lowest,) if patching.attribution_path == "joint" else range(lowest, layers):
            if patching.attribution_path == "layer":
                tally.up("attribution", "reference", range(start + 1, layers), laid)
            tally.read("attribution", laid.entries, backward=True)
            tally.down("attribution", "reference", laid, objectives=1, down_to=start)


def _gather_rows(tally: Tally, rank: int) -> None:
    """Token rows of the layers that are reconstructed: beside the first pass where they are named, else in one of their own."""
    job = tally.job
    if not (job.config.low_rank.enabled and job.config.patching.enabled and job.low_rank_layers and _halves(job)):
        return
    width, keys = job.shape.width, len(job.config.low_rank.bases) * len(job.low_rank_layers)
    named = job.config.low_rank.layers != "auto"
    beside = named and job.room.holds_beside(2 * keys * width**2 * 8)
    for group, kept in job.dealt(rank):
        laid = job.laid(group)
        for model in () if beside else ("policy", "reference"):
            tally.up("low_rank", model, range(max(job.low_rank_layers) + 1), laid)
        if kept:
            tally.add("low_rank", wide_flops=2 * keys * laid.tokens * width**2)
    # Eigenvectors for both halves and all rows; values alone, for how many dimensions each spans, are about as dear.
    tally.add("low_rank", cubes=keys * 7 * width**3)
    if job.ranks > 1:
        tally.add("low_rank", brought_bytes=2 * 2 * keys * width**2 * 8)  # around a ring


def _halves(job: Job) -> bool:
    """Whether there are two independent halves of the pairs."""
    return len({pair.group for pair in job.pairs}) >= 2


def _second_pass(tally: Tally, rank: int) -> None:
    """Subspaces and further noise, walked through the reference."""
    job = tally.job
    fitted, random, noise = _looks(job)
    if not fitted and not noise:
        return
    top = max(layer for _, layer in (*fitted, *noise))
    for group, _ in job.dealt(rank):
        if not job.is_exact(group):
            continue
        laid, streams = job.laid(group), list(fitted)
        for model in ("policy", "reference"):
            tally.up("low_rank" if fitted else "controls", model, range(top + 1), laid)
        if job.is_control(group):
            streams += [*random, *noise]
            tally.add("controls", normals=len(noise) * laid.pairs * laid.longest * job.shape.width)
            tally.add(
                "low_rank", host_flops=4 * len(random) * laid.pairs * job.shape.width * job.ranks_patched[-1] ** 2
            )
        projected = sum(part == "low_rank" for part, _ in streams)
        # In float64: both streams, their difference, what lies inside, and the sum.
        tally.add("low_rank", stream_bytes=projected * 6 * 8 * laid.tokens * job.shape.width)
        mean_rank = math.ceil(sum(job.ranks_patched) / len(job.ranks_patched))
        # By the spans of both halves, each on all rows.
        tally.add("low_rank", wide_flops=projected * 2 * 4 * laid.tokens * job.shape.width * mean_rank)
        tally.walk(streams, "reference", laid)


def _looks(job: Job) -> tuple[Streams, Streams, Streams]:
    """What is walked of fitted subspaces, of random ones, and of further noise."""
    patching, low_rank, shape = job.config.patching, job.config.low_rank, job.shape
    if not patching.enabled:
        return [], [], []
    fitted: Streams = []
    random: Streams = []
    if low_rank.enabled and _halves(job):
        ranks = len(job.ranks_patched)
        for layer in job.low_rank_layers:
            for basis in low_rank.bases:
                fitted += [("low_rank", layer)] * job.assumed.spanned.get((basis, layer), ranks)
            random += [("low_rank", layer)] * (ranks * low_rank.random_draws)
    noise: Streams = []
    if patching.noise_draws >= 2 and 0 <= job.peak_layer < shape.layers:
        noise = [("controls", job.peak_layer)] * (patching.noise_draws - 1)
    return fitted, random, noise


# -- beside the passes -------------------------------------------------------------------------------------------------


def _spinal(tally: Tally, first: bool, rank: int) -> None:
    """Spectra and transport, whose layers and blocks of rows the processes share."""
    job = tally.job
    if not job.config.spinal.enabled:
        return
    shape, rows, models = job.shape, job.spectrum_rows, 2 if first else 1
    layers = len(range(rank, shape.layers, job.ranks))
    tally.add("spectra", singular=models * layers * rows * shape.width * min(rows, shape.width))
    if shape.value_bytes < 4:
        # At half precision some of a spectrum lies below rounding, and the rank is told from one more product.
        tally.add("spectra", wide_flops=models * layers * 2 * rows * shape.width * min(rows, shape.width))
        tally.add("spectra", value_cubes=models * layers * min(rows, shape.width) ** 3)
    # Each process copies those of its own pairs to the host, and is brought the others' of its layers, and of its blocks.
    row, share = models * shape.stream_bytes, job.share(rank)
    travelling = math.ceil(job.transport_rows / job.ranks) * shape.layers
    brought = round((1 - share) * (layers * rows + travelling) * row)
    tally.add("spectra", kept_bytes=round(share * rows * shape.layers * row), brought_bytes=brought)
    tally.read("transport", travelling, models=models, scored=0)
    tally.add("transport", travelled=models * travelling)


def _generations(tally: Tally, first: bool) -> None:
    """Each model goes on from some prompts, and the reference reads at most all that was written. All processes do it."""
    job = tally.job
    settings, shape = job.config.generations, job.shape
    prompts = _continued_prompts(job)
    if not settings.enabled or not prompts:
        return
    new = settings.max_new_tokens if job.assumed.new_tokens is None else job.assumed.new_tokens
    longest = max(prompts)
    read = Laid(len(prompts), len(prompts), longest + new, len(prompts) * new, len(prompts) * new, longest + new)
    models: tuple[ModelName, ...] = ("reference", "policy") if first else ("policy",)
    for model in models:
        tally.add(
            "generations",
            decode_calls=shape.layers * new,
            decode_tokens=shape.layers * len(prompts) * (longest + new - 1),
            decode_steps=new,
            head_rows=len(prompts) * new,
            head_calls=new,
        )
        for _ in range(new if job.spread else 0):
            tally.hold("generations", model, range(shape.layers))
        tally.up("generations", "reference", range(shape.layers), read)
        tally.read("generations", read.entries)


def _continued_prompts(job: Job) -> list[int]:
    """Tokens of each prompt that is continued."""
    drawn = islice(distinct_prompts(job.pairs, bool), job.config.generations.prompts)
    return [len(prompt) for _, prompt in drawn]


def _statistics(tally: Tally) -> None:
    """Intervals of what was measured, and the localization, on the process that makes the record."""
    job = tally.job
    localization = job.config.localization
    pairs, layers = len(job.pairs), job.shape.layers
    tally.add("statistics", estimates=_RESAMPLED * layers * pairs)
    if localization.enabled and job.config.patching.enabled:
        paths = localization.folds * (5 + localization.permutations) + localization.selection_resamples
        tally.add("statistics", fits=paths * pairs * layers)
