"""``align-audit doctor``: each thing that can be wrong before training is named with its fix, and a good plan is ready."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_audit.cli import doctor, training_script
from align_audit.errors import ConfigurationError
from align_audit.models.loading import load_model
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.monitoring.plain_step import StepOptions, seconds_per_pair
from align_audit.probes.pairs import ProbeSet
from tests.cli.commands import refused
from tests.helpers.dpo import ROWS, saved_model


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model on disk, 16 pairs of 8 prompts, and a file of cheap options."""
    folder = tmp_path_factory.mktemp("doctor")
    probes, options = folder / "pairs.jsonl", folder / "audit.yaml"
    probes.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:16]), encoding="utf-8")
    options.write_text("patching: {noise_draws: 1}\nlocalization: {selection_resamples: 8, permutations: 2}\n")
    return SimpleNamespace(folder=folder, model=saved_model(folder / "base"), probes=probes, options=options)


def asked(start: SimpleNamespace, *more: Any, model: Any = None) -> list[Any]:
    return ["doctor", model or start.model, "--probes", start.probes, "--config", start.options, *more]


def levels(out: str) -> dict[str, str]:
    return {check["name"]: check["level"] for check in map(json.loads, out.splitlines())}


@pytest.fixture
def ready(command: Any, start: SimpleNamespace, tmp_path: Path) -> list[dict[str, str]]:
    """The checks of a plan with nothing wrong in it."""
    done = command(*asked(start, "--steps", "400", "--output-dir", tmp_path / "out", "--json"))
    assert done.code == 0, done.out + done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_everything_is_looked_at_and_nothing_is_left_behind(ready: list[dict[str, str]], tmp_path: Path) -> None:
    by_name = {check["name"]: check for check in ready}
    expected = ["versions", "output", "model", "probes", "texts", "reference", "layers", "sites", "cost", "schedule"]
    assert list(by_name) == expected
    assert {check["level"] for check in ready} <= {"green", "yellow"}
    assert by_name["layers"]["observation"].startswith("3 decoder layers")
    assert "16 pairs" in by_name["probes"]["observation"]
    assert by_name["probes"]["level"] == "yellow", "8 prompts are few"
    assert "first look at the trained policy: step 5" in by_name["schedule"]["observation"]
    assert "training pairs" in by_name["cost"]["observation"]
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_people_read_a_line_a_check_and_the_verdict_last(command: Any, start: SimpleNamespace) -> None:
    done = command(*asked(start))
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].strip().startswith("ok  versions: Python")
    assert lines[-1] == "ready"
    assert "schedule: how long the run is was not said" in done.out
    assert "do: --steps" in done.out


def test_a_model_that_cannot_be_loaded_is_the_thing_to_change(
    command: Any, start: SimpleNamespace, tmp_path: Path
) -> None:
    done = command(*asked(start, model=tmp_path / "nothing"))
    assert done.code == 1
    assert done.out.splitlines()[-1].startswith("not ready: model; name a folder or hub name")
    assert "Traceback" not in done.out + done.err


def test_pairs_that_cannot_be_used_are_the_thing_to_change(
    command: Any, start: SimpleNamespace, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "no pair"}\n')
    done = command("doctor", start.model, "--probes", empty, "--json")
    assert done.code == 1
    assert levels(done.out)["probes"] == "red"


def test_a_reference_of_another_size_is_refused_before_training(
    command: Any, start: SimpleNamespace, tmp_path: Path
) -> None:
    other = saved_model(tmp_path / "other", hidden_size=64)
    done = command(*asked(start, "--reference", other, "--json"))
    assert done.code == 1
    last = json.loads(done.out.splitlines()[-1])
    assert (last["name"], last["level"]) == ("reference", "red")
    assert "--reference" in last["fix"]


def test_trackers_and_folders_are_looked_at_before_any_model(
    command: Any, start: SimpleNamespace, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    more = ["--output-dir", file / "out", "--report-to", "tensorboard", "--report-to", "comet_ml", "--json"]
    done = command(*asked(start, *more, model=tmp_path / "nothing"))
    assert done.code == 1
    checks = [json.loads(line) for line in done.out.splitlines()]
    assert [check["name"] for check in checks] == ["versions", "output", "trackers", "trackers", "model"]
    assert [check["level"] for check in checks[1:4]] == ["red", "green", "yellow"]


def test_a_folder_that_holds_a_run_is_named(
    command: Any, start: SimpleNamespace, place: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(place.full / "align_audit", tmp_path / "out" / "align_audit")
    done = command(*asked(start, "--output-dir", tmp_path / "out", "--json", model=tmp_path / "nothing"))
    check = next(check for check in map(json.loads, done.out.splitlines()) if check["name"] == "output")
    assert check["level"] == "yellow"
    assert "earlier run" in check["observation"]


def test_the_arguments_of_a_script_are_read_as_trl_reads_them(start: SimpleNamespace) -> None:
    from align_audit.cli.doctor import plan_of_script

    common = {"probes": start.probes, "device": "cpu", "dtype": None, "trust_remote_code": False}
    arguments = (
        f"--model_name_or_path {start.model} --dataset_name {start.folder} --max_steps 90 --use_peft --save_steps 30 "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 4 --beta 0.3 --report_to mlflow --use_cpu "
        "--eval_strategy steps --eval_steps 45 --output_dir out --bf16 False"
    ).split()
    plan = plan_of_script(arguments, common)
    assert (plan.model, plan.max_steps, plan.pairs_per_step) == (start.model, 90, 8)
    assert (plan.save_steps, plan.eval_steps, plan.lora, plan.beta) == (30, 45, True, 0.3)
    assert (plan.report_to, plan.output_dir) == (("mlflow",), Path("out"))


def test_epochs_are_counted_in_the_data(start: SimpleNamespace, tmp_path: Path) -> None:
    from align_audit.cli.doctor import plan_of_script

    common = {"probes": start.probes, "device": "cpu", "dtype": None, "trust_remote_code": False}
    (tmp_path / "train.jsonl").write_text(start.probes.read_text())
    arguments = (
        f"--model_name_or_path {start.model} --dataset_name {tmp_path} --num_train_epochs 3 --use_cpu --bf16 False "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    ).split()
    assert plan_of_script(arguments, common).max_steps == 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning_rate", "fast"], "are not those of a DPO script"),
        (["--dataset_name", "pairs", "--use_cpu", "--bf16", "False"], "name no model"),
        (["--use_cpu", "--bf16", "False", "--max_stepz", "9"], "are not those of a DPO script"),
    ],
)
def test_arguments_that_are_no_script_s_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from align_audit.cli.doctor import plan_of_script

    with pytest.raises(ConfigurationError, match=words):
        plan_of_script(arguments, {"trust_remote_code": False})


def test_a_machine_without_a_gpu_is_told_what_to_add(start: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL trains in bf16 where nothing is said, and refuses it there."""
    from align_audit.cli.doctor import plan_of_script

    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    arguments = ["--model_name_or_path", str(start.model)]
    common = {"probes": start.probes, "device": "cpu"}
    with pytest.raises(ConfigurationError, match=r"without a GPU add --bf16 False, or --use_cpu"):
        plan_of_script(arguments, common)
    for option in (["--bf16", "False"], ["--use_cpu"]):
        assert plan_of_script([*arguments, *option], common).model == str(start.model)


def read(start: SimpleNamespace, *arguments: Any, **common: Any) -> Any:
    """The plan that these arguments of a script, and options beside them, come to; on the CPU, without mixed precision."""
    from align_audit.cli.doctor import plan_of_script

    precise = [] if {"--bf16", "--fp16"} & set(map(str, arguments)) else ["--bf16", "False"]
    words = ["--model_name_or_path", start.model, "--use_cpu", *precise, *map(str, arguments)]
    return plan_of_script(words, {"probes": start.probes, **common})


def test_how_the_script_opens_the_model_and_cuts_the_pairs_is_carried(start: SimpleNamespace) -> None:
    plan = read(start, "--max_steps", 9, "--max_length", 77, "--dtype", "bfloat16", "--model_revision", "v1",
                "--attn_implementation", "eager", "--resume_from_checkpoint", "out/checkpoint-3")  # fmt: skip
    assert (plan.max_length, plan.truncation_mode, plan.dtype, plan.device) == (77, "keep_start", "bfloat16", "cpu")
    assert (plan.revision, plan.attention, plan.resumes, plan.untried) == ("v1", "eager", True, ())
    assert (read(start).dtype, read(start).revision, read(start).mixed_precision) == ("float32", None, None)
    within = read(start, "--model_init_kwargs", '{"dtype": "float16", "revision": "v2", "trust_remote_code": true}')
    assert (within.dtype, within.revision, within.trust_remote_code) == ("float16", "v2", True)
    assert read(start, "--bf16", "True").mixed_precision == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--load_in_4bit", "True"], "load_in_4bit (the model is opened unquantized)"),
        (["--load_in_8bit", "True"], "load_in_8bit (the model is opened unquantized)"),
        (["--sync_ref_model", "True", "--ref_model_sync_steps", 64], "the reference moves every 64 steps"),
        (["--model_init_kwargs", '{"rope_scaling": {}}'], "model_init_kwargs: rope_scaling"),
        (["--accelerate_config", "zero3"], "accelerate's configuration file"),
        (["--use_fsdp"], "use_fsdp"),
    ],
)
def test_what_the_doctor_does_not_try_is_kept(start: SimpleNamespace, arguments: list[Any], words: str) -> None:
    (said,) = read(start, *arguments).untried
    assert words in said


def test_options_beside_a_script_hold_in_place_of_its_own(start: SimpleNamespace) -> None:
    given = {
        "reference": "base", "max_steps": 70, "pairs_per_step": 3, "save_steps": 0, "output_dir": Path("elsewhere"),
        "report_to": ("wandb",), "lora": True, "dtype": "float64", "processes": 2, "allow_pickle": True, "device": "meta",
    }  # fmt: skip
    script = ["--max_steps", 9, "--save_steps", 3, "--output_dir", "out", "--dtype", "bfloat16", "--report_to", "none"]
    plan = read(start, *script, **given)
    assert {name: getattr(plan, name) for name in given} == given
    nothing = read(start, *script, **dict.fromkeys(given))
    assert (nothing.max_steps, nothing.save_steps, nothing.dtype, nothing.device) == (9, 3, "bfloat16", "cpu")


def test_the_command_hands_its_options_over_beside_a_script(
    command: Any, start: SimpleNamespace, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    more = ["--output-dir", file / "out", "--report-to", "comet_ml", "--processes", 3, "--json", "--"]
    script = ["--model_name_or_path", tmp_path / "nothing", "--output_dir", tmp_path, "--use_cpu", "--bf16", "False"]
    done = command("doctor", "--probes", start.probes, "--config", start.options, *more, *script)
    checks = [json.loads(line) for line in done.out.splitlines()]
    by_name = {check["name"]: check for check in checks}
    assert by_name["output"]["level"] == "red"
    assert "comet_ml" in by_name["trackers"]["observation"]
    assert "3 processes" in by_name["not tried"]["observation"]


@pytest.mark.parametrize(
    ("arguments", "save", "evaluation", "unforeseen"),
    [
        (["--max_steps", 90, "--save_steps", 0.1, "--eval_strategy", "steps", "--eval_steps", 0.34], 9, 31, 0),
        (["--num_train_epochs", 3, "--save_strategy", "epoch", "--eval_strategy", "epoch"], 4, 4, 0),
        (["--num_train_epochs", 3, "--save_strategy", "epoch", "--num_processes", 2], 2, None, 0),
        (["--max_steps", 90, "--save_strategy", "no"], None, None, 0),
        (["--max_steps", 90, "--save_strategy", "epoch", "--dataset_name", "nothing"], None, None, 1),
        (["--save_steps", 0.1, "--eval_strategy", "steps", "--eval_steps", 0.2, "--dataset_name", "nothing"], None, None, 2),
        (["--max_steps", 90, "--save_strategy", "best", "--metric_for_best_model", "loss", "--eval_strategy", "steps",
          "--eval_steps", 9], None, 9, 1),
    ],
)  # fmt: skip
def test_every_way_to_say_when_is_foreseen_or_said_not_to_be(
    start: SimpleNamespace,
    tmp_path: Path,
    arguments: list[Any],
    save: int | None,
    evaluation: int | None,
    unforeseen: int,
) -> None:
    (tmp_path / "train.jsonl").write_text(start.probes.read_text())  # 16 pairs
    data = [] if "--dataset_name" in arguments else ["--dataset_name", tmp_path]
    batch = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    plan = read(start, *arguments, *data, *batch)
    assert (plan.save_steps, plan.eval_steps, len(plan.unforeseen)) == (save, evaluation, unforeseen)
    assert read(start, *arguments, *data, *batch, save_steps=7).save_steps == 7


def test_names_from_outside_leave_as_escapes(command: Any, start: SimpleNamespace, tmp_path: Path) -> None:
    done = command(*asked(start, "--json", model=tmp_path / "red\x9b31m\u202e"))
    assert done.code == 1
    assert done.out.isascii()
    assert r"red\x9b31m" in json.loads(done.out.splitlines()[-1])["observation"]


def test_no_model_and_two_models_are_refused(command: Any, start: SimpleNamespace) -> None:
    refused(command("doctor", "--probes", start.probes), "found no model")
    refused(command(*asked(start, "second-model")), "expected one model", "second-model")


@pytest.mark.parametrize("lora", [False, True])
def test_a_timed_step_leaves_the_models_as_they_were(start: SimpleNamespace, lora: bool) -> None:
    policy, reference = load_model(start.model), load_model(start.model)
    tokenizer = None
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [3, 5]}] * 3
    probes = ProbeSet.from_dataset(rows[:1], tokenizer)
    before = fingerprint(policy), fingerprint(reference)
    assert seconds_per_pair(policy, reference, probes.pairs, StepOptions(lora=lora)) > 0
    assert (fingerprint(policy), fingerprint(reference)) == before
    assert not policy.training
    assert all(weight.grad is None and weight.requires_grad for weight in policy.parameters())
    assert not policy.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("named", "default", "gpus", "expected"),
    [("8", "2", 4, 8), (None, "2", 4, 2), (None, None, 4, 4), (None, None, 0, 1), (None, "broken", 4, 4)],
)
def test_processes_are_those_that_accelerate_would_start(
    named: str | None, default: str | None, gpus: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from accelerate.commands.config import config_args

    file = tmp_path / "default_config.yaml"
    if default is not None:
        file.write_text(f"num_processes: {default}\n")
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    launch = SimpleNamespace(num_processes=named, config_file=None)
    assert training_script._processes(SimpleNamespace(use_cpu=False, world_size=1), launch) == expected


def test_nobody_is_shown_colours_who_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert doctor._styled("ready", fg="green") == "ready"
    monkeypatch.delenv("NO_COLOR")
    assert doctor._styled("ready", fg="green") != "ready"
