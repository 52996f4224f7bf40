"""docs/users.md names a test for every wish: each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "users.md").read_text(encoding="utf-8")
ROWS = {row[0]: row for row in re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", TABLE, re.MULTILINE)}


def test_every_wish_has_its_row() -> None:
    assert list(ROWS) == [str(number) for number in range(1, 31)]


@pytest.mark.parametrize("number", ROWS)
def test_the_tests_of_a_row_exist(number: str) -> None:
    *_, answer, shown = ROWS[number]
    named = re.findall(r"`(\w+\.py)::(\w+)`", shown)
    assert named or (shown == "not done" and answer.startswith("*Not"))
    for file, test in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
