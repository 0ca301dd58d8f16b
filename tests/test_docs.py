"""Tests of the documentation. Run: python -m pytest tests/test_docs.py -q (no network, seconds).

A command that is shown but does not parse, or a file that is named but not there, is a lie to a newcomer.
"""
import importlib
import re
import shlex
from pathlib import Path

import pytest

from model import parse_args

ROOT = Path(__file__).parent.parent
STAGES = [p.stem for p in ROOT.glob("*.py") if "parse_args(Config)" in p.read_text()]


def documented_commands():
    """(where, stage, arguments) of every `python STAGE.py ...` or `torchrun ... STAGE.py ...` shown."""
    for path in [ROOT / "README.md", *ROOT.glob("*.py")]:
        for line in path.read_text().splitlines():
            for part in re.split(r"&&|`", line.split("#")[0] if path.suffix == ".md" else line):
                found = re.match(r"\s*(?:python|torchrun [^`]*?)\s+(\w+)\.py\b(.*)$", part)
                if found and found[1] in STAGES and ('"' not in found[2] and "'" not in found[2]):
                    yield pytest.param(found[1], shlex.split(found[2].split("  #")[0]),
                                       id=f"{path.name}:{part.strip()[:60]}")


@pytest.mark.parametrize("stage, arguments", list(documented_commands()))
def test_documented_commands_parse(stage, arguments):
    """Somebody would copy a command and be told that its flags do not exist."""
    if any(a.isupper() and not a.startswith("-") for a in arguments):    # placeholders such as N
        arguments = ["3" if a in ("N", "R") else a for a in arguments]
    parse_args(importlib.import_module(stage).Config, arguments)


def test_named_files_exist():
    """The map of the project would not match the ground."""
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:data|tests)/[\w./]*|\w+\.(?:py|txt|md))`", text):
        assert (ROOT / name).exists(), f"README.md names {name}"


def test_every_field_of_every_config_is_explained():
    """--help would list a flag and not say what it does."""
    for stage in STAGES:
        source = (ROOT / f"{stage}.py").read_text()
        body = re.search(r"@dataclass\nclass Config:\n(.*?)\n\n", source, re.S)[1]
        for line in body.splitlines():
            if re.match(r"    \w+: ", line):
                assert "  # " in line, f"{stage}.Config: {line.strip()}"


def test_stages_have_docstrings_with_commands():
    """A reader would have to guess what goes in, what comes out and how to start."""
    for stage in STAGES:
        doc = importlib.import_module(stage).__doc__
        assert all(word in doc for word in ("In:", "Out:", f"{stage}.py")), stage
