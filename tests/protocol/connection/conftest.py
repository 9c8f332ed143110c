"""Two connections back to back."""

import pytest

from tests.fakes.machines import Pair


@pytest.fixture
def pair():
    """Two connections that know each other."""
    pair = Pair()
    pair.settle()
    return pair
