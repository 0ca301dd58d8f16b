"""Shared by all tests: the project's root on the path, one thread (tests are small), no colour of the machine."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts whole processes, seconds each (deselect with -m 'not slow')")
