"""Models on disk, loaded and streamed; what tests of where weights are share."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from align_audit.models.weights.streaming import stream_of
from tests.helpers.tiny import tiny_model

IDS = torch.arange(3, 21).view(2, 9)
MASK = torch.ones_like(IDS)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    wait_for_threads()


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("align_audit-layer")]


def wait_for_threads() -> None:
    """A thread ends with the layer it reads; a moment after its model is gone none may be left."""
    for _ in range(200):
        if not our_threads():
            return
        time.sleep(0.01)
    raise AssertionError(our_threads())


def save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    shards = options.pop("max_shard_size", None)
    model: Any = tiny_model(family, dtype=torch.float32, **options).to(dtype)
    model.save_pretrained(folder, **({} if shards is None else {"max_shard_size": shards}))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits  # type: ignore[no-any-return]


def layer(model: Any, index: int) -> torch.Tensor:
    stream_of(model).need(index)  # type: ignore[union-attr]
    return torch.cat([parameter.detach().flatten() for parameter in model.model.layers[index].parameters()])
