"""DeepSpeed ZeRO-2: every process holds all weights, and training does not notice an audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.reading import lines

pytestmark = pytest.mark.distributed
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: run `make test-deepspeed`")

_AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
CASES: dict[str, dict[str, Any]] = {
    "zero2 plain": {"engine": "zero2"},
    "zero2 audited": {"audit": {}, "engine": "zero2"},
    "autocast plain": {"engine": "zero2", "deepspeed": _AUTOCAST},
    "autocast audited": {"audit": {}, "engine": "zero2", "deepspeed": _AUTOCAST},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("zero2")
    return folder, launch(folder, CASES)


@pytest.mark.parametrize(("setting", "computes_in"), [("zero2", "float32"), ("autocast", "bfloat16")])
def test_training_is_the_same_bits_under_zero2(setting: str, computes_in: str, ran: Any) -> None:
    """The engine's own autocast stands around the model's forward, where nothing that an audit calls would meet it."""
    plain, audited = ran[1][f"{setting} plain"], ran[1][f"{setting} audited"]
    assert all(said["distributed"] == "DistributedType.DEEPSPEED" for said in (*plain, *audited))
    for without, with_ours in zip(plain, audited, strict=True):
        assert with_ours["weights"] == without["weights"]
        assert with_ours["losses"] == without["losses"]
    records = lines(ran[0], f"{setting} audited", "records.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4]
    assert {record["provenance"]["compute_dtype"] for record in records} == {computes_in}
    assert {record["provenance"]["parameter_dtype"] for record in records} == {"float32"}
