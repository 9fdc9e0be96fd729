"""Policy and reference that are one thing in another guise, events outside training, and what a run leaves to the next."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from align_audit import AlignmentAuditCallback, AuditRun, audit, transfer
from align_audit.errors import ReferenceUnavailableError
from align_audit.measures.margin import compare_readouts
from align_audit.models.reference import fingerprints, policy_fingerprint, resolve_reference
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.monitoring.checkpoints import audit_saved, transfer_saved
from align_audit.monitoring.trainer import read_trainer
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import ROWS, build, saved_model
from tests.helpers.probe_tokenizer import make_tokenizer
from tests.helpers.tiny import random_pairs, tiny_model

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


class Margins(TrainerCallback):
    """What the trainer itself logs of its evaluations, by step: the mean of β·Δ."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.by_step[state.global_step] = metrics["eval_rewards/margins"]


def trainer_of(output: Path, model: Any, callbacks: list[Any], **options: Any) -> DPOTrainer:
    extra = {name: options.pop(name) for name in ("peft_config", "ref_model") if name in options}
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8, "disable_tqdm": True,
        "save_strategy": "no", **options,
    }  # fmt: skip
    return DPOTrainer(
        model=model, args=DPOConfig(str(output), **settings), train_dataset=Dataset.from_list(ROWS[:16]),
        eval_dataset=Dataset.from_list(ROWS[16:]), processing_class=make_tokenizer(), callbacks=callbacks, **extra,
    )  # fmt: skip


def last_shift(output: Path) -> float:
    record = AuditRun.load(output).records[-1]
    assert record.step == 3
    return record.margins.shift.mean


def loaded(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def trained(trainer: DPOTrainer, callback: AlignmentAuditCallback) -> None:
    callback.attach(trainer)
    with contextlib.redirect_stdout(None):
        trainer.train()


# -- one model in two guises -------------------------------------------------------------------------------------------


def test_the_base_that_adapters_were_put_into_is_the_policy_without_them(tmp_path: Path) -> None:
    """PEFT changes the very object that it is given: as a reference it would be the policy. The trainer's margin is right."""
    base, margins = loaded(saved_model(tmp_path / "base")), Margins()
    callback = AlignmentAuditCallback(config=quick(max_pairs=8), reference=base)
    trainer = trainer_of(tmp_path / "run", base, [callback, margins], peft_config=LORA)
    trained(trainer, callback)
    assert last_shift(tmp_path / "run") == pytest.approx(margins.by_step[3] / trainer.beta, rel=1e-2)
    source = AuditRun.load(tmp_path / "run").records[0].reference_check.source
    assert source == "the policy with its adapters off (a model that was passed is its own base)"


@pytest.mark.filterwarnings("ignore:.*base_model_name_or_path. was renamed")  # of a model that was never saved
def test_the_base_beside_a_reference_adapter_is_refused() -> None:
    base = tiny_model("llama")
    policy = get_peft_model(base, LORA)
    policy.add_adapter("ref", LORA)
    with pytest.raises(ReferenceUnavailableError, match="holds a 'ref' adapter that training compares it with"):
        resolve_reference(policy, base)


def test_the_policy_in_a_wrapper_is_refused() -> None:
    policy = tiny_model("llama")
    with pytest.raises(ReferenceUnavailableError, match="is the policy itself"):
        resolve_reference(torch.nn.DataParallel(policy), policy)
    with pytest.raises(ReferenceUnavailableError, match="is the policy itself"):
        resolve_reference(policy, torch.compile(policy))


@pytest.mark.filterwarnings("ignore:.*base_model_name_or_path. was renamed")  # of a model that was never saved
@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
@pytest.mark.parametrize("beside", [(), ("ref",)], ids=["adapters off", "ref adapter"])
def test_adapters_are_found_inside_a_wrapper(wrap: Any, beside: tuple[str, ...]) -> None:
    """Not found there, the reference would be taken for missing, or read from where the base was loaded from."""
    policy: Any = get_peft_model(tiny_model("llama"), LORA)
    for name in beside:
        policy.add_adapter(name, LORA)
    wrapped = wrap(policy)
    inside, plain = resolve_reference(wrapped), resolve_reference(policy)
    assert inside.source == plain.source
    assert inside.model() is policy
    assert fingerprints(wrapped, inside) == fingerprints(policy, plain)
    assert policy_fingerprint(wrapped) == policy_fingerprint(policy)
    assert fingerprint(wrapped) == fingerprint(policy)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_model_in_a_wrapper_is_the_same_model(wrap: Any) -> None:
    """Weights in a wrapper have other names; a policy that has not moved would be taken for one that has."""
    policy = tiny_model("llama")
    reference = copy.deepcopy(policy)
    both = (policy, reference), (wrap(policy), wrap(reference))
    records = [audit(one, other, random_pairs(4), quick()) for one, other in both]
    assert [record.reference_check.same_weights for record in records] == [True, True]
    assert records[0].provenance.policy_hash == records[1].provenance.policy_hash


def test_a_model_that_shares_what_trains_is_refused_and_one_that_shares_what_is_frozen_is_not() -> None:
    policy = tiny_model("llama")
    reference = copy.deepcopy(policy)
    reference.model.layers[1].mlp = policy.model.layers[1].mlp
    with pytest.raises(ReferenceUnavailableError, match=r"shares 3 parameters .* such as model\.layers\.1\.mlp"):
        resolve_reference(policy, None, reference)
    for parameter in policy.model.layers[1].mlp.parameters():
        parameter.requires_grad = False
    assert resolve_reference(policy, reference).model() is reference


@pytest.mark.parametrize("as_path", [True, False])
def test_a_saved_policy_is_not_its_own_reference(tmp_path: Path, as_path: bool) -> None:
    """A full checkpoint names its own folder as its source: a shift of 0 would be reported without a word."""
    folder = saved_model(tmp_path / "checkpoint-4")
    policy = folder if as_path else loaded(folder)
    # Of a path it is known before anything is loaded.
    holds = "checkpoint-4 is a full model and" if as_path else "holds the policy itself .*"
    with pytest.raises(ReferenceUnavailableError, match=f"{holds} does not say what it was trained from"):
        audit(policy, None, random_pairs(4), quick(), step=4)
    moved = loaded(folder)
    with torch.no_grad():
        moved.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert audit(moved, None, random_pairs(4), quick(), step=4).margins.shift.mean != 0.0, "trained since it was loaded"


def same_path_audit(folder: str, pairs: Path) -> None:
    audit(folder, folder, random_pairs(4), quick(), step=4)


def same_path_transfer(folder: str, pairs: Path) -> None:
    transfer(folder, folder, {"a": random_pairs(8), "b": random_pairs(8, seed=2)}, quick())


def own_source_transfer(folder: str, pairs: Path) -> None:
    transfer(loaded(folder), None, {"a": random_pairs(8), "b": random_pairs(8, seed=2)}, quick())


def same_path_saved(folder: str, pairs: Path) -> None:
    audit_saved({Path(folder): 4}, f"{folder}/../{Path(folder).name}", pairs, quick(), pairs.parent / "out")


def same_path_transfer_saved(folder: str, pairs: Path) -> None:
    transfer_saved(Path(folder), folder, {"a": pairs, "b": pairs}, quick())


@pytest.mark.parametrize(
    "entry", [same_path_audit, same_path_transfer, own_source_transfer, same_path_saved, same_path_transfer_saved]
)
def test_no_entry_point_compares_a_checkpoint_with_itself(tmp_path: Path, entry: Any) -> None:
    folder, pairs = saved_model(tmp_path / "checkpoint-4"), tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    with pytest.raises(ReferenceUnavailableError, match=r"the policy itself|checkpoint-4 itself"):
        entry(folder, pairs)


def test_a_folder_goes_on_where_one_checkpoint_has_no_reference(tmp_path: Path) -> None:
    """An adapter says what it was trained from, a full model beside it does not: it is passed over."""
    base, said = saved_model(tmp_path / "base"), []
    get_peft_model(loaded(base), LORA).save_pretrained(tmp_path / "checkpoint-2")
    saved_model(tmp_path / "checkpoint-4")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    folders = {tmp_path / f"checkpoint-{step}": step for step in (2, 4)}
    audits = audit_saved(folders, None, pairs, quick(), tmp_path / "out", tell=said.append)
    assert [record.step for record in audits.records] == [2]
    assert list(audits.broken) == [tmp_path / "checkpoint-4"]
    assert "checkpoint-4 is passed over: checkpoint-4 is a full model" in said[0]


# -- the reference is loaded as the policy was -------------------------------------------------------------------------


@pytest.mark.parametrize("kept_by", ["the model", "the trainer"])
def test_the_policys_own_source_is_taken_at_the_policys_own_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_by: str
) -> None:
    """A hub name means its newest revision; a cache is laid out here with two, of which the policy is the older one."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    commits = {"v1": "1" * 40, "main": "2" * 40}
    for number, (name, commit) in enumerate(commits.items()):
        model = tiny_model("llama", seed=number, dtype=torch.float32)
        model.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    policy: Any = loaded(str(repository / "snapshots" / commits["v1"]))
    policy.config._name_or_path, policy.config._commit_hash = "someone/tiny", None
    if kept_by == "the model":
        policy.config._commit_hash = commits["v1"]
    revision = None
    if kept_by == "the trainer":
        arguments = DPOConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"revision": "v1"})
        revision = read_trainer(None, arguments).revision
    reference: Any = resolve_reference(policy, revision=revision)
    weights = [dict(model.named_parameters())["lm_head.weight"] for model in (policy, reference.model())]
    assert torch.equal(*weights)
    reference.release()


@pytest.mark.parametrize("padded", ["policy", "reference"])
def test_a_vocabulary_that_was_padded_for_training_is_compared(tmp_path: Path, padded: str) -> None:
    base, margins = saved_model(tmp_path / "base"), Margins()
    policy, reference = loaded(base), loaded(base)
    size = policy.config.vocab_size
    model = policy if padded == "policy" else reference
    model.resize_token_embeddings(size + 1, pad_to_multiple_of=64)
    callback = AlignmentAuditCallback(config=quick(max_pairs=8))
    trainer = trainer_of(tmp_path / "run", policy, [callback, margins], ref_model=reference)
    trained(trainer, callback)
    assert last_shift(tmp_path / "run") == pytest.approx(margins.by_step[3] / trainer.beta, rel=1e-2)
    record = AuditRun.load(tmp_path / "run").records[-1]
    assert record.provenance.vocab_size == policy.config.vocab_size
    assert record.margins.kl.mean > 0


def test_the_divergence_of_unequal_vocabularies_is_that_over_what_they_share() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    target = torch.tensor([0, 3, 8, 2, 1])
    readout, _, kl = compare_readouts(policy, reference, target)
    p, q = policy[:, :9].softmax(-1), reference.softmax(-1)
    torch.testing.assert_close(kl, (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(readout.logp, policy.log_softmax(-1).gather(-1, target[:, None])[:, 0])


# -- before, after and between trainings -------------------------------------------------------------------------------


def test_evaluations_outside_training_belong_to_no_step(tmp_path: Path) -> None:
    config = quick(schedule={"on_evaluate": True})
    run = build(
        tmp_path / "run", "ref_model made", [callback := AlignmentAuditCallback(config=config)], max_steps=4,
        eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, learning_rate=5e-2,
        metric_for_best_model="eval_rewards/accuracies", greater_is_better=False,
    )  # fmt: skip
    callback.attach(run.trainer)
    with contextlib.redirect_stdout(None):
        run.trainer.evaluate()
        run.trainer.train()
        run.trainer.evaluate()
    records = AuditRun.load(tmp_path / "run").records
    assert [record.step for record in records] == [0, 2, 4]
    assert len({record.provenance.policy_hash for record in records}) == 3
    assert AuditRun.load(tmp_path / "run").failures == []


def test_a_second_training_has_probes_of_its_own(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(config=quick())
    hashes = []
    for number, rows in enumerate((ROWS[16:], ROWS[:8])):
        run = build(tmp_path / str(number) / "run", "ref_model made", [callback], max_steps=1)
        run.trainer.eval_dataset = run.trainer._prepare_dataset(
            Dataset.from_list(rows), run.trainer.processing_class, run.trainer.args, "eval"
        )
        callback.attach(run.trainer)
        with contextlib.redirect_stdout(None):
            run.trainer.train()
        records = AuditRun.load(tmp_path / str(number) / "run").records
        assert [record.step for record in records] == [0, 1]
        hashes.append(records[0].provenance.probe_hash)
    assert hashes[0] != hashes[1]
