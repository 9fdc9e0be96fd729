"""Every decoder family that is tried: a forward, replay and gradients leave nothing in it that the guard does not give back."""

from __future__ import annotations

import contextlib

import pytest
import torch

from align_audit.errors import AnatomyError
from align_audit.models.gradients import stream_gradients
from align_audit.models.guard import untouched
from align_audit.models.verify import open_replay
from tests.helpers.states import changed, everything
from tests.helpers.tiny import VOCABULARY
from tests.helpers.toys import batch
from tests.models.test_families import FAMILIES, build


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_left_as_it_was(name: str) -> None:
    model = build(name).train()
    before = everything(model)
    with untouched(model), torch.no_grad(), contextlib.suppress(AnatomyError):
        model(**batch(VOCABULARY), use_cache=False)
        replay = open_replay(model)
        recording = replay.record(batch(VOCABULARY))
        replay.head(recording.after(replay.num_layers - 1)[:, 0])
        for _ in stream_gradients(replay, recording, lambda top: [top.double().sum()]):
            pass
    if name == "rwkv":  # scales weights by mode, and says so in a flag; back in training mode both are as they were
        model(**batch(VOCABULARY), use_cache=False)
    assert changed(before, everything(model)) == []
