"""Tables and pictures of a transfer record: everything known is shown, everything unknown has its reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console

from align_audit import AuditConfig, TransferRecord, transfer
from align_audit.writers.plots.transfer import save_transfer, transfer_matrix
from align_audit.writers.transfer_terminal import print_transfer
from tests.auditing.test_transfer import made_of
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


@pytest.fixture(scope="module")
def record() -> TransferRecord:
    """Three sets that share a pair, and one of a single pair."""
    reference = tiny_model("llama", num_hidden_layers=2)
    first = list(random_pairs(5))
    sets = {
        "harmless": made_of(first),
        "helpful-v1.1": made_of([*random_pairs(4, seed=9), first[0]]),
        "one": random_pairs(1, seed=4),
    }
    config = AuditConfig.from_dict(
        {
            "statistics": {"bootstrap_resamples": 100, "confidence": 0.02},
            "low_rank": {"ranks": (1, 4), "layers": (1,), "bases": ("shift",)},
        }
    )
    return transfer(perturbed(reference), reference, sets, config, step=30)


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_is_whole_at_any_width(record: TransferRecord, width: int) -> None:
    out = io.StringIO()
    print_transfer(record, Console(file=out, width=width))
    shown = out.getvalue()
    assert "…" not in shown, "nothing is cut off"
    assert max(map(len, shown.splitlines())) <= width
    joined = " ".join(shown.split())
    assert "transfer, step 30: harmless 5 pairs, helpful-v1.1 5 pairs, one 1 pair" in joined
    assert (
        "1 of 5 pairs of helpful-v1.1 are in harmless too: 1 patched with the half of harmless they are not in"
        in joined
    )
    assert "at least 2 pairs, found 1" in joined
    for cell in (record.cells["shift"][1]["harmless"][name] for name in ("harmless", "helpful-v1.1")):
        for share in cell.effect_fraction:
            assert f"{share.mean:.2f}" in shown
            assert f"[{share.low:.2f}, {share.high:.2f}]" in shown
    assert "largest angle between harmless and helpful-v1.1: " in shown


def test_the_picture_annotates_what_is_known_and_explains_the_rest(record: TransferRecord) -> None:
    figure = transfer_matrix(record, "shift", 1)
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    words = [text.get_text() for text in texts]
    for place, rank in enumerate(record.ranks):
        assert f"rank {rank}" in words
        for by_patch in record.cells["shift"][1].values():
            for cell in by_patch.values():
                share = cell.effect_fraction[place]
                assert (f"{share.mean:.2f}" in words) == (share.reason is None or np.isfinite(share.mean))
    assert "at least 2 pairs, found 1" in " ".join(words)
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert len(panels) == 2
    for axes, place in zip(panels, range(2), strict=True):
        (image,) = axes.get_images()
        low, high = image.get_clim()
        assert low == -high, "white is no transfer"
        values = np.ma.filled(image.get_array(), np.nan)
        assert values.shape == (4, 3), "three fitted sets and random subspaces, on three sets"
        cell = record.cells["shift"][1]["harmless"]["helpful-v1.1"]
        assert values[0, 1] == cell.effect_fraction[place].mean
        assert np.isnan(values[2, 2])
    whole = figure.bbox
    for text in texts:
        if text.get_visible() and text.get_text() in ("harmless", "helpful-v1.1", "one", "patched on", "rank 1"):
            box = text.get_window_extent()
            assert box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1


def test_every_matrix_is_a_file(record: TransferRecord, tmp_path: Path) -> None:
    paths = save_transfer(record, tmp_path / "new")
    assert list(paths) == ["transfer_shift_layer_01"]
    assert paths["transfer_shift_layer_01"].read_bytes().startswith(b"\x89PNG")
