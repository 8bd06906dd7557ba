"""How `tutelage plan` calls several stages in one line."""

from __future__ import annotations

import pytest

from tutelage.commands.plan import _braces


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["init"], "init"),
        (["rl-sum", "rl-sort"], "rl-{sum, sort}"),
        (["eval base / sum@0", "eval base / sort@0"], "eval base / {sum, sort}@0"),
        (["init@0", "init@1"], "init@{0, 1}"),
        (["seed10", "seed11"], "{seed10, seed11}"),
    ],
)
def test_braces_break_no_word(labels, said):
    assert _braces(labels) == said
