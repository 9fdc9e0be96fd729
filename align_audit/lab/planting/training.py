"""Truth by real training: TRL's ``DPOTrainer`` with most of the learning rate in some layers."""

from __future__ import annotations

import contextlib
import copy
import random
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from align_audit.lab.planting.parts import Part, check_layer, layer_parts, weights_of
from align_audit.lab.planting.steps import relative_updates
from align_audit.lab.planting.truth import Planted, Truth


def train_dpo(
    base: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    layers: Sequence[int],
    rest: float = 0.1,
    steps: int = 20,
    learning_rate: float = 2e-4,
    beta: float = 0.1,
    batch: int = 8,
    seed: int = 0,
) -> Planted:
    """A policy trained by ``DPOTrainer`` with AdamW at the full rate in ``layers`` and ``rest`` of it in the other layers.

    What is in no decoder layer (embeddings, last norm, head) is frozen. Neither ``base`` nor any global random state is
    changed; nothing is written but to a temporary folder.

    Args:
        base: a causal LM in eval mode.
        tokenizer: the trainer's ``processing_class``.
        rows: preference pairs as the trainer takes them, with ``prompt``, ``chosen`` and ``rejected``.
        rest: 0: the other layers are frozen too.
        steps: optimizer steps of ``batch`` pairs each; the rate is constant.

    Returns:
        The policy, whose ``truth.numbers`` are the relative norms of each layer's update (``share_0`` …).

    Raises:
        ValueError: no such layer.
    """
    for layer in layers:
        check_layer(base, layer)
    parts = layer_parts(base)
    policy = copy.deepcopy(base)
    optimizer = _optimizer(policy, parts, layers, learning_rate, rest)
    _run_trainer(policy, base, tokenizer, rows, optimizer, steps, beta, batch, seed)
    was = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(was[name])
        parameter.grad = None
    policy.eval()
    shares = relative_updates(parts, weights_of(policy), weights_of(base))
    numbers = {f"share_{part.layer}": share for part, share in zip(parts, shares, strict=True)}
    where = ", ".join(str(layer) for layer in sorted(layers)) or "no layer"
    description = f"{steps} steps of DPO, full learning rate in layers {where}, {rest:g} of it in the others"
    return Planted(
        policy, Truth(description, tuple(parts[layer] for layer in sorted(layers)), tuple(sorted(layers)), numbers)
    )


def _optimizer(
    policy: nn.Module, parts: Sequence[Part], layers: Sequence[int], learning_rate: float, rest: float
) -> torch.optim.Optimizer:
    """AdamW at the full rate in ``layers`` and ``rest`` of it in the other ``parts``; what it does not train is frozen."""
    weights = dict(policy.named_parameters())
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in weights.values():
        parameter.requires_grad_(False)
    for part in parts:
        planted = part.layer in layers
        if planted or rest > 0:
            trained = [weights[name] for name, _ in part.slices]
            for parameter in trained:
                parameter.requires_grad_(True)
            groups[planted] += trained
    rates = {True: learning_rate, False: learning_rate * rest}
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rates[planted]} for planted, parameters in groups.items() if parameters],
        weight_decay=0.0,
    )


def _run_trainer(
    policy: nn.Module,
    base: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    steps: int,
    beta: float,
    batch: int,
    seed: int,
) -> None:
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as folder, random_state_kept():
        # Inside, since importing them draws random numbers.
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import DPOConfig, DPOTrainer

        settings = DPOConfig(
            folder, max_steps=steps, beta=beta, per_device_train_batch_size=batch, seed=seed, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
            gradient_checkpointing=False, dataset_num_proc=None,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=policy,
            ref_model=copy.deepcopy(base),  # the trainer prepares it
            args=settings,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=copy.deepcopy(tokenizer),
            optimizers=(optimizer, constant),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """The global random states of Python, NumPy and torch are after as they were before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the trainer seeds the old one)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
