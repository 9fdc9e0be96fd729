"""What a look costs: a health audit beside one plain forward of the policy over the same probe pairs, in CPU seconds.

    python benchmarks/cost/health.py                            # the shipped model
    python benchmarks/cost/health.py --layers 12 --width 512     # an untrained Llama of that shape, some minutes

The plain forward is what a user would write: both sequences of each pair, batches of 8, padded, logits at every position. The
first audit of a run also runs the reference; later ones read what is kept of it. They are timed in turn with the forward.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align_audit import AuditConfig, ProbeSet
from align_audit.auditing.audit import run_audit
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import preference_pairs
from align_audit.models.reference import Reference, resolve_reference
from align_audit.probes.batches import make_batch


def models_of(layers: int | None, width: int, vocabulary: int) -> tuple[Any, Any]:
    """A reference, and a policy beside it."""
    torch.manual_seed(0)
    if layers is None:
        reference = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    else:
        reference = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
                num_attention_heads=width // 64, num_key_value_heads=width // 64,
            )
        )  # fmt: skip
    policy = copy.deepcopy(reference.eval())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.02)
    return reference, policy


def forward(policy: Any, probes: ProbeSet) -> float:
    """CPU seconds of a plain forward over all pairs."""
    began = time.process_time()
    with torch.no_grad():
        for first in range(0, len(probes.pairs), 8):
            pairs = probes.pairs[first : first + 8]
            batch = make_batch(pairs, list(range(len(pairs))), 0)
            policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return time.process_time() - began


def look(policy: Any, reference: Reference, probes: ProbeSet, cache: ReferenceCache) -> float:
    """CPU seconds of a health audit as a callback makes it, models opened and closed."""
    began = time.process_time()
    with OpenModels(policy, reference, rehash=False) as models:
        run_audit(models, AuditRequest(probes, AuditConfig(), kind="health"), cache)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of an untrained Llama; default: the shipped model")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of that Llama")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    reference, policy = models_of(options.layers, options.width, options.vocabulary)
    probes = ProbeSet.from_dataset(preference_pairs(options.pairs, seed=5), tokenizer)
    cache, source = ReferenceCache(), resolve_reference(policy, reference)
    forward(policy, probes)
    first = look(policy, source, probes, cache)
    timed = [(forward(policy, probes), look(policy, source, probes, cache)) for _ in range(options.repeats)]
    plain, later = (median(column) for column in zip(*timed, strict=True))
    print(
        f"plain forward {plain:.2f} CPU s; first look {first:.2f}; later ones {later:.2f}: {later / plain:.2f} forwards"
    )


if __name__ == "__main__":
    main()
