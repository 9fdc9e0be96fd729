"""What one rank of a case does: a real ``DPOTrainer`` run, with or without the callback, and what came of it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from align_audit import AlignmentAuditCallback, AuditConfig
from align_audit.monitoring import monitor
from tests.distributed.engines import deepspeed_options
from tests.helpers.audits import QUICK
from tests.helpers.dpo import build


def run(folder: Path, rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Train as the case says.

    ``case``: ``audit`` (options over :data:`QUICK`; None: no callback), ``mode``, ``trainer`` (options), ``break_on`` (a rank
    whose audits fail), ``refuse_on`` (a rank whose set-up refuses), ``config_on`` (options of one rank alone).
    """
    torch.set_num_threads(1)
    callbacks = []
    if case.get("audit") is not None:
        options = {**QUICK, **case["audit"]}
        if case.get("config_on", -1) == rank:
            options["seed"] = 1
        probes = "no-such-file.jsonl" if case.get("refuse_on") == rank else None
        callbacks.append(AlignmentAuditCallback(probes, AuditConfig.from_dict(options)))
    if case.get("break_on") == rank:

        def run_audit(*_: Any) -> Any:
            raise ValueError("planted")

        monitor.run_audit = run_audit
    output = folder / "run"
    trained = build(
        output, case.get("mode", "ref_model made"), [*callbacks], base=folder / f"base-{rank}",
        **{
            "max_steps": 4, "per_device_train_batch_size": 2, **deepspeed_options(case.get("engine", "ddp")),
            **case.get("trainer", {}),
        },
    )  # fmt: skip
    engine = type(trained.trainer.model).__name__
    if callbacks and case.get("attach", True) and case.get("refuse_on") != rank:
        callbacks[0].attach(trained.trainer)
    trained.trainer.train()
    shutil.rmtree(folder / f"base-{rank}", ignore_errors=True)
    state, control = trained.trainer.state, trained.trainer.control
    digest = hashlib.sha256()
    for name, value in sorted(trained.weights.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return {
        "engine": type(trained.trainer.model_wrapped).__name__,
        "model": engine,
        "step": state.global_step,
        "stop": control.should_training_stop,
        "weights": digest.hexdigest(),
        "losses": trained.losses,
        "distributed": str(trained.trainer.accelerator.distributed_type),
    }
