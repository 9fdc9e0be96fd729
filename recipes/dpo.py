"""Preference-train a model with TRL's DPOTrainer, and audit it from inside. Copy this file and make it yours.

Full fine-tuning, any model and data set by hub name or local path:

    python recipes/dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir runs/dpo \
        --learning_rate 5e-7 --save_steps 100 --report_to tensorboard

LoRA: add --use_peft --lora_r 16 --learning_rate 5e-6. Local data: --dataset_name pairs.jsonl (also .json, .parquet, .gz).
All options of TRL's DPOConfig, ModelConfig and ScriptArguments work, but for two that are refused (NOT_HERE), and those of
AuditArguments below; `--config FILE.yaml` reads them from a file. Then look at it:

    tensorboard --logdir runs/dpo
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict, load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from align_audit import AlignmentAuditCallback, AuditConfig

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
NOT_HERE = {
    "dataset_streaming": "the audit's pairs are set aside from the whole data set",
    "ignore_bias_buffers": "TRL's own script has it, to debug training under DDP",
}
"""Options of ScriptArguments that this program does not have, and why."""


@dataclass
class AuditArguments:
    """Options of the audit; everything else about it comes from --audit_config."""

    audit_config: str | None = field(default=None, metadata={"help": "YAML file of AuditConfig options."})
    audit_every_n_steps: int | None = field(
        default=None, metadata={"help": "Audit every n steps too, not only when a checkpoint is saved."}
    )
    audit_pairs: int | None = field(default=None, metadata={"help": "Probe pairs; more narrow the intervals."})
    audit_action: str | None = field(
        default=None, metadata={"help": "What an error alert does: log, save (a checkpoint) or stop (training)."}
    )
    audit_held_out: int = field(
        default=200, metadata={"help": "Pairs kept out of training for the audit where the data has no test split."}
    )


def check(script: ScriptArguments, model: ModelConfig) -> None:
    """End in a sentence where something is missing, or is asked for that would be passed over."""
    needed = {"--model_name_or_path": model.model_name_or_path, "--dataset_name": script.dataset_name}
    missing = [option for option, value in needed.items() if not value]
    if missing:
        raise SystemExit(f"expected {' and '.join(missing)}: a hub name or a local path")
    for name, why in NOT_HERE.items():
        if getattr(script, name):
            raise SystemExit(f"--{name} is not provided for here: {why}")


def load_pairs(arguments: ScriptArguments) -> DatasetDict:
    """A preference data set by hub name, local file or folder."""
    name = Path(arguments.dataset_name)
    if name.is_file():
        suffix = Path(name.stem).suffix if name.suffix == ".gz" else name.suffix
        if suffix not in FILE_FORMATS:
            raise SystemExit(f"{name}: expected a file ending in {', '.join(FILE_FORMATS)} (or those and .gz)")
        return load_dataset(FILE_FORMATS[suffix], data_files=str(name))
    return load_dataset(arguments.dataset_name, name=arguments.dataset_config)


def audit_config(arguments: AuditArguments) -> AuditConfig:
    """The audit's configuration: the file, then what the command line says."""
    # As objects: a dictionary of a configuration has no secrets, such as the URL of a webhook.
    values = dict(AuditConfig.from_yaml(arguments.audit_config)) if arguments.audit_config else {}
    if arguments.audit_pairs is not None:
        values["max_pairs"] = arguments.audit_pairs
    if arguments.audit_every_n_steps is not None:
        values["schedule"] = {**dict(values.get("schedule", {})), "every_n_steps": arguments.audit_every_n_steps}
    if arguments.audit_action is not None:
        values["alerts"] = {**dict(values.get("alerts", {})), "action": arguments.audit_action}
    return AuditConfig.from_dict(values)


def main() -> None:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, AuditArguments))
    script, training, model, auditing = parser.parse_args_and_config()
    check(script, model)

    # How to load the model; the trainer loads its reference the same way.
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }

    # The audit reads pairs that training does not see: the test split, or some set aside here.
    data = load_pairs(script)
    train = data[script.dataset_train_split]
    if script.dataset_test_split in data:
        held_out = data[script.dataset_test_split]
    else:
        size = min(auditing.audit_held_out, len(train) // 5)
        split = train.train_test_split(test_size=max(size, 1), seed=training.seed)
        train, held_out = split["train"], split["test"]

    callback = AlignmentAuditCallback(config=audit_config(auditing))
    trainer = DPOTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
        callbacks=[callback],
    )
    callback.attach(trainer)

    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main()
