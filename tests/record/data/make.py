"""Write a record and a run log with whatever version of align_audit lies in the current directory.

    cd A_CHECKOUT_OF_AN_OLD_COMMIT && OMP_NUM_THREADS=1 python .../tests/record/data/make.py FOLDER NAME

A DPO run of two steps on a tiny model, audited before the first and after the last, with as much of what that version can
measure as stays small: ``FOLDER/NAME.json`` is the last record, ``FOLDER/NAME.records.jsonl`` the log. README.md says which
commits the files here are of.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, os.getcwd())
os.environ["HF_HUB_OFFLINE"] = "1"

PLACES = ("pond", "hill", "barn", "market", "bridge", "garden")
ROWS = [
    {
        "prompt": f"One day Mila went to the {place}.",
        "chosen": f" She found {thing} there and laughed" + " and danced" * (number % 3) + ".",
        "rejected": f" She lost {thing} and cried" + ", all alone" * (number % 2) + ".",
    }
    for number, (place, thing) in enumerate(
        (place, thing) for place in PLACES for thing in ("a kite", "the red drum", "some apples")
    )
]


def audit_config(schema: int) -> Any:
    """Few ranks; fewer pairs patched than there are, and finer sites, where this version knows them."""
    from align_audit import AuditConfig

    values: dict[str, Any] = {
        "max_pairs": 10,
        "progress": False,
        "tensorboard": "off",
        "low_rank": {"ranks": [1, 2]},
        "schedule": {"on_save": False},
    }
    wanted: list[dict[str, Any]] = []
    if schema >= 2:
        wanted.append({"patching": {"exact_pairs": 8}})
    if schema >= 3:
        wanted.append({"sites": [{"site": "attention_output"}, {"site": "block", "width": 2}]})
    if schema >= 7:
        wanted.append({"budget": None})  # else so short a run has time for health audits alone
    for more in wanted:
        try:
            AuditConfig.from_dict(values | more)
        except Exception as error:  # an option came later than its schema's first records
            print("without", more, "since", str(error).splitlines()[-1])
        else:
            values |= more
    return AuditConfig.from_dict(values)


def main(folder: Path, name: str) -> None:
    """Train, audit, and keep the record and the log."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    import align_audit
    from align_audit import AlignmentAuditCallback, AuditRecord, AuditRun

    package = Path(align_audit.__file__).parent
    assert package.parent == Path.cwd(), f"{package} is not the align_audit of the current directory"
    (shipped,) = package.glob("*/assets/model")
    schema = AuditRecord.model_fields["schema_version"].default
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=2, eos_token_id=3, pad_token_id=1,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        base, output = Path(work) / "base", Path(work) / "run"
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        held_out: Any = Dataset.from_list(ROWS[:12])
        named = "probe_name" in AuditRecord.model_fields["provenance"].annotation.model_fields
        probes = {"stories": held_out} if named else held_out
        callback = AlignmentAuditCallback(probes=probes, config=audit_config(schema))
        policy = AutoModelForCausalLM.from_pretrained(base)
        for part, weight in policy.named_parameters():
            weight.requires_grad_(".layers.1." in part)  # so that some layer stands out
        trainer = DPOTrainer(
            model=policy,
            ref_model=AutoModelForCausalLM.from_pretrained(base),
            args=DPOConfig(
                str(output), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
                bf16=False, save_strategy="no", disable_tqdm=True, seed=7,
            ),
            train_dataset=Dataset.from_list(ROWS[12:]), eval_dataset=held_out, processing_class=tokenizer,
            callbacks=[callback],
        )  # fmt: skip
        callback.attach(trainer)
        trainer.train()
        run = AuditRun.load(output)
        assert [record.step for record in run.records] == [0, 2], run.failures
        folder.mkdir(parents=True, exist_ok=True)
        run.records[-1].save(folder / f"{name}.json")
        shutil.copy(run.directory / "records.jsonl", folder / f"{name}.records.jsonl")
    print(f"schema {schema}: {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
