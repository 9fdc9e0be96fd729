"""What one rank of a case does: a real ``DPOTrainer`` run, with or without the callback, and what came of it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from align_audit import AlignmentAuditCallback, AuditConfig
from align_audit.auditing.costs.counting import count, layer_tokens
from align_audit.auditing.measurements import lens_walk
from align_audit.auditing.measurements.lens_walk import PORTION
from align_audit.models.anatomy import out_of_engine
from align_audit.models.weights.sharded import is_spread, whole_tensors
from align_audit.monitoring import monitor
from tests.distributed.engines import deepspeed_options
from tests.distributed.plants import FIRED, dawdle, plant
from tests.distributed.watch import After, Before, watch_gathers
from tests.helpers.audits import QUICK, audited_whole
from tests.helpers.counted import forwards, job_on_cpu
from tests.helpers.dpo import ROWS, build


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights on every rank, gathered where they are spread."""
    weights = {}
    for name, value in out_of_engine(model).named_parameters():
        (weights[name],) = whole_tensors([value], [value.dtype]) if is_spread(value) else [value.detach().clone()]
    return weights


def fill(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put weights into a model, by name; one that was copied while it was cut has none of its own."""
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].clone()


@contextlib.contextmanager
def functions_of_torch() -> Iterator[None]:
    """Inside, linear layers compute as in a process without DeepSpeed, which puts a function of its own in place of torch's."""
    functional: Any = torch.nn.functional
    replaced = functional.linear
    functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = replaced


class LogsHere(TrainerCallback):
    """Logs before the first step, where it is added, and a loss that a rule takes for suspicious.

    Not at the end of one: a log there takes the trainer's own log for made, which the other ranks then wait for.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.trainer.log({"loss": 1e9})


def run(folder: Path, rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Train as the case says.

    ``case``:
        ``audit``: options over :data:`QUICK`; None: no callback.
        ``mode``, ``engine``, ``trainer``: the trainer's reference, its engine, its options.
        ``reference``: ``path``: the callback is given where the base model is saved.
        ``zero``: of DeepSpeed's ZeRO, what is other than usual.
        ``shape``: of the base model, what is other than usual.
        ``probes``: how many pairs, or slices of them by name; else the eval set's.
        ``break_on``, ``refuse_on``: a rank whose audits fail, whose set-up refuses.
        ``config_on``, ``pairs_on``: a rank with other options, with other pairs.
        ``log_on``: a rank on which another callback logs before the first step, as no other rank does.
        ``plants``: a list of faults, each with its rank; see :mod:`tests.distributed.plants`.
        ``dawdle``: a seed; ranks sleep at moments of their own.
        ``frozen``: only the last layer trains.
        ``portion``: rows of a portion in which transport is drawn; else the audit's own.
        ``alone``: audit what came of it once more, in one process.
    """
    torch.set_num_threads(1)
    lens_walk.PORTION = case.get("portion", PORTION)
    audit = None
    if case.get("audit") is not None:
        options = {**QUICK, **case["audit"]}
        if case.get("config_on", -1) == rank:
            options["seed"] = 1
        counts = case.get("probes")
        probes: Any = None if counts is None else ROWS[-counts:] if isinstance(counts, int) else {
            name: ROWS[first:end] for name, (first, end) in counts.items()
        }  # fmt: skip
        if case.get("pairs_on") == rank:
            probes = ROWS[: len(probes)]
        if case.get("refuse_on") == rank:
            probes = "no-such-file.jsonl"
        reference = folder / f"base-{rank}" if case.get("reference") == "path" else None
        audit = AlignmentAuditCallback(probes, AuditConfig.from_dict(options), reference=reference)
    if case.get("break_on") == rank:

        def run_audit(*_: Any) -> Any:
            raise ValueError("planted")

        monitor.run_audit = run_audit
    for fault in case.get("plants", ()):
        if fault["rank"] == rank:
            plant(fault["where"], fault["kind"], fault["audit_number"], fault.get("call"))
    if "dawdle" in case:
        dawdle(2 * case["dawdle"] + rank, most=0.3)
    output = folder / "run"
    before, held = Before(), watch_gathers()
    after = After(before)
    trained = build(
        output, case.get("mode", "ref_model made"), [before, *([] if audit is None else [audit]), after],
        base=folder / f"base-{rank}", shape=case.get("shape", {}),
        **{
            "max_steps": 4, "per_device_train_batch_size": 2,
            **deepspeed_options(case.get("engine", "ddp"), case.get("zero", {}), case.get("deepspeed", {})),
            **case.get("trainer", {}),
        },
    )  # fmt: skip
    trainer = trained.trainer
    if case.get("engine", "ddp").startswith("zero"):  # one that FSDP2 has kept whole is put back to its shards
        before.reference = trainer.ref_model
    if case.get("log_on") == rank:
        trainer.add_callback(LogsHere(trainer))
    engine = type(trainer.model).__name__
    if case.get("frozen"):
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_("layers.2." in name)
    shell = copy.deepcopy(trainer.model) if case.get("alone") else None
    for module in () if shell is None else shell.modules():
        module.__dict__.pop("forward", None)  # TRL's own, which would call the model that was copied
    if audit is not None and case.get("attach", True) and case.get("refuse_on") != rank:
        audit.attach(trainer)
    trainer.train()
    weights = whole_weights(trainer.model)
    if shell is not None:
        references = {} if trainer.ref_model is None else whole_weights(trainer.ref_model)
        if rank == 0:
            fill(shell, weights)
            with functions_of_torch():
                audit_alone(folder, shell, references, audit, case, trainer.state.global_step)
    shutil.rmtree(folder / f"base-{rank}", ignore_errors=True)
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "model": engine,
        "reference": type(trainer.ref_model).__name__,
        "step": trainer.state.global_step,
        "stop": trainer.control.should_training_stop,
        "weights": digest.hexdigest(),
        "losses": trained.losses,
        "distributed": str(trainer.accelerator.distributed_type),
        "looks": after.looks,
        "left": after.left,
        "spread": after.spread,
        "available": after.available,
        "coordinators": after.coordinators,
        "held": held,
        "fired": FIRED.count,
    }


def audit_alone(
    folder: Path,
    policy: Any,
    references: dict[str, torch.Tensor],
    callback: AlignmentAuditCallback,
    case: dict[str, Any],
    step: int,
) -> None:
    """Write what one process finds in the weights that training has ended with: ``alone.json``, ``.texts.json``, ``.npz``."""
    half = case.get("mode") == "bf16"
    # DeepSpeed computes in the dtype of its weights.
    autocast = half and not case["engine"].startswith("zero")
    reference = None
    if references:
        reference = copy.deepcopy(policy)
        fill(reference, references)
    for model in (policy, reference):
        for parameter in model.parameters() if half and model is not None else ():
            parameter.data = parameter.data.to(torch.bfloat16)  # the engine casts weights, and no buffers
    for probe_name, probes in callback._probes.sets.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = audited_whole(
                policy, reference, probes, callback.config, step=step, beta=0.1, probe_name=probe_name,
                **({"autocast": lambda: torch.autocast("cpu", torch.bfloat16)} if autocast else {}),
            )  # fmt: skip
        assert result.texts is not None
        name = "alone" if probe_name is None else f"alone-{probe_name}"
        (folder / f"{name}.json").write_text(result.record.model_dump_json())
        if not callback.config.sites:
            counted = job_on_cpu(
                policy,
                probes.pairs,
                callback.config,
                result.record,
                ranks=2,
                spread=case.get("engine", "ddp") == "fsdp2",
            )
            work = count(counted, "full")
            said = {
                "forwards": forwards(counted, layer_tokens(counted, "full")),
                "gathers": {part: each.gathers for part, each in work.items()},
            }
            (folder / f"{name}.counted.json").write_text(json.dumps(said))
        (folder / f"{name}.texts.json").write_text(result.texts().to_json())
        np.savez(folder / f"{name}.npz", **result.arrays)
