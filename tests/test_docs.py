"""Tests of the documentation. Run: python -m pytest tests/test_docs.py -q (no network, seconds)."""
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from model import parse_args

ROOT = Path(__file__).parent.parent
STAGES = [path.stem for path in ROOT.glob("*.py") if "parse_args(Config)" in path.read_text()]


def documented_commands():
    """(stage, arguments) of every `python STAGE.py ...` or `torchrun ... STAGE.py ...` shown."""
    for path in [ROOT / "README.md", *ROOT.glob("*.py")]:
        for part in re.split(r"&&|`|\n", path.read_text()):
            found = re.match(r"\s*(?:python|torchrun .*?)\s+(\w+)\.py\b([^#]*)", part)
            if found and found[1] in STAGES and not re.search("['\"]", found[2]):
                name = f"{path.name}:{part.strip()[:60]}"
                yield pytest.param(found[1], shlex.split(found[2]), id=name)


@pytest.mark.parametrize("stage, arguments", list(documented_commands()))
def test_documented_commands_parse(stage, arguments):
    """Whoever copies a command is not told that its flags do not exist."""
    arguments = ["3" if a in ("N", "R") else a for a in arguments]    # placeholders
    parse_args(importlib.import_module(stage).Config, arguments)


def test_named_files_exist():
    """The README's map of the project matches the ground."""
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:data|tests)/[\w./]*|\w+\.(?:py|txt|md))`", text):
        assert (ROOT / name).exists(), f"README.md names {name}"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_explain_themselves(stage, capsys):
    """The docstring says what goes in, comes out and how to start; --help has every field."""
    module = importlib.import_module(stage)
    assert all(word in module.__doc__ for word in ("In:", "Out:", f"{stage}.py"))
    with pytest.raises(SystemExit):
        parse_args(module.Config, ["--help"])
    shown, source = capsys.readouterr().out, (ROOT / f"{stage}.py").read_text()
    for field in dataclasses.fields(module.Config):
        assert re.search(rf"--{field.name}\b", shown)
        assert re.search(rf"^    {field.name}: .*  # \S", source, re.M), field.name
