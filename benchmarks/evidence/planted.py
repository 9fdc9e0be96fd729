"""How often does the audit find what was planted? Policies of known truth, over three architectures and many seeds.

    python benchmarks/evidence/planted.py --plantings 48 --json results.json    # about ten minutes on one core
    python benchmarks/evidence/planted.py --plantings 6 --kinds layer           # a taste

Base models: the shipped Llama, and a GPT-2, a Gemma 2 and a Qwen3 that ``python -m align_audit.lab.bases`` pretrains into
the cache (``--bases DIR`` for another folder; those that are missing are trained first, minutes each). Kinds:

    layer       one layer carries the preference, all others move by noise; found: it is ``patching.peak_layer``
    pair        two layers carry it; found: both are the top two of the mean block transplants
    window      two adjacent layers carry it; found: of all windows of two layers theirs has the largest sufficiency
    site        the attention or the MLP of one layer carries it; found: of all attention and MLP outputs it has the largest
                sufficiency
    head        one attention head carries it; found: of all heads of all layers it has the largest sufficiency
    rank        a change of rank 1, 2, 4, 8 of one layer's output; found: ``rank_95`` of the shift basis within 1 of it
    prompt      the margin moves through prompt positions only; found: patching the planted layer there recovers at least
                three quarters of it, patching the completion at most one quarter
    completion  the same with the roles swapped; both are probed on the planting pairs, all others on pairs of their own
    nothing     no preference was learned; right: the mean shift stays below a tenth of what is planted elsewhere

How hard a planting is, is measured and not set: the *effect ratio* is |effect of restoring what was planted| over the
largest |effect of restoring any other of its kind| (layer, site, head), both as plain forwards of the policy with the
base's weights put back. (For a pair and a window, the weaker of the two layers counts.) Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shares import share
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_audit.auditing.once import audit_once
from align_audit.config import AuditConfig
from align_audit.lab.bases import base_dir
from align_audit.lab.corpus import preference_pairs
from align_audit.lab.planting import (
    Planted,
    few_prompts,
    margin_gradient,
    margins,
    measure_truth,
    patched_shift,
    plant_attention,
    plant_completion_only,
    plant_head,
    plant_layers,
    plant_mlp,
    plant_nothing,
    plant_prompt_only,
    plant_subspace,
)
from align_audit.lab.planting.parts import Part, count_heads, head_parts, site_part
from align_audit.lab.planting.truth import mixed
from align_audit.models.reference import resolve_reference
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditRecord

ARCHITECTURES = ("llama", "gpt2", "gemma2")
LINEAR = ("llama", "gpt2", "qwen3")
"""Those that add what an MLP writes to the stream as it is, so that a rank can be planted (Gemma 2 normalizes it)."""
DISTRACTIONS = (2.0, 4.0, 6.0, 8.0, 12.0, 20.0)
HEAD_DISTRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.5)
"""There are many more heads than layers, and each other one moves by this."""
RANKS = (1, 2, 4, 8)
BINS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0, math.inf)
CLEAR = 2.0
PLANTING_PAIRS, PROBE_PAIRS, PROMPTS = 32, 24, 3
PLANTING_SEED, PROBE_SEED = 101, 202
SHIFT = 2.0
QUICK: dict[str, Any] = {
    "low_rank": {"enabled": False},
    "spinal": {"enabled": False},
    "localization": {"enabled": False},
    "statistics": {"bootstrap_resamples": 200},
    "patching": {"noise_draws": 0, "reverse": False, "embedding": False},
}


def short_pairs(count: int, seed: int) -> list[dict[str, str]]:
    """The shortest third of three times as many pairs, in random order: half the time of any."""
    rows = preference_pairs(3 * count, seed)
    rows = sorted(rows, key=lambda row: max(len(row["prompt"] + row[side]) for side in ("chosen", "rejected")))[:count]
    random.Random(seed).shuffle(rows)
    return rows


class Bench:
    """One base model with its planting and probe pairs."""

    def __init__(self, family: str, bases: Path | None) -> None:
        folder = base_dir(family, bases)
        self.family = family
        self.base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rows = short_pairs(PLANTING_PAIRS, PLANTING_SEED)
        self.planting = self.probe_set(self.rows)
        self.probes = self.probe_set(short_pairs(PROBE_PAIRS, PROBE_SEED))
        # Where in the sequence, not on which pairs: the positions' plantings are looked at on the very pairs they were
        # planted with. On others of these few prompts they shift the margin too little to be located.
        self.few = self.probe_set(few_prompts(short_pairs(PLANTING_PAIRS, PROBE_SEED + 1), PROMPTS))
        self.gradient = margin_gradient(self.base, self.planting)
        self.num_layers = int(self.base.config.num_hidden_layers)

    def probe_set(self, rows: list[dict[str, str]]) -> ProbeSet:
        return ProbeSet.from_dataset(rows, self.tokenizer, max_pairs=len(rows))

    def audit(self, policy: Any, probes: ProbeSet, sites: Any = (), **changes: dict[str, Any]) -> AuditRecord:
        settings = {**QUICK, **{part: {**QUICK.get(part, {}), **values} for part, values in changes.items()}}
        settings["sites"] = sites
        config = AuditConfig.from_dict(settings)
        return audit_once(policy, resolve_reference(policy, self.base), probes, config).record


def plant_a_layer(bench: Bench, number: int) -> dict[str, Any]:
    """One layer, at the next distraction."""
    layer = random.Random(f"layer {number}").randrange(bench.num_layers)
    return _plant_layers(bench, number, (layer,), SHIFT)


def plant_a_pair(bench: Bench, number: int) -> dict[str, Any]:
    """Two layers, at the next distraction."""
    layers = sorted(random.Random(f"pair {number}").sample(range(bench.num_layers), 2))
    return _plant_layers(bench, number, tuple(layers), 2 * SHIFT)


def _plant_layers(bench: Bench, number: int, layers: tuple[int, ...], shift: float) -> dict[str, Any]:
    distraction = DISTRACTIONS[number // len(ARCHITECTURES) % len(DISTRACTIONS)]
    planted = plant_layers(
        bench.base, bench.planting, layers, shift, distraction, seed=number, gradient=bench.gradient
    )  # fmt: skip
    truth = measure_truth(planted, bench.base, bench.probes, sufficiency=False)
    necessity = [one.necessity for one in truth.layers]
    other = max(abs(value) for layer, value in enumerate(necessity) if layer not in layers)
    record = bench.audit(planted.policy, bench.probes)
    assert record.patching is not None
    transplants = [estimate.mean for estimate in record.patching.block_transplant]
    top = sorted(np.argsort(transplants)[-len(layers) :].tolist())
    found = top == list(layers)
    if len(layers) == 1:
        assert (record.patching.peak_layer == layers[0]) == found
    standing = record.patching.standing_out
    return {
        "layers": list(layers),
        "distraction": distraction,
        "ratio": min(abs(necessity[layer]) for layer in layers) / other,
        "shift": truth.shift,
        "necessity": necessity,
        "block_transplant": transplants,
        "standing_out": standing.layers if standing is not None else [],
        "found": found,
    }


def plant_a_window(bench: Bench, number: int) -> dict[str, Any]:
    """Two adjacent layers, at the next distraction."""
    first = random.Random(f"window {number}").randrange(bench.num_layers - 1)
    distraction = DISTRACTIONS[number // len(ARCHITECTURES) % len(DISTRACTIONS)]
    layers = (first, first + 1)
    planted = plant_layers(bench.base, bench.planting, layers, 2 * SHIFT, distraction, number, gradient=bench.gradient)
    necessity = [one.necessity for one in measure_truth(planted, bench.base, bench.probes, sufficiency=False).layers]
    other = max(abs(value) for layer, value in enumerate(necessity) if layer not in layers)
    record = bench.audit(planted.policy, bench.probes, [{"site": "block", "width": 2}])
    return {
        "layers": list(layers),
        "distraction": distraction,
        "ratio": min(abs(necessity[layer]) for layer in layers) / other,
        **_largest(record, (first, None), "block"),
    }


def plant_a_site(bench: Bench, number: int) -> dict[str, Any]:
    """The attention or the MLP of one layer, in turn, at the next distraction."""
    layer = random.Random(f"site {number}").randrange(bench.num_layers)
    kind = ("attention", "mlp")[number // len(ARCHITECTURES) % 2]
    distraction = DISTRACTIONS[number // len(ARCHITECTURES) // 2 % len(DISTRACTIONS)]
    plant: Any = plant_attention if kind == "attention" else plant_mlp
    planted = plant(bench.base, bench.planting, layer, SHIFT / 2, distraction, number, gradient=bench.gradient)
    every: Any = [
        site_part(bench.base, other, site) for other in range(bench.num_layers) for site in ("attention", "mlp")
    ]
    record = bench.audit(planted.policy, bench.probes, [{"site": "attention_output"}, {"site": "mlp_output"}])
    return {
        "layers": [layer],
        "distraction": distraction,
        "ratio": _ratio(bench, planted, every),
        "site": kind,
        **_largest(record, (layer, None), f"{kind}_output"),
    }


def plant_a_head(bench: Bench, number: int) -> dict[str, Any]:
    """One attention head, at the next distraction."""
    draw = random.Random(f"head {number}")
    layer, head = draw.randrange(bench.num_layers), draw.randrange(count_heads(bench.base))
    distraction = HEAD_DISTRACTIONS[number // len(ARCHITECTURES) % len(HEAD_DISTRACTIONS)]
    planted = plant_head(
        bench.base, bench.planting, layer, head, SHIFT / 4, distraction, number, gradient=bench.gradient
    )
    every = [part for other in range(bench.num_layers) for part in head_parts(bench.base, other)]
    record = bench.audit(planted.policy, bench.probes, [{"site": "head"}])
    return {
        "layers": [layer],
        "head": head,
        "distraction": distraction,
        "ratio": _ratio(bench, planted, every),
        **_largest(record, (layer, head), "head"),
    }


def _ratio(bench: Bench, planted: Planted, every: list[Part]) -> float:
    """|effect of restoring what was planted| over the largest of any other of its kind."""
    new = float(margins(planted.policy, bench.probes).mean())

    def necessity(part: Part) -> float:
        return new - float(margins(planted.policy, bench.probes, mixed(planted.policy, bench.base, [part])).mean())

    own = abs(necessity(planted.truth.units[0]))
    return own / max(abs(necessity(part)) for part in every if part not in planted.truth.units)


def _largest(record: AuditRecord, unit: tuple[int, int | None], site: str) -> dict[str, Any]:
    """Whether that unit has the largest mean sufficiency of all units of all curves."""
    units = [
        (estimate.mean, curve.site, (place.layer, place.head))
        for curve in record.sites
        for place, estimate in zip(curve.units, curve.sufficiency, strict=True)
    ]
    mean, where, largest = max(units, key=lambda one: one[0])
    return {
        "shift": record.margins.shift.mean,
        "largest": [where, *largest],
        "sufficiency": mean,
        "found": (where, largest) == (site, unit),
    }


def plant_a_rank(bench: Bench, number: int) -> dict[str, Any]:
    """A change of known rank at some layer below the last."""
    rank = RANKS[number // len(LINEAR) % len(RANKS)]
    # The same rank in the same architecture comes again at another layer.
    layer = (number + 2 * (number // (len(LINEAR) * len(RANKS)))) % (bench.num_layers - 1)
    planted = plant_subspace(bench.base, bench.planting, layer, rank, SHIFT)
    ranks = sorted({*range(1, rank + 3), 12, 16, 24})
    record = bench.audit(
        planted.policy,
        bench.probes,
        low_rank={"enabled": True, "bases": ["shift"], "layers": [layer], "ranks": ranks, "random_draws": 0},
    )
    curve = record.low_rank["shift"][layer]
    return {
        "layers": [layer],
        "rank": rank,
        "rank_95": curve.rank_95,
        "effect_fraction": [fraction.mean for fraction in curve.effect_fraction],
        "ranks": ranks,
        "shift": record.margins.shift.mean,
        "found": abs(curve.rank_95 - rank) <= 1,
    }


def plant_at_prompt(bench: Bench, number: int) -> dict[str, Any]:
    """Through the prompt, about half way up."""
    layer = bench.num_layers // 2 - number // len(ARCHITECTURES) % 2
    planted = plant_prompt_only(bench.base, bench.few, layer, SHIFT)
    return _patch_both(bench, planted.policy, layer, "prompt", "completion")


def plant_at_completion(bench: Bench, number: int) -> dict[str, Any]:
    """Through the completion, about half way up."""
    layer = bench.num_layers // 2 + number // len(ARCHITECTURES) % 2
    planted = plant_completion_only(bench.base, bench.few, layer, SHIFT)
    return _patch_both(bench, planted.policy, layer, "completion", "prompt")


def _patch_both(bench: Bench, policy: Any, layer: int, here: Any, there: Any) -> dict[str, Any]:
    recovery, effect, truth = {}, {}, {}
    for positions in (here, there):
        record = bench.audit(policy, bench.few, patching={"positions": positions})
        assert record.patching is not None
        # Of few prompts: too few to know an interval of the shift, without which a record has no recovery.
        recovery[positions] = record.patching.effect[layer].mean / record.margins.shift.mean
        effect[positions] = record.patching.effect[layer].mean
        truth[positions] = patched_shift(policy, bench.base, layer, bench.few, positions)
    return {
        "layers": [layer],
        "recovery": recovery,
        "effect": effect,
        "truth": truth,
        "shift": record.margins.shift.mean,
        "shift_interval": [record.margins.shift.low, record.margins.shift.high],
        "found": recovery[here] >= 0.75 and abs(recovery[there]) <= 0.25,
    }


def plant_no_preference(bench: Bench, number: int) -> dict[str, Any]:
    """The next null kind."""
    kinds: Any = ("weight_noise", "orthogonal_noise", "shuffled_labels", "language_modelling")
    kind = kinds[number // len(ARCHITECTURES) % len(kinds)]
    planted = plant_nothing(
        bench.base, bench.planting, kind, seed=number, tokenizer=bench.tokenizer, rows=bench.rows
    )  # fmt: skip
    record = bench.audit(planted.policy, bench.probes)
    assert record.patching is not None
    shift = record.margins.shift
    return {
        "layers": [],
        "null": kind,
        "shift": shift.mean,
        "shift_interval": [shift.low, shift.high],
        "interval_excludes_0": not shift.low <= 0 <= shift.high,
        "block_transplant": [estimate.mean for estimate in record.patching.block_transplant],
        "found": abs(shift.mean) < SHIFT / 10,
    }


@dataclass(frozen=True)
class Kind:
    """A kind of planting: how one is made and audited, in which architectures, and how many for ``--plantings`` n."""

    plant: Callable[[Bench, int], dict[str, Any]]
    architectures: tuple[str, ...]
    count: Callable[[int], int]


KINDS: dict[str, Kind] = {
    "layer": Kind(plant_a_layer, ARCHITECTURES, lambda n: n),
    "pair": Kind(plant_a_pair, ARCHITECTURES, lambda n: max(n // 2, 1)),
    "window": Kind(plant_a_window, ARCHITECTURES, lambda n: max(n // 2, 1)),
    "site": Kind(plant_a_site, ARCHITECTURES, lambda n: max(n // 2, 1)),
    "head": Kind(plant_a_head, ARCHITECTURES, lambda n: max(n // 2, 1)),
    "rank": Kind(plant_a_rank, LINEAR, lambda n: max(n // 2, 1)),
    "prompt": Kind(plant_at_prompt, ARCHITECTURES, lambda n: min(max(n // 8, 1), 6)),
    "completion": Kind(plant_at_completion, ARCHITECTURES, lambda n: min(max(n // 8, 1), 6)),
    "nothing": Kind(plant_no_preference, ARCHITECTURES, lambda n: min(max(n // 4, 1), 12)),
}


def counted(rows: list[dict[str, Any]]) -> str:
    """Found of all, with the interval."""
    return share(sum(row["found"] for row in rows), len(rows))


def report(results: list[dict[str, Any]]) -> None:
    """The tables, on standard output."""
    of = {kind: [row for row in results if row["kind"] == kind] for kind in KINDS}
    for kind, what in (
        ("layer", "the planted layer is the peak"),
        ("pair", "both layers are the top two"),
        ("window", "theirs is the largest of all windows of two layers"),
        ("site", "it is the largest of all attention and MLP outputs"),
        ("head", "it is the largest of all heads"),
    ):
        if not of[kind]:
            continue
        print(f"\n{kind}: {what}, by the measured ratio of planted to distracting effect")
        for low, high in itertools.pairwise(BINS):
            rows = [row for row in of[kind] if low <= row["ratio"] < high]
            print(f"  {low:4.1f} ≤ ratio < {high:<4}  {counted(rows)}")
        clear = [row for row in of[kind] if row["ratio"] >= CLEAR]
        print(f"  clear (≥ {CLEAR:g})        {counted(clear)}")
        for family in ARCHITECTURES:
            print(f"    {family:<16}  {counted([row for row in clear if row['family'] == family])}")
        if kind in ("layer", "pair"):
            exactly = [{"found": row["standing_out"] == row["layers"]} for row in clear]
            print(f"  clear, and no other stands out with it   {counted(exactly)}")
        for distraction in HEAD_DISTRACTIONS if kind == "head" else DISTRACTIONS:
            rows = [row for row in of[kind] if row["distraction"] == distraction]
            if rows:
                middle = float(np.median([row["ratio"] for row in rows]))
                print(f"  distraction {distraction:4g}      {counted(rows)}  median ratio {middle:.2f}")
        missed = sorted((row["ratio"] for row in of[kind] if not row["found"]), reverse=True)
        print(f"  missed at ratios: {', '.join(f'{ratio:.2f}' for ratio in missed) or 'none'}")
    if of["rank"]:
        print("\nrank: rank_95 of the shift basis within 1 of the planted rank")
        for rank in RANKS:
            rows = [row for row in of["rank"] if row["rank"] == rank]
            seen = ", ".join(f"{row['rank_95']:g}" for row in rows)
            print(f"  rank {rank}               {counted(rows)}  rank_95: {seen}")
    for kind in ("prompt", "completion"):
        if of[kind]:
            print(f"\n{kind}: recovery at the planted layer, patched at prompt and at completion   {counted(of[kind])}")
            for row in of[kind]:
                both = ", ".join(
                    f"{positions} {row['recovery'][positions]:.2f}" for positions in ("prompt", "completion")
                )
                error = max(abs(row["effect"][where] - row["truth"][where]) for where in row["truth"])
                print(
                    f"  {row['family']:<8} layer {row['layers'][0]}: {both}; shift {row['shift']:.2f} nats, "
                    f"farthest from plain patching {error:.1e} nats"
                )
    if of["nothing"]:
        print(f"\nnothing: the mean shift stays below {SHIFT / 10:g} nats   {counted(of['nothing'])}")
        for null in sorted({row["null"] for row in of["nothing"]}):
            rows = [row for row in of["nothing"] if row["null"] == null]
            shifts = ", ".join(f"{row['shift']:+.3f}" for row in rows)
            beyond = sum(row["interval_excludes_0"] for row in rows)
            print(f"  {null:<20}  shifts {shifts} nats; {beyond} of {len(rows)} intervals exclude 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plantings", type=int, default=48, help="single layers; the other kinds in proportion")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--families", nargs="+", choices=sorted({*ARCHITECTURES, *LINEAR}), help="only plantings into these"
    )
    parser.add_argument("--bases", type=Path, help="folder of the pretrained families; default: the cache")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(options.threads)
    benches: dict[str, Bench] = {}
    results: list[dict[str, Any]] = []
    began = time.perf_counter()
    for name in options.kinds:
        kind = KINDS[name]
        for number in range(kind.count(options.plantings)):
            family = kind.architectures[number % len(kind.architectures)]
            if options.families and family not in options.families:
                continue
            if family not in benches:
                benches[family] = Bench(family, options.bases)
            started = time.perf_counter()
            try:
                row = kind.plant(benches[family], number)
            except ValueError as error:  # a shift that cannot be reached there is no planting
                row = {"layers": [], "not_planted": str(error)}
            row = {"kind": name, "family": family, "number": number, **row, "seconds": time.perf_counter() - started}
            results.append(row)
            said = "not planted" if "not_planted" in row else "found" if row["found"] else "MISSED"
            ratio = f" ratio {row['ratio']:.2f}" if "ratio" in row else ""
            print(
                f"{name:<10} {number:3d} {family:<7} {row['layers']}{ratio} {said}, {row['seconds']:.1f} s", flush=True
            )
            if options.json:
                options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    planted = [row for row in results if "not_planted" not in row]
    report(planted)
    seconds = time.perf_counter() - began
    median = float(np.median([row["seconds"] for row in results]))
    missing = len(results) - len(planted)
    print(f"\n{len(planted)} plantings, {missing} could not be planted; {seconds:.0f} s, median {median:.1f} s each")


if __name__ == "__main__":
    main()
