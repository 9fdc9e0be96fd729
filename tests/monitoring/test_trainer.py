"""What is read from a trainer, or from the arguments of one that is out of reach."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PrinterCallback, Trainer
from transformers.integrations import TensorBoardCallback

from align_audit.monitoring.trainer import TrainerFacts, read_trainer


class DPOConfig(SimpleNamespace):
    """Known by its name, as TRL's own and classes made of it are."""


def arguments(kind: type[SimpleNamespace] = SimpleNamespace, **changes: Any) -> SimpleNamespace:
    """What every trainer of transformers has."""
    return kind(**{"output_dir": "out", "bf16": False, "fp16": False, "disable_tqdm": True, **changes})


def test_a_trainer_out_of_reach_says_what_its_arguments_do() -> None:
    args = arguments(
        DPOConfig, beta=0.3, max_length=77, truncation_mode="keep_end", ld_alpha=0.5, load_best_model_at_end=True
    )
    facts = read_trainer(None, args, SimpleNamespace(dataset="pairs"))
    assert not facts.attached
    assert (facts.reference, facts.eval_sets, facts.summary_writer()) == (None, None, None)
    assert (facts.train_set, facts.beta, facts.max_length, facts.truncation_mode) == ("pairs", 0.3, 77, "keep_end")
    assert (facts.compare_precomputed, facts.loads_best, facts.progress) == (False, True, False)


def test_a_trainer_that_knows_nothing_of_preferences() -> None:
    """It has no ``ref_model``, no β and no reference to synchronize."""
    handler = SimpleNamespace(callbacks=[])
    accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    trainer = SimpleNamespace(
        train_dataset="trained", eval_dataset="held out", accelerator=accelerator, callback_handler=handler
    )
    facts = read_trainer(trainer, arguments(), SimpleNamespace(dataset="loader's"))
    assert facts.attached
    assert (facts.reference, facts.beta, facts.sync_every) == (None, None, None)
    assert (facts.train_set, facts.eval_sets) == ("trained", "held out")
    assert (facts.max_length, facts.truncation_mode, facts.compare_precomputed) == (1024, "keep_start", True)
    assert facts.numerics(nn.Linear(1, 1)) is contextlib.nullcontext


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        (DPOConfig, 0.3, 0.3),
        (type("MyConfig", (DPOConfig,), {}), 0.3, 0.3),
        (type("GRPOConfig", (SimpleNamespace,), {}), 0.3, None),
        (type("OnlineDPOConfig", (SimpleNamespace,), {}), [0.3, 0.1], None),
    ],
)
def test_a_beta_is_read_where_it_scales_rewards(kind: type[SimpleNamespace], beta: Any, expected: float | None) -> None:
    assert read_trainer(None, arguments(kind, beta=beta)).beta == expected


def test_the_trainers_curves_are_in_reach_while_it_draws_them() -> None:
    drawing = TensorBoardCallback()
    handler = SimpleNamespace(callbacks=[PrinterCallback(), drawing])
    accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    trainer = SimpleNamespace(train_dataset=None, accelerator=accelerator, callback_handler=handler)
    facts = read_trainer(trainer, arguments())
    assert facts.summary_writer() is None, "training has not begun"
    drawing.tb_writer = writer = SimpleNamespace()
    assert facts.summary_writer() is writer
    drawing.tb_writer = None
    assert facts.summary_writer() is None, "it has ended"


@pytest.mark.parametrize(("changes", "expected"), [({}, torch.float32), ({"bf16": True}, torch.bfloat16)])
def test_numerics_of_a_trainer_out_of_reach_are_those_of_its_arguments(
    changes: dict[str, bool], expected: torch.dtype
) -> None:
    layer = nn.Linear(2, 2)
    with read_trainer(None, arguments(**changes)).numerics(layer)():
        assert layer(torch.ones(1, 2)).dtype is expected


def facts(**changes: Any) -> TrainerFacts:
    return read_trainer(None, arguments(**changes))


def test_the_last_synchronization() -> None:
    synced = facts(sync_ref_model=True, ref_model_sync_steps=3)
    assert [synced.last_sync_step(step) for step in range(8)] == [None, None, None, 3, 3, 3, 6, 6]
    assert facts(sync_ref_model=False, ref_model_sync_steps=3).last_sync_step(6) is None


def test_what_the_schedule_is_told() -> None:
    control = SimpleNamespace(should_training_stop=True, should_save=False, should_evaluate=True)

    def training(step: int, best: str | None = None, **changes: Any) -> Any:
        state = SimpleNamespace(global_step=step, max_steps=9, best_model_checkpoint=best)
        return facts(**changes).training(state, control)

    synced = [training(step, sync_ref_model=True, ref_model_sync_steps=2).syncs_reference for step in (1, 2, 3, 4)]
    assert synced == [False, True, False, True]
    assert not training(2).syncs_reference
    assert (training(2).step, training(2).max_steps, training(2).stopping) == (2, 9, True)
    assert training(2, "checkpoint-1", load_best_model_at_end=True).best_loaded
    assert not training(2, "checkpoint-1").best_loaded
    assert not training(2, load_best_model_at_end=True).best_loaded
    assert (training(2).saving, training(2).evaluating) == (False, True)


@pytest.mark.parametrize(("tried", "expected"), [(None, 48), (8, 48), (2, 12)])
def test_a_step_is_made_of_the_batch_that_was_found_to_fit(tried: int | None, expected: int) -> None:
    """``auto_find_batch_size`` leaves the arguments as they were given."""
    args = arguments(train_batch_size=8, gradient_accumulation_steps=3, world_size=2)
    assert read_trainer(None, args, state=SimpleNamespace(train_batch_size=tried)).pairs_per_step == expected
    assert read_trainer(None, args).pairs_per_step == 48


@pytest.mark.parametrize(("sharing", "expected"), [(1, 48), (2, 24)])
def test_processes_that_share_a_pair_count_once(sharing: int, expected: int) -> None:
    """Tensor parallelism: as many processes as there are hold a part of the model each, and train on the same pairs."""
    trainer = object.__new__(Trainer)
    trainer.model, trainer._train_batch_size = SimpleNamespace(_tp_size=sharing), 8
    trainer.accelerator = SimpleNamespace(autocast=contextlib.nullcontext, parallelism_config=None)
    trainer.train_dataset = trainer.eval_dataset = None
    trainer.callback_handler = SimpleNamespace(callbacks=[])
    args = arguments(train_batch_size=8, gradient_accumulation_steps=3, world_size=2)
    assert read_trainer(trainer, args).pairs_per_step == expected


@pytest.mark.parametrize(
    ("groups", "given", "expected"),
    [
        (None, 1e-5, 1e-5),
        (None, "1e-5", 1e-5),
        (None, "much", None),
        (None, None, None),
        (None, float("nan"), None),
        ([], 1e-5, 1e-5),
        ([{"lr": 1e-3}], 5e-5, 1e-3),
        ([{"lr": 0.0, "initial_lr": 1e-3}], 5e-5, 1e-3),
        ([{"lr": 1e-4}, {"lr": torch.tensor(0.5)}], 5e-5, 0.5),
    ],
)
def test_the_learning_rate_is_the_optimizers(groups: Any, given: Any, expected: float | None) -> None:
    """A trainer that was given its own takes no notice of the arguments', whose default would be advised against."""
    trainer = SimpleNamespace(
        train_dataset=None,
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
        callback_handler=SimpleNamespace(callbacks=[]),
        optimizer=None if groups is None else SimpleNamespace(param_groups=groups),
    )
    assert read_trainer(trainer, arguments(learning_rate=given)).learning_rate == expected
    if groups is None:
        assert read_trainer(None, arguments(learning_rate=given)).learning_rate == expected
