"""What is passed in Python and is of another type is refused at once, with what was expected, wherever it is passed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_audit import AlignmentAuditCallback, AuditConfig, audit
from align_audit.auditing.transfer import transfer
from align_audit.errors import ConfigurationError
from align_audit.record.checkpoint_names import LAST_STEP
from tests.helpers.audits import QUICK
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

MODEL: Any = tiny_model("llama")
SETS = {"one": random_pairs(2), "another": random_pairs(3)}


def by_audit(**given: Any) -> Any:
    return audit(**{"policy": perturbed(MODEL), "reference": MODEL, "probes": SETS["one"], **given})


def by_transfer(**given: Any) -> Any:
    return transfer(**{"policy": perturbed(MODEL), "reference": MODEL, "probes": SETS, **given})


WRONG = [
    ({"config": {"max_pairs": 3}}, "expected config to be an AuditConfig, found dict; build one with AuditConfig"),
    ({"anatomy": "model.layers"}, "expected anatomy to be an Anatomy, found str; build one with Anatomy"),
    ({"reference": 3}, "expected the reference to be a model or the path of one, found int"),
]


@pytest.mark.parametrize(("given", "words"), WRONG)
@pytest.mark.parametrize("call", [by_audit, by_transfer, AlignmentAuditCallback])
def test_an_argument_of_another_type(call: Callable[..., Any], given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        call(**given)


@pytest.mark.parametrize("call", [by_audit, by_transfer])
def test_a_policy_of_another_type(call: Callable[..., Any]) -> None:
    for policy in (3, None):
        with pytest.raises(ConfigurationError, match="expected the policy to be a model or the path of one, found"):
            call(policy=policy)


@pytest.mark.parametrize("step", [-5, "5", True, LAST_STEP + 1, 2.0])
@pytest.mark.parametrize("call", [by_audit, by_transfer])
def test_a_step_that_is_none(call: Callable[..., Any], step: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected step to be a whole number from 0 to"):
        call(step=step)


def test_a_step_of_numpy_is_one() -> None:
    assert by_audit(step=np.int64(5), config=AuditConfig.from_dict(QUICK)).step == 5


def test_a_trainer_that_is_none() -> None:
    trainer: Any = Path()
    with pytest.raises(ConfigurationError, match="expected the trainer, a DPOTrainer, found PosixPath"):
        AlignmentAuditCallback().attach(trainer)
