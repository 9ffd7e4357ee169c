import pytest

from . import workers


@pytest.fixture(scope="session", autouse=True)
def _processes():
    """End the processes with the session."""
    yield
    workers.stop_all()
