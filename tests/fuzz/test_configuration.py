"""Options as a dict and as YAML: an ``AuditConfig`` that is itself again when it was written, or a ``ConfigurationError``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError
from tests.fuzz.cases import bytes_of, damaged, fuzz, told, values

WHOLES: list[Any] = [
    AuditConfig().to_dict(),
    AuditConfig.from_dict(
        {
            "sites": [{"site": "block", "width": 2, "layers": [0, 3]}, {"site": "head", "heads": [1]}],
            "patching": {"exact_pairs": 16, "keep_reference": True},
            "low_rank": {"layers": [1, 2], "bases": ["shift"]},
        }
    ).to_dict(),
]
YAMLS = [yaml.safe_dump(whole).encode() for whole in WHOLES] + [
    b"seed: &a 1\nmax_pairs: *a\n",
    b"patching:\n  enabled: yes\n  noise_draws: 0x10\n  # a remark\nalerts: {kl_error: .inf, kl_warning: 1e3}\n",
    b"? a\n: - b\n- !!set {c}\n",
]


def option_names(part: type[BaseModel] = AuditConfig) -> set[str]:
    names = set(part.model_fields)
    for field in part.model_fields.values():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names |= option_names(kind)
    return names


NAMES = st.sampled_from(sorted(option_names()))
ODD_KEYS = st.one_of(NAMES, st.text(max_size=5), st.integers(), st.none(), st.tuples(st.integers()))
OPTIONS = st.dictionaries(NAMES, st.one_of(values, st.dictionaries(NAMES, values, max_size=3)), max_size=3)


def configured(make: Any) -> None:
    try:
        config = make()
    except ConfigurationError as error:
        told(error)
        return
    assert AuditConfig.from_dict(config.to_dict()) == config
    assert yaml.safe_load(yaml.safe_dump(config.to_dict())) == config.to_dict()


@fuzz(options=OPTIONS)
def test_options_by_their_names(options: dict[str, Any]) -> None:
    configured(lambda: AuditConfig.from_dict(options))


@fuzz(options=damaged(WHOLES))
def test_whole_options_with_damage(options: Any) -> None:
    configured(lambda: AuditConfig.from_dict(options))


@fuzz(options=st.one_of(values, st.dictionaries(ODD_KEYS, values, max_size=3), st.binary(), st.just(AuditConfig())))
def test_what_are_no_options(options: Any) -> None:
    configured(lambda: AuditConfig.from_dict(options))


def read(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.yaml"
        path.write_bytes(data)
        configured(lambda: AuditConfig.from_yaml(path))


@fuzz(data=bytes_of(YAMLS))
def test_yaml_with_damage(data: bytes) -> None:
    read(data)


@fuzz(
    data=st.one_of(
        st.text(alphabet="abs:-?[]{}&*!|>'\"%@` \n\t#0.1~é\x85\u2028", max_size=40).map(str.encode),
        st.binary(max_size=40),
        OPTIONS.map(lambda options: yaml.safe_dump(options).encode()),
    )
)
def test_text_that_may_be_yaml(data: bytes) -> None:
    read(data)
