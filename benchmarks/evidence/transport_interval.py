"""Does the interval of a drawn transport hold? Coverage of the mean over all rows, over 2,000 draws of the rows.

    python benchmarks/evidence/transport_interval.py                      # the shipped model, a minute on one core
    python benchmarks/evidence/transport_interval.py --first-seed 9001    # draws that nobody has looked at
    python benchmarks/evidence/transport_interval.py --model PATH --policy PATH [--pairs 8]     # two folders of causal LMs

All rows of some preference pairs walk up the layers of both models once, whose means are the truth. Then rows are drawn as an
audit with another ``seed`` draws them (the hash of what stands before a position), by the rule that an audit goes by
(``spinal.transport_rows: auto``: portions, until every layer's standard error is at most 2 % of its mean), and mean ± 1.96
standard errors is compared with the truth: of each layer in each model, of the difference of both, and of what of
``delta_align`` is transport. Printed: the least, mean and largest coverage over layers, how many rows were drawn, the largest
error against the 2 %, and how far the policy's coherence moves with the draw. Monte Carlo error: 0.5 points at 2,000
draws, 1.5 at 200.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_audit import AuditConfig, ProbeSet
from align_audit.auditing.measurements.lens_walk import SHARE, travelled
from align_audit.auditing.measurements.measurement import AuditTask, RecordedBatch
from align_audit.auditing.measurements.spinal import Spinal
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.session.walk import Session
from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import preference_pairs
from align_audit.measures.row_sample import sampling_error
from align_audit.measures.spinal import coherence, terminal_layers
from align_audit.models.reference import resolve_reference

Z = 1.96


@dataclass
class Walked:
    """Rows that have all walked, in the order of a draw."""

    distances: np.ndarray

    def up_to(self, count: int, block: int | None = None) -> np.ndarray:
        """As a walk gives them."""
        return self.distances[:count]


def models_of(options: argparse.Namespace) -> tuple[Any, Any, Any, list[dict[str, str]]]:
    """Policy, reference, tokenizer and pairs."""
    folder = options.model or MODEL_DIR
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if options.policy:
        policy = AutoModelForCausalLM.from_pretrained(options.policy, dtype=torch.float32).eval()
    else:
        policy = copy.deepcopy(reference)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)
    root = Path(os.environ.get("ALIGN_AUDIT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    path = root / "hh-harmless" / "pairs.jsonl.gz"
    if options.model and path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    else:
        rows = preference_pairs(4 * options.pairs, seed=5)
    return policy, reference, AutoTokenizer.from_pretrained(folder), rows


@dataclass
class Truth:
    """What is so of all rows: distances [rows, L − 1] in policy and reference, contraction [L], and for each draw the order
    [draws, rows] it takes the rows in."""

    distances: list[np.ndarray]
    contraction: list[np.ndarray]
    orders: np.ndarray

    def coherence(self, distances: list[np.ndarray]) -> float:
        """Of the policy's trace, with the transport of some rows or of all."""
        policy, reference = (
            (slopes, each.mean(axis=0)) for slopes, each in zip(self.contraction, distances, strict=True)
        )
        value, _ = coherence(*policy, *reference, terminal_layers(len(policy[0])))
        return value


def walk(policy: Any, reference: Any, probes: ProbeSet, seeds: list[int]) -> Truth:
    """Let all rows travel in both models, and draw their order with each seed."""
    everything = {"transport_rows": "all", "max_rows": 10**7, "gradient_concentration": False}

    def task_of(session: Session) -> Spinal:
        task = AuditTask(session, AuditRequest(probes, session.config), ReferenceCache())
        task.begin((Spinal,))
        return task[Spinal]

    def config(seed: int) -> AuditConfig:
        return AuditConfig.from_dict({"seed": seed, "spinal": everything, "patching": {"enabled": False}})

    with OpenModels(policy, resolve_reference(policy, reference)) as models:
        session = Session(models, probes.pairs, config(0), truncation_mode=probes.truncation_mode)
        measured = task_of(session)
        session.each_batch(lambda batch: measured.commit(RecordedBatch(batch, *session.record_both(batch))))
        measured.look_closer(lambda: None)
        orders = []
        for seed in [0, *seeds]:
            session.config = config(seed)
            sampled = task_of(session)._sampled
            assert sampled is not None
            orders.append(np.argsort(sampled.keys[sampled.kept], kind="stable"))
    # The first is the order that the distances come in: back to the rows' own, and from there to each draw's.
    home = np.argsort(orders[0])
    spinal, _ = measured.part()
    assert spinal is not None
    slopes = [np.array(trace.contraction) for trace in (spinal.policy, spinal.reference)]
    return Truth([each[home] for each in measured._distances], slopes, np.stack(orders[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the reference; default: the shipped model")
    parser.add_argument("--policy", help="folder of the policy; default: the reference plus weight noise")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=2001, help="of the first draw; each takes the next one")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy, reference, tokenizer, rows = models_of(options)
    probes = ProbeSet.from_dataset(rows, tokenizer, max_pairs=options.pairs, max_length=320)
    seeds = list(range(options.first_seed, options.first_seed + options.draws))
    everything = walk(policy, reference, probes, seeds)
    distances = everything.distances
    population, layers = distances[0].shape
    inner = [layer for layer in terminal_layers(layers + 1) if layer < layers]

    def columns(both: list[np.ndarray]) -> dict[str, np.ndarray]:
        change = both[0] - both[1]
        return {
            "policy": both[0], "reference": both[1], "difference": change,
            "of delta_align": change[:, inner].mean(axis=1, keepdims=True),
        }  # fmt: skip

    truth = {name: values.mean(axis=0) for name, values in columns(distances).items()}
    hits: dict[str, list[np.ndarray]] = {name: [] for name in truth}
    drawn, errors, coherences = [], [], []
    for order in everything.orders:
        sample = travelled([Walked(each[order]) for each in distances], "auto", population, population)
        drawn.append(len(sample[0]))
        coherences.append(everything.coherence(sample))
        for name, values in columns(sample).items():
            error = sampling_error(values, population)
            # All rows, in another order: their mean is the truth but for rounding.
            slack = 1e-12 * np.abs(truth[name])
            hits[name].append(np.abs(values.mean(axis=0) - truth[name]) <= Z * error + slack)
            if name in ("policy", "reference"):
                errors.append(float((error / values.mean(axis=0)).max()))
    print(f"{population} rows of {len(probes)} pairs, {layers + 1} layers, {options.draws} draws")
    print(f"rows drawn: {np.min(drawn)} to {np.max(drawn)}, median {np.median(drawn):.0f}")
    print(f"largest standard error over the mean: {max(errors):.4f} (allowed {SHARE})")
    print(
        f"coherence of the policy: {everything.coherence(distances):.4f} over all rows; {np.min(coherences):.4f} to "
        f"{np.max(coherences):.4f}, standard deviation {np.std(coherences):.4f} over draws"
    )
    print(f"{'':16} {'least':>7} {'mean':>7} {'largest':>8}")
    covered = {name: np.mean(each, axis=0) for name, each in hits.items()}
    for name, share in covered.items():
        print(f"{name:16} {share.min():7.1%} {share.mean():7.1%} {share.max():8.1%}")
    if options.json:
        figures = {
            "rows": population,
            "drawn": drawn,
            "coherence": coherences,
            "coverage": {name: each.tolist() for name, each in covered.items()},
        }
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
