"""Names of probe sets: what may be one."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from align_audit.errors import ConfigurationError
from align_audit.probes import names as probe_names
from align_audit.probes.names import as_name, check_names


def test_the_examples_hold() -> None:
    results = doctest.testmod(probe_names)
    assert results.attempted == 2
    assert results.failed == 0


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", ".", "é", "a\n", "a=b", 7, None])
def test_what_cannot_be_a_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"as the name of a probe set; a name is of letters, digits, '_', '.'"):
        check_names(["harmless", name])


def test_names_are_told_apart_on_any_disk() -> None:
    check_names(["a", "b.1", "c-2", "_", "...x"])
    with pytest.raises(ConfigurationError, match="two probe sets called 'Help' and 'help'"):
        check_names(["Help", "a", "help"])
    with pytest.raises(ConfigurationError, match="found no probe set"):
        check_names([])


def test_names_of_others_become_names() -> None:
    assert as_name("my set/ü") == "my_set__"
