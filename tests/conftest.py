"""Shared by all tests: the project's root on the path, one thread, the files of short runs."""
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
NUMBERS = itertools.count()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts processes, seconds each (-m 'not slow')")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Paths of the models and data that short runs start from, see common.make_files."""
    from common import make_files
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs measure no peak of the processor and sample little: that would take longest."""
    import pretrain
    import sft
    for stage in (pretrain, sft):
        monkeypatch.setattr(stage, "peak_flops", lambda env: 1e12)
        monkeypatch.setattr(stage, "SAMPLE_TOKENS", 8)


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile that traces and guards as ever, but needs no compiler."""
    import model
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="eager"))
    torch._dynamo.reset()
    model.compiled.cache_clear()


@pytest.fixture
def short(files, tmp_path):
    """Settings of a short run: short(stage, name of the file that it writes, **changes)."""
    from common import config
    return lambda stage, out="a", **changes: config(stage, files, tmp_path / f"{out}.pt", **changes)


@pytest.fixture
def function(tmp_path):
    """--reward of a Python function with this body, in a module of its own."""
    def make(body):
        file = tmp_path / f"mine_{next(NUMBERS)}.py"
        file.write_text(f"def score(prompts, completions, rows):\n    {body}\n")
        return f"{file}:score"
    return make
