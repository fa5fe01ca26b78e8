"""A Hub for each module of tests."""

import pytest
from loopback import LoopbackHub


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server
