"""How a process of a test becomes a rank, and how FSDP and DeepSpeed are had without an accelerator."""

from __future__ import annotations

import os
from typing import Any

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
"""What ``accelerate launch`` sets for an FSDP2 configuration."""


def become_rank(rank: int, size: int, port: int, engine: str) -> None:
    """Set what a launcher sets, in a process that has not used accelerate yet.

    Args:
        engine: ``ddp``, ``fsdp2``, ``fsdp2 kept`` (layers stay whole between forward and backward), ``zero2``, ``zero3``.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    if engine.startswith("fsdp2"):
        os.environ.update(FSDP2)
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(engine != "fsdp2 kept").lower()
        _fsdp_without_accelerator()
    if engine.startswith("zero"):
        os.environ.pop("ACCELERATE_USE_CPU")
        os.environ["DS_ACCELERATOR"] = "cpu"
        _deepspeed_without_accelerator()


def deepspeed_options(engine: str, changes: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """What ``DPOConfig`` is given for an engine: DeepSpeed's own configuration, or nothing.

    Args:
        changes: to what stands under ``zero_optimization``.
        more: stands beside it.
    """
    if not engine.startswith("zero"):
        return {}
    stage = int(engine.removeprefix("zero"))
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "use_cpu": False,
        "deepspeed": {
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {**zero, **changes},
            "zero_allow_untested_optimizer": True, "communication_data_type": "fp32",
            **more,
        },
    }  # fmt: skip


def _fsdp_without_accelerator() -> None:
    """accelerate drops an FSDP plugin on CPU processes without a word and trains DDP; torch itself shards there."""
    from accelerate import state
    from accelerate.utils import DistributedType

    plain = state.AcceleratorState.__init__

    def keep_the_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    state.AcceleratorState.__init__ = keep_the_plugin


def _deepspeed_without_accelerator() -> None:
    """With ``use_cpu`` accelerate drops DeepSpeed; without it nobody names a backend, and one process is counted."""
    import deepspeed.ops
    from accelerate import state
    from accelerate.utils import DistributedType
    from transformers import training_args

    plain = state.PartialState._prepare_backend

    def prepare(self: Any, cpu: bool, sagemaker_dp: bool = False, backend: Any = None) -> Any:
        if not cpu and int(os.environ.get("LOCAL_RANK", -1)) != -1:
            return "gloo", DistributedType.MULTI_CPU
        return plain(self, cpu, sagemaker_dp, backend)

    state.PartialState._prepare_backend = prepare
    # Without ``use_cpu`` transformers asks for a GPU that computes in bfloat16.
    training_args.is_torch_bf16_gpu_available = lambda: True
    # Nothing that trains uses this one, and to compile it takes a minute and more.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
