"""Do the same inputs still give the same numbers? Records made before and after a change, compared leaf by leaf.

    python benchmarks/evidence/same_numbers.py make DIR              # about three minutes on one core
    python benchmarks/evidence/same_numbers.py compare BEFORE AFTER  # 1 when anything differs
    python benchmarks/evidence/same_numbers.py make DIR --only 'audit-*'          # a quick look, without the demo
    python benchmarks/evidence/same_numbers.py compare BEFORE AFTER --only 'audit-*'

``make`` runs the ``align_audit`` of the current directory, so that one copy of this file measures any checkout; it uses the
public names only, which stay where they are when files move. It writes gzipped JSON: every record of the demo's two runs,
of DPO runs with LoRA and of audits and transfers of tiny models, with what lies beside them: the arrays of each step,
the alerts, the tables and the TensorBoard curves.

``compare`` asks for equality, bit by bit, of everything but dates, seconds, memory and the versions of packages. Another
processor rounds otherwise: ``--tolerance 1e-4`` allows relative differences up to that, also of numbers inside sentences, and
looks at neither hashes of weights nor those of arrays. A field that was renamed, added or removed on purpose is written into
the tables below. Records are compared twice, as they were written and as the present ``AuditRecord.load`` reads them, migrated,
and count twice.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import gzip
import hashlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

RENAMED: dict[str, str] = {}
"""Fields that have another name on purpose: what to search in a path of BEFORE (a regular expression) → its name in AFTER."""
EXPECTED: dict[str, str] = {
    r"(.*\.)?schema_version": "5: a record may hold parts of measurements that it has no field for",
    r"(.*\.)?extra": "they stand there; empty in an audit of this package's own",
    r"(.*\.)?(policy_|reference_)?transport_(stderr|rows|change_stderr)": "8: transport may be of some of the rows",
    r"(.*\.)?delta_align_stderr": "8: so may delta_align",
    r"(.*\.)?(reasons\.)?cost\.(training_pairs|share_of_run)": "8: what an audit cost in the trainer's unit",
}
"""What is new, gone or different on purpose: a regular expression for the path of a field, of what holds it, or for the name of
a file that only one folder has → why. The command says how many leaves it did not compare for that."""
IGNORED = re.compile(
    r"(.*\.)?(created|time|versions|cost\.seconds|cost\.peak_memory|"
    r"occasion\.(share_spent|training_pair_seconds|unaffordable_seconds))(\..*)?"
)
"""What no two runs have in common: dates, seconds, memory and package versions. How much work an audit was
(``cost.forward_equivalents``) is compared."""
OTHER_BITS = re.compile(r"(.*\.)?(policy_hash|reference_hash|sha256)")
"""Hashes of what was computed: with a tolerance they say nothing."""

SUFFIX = ".json.gz"
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
SMALL = 200
"""Arrays of up to so many values are kept as they are; of larger ones a hash and some sums."""


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass
class Difference:
    """What two sets of leaves have in common, and what not."""

    leaves: int = 0
    largest: float = 0.0
    """Relative difference, over all numbers; infinite where one is not finite and the other is."""
    paths: list[str] = field(default_factory=list)
    """Each leaf that differs, in words."""
    expected: int = 0
    """Leaves that were not compared because they changed on purpose."""


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values below ``value``; an empty list or dict is a leaf too.

    Example:
        >>> list(leaves({"a": [1, {"b": "NaN"}], "c": {}}))
        [('a.0', 1), ('a.1.b', nan), ('c', {})]
    """
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in items:
            yield from leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        # As strings they survive any JSON reader; here they are numbers again.
        yield path, NOT_FINITE.get(value, value) if isinstance(value, str) else value


def compare_values(before: Any, after: Any, tolerance: float = 0.0) -> Difference:
    """Compare two parsed JSON documents, leaf by leaf."""
    found = Difference()
    old, new = _by_path(before, RENAMED), _by_path(after, {})
    for path in [*old, *(path for path in new if path not in old)]:
        if IGNORED.fullmatch(path) or (tolerance > 0 and OTHER_BITS.fullmatch(path)):
            continue
        if _is_expected(path):
            found.expected += 1
            continue
        found.leaves += 1
        if path not in new:
            found.paths.append(f"{path}: {_short(old[path])} → nothing")
        elif path not in old:
            found.paths.append(f"{path}: nothing → {_short(new[path])}")
        else:
            apart = distance(old[path], new[path], tolerance > 0)
            found.largest = max(found.largest, apart)
            if apart > tolerance:
                found.paths.append(f"{path}: {_short(old[path])} → {_short(new[path])}")
    return found


def _is_expected(path: str) -> bool:
    return any(re.fullmatch(rf"(?:{pattern})(?:\..*)?", path) for pattern in EXPECTED)


def _by_path(document: Any, renamed: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in leaves(document):
        for pattern, name in renamed.items():
            path = re.sub(pattern, name, path)
        if path in found:
            raise ValueError(f"two leaves have the path {path}: one of them would not be compared")
        found[path] = value
    return found


def distance(one: Any, other: Any, within_text: bool = False) -> float:
    """How far apart two leaves are: relative for numbers, 0 or infinity for all else. NaN equals NaN.

    Args:
        within_text: strings are as far apart as the numbers in them, where all else in them is equal.

    Example:
        >>> distance(1.0, 1), distance(math.nan, math.nan), distance(4.0, 5.0), distance(1, True)
        (0.0, 0.0, 0.2, inf)
        >>> distance("about 40 %", "about 50 %"), distance("about 40 %", "about 50 %", within_text=True)
        (inf, 0.2)
    """
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other)):
        if one == other or (math.isnan(one) and math.isnan(other)):
            return 0.0
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.inf
        return float(abs(one - other) / max(abs(one), abs(other)))
    if one == other and type(one) is type(other):
        return 0.0
    texts = isinstance(one, str) and isinstance(other, str)
    if within_text and texts and NUMBER.sub("#", one) == NUMBER.sub("#", other):
        both = [[float(text.replace("−", "-")) for text in NUMBER.findall(words)] for words in (one, other)]
        return max(distance(*pair) for pair in zip(*both, strict=True))
    return math.inf


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def compare(before: Path, after: Path, tolerance: float = 0.0, only: str = "*") -> int:
    """Compare two folders that ``make`` wrote, print what was seen, and return how many leaves differ."""
    names = {folder: {path.name for path in folder.glob(f"{only}{SUFFIX}")} for folder in (before, after)}
    if not names[before]:
        raise SystemExit(f"{before} holds no {only}{SUFFIX}; expected a folder that `make` wrote")
    total = differing = expected = 0
    for name in sorted(names[before] | names[after]):
        stem = name.removesuffix(SUFFIX)
        absent = [folder for folder in (before, after) if name not in names[folder]]
        if absent:
            expected, differing = expected + _is_expected(stem), differing + (not _is_expected(stem))
            print(f"{stem}: no such file in {absent[0]}")
            continue
        texts = [gzip.decompress((folder / name).read_bytes()) for folder in (before, after)]
        parsed = [json.loads(text) for text in texts]
        looks = [("", compare_values(parsed[0], parsed[1], tolerance))]
        if all(isinstance(values, dict) and "schema_version" in values for values in parsed):
            looks.append((", as read today", _as_read_today(texts, tolerance)))
        said = []
        for how, found in looks:
            total += found.leaves
            differing += len(found.paths)
            expected += found.expected
            said.append(f"{found.leaves} leaves{how}, {len(found.paths)} differ")
        largest = max(found.largest for _, found in looks)
        print(f"{stem}: {'; '.join(said)}; largest relative difference {largest:.3g}")
        for how, found in looks:
            # What differs in a record differs in it as it is read, too.
            paths = [path for path in found.paths if not how or path not in looks[0][1].paths]
            for path in paths[:5]:
                print(f"    {path}{how}")
            if len(paths) > 5:
                print(f"    and {len(paths) - 5} more{how}")
    if expected:
        print(f"not compared, since expected: {expected} ({'; '.join(f'{k}: {v}' for k, v in EXPECTED.items())})")
    print(f"{len(names[before] | names[after])} files, {total} leaves, {differing} differ")
    return differing


def _as_read_today(texts: list[bytes], tolerance: float) -> Difference:
    """The same records, loaded and saved by the present version. One that cannot be loaded is a difference."""
    from align_audit import AuditRecord, TransferRecord

    with tempfile.TemporaryDirectory() as folder:
        read = []
        for text in texts:
            path = Path(folder) / "record.json"
            path.write_bytes(text)
            kind: Any = TransferRecord if "cells" in json.loads(text) else AuditRecord
            try:
                kind.load(path).save(path)
            except Exception as error:  # whatever it raises is what is wanted here
                return Difference(leaves=1, largest=math.inf, paths=[f"cannot be loaded: {_short(str(error))}"])
            read.append(json.loads(path.read_bytes()))
    return compare_values(read[0], read[1], tolerance)


# --- making: what is kept of a record and of a run --------------------------------------------------------------------


@dataclass
class Scene:
    """Where things are: the checkout that is measured, a folder to work in, and the folder the evidence goes to."""

    root: Path
    work: Path
    out: Path
    _models: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @cached_property
    def shipped(self) -> Path:
        """The demo's model, wherever in the package it lies."""
        (found,) = (self.root / "align_audit").glob("*/assets/model")
        return found

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.shipped)

    def models(self, family: str = "llama", dtype: str = "float32") -> tuple[Any, Any]:
        """A tiny policy and its reference, the same ones each time: an audit leaves models as they were."""
        import torch

        if family not in self._models:
            reference = tiny_model(self, family)
            self._models[family] = preferring(reference, probes(self, 16, seed=20)), reference
        policy, reference = self._models[family]
        if dtype == "float32":
            return policy, reference
        precise = getattr(torch, dtype)
        return copy.deepcopy(policy).to(precise), copy.deepcopy(reference).to(precise)

    def keep(self, name: str, text: str) -> None:
        """Write one file; where things lay is no part of what was found."""
        for path, word in ((self.shipped, "SHIPPED"), (self.work, "WORK"), (self.root, "ROOT")):
            text = text.replace(str(path), word)
        # No name and no time in the header: the same text gives the same bytes.
        (self.out / f"{name}{SUFFIX}").write_bytes(gzip.compress(text.encode(), mtime=0))

    def keep_values(self, name: str, values: Any) -> None:
        """Write plain values."""
        self.keep(name, json.dumps(values))

    def keep_record(self, name: str, record: Any) -> None:
        """Write a record as it saves itself."""
        path = self.work / "record.json"
        record.save(path)
        self.keep(name, path.read_text(encoding="utf-8"))

    def keep_run(self, name: str, output: Path) -> None:
        """All that a run left: records, alerts, arrays, tables and curves."""
        from align_audit import AuditRun

        run = AuditRun.load(output)
        if run.failures:
            raise SystemExit(f"an audit of {name} broke:\n{run.failures[0].error}")
        if not run.records:
            raise SystemExit(f"no audit in {name}")
        for record in run.records:
            probes = record.provenance.probe_name
            self.keep_record(f"{name}.step-{record.step}{'' if probes is None else f'.{probes}'}", record)
        self.keep_values(f"{name}.alerts", [json.loads(alert.model_dump_json()) for alert in run.alerts])
        for step in sorted(run.directory.glob("step-*")):
            self.keep_values(f"{name}.{step.name}.arrays", arrays_in(step))
        tables = {"runs": run.to_pandas(), "layers": run.to_pandas(layers=True)}
        self.keep_values(f"{name}.tables", {key: columns_of(table) for key, table in tables.items()})
        if curves := curves_in(output):
            self.keep_values(f"{name}.curves", curves)


def arrays_in(folder: Path) -> dict[str, Any]:
    """Every array of every file: what it is, a hash of its bytes, and its values or sums of them."""
    from safetensors.numpy import load_file

    return {
        path.stem: {key: described(value) for key, value in load_file(path).items()}
        for path in sorted(folder.glob("*.safetensors"))
    }


def described(array: Any) -> dict[str, Any]:
    """A hash tells whether a bit changed; the values, or sums over them, tell by how much."""
    import numpy as np

    values = np.ascontiguousarray(array)
    said: dict[str, Any] = {
        "dtype": str(values.dtype), "shape": list(array.shape), "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
    }  # fmt: skip
    if values.size <= SMALL:
        return said | {"values": array.tolist()}
    flat = values.astype(np.float64).ravel()
    finite = flat[np.isfinite(flat)]
    weighted = math.fsum(finite * np.cos(np.arange(len(finite))))  # sees also where values change places
    return said | {
        "finite": len(finite), "sum": math.fsum(finite), "absolute": math.fsum(abs(finite)), "weighted": weighted,
        "smallest": float(finite.min(initial=0.0)), "largest": float(finite.max(initial=0.0)),
    }  # fmt: skip


def columns_of(table: Any) -> dict[str, list[Any]]:
    """A pandas table as plain values."""
    return {name: [_plain(value) for value in table[name].tolist()] for name in table.columns}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def curves_in(output: Path) -> dict[str, list[list[float]]]:
    """The audit's own TensorBoard curves: tag → steps and values, of all event files below ``output``."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[list[float]]] = {}
    for folder in sorted({path.parent for path in output.rglob("events.out.tfevents*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in sorted(events.Tags()["scalars"]):
            # TRL's own curves hold times; what training computed shows in the weights' hashes.
            if tag.startswith("align_audit") and "/cost/" not in tag:
                found.setdefault(tag, []).extend([event.step, event.value] for event in events.Scalars(tag))
    return found


# --- making: models and pairs -----------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, hidden_size=32,
    ),
    "gemma2": dict(
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48,
        hidden_size=32, sliding_window=8, final_logit_softcapping=2.0, attn_logit_softcapping=5.0,
    ),
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=128),
}  # fmt: skip


def tiny_model(scene: Scene, family: str = "llama") -> Any:
    """A randomly initialized model, with weights large enough that every layer does visible work."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
    config = AutoConfig.for_model(family, vocab_size=len(scene.tokenizer), **special, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def preferring(model: Any, pairs: Any, steps: int = 6) -> Any:
    """A copy that learned to prefer the chosen completions of ``pairs``, mostly in layer 1: its margin gains are clear.

    Plain gradient steps, each weight matrix moved by a share of its own size: no optimizer and no trainer whose details
    may change.
    """
    import torch

    policy = copy.deepcopy(model)
    weights = {name: weight for name, weight in policy.named_parameters() if weight.dim() > 1}
    for _ in range(steps):
        for pair in pairs:
            (
                _logp(policy, pair.rejected_ids, pair.rejected_start)
                - _logp(policy, pair.chosen_ids, pair.chosen_start)
            ).backward()
        with torch.no_grad():
            for name, weight in weights.items():
                share = 0.02 if re.search(r"\b(layers|h)\.1\.", name) else 0.002
                if weight.grad is not None and weight.grad.any():
                    weight.sub_(share * weight.norm() / weight.grad.norm() * weight.grad)
        policy.zero_grad()
    return policy


def _logp(model: Any, ids: tuple[int, ...], start: int) -> Any:
    import torch

    tokens = torch.tensor([ids])
    logps = model(tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, tokens[0, 1:, None])[start - 1 :].sum()


WHO = ("Mila", "Ben", "a fox", "the old goat", "Nora", "a tiny mouse", "Finn", "the crow")
WHERE = ("by the pond", "in the garden", "at the market", "on the hill", "in the barn")
GOOD = ("shared the apples", "found the red kite", "sang a song and laughed", "helped the lamb", "went home happy")
BAD = ("lost the boat", "fell into the mud and cried", "broke the drum", "was all alone", "went home sad")


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Small stories that end well (chosen) or badly; their lengths differ."""
    import random

    draw = random.Random(seed)
    return [
        {
            "prompt": f"One day {draw.choice(WHO)} met {draw.choice(WHO)} {draw.choice(WHERE)}.",
            "chosen": " They " + " and ".join(draw.sample(GOOD, draw.randint(1, 2))) + ".",
            "rejected": " They " + " and ".join(draw.sample(BAD, draw.randint(1, 2))) + ".",
        }
        for _ in range(count)
    ]


def probes(scene: Scene, count: int, seed: int = 0, **options: Any) -> Any:
    """A probe set of the stories."""
    from align_audit import ProbeSet

    return ProbeSet.from_dataset(rows(count, seed), scene.tokenizer, max_pairs=count, **{"max_length": 64, **options})


def settings(**changes: Any) -> Any:
    """The defaults, on few ranks, with ``changes``."""
    from align_audit import AuditConfig

    return AuditConfig.from_dict({"progress": False, "low_rank": {"ranks": [1, 2, 4, 8]}, **changes})


SITES: list[dict[str, Any]] = [
    {"site": "attention_output"},
    {"site": "mlp_output", "positions": "completion"},
    {"site": "head", "estimator": "attribution", "pairs": 6},
    {"site": "head", "estimator": "control_variate", "pairs": 8},
    {"site": "block", "width": 2},
]
OFF: dict[str, Any] = {"spinal": {"enabled": False}, "localization": {"enabled": False}, "low_rank": {"enabled": False}}
"""For audits that are about something else."""


# --- making: the cases ------------------------------------------------------------------------------------------------


def demo(scene: Scene) -> None:
    """The healthy and the ruined run, as ``align-audit demo`` makes them."""
    output = scene.work / "demo"
    _command(scene, "demo", "--output", str(output))
    for name in ("healthy", "ruined"):
        scene.keep_run(f"demo-{name}", output / name)


def _command(scene: Scene, *arguments: str) -> None:
    """``align-audit ARGUMENTS``, of the checkout that is measured."""
    # The module of the command may become a package in which ``main`` lies a floor deeper.
    program = (
        "import importlib\n"
        "module = importlib.import_module('align_audit.cli')\n"
        "if not callable(getattr(module, 'main', None)):\n"
        "    module = importlib.import_module('align_audit.cli.app')\n"
        "module.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=scene.root, env={**os.environ, "PYTHONPATH": str(scene.root)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"align-audit {' '.join(arguments)} broke:\n{done.stdout}\n{done.stderr}")


def _train(
    scene: Scene, name: str, config: dict[str, Any], sets: Any = None, lora: bool = True, **options: Any
) -> tuple[Path, Path]:
    """Six steps of a real DPO run, audited at 0, 3 and 6; where its base model and its output are."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from align_audit import AlignmentAuditCallback

    base, output = scene.work / name / "base", scene.work / name / "run"
    tiny_model(scene).save_pretrained(base)
    scene.tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    schedule = {"every_n_steps": 3}
    callback = AlignmentAuditCallback(
        probes=sets, config=settings(schedule=schedule, tensorboard_images=False, **config)
    )
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(output), max_steps=6, per_device_train_batch_size=4, learning_rate=5e-3, report_to=[],
            use_cpu=True, bf16=False, disable_tqdm=True, seed=7, max_length=64, **{"save_strategy": "no", **options},
        ),
        train_dataset=Dataset.from_list(rows(24, seed=10)),
        eval_dataset=Dataset.from_list(rows(16, seed=11)),
        processing_class=scene.tokenizer,
        callbacks=[callback],
        peft_config=adapter if lora else None,
    )  # fmt: skip
    callback.attach(trainer)
    with contextlib.redirect_stdout(None):
        trainer.train()
    scene.keep_run(name, output)
    return base, output


def run_lora(scene: Scene) -> None:
    """An adapter; the trainer's eval set; all finer sites."""
    _train(scene, "run-lora", {"sites": SITES})


def run_named(scene: Scene) -> None:
    """Two named sets; at each layer as many pairs patched as it needs; the reference's streams are kept on disk."""
    sets = {"first": probes(scene, 32, seed=12), "second": rows(28, seed=13)}
    patching = {"exact_pairs": "auto", "equivalent_pairs": 26, "control_pairs": 8, "keep_reference": True}
    _train(scene, "run-named", {"patching": {**patching, "attribution_points": [0.0]}}, sets)


def run_full(scene: Scene) -> None:
    """All weights; the reference is read from its files, the trainer has precomputed its margins; then the checkpoints
    again, with ``align-audit run``."""
    base, output = _train(
        scene, "run-full", {}, lora=False, precompute_ref_log_probs=True, save_strategy="steps", save_steps=3
    )
    named = []
    for name, seed in (("first", 14), ("second", 15)):
        path = scene.work / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(12, seed)), encoding="utf-8")
        named += ["--probes", f"{name}={path}"]
    again = scene.work / "saved"
    options = ["--reference", str(base), "--output", str(again), "--max-pairs", "12", "--max-length", "64"]
    _command(scene, "run", str(output), *options, *named)
    scene.keep_run("run-saved", again)


def _audit(
    scene: Scene, name: str, pairs: Any = None, family: str = "llama", dtype: str = "float32", **config: Any
) -> None:
    """One audit of a tiny model that learned a preference."""
    from align_audit import audit

    found = audit(*scene.models(family, dtype), pairs or probes(scene, 16), settings(**config), step=5)
    for probe_name, record in (found if isinstance(found, dict) else {"": found}).items():
        scene.keep_record(f"audit-{name}{probe_name and '.'}{probe_name}", record)


def audit_families(scene: Scene) -> None:
    """The defaults, over architectures and precisions."""
    _audit(scene, "llama")
    _audit(scene, "gpt2", family="gpt2", sites=SITES[:3])
    _audit(scene, "gemma2", family="gemma2")
    _audit(scene, "bfloat16", dtype="bfloat16")
    _audit(scene, "float64", dtype="float64")


def audit_sets(scene: Scene) -> None:
    """Several sets in one call."""
    _audit(scene, "sets", {"first": probes(scene, 12, seed=1), "second": probes(scene, 10, seed=2)})


def audit_fewer(scene: Scene) -> None:
    """More pairs than are patched: attribution as a control variate."""
    many = probes(scene, 48, seed=3)
    _audit(scene, "exact-12", many, patching={"exact_pairs": 12, "control_pairs": 12})
    auto = {"exact_pairs": "auto", "equivalent_pairs": 40, "control_pairs": 10}
    _audit(scene, "exact-auto", many, patching=auto)
    path = {"exact_pairs": 8, "attribution_path": "layer", "attribution_points": [0.0, 0.5, 1.0]}
    _audit(scene, "exact-layer-path", many, patching=path, **OFF)


def audit_sites(scene: Scene) -> None:
    """All kinds of finer sites and their estimators."""
    _audit(scene, "sites", probes(scene, 20, seed=4), sites=SITES, **OFF)


def audit_positions(scene: Scene) -> None:
    """Patched at some positions only."""
    for positions in ("prompt", "completion", "last_prompt_token"):
        _audit(scene, f"positions-{positions}", patching={"positions": positions})


def audit_options(scene: Scene) -> None:
    """What else there is to switch."""
    _audit(scene, "low-rank-all", low_rank={"ranks": [1, 2, 4], "layers": "all", "random_draws": 2})
    _audit(scene, "no-patching", patching={"enabled": False})
    _audit(scene, "no-spinal", spinal={"enabled": False})
    _audit(
        scene, "bare", patching={"embedding": False, "transplants": False, "reverse": False, "noise_draws": 0}, **OFF
    )
    _audit(scene, "keep-end", probes(scene, 16, max_length=28, truncation_mode="keep_end"))
    _audit(scene, "prompts-apart", share_prompts=False)
    _audit(scene, "small-batches", batch_tokens=128, working_memory_mb=1)
    _audit(
        scene, "statistics", statistics={"interval": "bca", "confidence": 0.9}, localization={"target": "effect"}, seed=3,
        spinal={"max_rows": 200, "gradient_concentration": False, "terminal_fraction": 0.5},
    )  # fmt: skip


def audit_paths(scene: Scene) -> None:
    """Saved models, the reference read layer by layer."""
    from align_audit import audit

    folders = [scene.work / "paths" / name for name in ("policy", "reference")]
    for folder, model in zip(folders, scene.models(), strict=True):
        model.save_pretrained(folder)
    scene.keep_record("audit-paths", audit(*folders, probes(scene, 16), settings(), step=5))


def transfers(scene: Scene) -> None:
    """Subspaces of one set on the pairs of the other, in both bases; some pairs are in both sets."""
    from align_audit import ProbeSet, transfer

    shared = rows(4, seed=7)
    sets = {
        name: ProbeSet.from_dataset(rows(14, seed=seed) + shared, scene.tokenizer, max_pairs=18, max_length=64)
        for name, seed in (("first", 5), ("second", 6))
    }
    for layers in ("auto", "all"):
        config = settings(low_rank={"ranks": [1, 2, 4, 8], "layers": layers, "bases": ["activation", "shift"]})
        scene.keep_record(f"transfer-{layers}", transfer(*scene.models(), sets, config, step=5))


CASES: dict[str, Callable[[Scene], None]] = {
    "audit-families": audit_families,
    "audit-sets": audit_sets,
    "audit-exact": audit_fewer,
    "audit-sites": audit_sites,
    "audit-positions": audit_positions,
    "audit-options": audit_options,
    "audit-paths": audit_paths,
    "transfer": transfers,
    "run-lora": run_lora,
    "run-named": run_named,
    "run-full": run_full,
    "demo": demo,
}


def make(out: Path, only: str = "*") -> None:
    """Run the cases and write what they found to ``out``, which is made when absent."""
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    import align_audit

    root = Path.cwd()
    if Path(align_audit.__file__).resolve().parent != (root / "align_audit").resolve():
        raise SystemExit(
            f"{root} holds no align_audit (the one that would run is {Path(align_audit.__file__).parent}); expected the root "
            "of the checkout to measure as the current directory"
        )
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    logging.disable_progress_bar()
    disable_progress_bars()
    out.mkdir(parents=True, exist_ok=True)
    print(f"the align_audit of {root}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as work:
        scene = Scene(root, Path(work).resolve(), out.resolve())
        for name, case in CASES.items():
            if not fnmatch.fnmatch(name, only):
                continue
            began = time.perf_counter()
            case(scene)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """What the command returns: 1 when anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    making = parts.add_parser("make", help="run the align_audit of the current directory and write what it finds")
    making.add_argument("folder", type=Path)
    making.add_argument("--only", default="*", help=f"cases, as a pattern: {', '.join(CASES)}")
    comparing = parts.add_parser("compare", help="compare two such folders leaf by leaf")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--only", default="*", help="files, as a pattern")
    comparing.add_argument("--tolerance", type=float, default=0.0, help="largest relative difference allowed")
    asked = parser.parse_args(arguments)
    if asked.part == "make":
        make(asked.folder, asked.only)
        return 0
    return int(compare(asked.before, asked.after, asked.tolerance, asked.only) > 0)


if __name__ == "__main__":
    # The sums of a matrix product depend on how many threads share it; and nothing is to come from outside.
    os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")})
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    sys.exit(main())
