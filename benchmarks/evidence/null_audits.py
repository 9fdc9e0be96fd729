"""How often does an audit claim a localization where no preference was learned? And where one was?

    python benchmarks/evidence/null_audits.py --audits 240 --processes 2 --json null_audits.json  # 20 minutes on two cores
    python benchmarks/evidence/null_audits.py --pairs 24 --audits 240 --processes 2                   # the fewest that claim
    python benchmarks/evidence/null_audits.py --audits 24                                             # a taste

Null models of ``align_audit.lab.planting.plant_nothing``, in turn: weight noise in every layer (of 0.3 % to 10 % of its norm),
the same orthogonal to the margin's gradient, DPO on pairs half of whose labels are swapped, and next-token training on both
completions. Each is audited with the default settings on its own 64 probe pairs (``--pairs``). Whatever it claims is false.
Printed per kind and base model: claims with Wilson's interval, what spoke against the others, how often each control passes.

``--trained`` audits runs that did learn: DPO with some layers S at the full rate and the rest at a tenth, and counts how
often the claim is made and names S.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from shares import share

KINDS = ("weight_noise", "orthogonal_noise", "shuffled_labels", "language_modelling")
SIZES = (0.003, 0.01, 0.03, 0.1)
STEPS = (8, 24)
RATES = (1e-4, 3e-4)
PAIRS = 64
"""Probe pairs of an audit, where nothing else is asked for; each has a prompt of its own."""
TRAINING_PAIRS = 192
PROBES_FROM = 10_000
"""Seeds of probe pairs, apart from those of the pairs that anything is trained on."""
SETTINGS: dict[str, Any] = {
    "low_rank": {"enabled": False}, "spinal": {"enabled": False}, "progress": False,
}  # fmt: skip
"""What the claim does not read is left out; the rest is as it comes."""

_bases: dict[str, tuple[Any, Any, list[dict[str, str]]]] = {}


def base(family: str, folder: str | None) -> tuple[Any, Any, list[dict[str, str]]]:
    """A base model, its tokenizer and training pairs; kept for the next audit of this process."""
    if family not in _bases:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from align_audit.lab.bases import base_dir
        from align_audit.lab.corpus import preference_pairs

        torch.set_num_threads(1)
        where = base_dir(family, None if folder is None else Path(folder))
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
        _bases[family] = (model, AutoTokenizer.from_pretrained(where), preference_pairs(TRAINING_PAIRS, 77))
    return _bases[family]


def audited(policy: Any, reference: Any, tokenizer: Any, number: int, pairs: int) -> dict[str, Any]:
    """What an audit on so many fresh probe pairs says."""
    from align_audit.auditing.once import audit_once
    from align_audit.config import AuditConfig
    from align_audit.lab.corpus import preference_pairs
    from align_audit.models.reference import resolve_reference
    from align_audit.probes.pairs import ProbeSet

    probes = ProbeSet.from_dataset(preference_pairs(pairs, PROBES_FROM + number), tokenizer, max_pairs=pairs)
    config = AuditConfig.from_dict({**SETTINGS, "seed": number})
    record = audit_once(policy, resolve_reference(policy, reference), probes, config).record
    assert record.finding is not None
    assert record.patching is not None
    shift = record.margins.shift
    return {
        "claimed": record.finding.localized,
        "layers": record.finding.layers,
        "words": record.finding.words,
        "peak": record.patching.peak_layer,
        "standing_out": record.patching.standing_out.layers if record.patching.standing_out else [],
        "shift": [shift.mean, shift.low, shift.high],
        "controls": {name: getattr(record.controls, name).verdict for name in type(record.controls).model_fields},
    }


def null_audit(number: int, family: str, folder: str | None, pairs: int) -> dict[str, Any]:
    """One null model and its audit."""
    from align_audit.lab.planting import plant_nothing
    from align_audit.probes.pairs import ProbeSet

    began = time.perf_counter()
    model, tokenizer, rows = base(family, folder)
    kind: Any = KINDS[number % len(KINDS)]
    turn = number // len(KINDS)
    chosen = random.Random(number).sample(rows, 96)
    planting = ProbeSet.from_dataset(chosen, tokenizer, max_pairs=len(chosen))
    how = {"size": SIZES[turn % 4], "steps": STEPS[turn % 2], "learning_rate": RATES[turn // 2 % 2]}
    planted = plant_nothing(model, planting, kind, seed=number, tokenizer=tokenizer, rows=chosen, **how)
    return {
        "number": number, "kind": kind, "family": family, **how, **audited(planted.policy, model, tokenizer, number, pairs),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def trained_audit(number: int, family: str, folder: str | None, pairs: int) -> dict[str, Any]:
    """One DPO run with one or two layers at the full rate, the rest at a tenth, and its audit."""
    from align_audit.lab.planting import train_dpo

    began = time.perf_counter()
    model, tokenizer, rows = base(family, folder)
    count = int(model.config.num_hidden_layers)
    layers = sorted(random.Random(number).sample(range(count), 1 + number // 3 % 2))
    chosen = random.Random(number).sample(rows, 160)
    steps = (20, 60)[number % 2]
    planted = train_dpo(model, tokenizer, chosen, layers, rest=0.1, steps=steps, learning_rate=3e-4, seed=number)
    return {
        "number": number, "kind": f"{len(layers)} of {count} layers", "family": family, "steps": steps,
        "planted": layers, **audited(planted.policy, model, tokenizer, number, pairs),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def report_null(rows: list[dict[str, Any]]) -> None:
    """Claims, reasons and controls."""
    print(f"\nfalse claims of a localization   {share(sum(row['claimed'] for row in rows), len(rows))}")
    for key in ("kind", "family"):
        for value in sorted({row[key] for row in rows}):
            own = [row for row in rows if row[key] == value]
            beyond = sum(row["shift"][1] > 0 for row in own)
            print(
                f"  {value:<22} {share(sum(row['claimed'] for row in own), len(own))}   mean shift above 0 with its "
                f"interval: {beyond}"
            )
    against: Counter[str] = Counter()
    for row in rows:
        if not row["claimed"]:
            words = re.sub(r"[-+]?\d[\d.,–e-]*", "#", row["words"].removeprefix("no localization claimed: "))
            against.update({part.split(" (")[0][:60] for part in words.split("; ")})
    print("what spoke against a claim:")
    for words, count in against.most_common(8):
        print(f"  {count:4d}  {words}")
    print("controls that passed, of those that ran:")
    for name in rows[0]["controls"]:
        verdicts = Counter(row["controls"][name] for row in rows)
        print(f"  {name:<18} {share(verdicts['passed'], verdicts['passed'] + verdicts['failed'])}")


def report_trained(rows: list[dict[str, Any]]) -> None:
    """How often S is what stands out, and how often the claim is made and names it."""
    print("\nDPO with layers S at the full rate and the rest at a tenth")
    for kind in (*sorted({row["kind"] for row in rows}), None):
        own = [row for row in rows if kind in (None, row["kind"])]
        right = sum(row["standing_out"] == row["planted"] for row in own)
        claims = [row for row in own if row["claimed"]]
        print(f"  {kind or 'all':<18} the layers that stand out are S   {share(right, len(own))}")
        print(f"  {'':<18} a localization is claimed         {share(len(claims), len(own))}")
        named = sum(row["layers"] == row["planted"] for row in claims)
        print(f"  {'':<18} and names S                       {share(named, len(claims))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=int, default=240)
    parser.add_argument("--first", type=int, default=0, help="number of the first audit, which seeds everything")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="probe pairs of an audit")
    parser.add_argument("--families", nargs="+", default=["llama", "gpt2", "gemma2"])
    parser.add_argument("--bases", help="folder of the pretrained families; default: the cache")
    parser.add_argument("--trained", action="store_true", help="runs that learned a preference, instead of null models")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    work = trained_audit if options.trained else null_audit
    with concurrent.futures.ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        # Families in blocks, so that every kind meets every family.
        jobs = [
            pool.submit(
                work,
                number,
                options.families[number // len(KINDS) % len(options.families)],
                options.bases,
                options.pairs,
            )
            for number in range(options.first, options.first + options.audits)
        ]
        for done in concurrent.futures.as_completed(jobs):
            rows.append(done.result())
            row = rows[-1]
            print(
                f"{len(rows):4d} {row['family']:<7} {row['kind']:<19} {row.get('planted', '')} shift "
                f"{row['shift'][0]:+.3f}: {row['words'][:150]}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    rows.sort(key=lambda row: row["number"])
    (report_trained if options.trained else report_null)(rows)
    print(
        f"\n{len(rows)} audits of {options.pairs} pairs; {time.perf_counter() - began:.0f} s in {options.processes} processes"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
