import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # tests never reach for the network, and fail at once where a user's run would ask it
)

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; left out of the main test command, see README")
