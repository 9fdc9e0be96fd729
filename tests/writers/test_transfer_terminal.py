"""A transfer matrix in a table: everything known is shown, everything unknown has its reason."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from align_audit import TransferRecord
from align_audit.writers.transfer_terminal import print_transfer


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_is_whole_at_any_width(transfer_record: TransferRecord, width: int) -> None:
    out = io.StringIO()
    print_transfer(transfer_record, Console(file=out, width=width))
    shown = out.getvalue()
    assert "…" not in shown, "nothing is cut off"
    assert max(map(len, shown.splitlines())) <= width
    joined = " ".join(shown.split())
    assert "transfer, step 30: harmless 9 pairs, helpful-v1.1 9 pairs, one 1 pair" in joined
    assert (
        "1 of 9 pairs of helpful-v1.1 are in harmless too: 1 patched with the half of harmless they are not in"
        in joined
    )
    assert "at least 2 independent pairs (those that share a prompt are one), found 1" in joined
    for cell in (transfer_record.cells["shift"][1]["harmless"][name] for name in ("harmless", "helpful-v1.1")):
        for share in cell.effect_fraction:
            assert f"{share.mean:.2f}" in shown
            assert f"[{share.low:.2f}, {share.high:.2f}]" in shown
    assert "largest angle between harmless and helpful-v1.1: " in shown
