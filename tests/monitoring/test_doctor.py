"""What the doctor says before a run begins is what the run would do: the same refusals, the same log, the same schedule."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align_audit import audit
from align_audit.auditing.measurements import lens_walk
from align_audit.auditing.session.open_models import OpenModels
from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError, AuditMemoryError, ConfigurationError
from align_audit.models.loading import load_model
from align_audit.models.reference import Reference, policy_fingerprint, resolve_reference
from align_audit.monitoring import doctor, doctor_costs, doctor_place
from align_audit.monitoring.checkpoints import audit_saved
from align_audit.monitoring.doctor import examine, probes_check
from align_audit.monitoring.doctor_costs import cost_checks, in_proportion, numerics, schedule_check, training_seconds
from align_audit.monitoring.doctor_place import log_check, not_tried, place_checks, stored_in, texts_kept
from align_audit.monitoring.doctor_plan import Check, Plan
from align_audit.monitoring.forecast import Costs, PlannedSteps, forecast
from align_audit.monitoring.start import begin_run
from align_audit.monitoring.trainer import read_trainer
from align_audit.probes.pairs import ProbeSet
from align_audit.ranks import Ranks
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import FOLDER, RECORDS, RunLog
from align_audit.writers.webhook import VARIABLE
from tests.helpers.dpo import saved_model
from tests.helpers.make_record import make_record
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

OPTIONS: dict[str, Any] = {"progress": False, "tensorboard": "off", "report": False}
PAIRS = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [3, 5]}]


def checked(plan: Plan, **options: Any) -> dict[str, Check]:
    return {
        check.name: check for check in place_checks(plan, AuditConfig.from_dict(OPTIONS | options), stored_in(plan))
    }


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def pairs() -> dict[str | None, ProbeSet]:
    return {None: ProbeSet.from_dataset(PAIRS, None)}


# -- what a run refuses, the doctor refuses in the same words ----------------------------------------------------------


def no_address(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.delenv(VARIABLE, raising=False)
    RunLog(folder).append(make_record(3))
    return {"alerts": {"webhook": {}}}


def no_tracker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"trackers": ["wandb"]}


def newer_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    log = RunLog(folder)
    (log.directory / RECORDS).write_text(
        json.dumps(json.loads(make_record(1).to_json()) | {"schema_version": 99}) + "\n"
    )
    return {}


def no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    folder.mkdir()
    (folder / FOLDER).touch()
    return {}


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); input()"


@pytest.fixture
def hold() -> Iterator[Callable[[Path], None]]:
    """Lock a file from another process, until the test ends."""
    holders = []

    def lock(path: Path) -> None:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"

    yield lock
    for holder in holders:
        holder.communicate(b"\n")


@pytest.mark.parametrize("wrong", [no_address, no_tracker, newer_log, no_folder, "a log that another process writes"])
def test_a_run_that_would_not_begin_is_red_and_nothing_is_touched(
    wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Any, pairs: dict[str | None, ProbeSet]
) -> None:
    from trl import DPOConfig

    folder = tmp_path / "out"
    options: dict[str, Any] = {}
    if callable(wrong):
        options = wrong(folder, monkeypatch)
    else:
        (folder / FOLDER).mkdir(parents=True)
        hold(folder / FOLDER / RECORDS)
    present = contents(tmp_path)
    checks = checked(Plan("model", "pairs", output_dir=folder, report_to=()), **options).values()
    red = [check for check in checks if check.level == "red"]
    assert contents(tmp_path) == present
    assert len(red) == 1
    assert red[0].fix
    policy, reference = tiny_model("llama"), tiny_model("llama")
    facts = read_trainer(None, DPOConfig(str(folder), use_cpu=True, bf16=False, report_to=[]))
    config = AuditConfig.from_dict(OPTIONS | options)
    with pytest.raises(AlignAuditError) as refused:
        begin_run(policy, reference, pairs, config, facts, step=0, ranks=Ranks(), writes=True, anatomy=None)
    # What the operating system calls it depends on what was tried.
    assert str(refused.value).split(": [Errno")[0] == red[0].observation.split(": [Errno")[0]
    assert contents(tmp_path) == present, "no log was set aside for a run that does not begin"


def test_saved_checkpoints_are_refused_before_their_log_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = no_address(tmp_path / "out", monkeypatch)
    saved_model(tmp_path / "checkpoint-3")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    present = contents(tmp_path / "out" / FOLDER)
    config = AuditConfig.from_dict(OPTIONS | options)
    with pytest.raises(ConfigurationError, match=VARIABLE):
        audit_saved(
            {tmp_path / "checkpoint-3": 3}, None, tmp_path / "pairs.jsonl", config, tmp_path / "out", fresh=True
        )
    assert contents(tmp_path / "out" / FOLDER) == present


def test_files_of_others_stay_in_the_output_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "out"):
        folder.mkdir(exist_ok=True)
        (folder / ".align_audit-notes").write_text("mine")
    present = contents(tmp_path)
    for output in (tmp_path / "out", tmp_path / "new" / "out"):
        assert checked(Plan("model", "pairs", output_dir=output))["output"].level == "green"
    assert contents(tmp_path) == present


# -- what becomes of a log ---------------------------------------------------------------------------------------------


def of_start(policy: torch.nn.Module, probes: ProbeSet, config: AuditConfig, **changes: Any) -> AuditRecord:
    """The record that a run's own first audit would leave."""
    record = make_record(0)
    said = {"policy_hash": policy_fingerprint(policy), "probe_hash": probes.content_hash, "config": config.to_dict()}
    return record.model_copy(update={"provenance": record.provenance.model_copy(update=said | changes)})


@pytest.mark.parametrize(
    ("case", "level", "words"),
    [
        ("the same start", "green", "goes on with the 1 audit there"),
        ("another policy", "yellow", "moves the 1 audit there to a folder previous-N"),
        ("resumed", "green", "that is resumed goes on"),
        ("adapters", "yellow", "unless the adapters begin exactly"),
    ],
)
def test_what_becomes_of_a_log_is_what_the_run_would_do(
    case: str, level: str, words: str, tmp_path: Path, pairs: dict[str | None, ProbeSet]
) -> None:
    policy, config = tiny_model("llama"), AuditConfig.from_dict(OPTIONS)
    changes = {"policy_hash": "f" * 16} if case in ("another policy", "resumed") else {}
    log = RunLog(tmp_path)
    log.append(of_start(policy, pairs[None], config, **changes))
    log.close()
    plan = Plan("model", "pairs", output_dir=tmp_path, resumes=case == "resumed", lora=case == "adapters")
    (check,) = log_check(plan, config, policy, pairs, stored_in(plan))
    assert (check.name, check.level) == ("log", level)
    assert words in check.observation


def test_a_log_is_read_once_for_all_that_is_said_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0] | {"chosen_ids": [90_000]}) + "\n")
    log = RunLog(tmp_path / "out")
    log.append(make_record(0))
    log.close()
    looks: list[Path] = []
    look = doctor_place.look_into_log
    monkeypatch.setattr(doctor_place, "look_into_log", lambda folder: looks.append(folder) or look(folder))
    plan = Plan(str(tmp_path / "model"), tmp_path / "pairs.jsonl", output_dir=tmp_path / "out")
    said = {check.name: check.observation for check in examine(plan, AuditConfig.from_dict(OPTIONS))}
    assert "holds 1 audit of an earlier run" in said["output"] and "the 1 audit there" in said["log"]
    assert looks == [tmp_path / "out"]


# -- the run's own check comes first -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "row", "name", "words"),
    [
        ({}, {"chosen_ids": [90_000]}, "probes", "token id 90000"),
        ({"kind": "gpt2"}, {"prompt_ids": [1] * 40}, "probes", "positions"),
        ({"sites": [{"site": "head", "layers": [7]}]}, {}, "sites", "layer"),
    ],
)
def test_what_breaks_every_audit_is_no_fault_of_the_tool(
    changes: dict[str, Any], row: dict[str, Any], name: str, words: str, tmp_path: Path
) -> None:
    saved_model(tmp_path / "model")
    if changes.get("kind") == "gpt2":
        tiny_model("gpt2", n_positions=32).save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0] | row) + "\n")
    config = AuditConfig.from_dict(OPTIONS | {"sites": changes.get("sites", [])})
    checks = list(examine(Plan(str(tmp_path / "model"), tmp_path / "pairs.jsonl"), config))
    assert (checks[-1].name, checks[-1].level) == (name, "red")
    assert words in checks[-1].observation


def test_a_model_in_pickles_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    folder = Path(saved_model(tmp_path / "model"))
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    plan = {"probes": tmp_path / "pairs.jsonl", "model": str(folder)}
    *_, refused = examine(Plan(**plan), AuditConfig.from_dict(OPTIONS))
    assert (refused.name, refused.level) == ("model", "red")
    assert "are a pickle (pytorch_model.bin)" in refused.observation
    assert "--allow-pickle" in refused.fix
    trusted = {
        check.name: check.level for check in examine(Plan(**plan, allow_pickle=True), AuditConfig.from_dict(OPTIONS))
    }
    assert (trusted["model"], trusted["probes"]) == ("green", "red")


# -- the trainer's numerics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_training_is_timed_in_the_trainers_precision(dtype: Any, pairs: dict[str | None, ProbeSet]) -> None:
    policy, reference = tiny_model("llama", dtype=torch.float32), tiny_model("llama", dtype=torch.float32)
    plan = Plan("model", "pairs", mixed_precision=dtype)
    seen = set()
    for model in (policy, reference):
        model.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    assert training_seconds(plan, AuditConfig(), policy, Reference("start", model=reference), pairs) > 0
    assert seen == {dtype is not None}
    with numerics(plan, policy)():
        assert torch.is_autocast_enabled("cpu") == (dtype is not None)


def test_memory_of_all_pairs_is_told_beside_that_of_those_that_were_tried() -> None:
    reference = tiny_model("llama", dtype=torch.float32)
    policy, sets = perturbed(reference), {None: random_pairs(24)}
    config = AuditConfig.from_dict({**OPTIONS, "localization": {"enabled": False}, "generations": {"enabled": False}})
    with OpenModels(policy, resolve_reference(policy, reference), keep_loaded=True) as models:
        first, *_ = cost_checks(Plan("m", "p"), config, 1.0, models.open(), sets, lambda _: None)
    said = re.search(r"takes (\d+) MiB beside the models on 8 pairs, about (\d+) MiB on 24", first.observation)
    assert said is not None, first.observation
    assert int(said[1]) <= int(said[2])


def test_a_very_long_run_is_judged_by_its_beginning_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_costs, "_MOST_STEPS", 40)
    reference = tiny_model("llama", dtype=torch.float32)
    policy, sets = perturbed(reference), {None: random_pairs(4)}
    config = AuditConfig.from_dict({**OPTIONS, "localization": {"enabled": False}, "generations": {"enabled": False}})
    with OpenModels(policy, resolve_reference(policy, reference), keep_loaded=True) as models:
        for steps, said in ((40, False), (10**12, True)):
            plan = Plan("m", "p", max_steps=steps)
            *_, schedule = cost_checks(plan, config, 1.0, models.open(), sets, lambda _: None)
            assert ("(judged by the first 40 of 1,000,000,000,000 steps)" in schedule.observation) is said


def test_a_part_of_the_pairs_takes_the_same_part_of_an_audits_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls, continuations and transport take no more of many pairs than of some: scaled with the pairs, they would be."""
    for module in (lens_walk, doctor_costs):
        monkeypatch.setattr(module, "PORTION", 16)
        monkeypatch.setattr(module, "SHARE", 0.05)
    reference = tiny_model("llama")
    policy, probes = perturbed(reference), random_pairs(32)
    timed = probes.subsample(8, 0)
    config = AuditConfig.from_dict(
        {
            "patching": {"control_pairs": 8},
            "generations": {"prompts": 4},
            "localization": {"enabled": False},
            "progress": False,
        }
    )
    share = timed.num_tokens / probes.num_tokens

    def work(pairs: ProbeSet, settings: AuditConfig) -> tuple[float, int]:
        record = audit(policy, reference, pairs, settings)
        assert record.spinal is not None and record.spinal.transport_rows is not None
        return record.cost.forward_equivalents * pairs.num_tokens, record.spinal.transport_rows

    with OpenModels(policy, resolve_reference(policy, reference), keep_loaded=True) as models:
        rows = doctor_costs._transport_rows(models, timed, config, share)
    layers, transport = work(probes, config)
    foreseen_layers, foreseen_rows = work(timed, in_proportion(config, [len(probes)], share, rows))
    scaled_layers, scaled_rows = work(timed, config)
    assert foreseen_layers / share == pytest.approx(layers, rel=0.1)
    assert scaled_layers / share > 1.25 * layers
    assert foreseen_rows / share == pytest.approx(transport, rel=0.4)
    assert scaled_rows / share > 1.4 * transport
    assert in_proportion(config, [len(timed)], 1.0, None) == config


def test_what_is_not_tried_and_not_foreseen_is_said(tmp_path: Path) -> None:
    plan = Plan("model", "pairs", processes=4, untried=("load_in_4bit",), unforeseen=("checkpoints of best",))
    tried, foreseen = not_tried(plan)
    assert (tried.name, tried.level, foreseen.name, foreseen.level) == ("not tried", "yellow", "not foreseen", "yellow")
    assert "load_in_4bit; 4 processes" in tried.observation
    assert foreseen.observation == "checkpoints of best"
    assert list(not_tried(Plan("model", "pairs"))) == []


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "words"), [(3, "text of the 3 pairs"), (0, "keep no text of the data")])
def test_how_much_text_is_kept_is_said(pairs: int, words: str) -> None:
    check = texts_kept(AuditConfig.from_dict({"examples": {"pairs": pairs}}))
    assert check.level == "green"
    assert words in check.observation
    assert "examples.pairs" in check.observation


def drawn(good: int, **dropped: int) -> Check:
    """What is said of so many usable pairs, of which so many were dropped for each reason."""
    prompts = [{"prompt_ids": [1, 2 + at], "chosen_ids": [3, 4], "rejected_ids": [3, 5]} for at in range(good)]
    bad = {
        "equal": [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [3, 4]}],
        "long": [{"prompt_ids": [1] * 9, "chosen_ids": [3, 4], "rejected_ids": [3, 5]}],
    }
    rows = [*prompts, *(row for name, count in dropped.items() for row in bad[name] * count)]
    return probes_check(None, ProbeSet.from_dataset(rows, None, max_pairs=200, max_length=8))


@pytest.mark.parametrize(
    ("check", "level", "found", "fix"),
    [
        (drawn(36), "green", "", ""),
        (drawn(36, equal=4), "green", "", ""),
        (drawn(36, equal=5), "yellow", "12 % of the pairs were dropped, most for: equal completions", "pass pairs whose"),
        (drawn(36, equal=8, long=28), "yellow", "50 % of the pairs were dropped, most for: prompt fills", "raise max_length"),
        (drawn(36, equal=9, long=28), "red", "51 % of the pairs were dropped", "raise max_length (now 8)"),
        (drawn(4), "yellow", "With 4 independent pairs no interval", "give 24 held-out pairs"),
        (drawn(4, equal=5), "red", "56 % of the pairs were dropped", "chosen and rejected differ; give 24"),
    ],
)  # fmt: skip
def test_pairs_that_are_dropped_are_told_with_the_reason_of_most(
    check: Check, level: str, found: str, fix: str
) -> None:
    assert check.level == level
    assert found in check.observation
    assert fix in check.fix and bool(check.fix) == bool(fix)


OFF = {"health": False, "on_save": False, "on_last_step": False, "before_training": False}


@pytest.mark.parametrize(
    ("schedule", "fix"),
    [
        (OFF, "switch schedule.health on, which is off (schedule.on_save, schedule.on_last_step off too)"),
        (OFF | {"on_save": True}, "switch schedule.health on, which is off (schedule.on_last_step off too), or save"),
        (OFF | {"health": True, "first_health": 400}, "set schedule.first_health (400) to fewer steps"),
        (OFF | {"health": True}, "switch schedule.on_last_step on, which is off (schedule.on_save off too)"),
    ],
)
def test_a_schedule_that_looks_at_nothing_names_the_switch_that_is_off(schedule: dict[str, Any], fix: str) -> None:
    config, steps = AuditConfig.from_dict({"schedule": schedule}), PlannedSteps(100)
    check = schedule_check(forecast(config, steps, Costs(1.0, 0.01, 0.1)), config, steps)
    assert check.level == "yellow"
    assert check.fix.startswith(fix)


@pytest.mark.parametrize(
    ("look", "words"), [(0.1, None), (5.0, "; 43 checkpoints without an audit, for lack of budget")]
)
def test_checkpoints_that_will_get_no_audit_are_foreseen(look: float, words: str | None) -> None:
    config, steps = AuditConfig(), PlannedSteps(1000, save_steps=20)
    check = schedule_check(forecast(config, steps, Costs(1.0, look, 15 * look), per_look=15.0), config, steps)
    assert ("without an audit" in check.observation) is (words is not None)
    assert words is None or words in check.observation


def test_trackers_that_the_options_leave_out_are_not_promised() -> None:
    plan = Plan("model", "pairs", report_to=("tensorboard",))
    assert checked(plan, tensorboard="auto")["trackers"].level == "green"
    assert "leave it out" in checked(plan, tensorboard="off")["trackers"].observation


@pytest.mark.parametrize(("lora", "level"), [(False, "red"), (True, "yellow")])
@pytest.mark.parametrize("error", [AuditMemoryError("no room"), MemoryError("no room")])
def test_memory_that_runs_out_is_no_fault_of_the_layers(lora: bool, level: str, error: BaseException) -> None:
    check = doctor._no_memory(error, SimpleNamespace(lora=lora))  # type: ignore[arg-type]
    assert (check.name, check.level) == ("memory", level)
    assert "--device cpu" in check.fix and "anatomy" not in check.fix
