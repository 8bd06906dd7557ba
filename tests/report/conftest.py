"""The made-up store, built once."""

from __future__ import annotations

import pytest

from tests.report import synthetic


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return synthetic.build(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture(scope="session")
def found(made):
    from tutelage.report.data import collect

    return collect(made, "last")
