"""``notebook``: ``docs/replication.ipynb``, whose cells read a stored run with ``AuditRun`` and draw its six pictures."""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from replication.stored import DATA

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "replication.ipynb"
DPI, COLOURS = 70, 128
"""Of pictures in the notebook, which is to stay small."""
PICTURES = {
    "margins_over_steps": "What training did to the margins of the probe pairs, and to the answers' log-probabilities.",
    "recovery_by_layer_and_step": "How much of the shift comes over with a layer's stream; it climbs to 1 by construction.",
    "layer_gain_by_layer_and_step": "What each layer adds to what lies below it: this is what may be called a place.",
    "block_transplants": "What each block's update does alone, in the reference.",
    "low_rank_curve": "How many directions carry the effect, beside random ones.",
    "depth_trace": "SPINAL's path of both models through the layers: contraction and transport.",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "--run", default="shipped-stories-lora/healthy-0", help="the stored run, in the folder of these"
    )
    parser.add_argument("--stored", dest="data", type=Path, default=DATA, help="folder of the stored runs")
    parser.add_argument("--output", type=Path, default=PAGE)


def main(options: argparse.Namespace) -> None:
    """Write the notebook, executed.

    Raises:
        SystemExit: there is no such stored run.
    """
    folder = options.data / options.run
    if not (folder / "records.jsonl.gz").exists():
        raise SystemExit(f"no stored run in {folder}; make one with `replication run`, or name another with --run")
    options.output.write_text(json.dumps(executed(cells(options.run), options.data), indent=1) + "\n", encoding="utf-8")
    print(f"{options.output}: {options.output.stat().st_size / 1024:.0f} KiB")


def cells(run: str) -> list[tuple[str, str]]:
    """(kind, text) of each cell; ``STORED`` is where the stored runs lie, seen from the root of the repository."""
    reading = f"""import gzip
import tempfile
from pathlib import Path

from align_audit import AuditRun

stored = Path("STORED") / "{run}"
folder = Path(tempfile.mkdtemp())
(folder / "records.jsonl").write_bytes(gzip.decompress((stored / "records.jsonl.gz").read_bytes()))
run = AuditRun.load(folder).select("first")
print(run.summary())"""
    introduction = """# A run of the replication, read back

One DPO run of [the replication](replication.md), audited before, early, in the middle and late. The cells need `align_audit`
alone, and run from the root of the repository; no model loads."""
    at_the_end = """last = run.records[-1]
print(last.finding.words)
print(f"shift {last.margins.shift:.2f} nats")
columns = ["layer", "effect", "layer_gain", "block_transplant"]
run.to_pandas(layers=True).query(f"step == {last.step}")[columns].round(3)"""
    shown = [
        ("markdown", introduction),
        ("code", reading),
        ("markdown", "The finding of the last audit, its mean shift with its interval, and the layers' gains."),
        ("code", at_the_end),
    ]
    for name, words in PICTURES.items():
        shown += [("markdown", f"## {name.replace('_', ' ').capitalize()}\n\n{words}"), ("code", f"run.plot.{name}()")]
    return shown


def executed(shown: list[tuple[str, str]], data: Path) -> dict[str, Any]:
    """The notebook with the outputs of its cells, run one after the other in one namespace."""
    namespace: dict[str, Any] = {}
    made: list[dict[str, Any]] = []
    count = 0
    place = str(data.relative_to(ROOT)) if data.is_relative_to(ROOT) else str(data)
    for kind, text in shown:
        text = text.replace("STORED", place)
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{len(made)}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
        if kind == "code":
            count += 1
            cell |= {"execution_count": count, "outputs": run_cell(text, namespace, count)}
        made.append(cell)
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def run_cell(text: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell prints, and what its last line is worth; a notebook's rules, without its server."""
    lines = text.splitlines()
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        try:
            last = compile(lines[-1], "cell", "eval")
        except SyntaxError:
            exec("\n".join(lines), namespace)
            value = None
        else:
            exec("\n".join(lines[:-1]), namespace)
            value = eval(last, namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append(
            {"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}
        )
    if value is not None:
        outputs.append(
            {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": shown_as(value)}
        )
    return outputs


def shown_as(value: Any) -> dict[str, Any]:
    """MIME type → what shows a value: pictures as PNG, tables as HTML too."""
    if hasattr(value, "savefig"):
        drawn, file = io.BytesIO(), io.BytesIO()
        value.savefig(drawn, dpi=DPI, format="png")
        Image.open(drawn).convert("RGB").quantize(COLOURS).save(file, "png", optimize=True)
        title = value.get_suptitle() or "a picture"
        return {"image/png": base64.b64encode(file.getvalue()).decode() + "\n", "text/plain": [title]}
    data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    return data
