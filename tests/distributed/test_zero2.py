"""DeepSpeed ZeRO-2: every process holds all weights, and training does not notice an audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import lines

pytestmark = pytest.mark.distributed
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: run `make test-deepspeed`")

CASES: dict[str, dict[str, Any]] = {
    "zero2 plain": {"engine": "zero2"},
    "zero2 audited": {"audit": {}, "engine": "zero2"},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("zero2")
    return folder, launch(folder, CASES)


def test_training_is_the_same_bits_under_zero2(ran: Any) -> None:
    plain, audited = ran[1]["zero2 plain"], ran[1]["zero2 audited"]
    assert all(said["distributed"] == "DistributedType.DEEPSPEED" for said in (*plain, *audited))
    for without, with_ours in zip(plain, audited, strict=True):
        assert with_ours["weights"] == without["weights"]
        assert with_ours["losses"] == without["losses"]
    assert [line["step"] for line in lines(ran[0], "zero2 audited", "records.jsonl")] == [0, 2, 4]
