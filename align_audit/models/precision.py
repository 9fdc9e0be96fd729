"""How exactly a device computes matrix products, and how far apart that may leave numbers that are computed in other shapes.

Products of float32 need not be computed in float32: trainers have them rounded to TF32 first (``TrainingArguments(tf32=True)``,
``torch_compile``), or to bfloat16 on a CPU.
"""

from __future__ import annotations

import torch

_UNITS = {"tf32": 2.0**-10, "bf16": torch.finfo(torch.bfloat16).eps}
"""Rounding units of what products of float32 may be computed in."""


def float32_products(device: str) -> str:
    """What products of float32 are computed in on a type of device: ``ieee`` (float32 itself), ``tf32`` or ``bf16``.

    CPUs have no TF32, and bfloat16 only where they have its products; on devices of other kinds nothing is known to be rounded.
    """
    if device not in ("cuda", "xpu", "cpu"):
        return "ieee"
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    # Torch from 2.9 on refuses to say it in the old way to those who have set it in the new one, as transformers does.
    said = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if said is None:
        legacy = torch.get_float32_matmul_precision()
        said = {"high": "tf32", "medium": "tf32" if device == "cuda" else "bf16"}.get(legacy, "ieee")
    if device == "cpu" and not (said == "bf16" and _bfloat16_products()):
        return "ieee"
    return str(said) if said in _UNITS else "ieee"


def _bfloat16_products() -> bool:
    """Whether this CPU multiplies in bfloat16."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(ask is not None and ask())


def product_unit(dtype: torch.dtype, device: str) -> float:
    """Rounding unit of matrix products of a dtype: ``torch.finfo(dtype).eps``, more where float32 is rounded before."""
    unit = _UNITS.get(float32_products(device)) if dtype == torch.float32 else None
    return float(torch.finfo(dtype).eps) if unit is None else unit


def rounding(steps: int, device: str, *dtypes: torch.dtype) -> float:
    """How far numbers computed in other shapes may lie apart, as a share of the largest: ``steps`` rounding units of
    float32, in which several families' norms compute whatever the dtype; 8 units of the coarsest dtype that is met."""
    return max(steps * torch.finfo(torch.float32).eps, *(8 * product_unit(dtype, device) for dtype in dtypes))
