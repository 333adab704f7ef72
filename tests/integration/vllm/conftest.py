"""A key for servers that these tests query themselves; a run's servers have that of its home."""

from collections.abc import Iterator

import pytest

from stages.vllm.settings import KEY_VARIABLE

KEY = "a key of the tests"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="package", autouse=True)
def server_key() -> Iterator[None]:
    """Servers that are started in this process, and their clients, have one key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)
        yield
