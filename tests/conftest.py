import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # tests never reach for the network, and fail at once where a user's run would ask it
)

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def the_number_of_threads_stays():
    """Runs in this process and in others are compared bit for bit: all must have the same number."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; left out of the main test command, see README")
