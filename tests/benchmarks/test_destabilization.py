"""The destabilization benchmark: the split, the lines, the runs and their twins, and what is counted."""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from destabilization import (
    corruptions,
    curves,
    faults,
    kinds,
    lines,
    looks,
    models,
    pack,
    rivals,
    rules,
    score,
    training,
    truth,
    tune,
    verdicts,
)
from destabilization.inside import auroc
from destabilization.kinds import Case
from destabilization.lines import Truth
from destabilization.signals import FAMILIES, OF_FULL_AUDITS
from destabilization.stored import StoredRun, packed

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun
from align_audit.lab import MODEL_DIR
from align_audit.options.rules import LIMITS
from align_audit.record.audit_record import AuditRecord
from align_audit.record.training_log import LogRow

START = Truth(
    0, text=2.0, preferred=2.0, dispreferred=2.0, distinct=0.9, compression=0.4, length=40, ended=1.0, foreign=0.0
)


def at(step: int, **changes: float) -> Truth:
    return replace(START, step=step, **{"dispreferred": 2.5, **changes})


# -- the split -------------------------------------------------------------------------------------------------------------


FAULTS = (*kinds.SCORING_FAULTS, *kinds.LONG_FAULTS)


def test_tuning_and_scoring_share_no_seed_no_base_and_no_fault() -> None:
    tuning = [case for seed in range(kinds.SEEDS) for case in kinds.cases("tuning", seed)]
    scoring = [case for seed in range(kinds.SEEDS) for case in kinds.cases("scoring", seed)]
    assert not {case.seed for case in tuning} & {case.seed for case in scoring}
    assert not {case.base.name for case in tuning} & {case.base.name for case in scoring}
    settings = [{replace(case.base, name="", group="healthy") for case in split} for split in (tuning, scoring)]
    assert not settings[0] & settings[1]
    ways = [
        {(case.fault.rows, case.fault.event, case.fault.rate, case.fault.beta) for case in split if case.fault}
        for split in (tuning, scoring)
    ]
    assert not ways[0] & ways[1]


def test_twins_come_first_and_are_the_same_seed_without_the_fault() -> None:
    for split in ("tuning", "scoring"):
        seen: set[str] = set()
        for case in kinds.cases(split, 1):
            twin = case.twin
            assert twin is None or (twin.name in seen and twin.seed == case.seed and twin.base == case.base)
            seen.add(case.name)


def test_each_fault_of_the_scoring_split_meets_each_model_in_three_seeds() -> None:
    met = {(case.kind, case.base.model) for seed in range(3) for case in kinds.cases("scoring", seed) if case.fault}
    assert len(met) == 3 * len(FAULTS)


def test_in_nine_seeds_a_fault_meets_each_model_on_each_number_of_pairs() -> None:
    every = [case for seed in range(9) for case in kinds.cases("scoring", seed) if case.fault]
    met = {(case.kind, case.base.model, looks.looks(case).pairs) for case in every}
    assert len(met) == 9 * len(FAULTS)


def test_faults_name_what_there_is() -> None:
    every = [*FAULTS, *(fault for faults_ in kinds.TUNING_FAULTS.values() for fault in faults_)]
    assert {fault.rows for fault in every} - {None} <= set(corruptions.CORRUPTIONS)
    assert {fault.event for fault in every} - {None} == set(faults.EVENTS)


def test_truth_is_as_dense_as_audits_or_denser() -> None:
    for split in ("tuning", "scoring"):
        for case in kinds.cases(split, 0):
            steps = looks.looks(case).scheduled
            gaps = [b - a for a, b in itertools.pairwise(steps) if a >= 24]
            assert max(gaps) >= looks.TRUTH_EVERY
            assert set(steps) | set(looks.truth_steps(case)) <= looks.kept_steps(case)


def test_a_long_run_is_looked_at_to_its_end() -> None:
    case = next(case for case in kinds.cases("scoring", 0) if case.steps == kinds.LONG)
    assert looks.looks(case).scheduled[-1] == looks.truth_steps(case)[-1] == kinds.LONG
    assert [step / kinds.LONG for step in looks.looks(case).full] == [0.1, 0.25, 0.5, 0.75]
    assert {5, 10, 20, 40, 80, 160} <= set(looks.looks(case).scheduled)


def test_the_looks_of_a_short_run_are_those_it_was_stored_with() -> None:
    with gzip.open(packed("scoring"), "rt", encoding="utf-8") as file:
        about = json.loads(next(file))["about"]
    case = next(case for case in kinds.cases("scoring", about["seed"] - 100) if case.name == about["name"])
    assert list(looks.looks(case).scheduled) == about["looks"]


# -- the lines -------------------------------------------------------------------------------------------------------------


def test_one_bad_measurement_ruins_nothing_and_two_do() -> None:
    once = [START, at(4, text=2.6), at(8), at(12)]
    twice = [START, at(4, text=2.6), at(8, text=2.7), at(12)]
    assert lines.outcome(once).fate == "healthy"
    assert lines.outcome(twice) == lines.Outcome("ruined", 4, "text at 1.2 of its line")


def test_the_last_measurement_counts_alone() -> None:
    assert lines.outcome([START, at(4), at(8, preferred=2.5, dispreferred=3.0)]).since == 8


@pytest.mark.parametrize(
    "harm",
    [{"distinct": 0.6}, {"compression": 0.2}, {"length": 70.1}, {"length": 16}, {"ended": 0.5}, {"foreign": 0.1}],
)
def test_degenerate_continuations_ruin(harm: dict[str, float]) -> None:
    assert lines.outcome([START, at(4, **harm), at(8, **harm)]).fate == "ruined"


def test_half_of_a_line_is_worn() -> None:
    assert lines.outcome([START, at(4, text=2.26), at(8, text=2.3)]).fate == "worn"


def test_what_a_healthy_twin_loses_as_well_is_no_harm() -> None:
    run, twin = [START, at(4, text=2.4), at(8, text=2.6)], [START, at(4, text=2.2), at(8, text=2.24)]
    assert lines.outcome(run).fate == "ruined"
    assert lines.outcome(run, twin).fate == "worn"


def test_a_twin_that_is_not_healthy_excuses_nothing() -> None:
    run = [START, at(4, text=3.0), at(8, text=3.0)]
    assert lines.outcome(run, run).fate == "ruined"


def test_a_preference_that_was_learned_and_lost_is_wasted_from_where_the_twin_is_ahead() -> None:
    run = [START, at(4, dispreferred=2.1), at(8, dispreferred=2.1), at(12, dispreferred=2.0)]
    twin = [START, at(4, dispreferred=2.1), at(8, dispreferred=2.3), at(12, dispreferred=2.5)]
    found = lines.outcome(run, twin)
    assert (found.fate, found.since) == ("wasted", 12)
    assert lines.outcome(run).fate == "wasted"
    assert lines.outcome(twin).fate == "healthy"


def test_nan_is_ruined() -> None:
    assert lines.outcome([START, at(4, text=math.nan), at(8, text=math.nan)]).fate == "ruined"


def test_truth_of_other_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="same steps"):
        lines.outcome([START, at(4)], [START, at(8)])
    with pytest.raises(ValueError, match="step 0"):
        lines.outcome([at(4)])


# -- what goes wrong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(corruptions.CORRUPTIONS))
def test_rows_before_a_corruption_are_those_without_it(name: str) -> None:
    pairs = models.texts("llama", 7, 24).training
    plain = corruptions.training_rows(pairs, 64, 7, corruption=None, begin=0)
    changed = corruptions.training_rows(pairs, 64, 7, corruption=name, begin=16)
    assert changed[:16] == plain[:16]
    assert changed[16:] != plain[16:]
    assert [row["prompt"] for row in changed] == [row["prompt"] for row in plain]


def test_no_pair_is_trained_on_and_measured_on() -> None:
    data = models.texts("llama", 3, 64)
    sets = [{row["prompt"] for row in rows} for rows in (data.training, data.evaluated, data.probes, data.preferred)]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 64 + models.EVALUATED + models.PROBED + models.TRUTH_PAIRS


def test_lost_moments_keep_their_count_and_make_long_steps() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(40):
        weight.grad = torch.ones(4)
        optimizer.step()
    was = weight.detach().clone()
    faults.lose_optimizer_state(SimpleNamespace(optimizer=optimizer))
    optimizer.step()
    assert 20 * 1e-3 < float((was - weight.detach())[0]) < 40 * 1e-3


def test_an_idle_optimizer_moves_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    was = model.weight.detach().clone()
    faults.idle(SimpleNamespace(model=model, optimizer=optimizer))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, was)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_swapped_layers_and_references_are_other_models(family: str, pair_of_models: Any) -> None:
    policy, reference = (copy.deepcopy(model) for model in pair_of_models(family))
    was = [training.digest(dict(model.state_dict())) for model in (policy, reference)]
    trainer = SimpleNamespace(model=policy, ref_model=reference)
    faults.swap_layers(trainer)
    faults.swap_reference(trainer)
    assert [training.digest(dict(model.state_dict())) for model in (policy, reference)] != was
    faults.swap_layers(trainer)
    assert training.digest(dict(policy.state_dict())) == was[0]


# -- the truth -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    model, tokenizer = models.load("llama")
    return model.eval(), tokenizer


def test_nats_per_token_are_the_models_own_loss(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    rows = [tokenizer(text)["input_ids"] for text in models.texts("llama", 0, 1).natural[:3]]
    with torch.no_grad():
        losses = [float(model(torch.tensor([row]), labels=torch.tensor([row])).loss) * (len(row) - 1) for row in rows]
    expected = sum(losses) / sum(len(row) - 1 for row in rows)
    assert truth.nats_per_token(model, [(row, 1) for row in rows]) == pytest.approx(expected, rel=1e-5)


def test_continuations_are_what_the_model_generates_from_each_prompt_alone(
    shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = shipped
    monkeypatch.setattr(truth, "NEW_TOKENS", 50)
    monkeypatch.setattr(models, "PROMPTS", 4)
    meter = truth.TruthMeter("llama", tokenizer, models.texts("llama", 0, 1))
    continued, ended = meter._continue(model)
    assert len({len(prompt) for prompt in meter._prompts}) > 1
    for row in range(4):
        prompt = torch.tensor([meter._prompts[row]])
        whole = model.generate(prompt, max_new_tokens=truth.NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :].tolist()
        stop = tokenizer.eos_token_id
        assert ended[row] == (stop in whole)
        assert continued[row] == (whole[: whole.index(stop)] if stop in whole else whole)


def test_distinct_grams_are_counted() -> None:
    assert truth.distinct([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(4 / 5)
    assert truth.distinct([1, 2]) == 1.0


# -- runs and their twins --------------------------------------------------------------------------------------------------


def test_a_run_is_its_twin_until_its_fault(tmp_path: Path) -> None:
    base = kinds.Base("test", "healthy", steps=4, pairs=32, learning_rate=5e-4)
    case = Case("tuning", base, kinds.Fault("flip", "known step", step=2, rows="flipped"), 5)
    kept = []
    for run in (case, case.twin):
        assert run is not None
        training.train(run, tmp_path / run.name, frozenset(range(5)))
        kept.append(json.loads((tmp_path / run.name / training.WEIGHTS).read_text()))
    policies = [[steps[str(step)]["policy"] for step in range(5)] for steps in kept]
    assert policies[0][:3] == policies[1][:3]
    assert policies[0][3] != policies[1][3]
    assert len({*policies[1]}) == 5
    assert {steps["reference"] for steps in kept[0].values()} == {policies[0][0]}


@pytest.mark.slow
def test_audits_of_stored_weights_are_those_of_the_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from destabilization import auditing

    case = Case("tuning", kinds.Base("test", "healthy", steps=2, pairs=16, learning_rate=1e-3), None, 3)
    monkeypatch.setattr(auditing, "looks", lambda case: SimpleNamespace(full=(2,)))
    monkeypatch.setattr(auditing, "kept_steps", lambda case: {0, 2})
    monkeypatch.setattr(looks, "looks", lambda case: looks.Looks(every=2, pairs=6))
    training.train(case, tmp_path / "stored", frozenset({0, 2}))
    auditing.audit_run(case, tmp_path / "stored", "health")
    stored = auditing.read_records(tmp_path / "stored", "health")

    off = {"enabled": False}
    config = AuditConfig.from_dict(
        {"max_pairs": 6, "tensorboard": "off", "progress": False, "strict": True, "schedule": {"every_n_steps": 2},
         "patching": off, "localization": off, "low_rank": off, "spinal": off, "generations": off}
    )  # fmt: skip
    callback = AlignmentAuditCallback(models.texts("llama", 3, 1).probes, config=config)
    trainer = training._trainer(case, tmp_path / "live")
    trainer.add_callback(callback)
    callback.attach(trainer)
    trainer.train()
    live = AuditRun.load(tmp_path / "live" / "trainer").records[-1]
    assert stored[-1]["provenance"]["policy_hash"] == live.provenance.policy_hash
    assert stored[-1]["margins"]["kl"]["mean"] == pytest.approx(live.margins.kl.mean, rel=1e-4)
    assert stored[-1]["margins"]["shift"]["mean"] == pytest.approx(live.margins.shift.mean, rel=1e-4)


def test_a_merged_adapter_computes_what_the_adapted_model_does() -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = models.load("llama")
    adapted: Any = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    plain, tokenizer = models.load("llama")
    plain.load_state_dict(training.merged_state(adapted), strict=False)
    ids = torch.tensor([tokenizer("One rainy day, Mila went to the pond.")["input_ids"]])
    merged = plain.eval()(ids).logits
    assert torch.allclose(merged, adapted.eval()(ids).logits, atol=1e-4)
    assert not torch.allclose(merged, models.load("llama")[0].eval()(ids).logits, atol=1e-2)
    assert MODEL_DIR.is_dir()


def test_a_run_that_is_not_its_twin_is_refused() -> None:
    twin = {"about": {"name": "a", "twin": None}, "weights": {"0": "x", "4": "y"}}
    run = {"about": {"name": "b", "twin": "a", "fault_step": 4}, "weights": {"0": "x", "4": "z"}}
    with pytest.raises(ValueError, match="step 4"):
        pack.check_twin(run, {"a": twin})
    pack.check_twin({**run, "weights": {"0": "x", "4": "y"}}, {"a": twin})


def test_runs_that_were_packed_before_stay_and_those_made_again_take_their_place(tmp_path: Path) -> None:
    """Runs are made on many days: a folder of new ones is no reason to lose the old."""
    with gzip.open(packed("tuning"), "rt", encoding="utf-8") as file:
        steady, flipped = (
            next(line for line in file if json.loads(line)["about"]["name"] == name)
            for name in ("steady+000", "steady+labels-flip+000")
        )
    data, folder = tmp_path / "data", tmp_path / "runs" / "tuning" / "again"
    data.mkdir()
    with gzip.open(packed("tuning", data), "wt", encoding="utf-8") as file:
        file.writelines([steady, flipped])
    folder.mkdir(parents=True)
    made = json.loads(steady)
    (folder / "run.json").write_text(json.dumps({**made["about"], "machine": "another"}))
    (folder / "weights.json").write_text(json.dumps({step: {"policy": kept} for step, kept in made["weights"].items()}))
    for name, rows in (("truth", made["truth"]), ("training", made["log"]), ("health", made["health"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack.main(argparse.Namespace(out=tmp_path / "runs", data=data))
    with gzip.open(packed("tuning", data), "rt", encoding="utf-8") as file:
        kept, old = sorted((json.loads(line) for line in file), key=lambda line: len(line["about"]["name"]))
    assert (kept["about"]["machine"], {**kept, "about": made["about"]}) == ("another", made)
    assert old == json.loads(flipped)


def test_numbers_are_rounded_and_nothing_else() -> None:
    assert pack.rounded({"a": [0.123456789, 3, None, "x"]}) == {"a": [0.12346, 3, None, "x"]}


# -- what is counted -------------------------------------------------------------------------------------------------------


def stored_run(
    truths: list[Truth], log: list[LogRow], *, fault_step: int | None = None, name: str = "run"
) -> StoredRun:
    about = {"name": name, "kind": name, "group": "healthy", "twin": None, "fault_step": fault_step, "looks": [24, 28],
             "settings": {"model": "llama"}}  # fmt: skip
    return StoredRun(about, truths, log, [], [], None)


def loss_log(values: list[float]) -> list[LogRow]:
    return [LogRow(step, {"loss": value}) for step, value in enumerate(values, start=1)]


def test_a_spike_is_seen_when_it_lasts() -> None:
    flat = [0.7] * 20
    assert not rivals.loss_spike(loss_log([*flat, 1.5]), 1.0)
    assert rivals.loss_spike(loss_log([*flat, 1.5, 1.5]), 1.0)
    assert not rivals.loss_spike(loss_log([*flat, 1.5, 1.5]), 4.0)


def test_a_loss_that_stays_at_ln_2_is_seen_after_sixteen_steps() -> None:
    assert rivals.loss_stuck(loss_log([math.log(2)] * 16), 1.0)
    assert not rivals.loss_stuck(loss_log([math.log(2)] * 15), 1.0)
    assert not rivals.loss_stuck(loss_log([0.7 - 0.01 * step for step in range(16)]), 1.0)


def test_rules_of_evaluations_compare_with_the_start() -> None:
    log = [
        LogRow(0, {"eval_logps/chosen": -20.0, "eval_entropy": 1.0}),
        LogRow(8, {"eval_logps/chosen": -27.0, "eval_entropy": 0.4}),
    ]
    assert rivals.eval_chosen_floor(log, 1.0)
    assert not rivals.eval_chosen_floor(log, 2.0)
    assert rivals.eval_entropy_range(log, 1.0)
    assert not rivals.eval_entropy_range(log[:1], 1.0)


def test_tuning_takes_the_strictest_limits_without_a_false_alarm() -> None:
    healthy = [stored_run([START], loss_log([0.7] * 20 + [1.2, 1.2]))]
    limit = rivals.tuned(healthy, ("loss spike",))["loss spike"]
    rules_of = rules.RuleSet("spike", rivals.union({"loss spike": 1.0}))
    stricter = rivals.LAXNESS[rivals.LAXNESS.index(limit) - 1]
    assert rules.alarms(healthy[0], rules_of, limit) == []
    assert [raised.step for raised in rules.alarms(healthy[0], rules_of, stricter)] == [22]


def test_alarms_before_a_fault_are_its_twins() -> None:
    log = loss_log([0.7] * 20 + [1.5, 1.5, 0.7, 0.7])
    spike = rules.RuleSet("spike", rivals.union({"loss spike": 1.0}))
    assert [raised.step for raised in rules.alarms(stored_run([START], log), spike)] == [22]
    assert rules.alarms(stored_run([START], log, fault_step=22), spike) == []


def test_recall_false_alarms_and_lead_are_counted() -> None:
    ruined = [START, *(at(step, text=3.0) for step in (24, 28))]
    healthy = [START, at(24), at(28)]
    spike = rules.RuleSet("spike", rivals.union({"loss spike": 1.0}))
    runs = [
        stored_run(ruined, loss_log([0.7] * 20 + [1.5, 1.5]), name="seen"),
        stored_run(ruined, loss_log([0.7] * 28), name="missed"),
        stored_run(healthy, loss_log([0.7] * 28), name="quiet"),
        stored_run(healthy, loss_log([0.7] * 20 + [1.5, 1.5]), name="disturbed"),
    ]
    figures = verdicts.summary(verdicts.Groups.of(runs), spike)
    assert (figures["caught"], figures["harmed"], figures["missed"]) == (1, 2, ["missed"])
    assert (figures["false_errors"], figures["healthy"]) == (1, 2)
    assert list(figures["disturbed"]) == ["disturbed"]
    assert (figures["median_lead"], figures["median_lead_share"]) == (2, 2 / 64)


def test_a_lead_is_a_share_of_its_own_run() -> None:
    """Runs of two lengths: the median of the shares, not a share of the median."""
    log = loss_log([0.7] * 20 + [1.5, 1.5])
    runs = [stored_run([START, *(at(step, text=3.0) for step in (step, step + 4))], log) for step in (24, 42, 62)]
    runs[2].about["settings"]["steps"] = 160
    spike = rules.RuleSet("spike", rivals.union({"loss spike": 1.0}))
    said = verdicts.verdicts(runs, spike)
    assert [verdict.lead for verdict in said] == [2, 20, 40]
    assert verdicts.median_leads(said) == {"median_lead": 20, "median_lead_share": 40 / 160}
    assert score.lead_words(verdicts.median_leads(said)) == "+20 (+25%)"
    assert verdicts.median_leads([]) == {"median_lead": None, "median_lead_share": None}


def test_of_two_points_that_catch_as_many_the_one_that_leads_is_taken() -> None:
    """A lead of nothing is more than one that comes late, and than none."""
    point = {"false_warnings": 0, "healthy": 9, "in_time": 3, "caught": 4}
    points = [{**point, "laxness": at, "median_lead_share": lead} for at, lead in enumerate((None, -0.1, 0.0))]
    assert curves.best_at(points, 0.0)["laxness"] == 2


def keep(split: kinds.Split, names: Sequence[str], folder: Path) -> None:
    """Put some of a split's stored runs there."""
    with gzip.open(packed(split), "rt", encoding="utf-8") as file:
        chosen = [line for line in file if json.loads(line)["about"]["name"] in names]
    with gzip.open(packed(split, folder), "wt", encoding="utf-8") as file:
        file.writelines(chosen)


def test_curves_are_the_same_on_one_process_and_on_two(tmp_path: Path) -> None:
    keep("tuning", ["steady+000"], tmp_path)
    keep("scoring", ["plain+100", "plain+wrong-labels+100"], tmp_path)
    dials = curves.Dials("scoring", tmp_path)
    alone = curves.curves(dials, laxness=(0.5, 1.0))
    assert list(alone) == list(dials.sets)
    for name, points in alone.items():
        usual = verdicts.summary(dials.groups, dials.sets[name])
        assert [point["laxness"] for point in points] == [0.5, 1.0]
        assert points[1].items() - {("laxness", 1.0)} <= usual.items()
    assert curves.curves(dials, jobs=2, laxness=(0.5, 1.0)) == alone


def test_another_value_of_an_option_is_tried_on_the_tuning_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs of those that are kept: a healthy one, and one whose loss is used up while it learns nothing."""
    keep("tuning", ["steady+000", "steady+long-answers+000"], tmp_path)
    tune.main(argparse.Namespace(option="log_saturated_loss", values=[0.05], data=tmp_path, level="warning"))
    usual, early, moved = capsys.readouterr().out.splitlines()
    assert usual.startswith("log_saturated_loss default: false 0 of 1, caught 1 and in time 0 of 1")
    assert early.startswith("log_saturated_loss 0.05: false 0 of 1, caught 1 and in time 1 of 1")
    assert moved == "    steady+long-answers+000: step 56 → 32"
    with pytest.raises(SystemExit, match="no option kl_warnin"):
        tune.main(argparse.Namespace(option="kl_warnin", values=[1.0], data=tmp_path, level="warning"))


def test_every_signal_can_be_read_of_a_stored_full_audit() -> None:
    with gzip.open(packed("scoring"), "rt", encoding="utf-8") as file:
        line = next(line for line in map(json.loads, file) if line["full"] and line["about"]["kind"] == "rate-high")
    record = AuditRecord.from_values(line["full"][-1], "a packed record")
    for family in OF_FULL_AUDITS:
        read = {name: signal(record) for name, signal in FAMILIES[family].items()}
        assert all(isinstance(value, float) for value in read.values())
        assert any(math.isfinite(value) for value in read.values()), family


def test_limits_of_one_are_the_defaults() -> None:
    assert rules.limits(1.0) == AuditConfig().alerts
    assert all(rules.moved(limit, 1.0) == pytest.approx(limit.default, abs=1e-5) for limit in LIMITS.values())


@pytest.mark.parametrize("laxness", rivals.LAXNESS)
def test_moved_limits_are_allowed_and_on_the_lax_side(laxness: float) -> None:
    config = rules.limits(laxness)
    for name, limit in LIMITS.items():
        change = (getattr(config, name) - limit.default) * (1 if limit.direction == "above" else -1)
        assert change == 0 or (change > 0) == (laxness > 1), name


def test_wilson_bounds_are_printed_also_of_none() -> None:
    assert verdicts.share(0, 60) == "0 of 60 (0 to 6 %)"
    assert verdicts.share(0, 0) == "none"


def test_tables_are_written_between_the_marks_of_a_document(tmp_path: Path) -> None:
    path = tmp_path / "alerts.md"
    path.write_text("# Alerts\n\ntext\n")
    score.write_section(path, "first")
    score.write_section(path, "second")
    assert path.read_text() == f"# Alerts\n\ntext\n\n{score.BEGIN}\nsecond\n{score.END}\n"
    path.write_text(path.read_text() + "\n## More\n")
    score.write_section(path, "third")
    assert path.read_text().split(score.END)[1] == "\n\n## More\n"


def test_what_the_document_says_in_short_is_what_its_tables_say() -> None:
    """The words are written by hand, and the tables are made again with more runs."""
    text = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text(encoding="utf-8")
    short = " ".join(text.partition("## What they are worth, in short")[2].partition("![")[0].split())

    def table(heading: str) -> dict[str, list[str]]:
        lines = text.partition(heading)[2].partition("\n#")[0].splitlines()
        return {cells[1]: cells[2:] for line in lines if len(cells := [cell.strip() for cell in line.split("|")]) > 2}

    sets, curves = table("### Every set of rules"), table("### At equal shares of false alarms")
    ours = sets["align_audit, looks and log"]
    alarmed, failed, caught, in_time = (cell.partition(" (")[0] for cell in ours[:4])
    for words in (f"an error in {failed} ", f"came in {alarmed} ", f"runs {caught} were told of, {in_time} in time"):
        assert words in short, words
    assert sets["align_audit, with full audits"][2:] == ours[2:], "the inside adds no run and no lead"
    runs = re.search(r"Signals of full audits: (\d+) harmed runs, (\d+) healthy ones", text)
    assert runs is not None
    assert f"({runs[1]} harmed runs, {runs[2]} healthy ones)" in short
    at_none = {name: int(cells[0].partition(",")[0]) for name, cells in curves.items() if cells[0][:1].isdigit()}
    best = max(count for name, count in at_none.items() if not name.startswith("align_audit"))
    assert f"catch {at_none['align_audit, looks and log']} in time and the best of the others {best}." in short
    for share, word in enumerate(("catch", "2 % disturbed", "with 5 %", "with 10 %")):
        assert f"{word} {against(curves, share, caught_in_time=False)}" in short
    late = ", ".join(against(curves, share, caught_in_time=True) for share in (1, 2, 3))
    assert f"In time they are behind there: {late}." in short


def against(curves: dict[str, list[str]], share: int, *, caught_in_time: bool) -> str:
    """Ours against the best of the others, at one share of false alarms."""
    counts = {
        name: int(cells[share].split(",")[0 if caught_in_time else 1])
        for name, cells in curves.items()
        if cells[share][:1].isdigit()
    }
    best = max(count for name, count in counts.items() if not name.startswith("align_audit"))
    return f"{counts['align_audit, looks and log']} against {best}"


def test_a_suspicion_of_the_log_calls_for_one_look_at_the_next_step_kept() -> None:
    log = [LogRow(step, {"loss": 0.7, "grad_norm": 1.0}) for step in range(1, 5)] + [
        LogRow(step, {"loss": math.nan, "grad_norm": 1.0}) for step in range(5, 9)
    ]
    run = StoredRun({"settings": {}}, [], log, [SimpleNamespace(step=step) for step in (0, 4, 6, 8)], [], None)  # type: ignore[list-item]
    assert rules.called_for(run, AuditConfig().alerts) == {6}


def test_auroc_counts_ties_half() -> None:
    def of(model: str, *values: float) -> list[tuple[str, float]]:
        return [(model, value) for value in values]

    assert auroc(of("a", 3, 4, 5), of("a", 1, 2, 3)) == pytest.approx(8.5 / 9)
    assert math.isnan(auroc(of("a", 1, 2), of("a", 1, 2, 3)))
    # What sets models apart says nothing of their runs.
    assert auroc(of("a", 3, 4, 5), [*of("a", 1, 2, 3), *of("b", 9, 9, 9)]) == pytest.approx(8.5 / 9)
    assert math.isnan(auroc(of("a", 3, 4, 5), of("b", 1, 2, 3)))
