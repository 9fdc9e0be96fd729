"""Pictures of a transfer record: what is known is annotated, what is not is explained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.text import Text

from align_audit import TransferRecord
from align_audit.writers.plots.transfer import save_transfer, transfer_matrix


def test_the_picture_annotates_what_is_known_and_explains_the_rest(transfer_record: TransferRecord) -> None:
    figure = transfer_matrix(transfer_record, "shift", 1)
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    words = [text.get_text() for text in texts]
    for place, rank in enumerate(transfer_record.ranks):
        assert f"rank {rank}" in words
        for by_patch in transfer_record.cells["shift"][1].values():
            for cell in by_patch.values():
                share = cell.effect_fraction[place]
                assert (f"{share.mean:.2f}" in words) == (share.reason is None or np.isfinite(share.mean))
    assert "an interval needs at least 8 independent pairs, found 1" in " ".join(words)
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert len(panels) == 2
    for axes, place in zip(panels, range(2), strict=True):
        (image,) = axes.get_images()
        low, high = image.get_clim()
        assert low == -high, "white is no transfer"
        values = np.ma.filled(image.get_array(), np.nan)
        assert values.shape == (4, 3), "three fitted sets and random subspaces, on three sets"
        cell = transfer_record.cells["shift"][1]["harmless"]["helpful-v1.1"]
        assert values[0, 1] == cell.effect_fraction[place].mean
        assert np.isnan(values[2, 2])
    whole = figure.bbox
    for text in texts:
        if text.get_visible() and text.get_text() in ("harmless", "helpful-v1.1", "one", "patched on", "rank 1"):
            box = text.get_window_extent()
            assert box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1


def test_every_matrix_is_a_file(transfer_record: TransferRecord, tmp_path: Path) -> None:
    paths = save_transfer(transfer_record, tmp_path / "new")
    assert list(paths) == ["transfer_shift_layer_01"]
    assert paths["transfer_shift_layer_01"].read_bytes().startswith(b"\x89PNG")
