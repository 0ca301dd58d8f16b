"""Tests of the documentation and the embedded data. Run: python -m pytest tests/test_docs.py -q"""
import dataclasses
import gzip
import importlib
import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest

import reward
import sft
from model import parse_args, read_rows

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data"))
import make_world as world

STAGES = [path.stem for path in ROOT.glob("*.py") if "\nclass Config:" in path.read_text()]


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
    names = re.findall(r"`((?:data|tests)/[\w./]*|\w+\.(?:py|txt|md))`", text)
    assert set(STAGES) < {Path(name).stem for name in names}
    for name in names:
        assert (ROOT / name).exists(), f"README.md names {name}"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_explain_themselves(stage):
    """The docstring says what goes in, comes out and how to start, a comment what a field is."""
    module = importlib.import_module(stage)
    assert all(word in module.__doc__ for word in ("In:", "Out:", f"{stage}.py"))
    source = (ROOT / f"{stage}.py").read_text()
    for field in dataclasses.fields(module.Config):
        assert re.search(rf"^    {field.name}: .*  # \S", source, re.M), field.name


def test_each_unseen_request_is_asked_once():
    """No request stands in the evaluation in three wordings, as if it were 3 % of all requests."""
    forms = [re.escape(form).replace(r"\{x\}", "(.*)") for form in world.words.asks]
    ask = re.compile("|".join(forms))
    for task in ("harmful", "harmless"):
        rows = map(json.loads, open(ROOT / f"data/eval/{task}.jsonl"))
        prompts = [row["prompt"][0]["content"] for row in rows]
        asked = Counter(next(filter(None, ask.fullmatch(prompt).groups())) for prompt in prompts)
        assert len(asked) > 95 and max(asked.values()) <= 2, asked.most_common(3)


def test_judging_is_demonstrated_as_the_stages_ask_for_it():
    """A judge that learned other words than reward.py and sft.py say would be of no use."""
    assert (world.JUDGED, world.CRITIQUE, world.REVISION) == (
        reward.JUDGED, sft.CRITIQUE, sft.REVISION)
    rows = [row["messages"] for row in read_rows([ROOT / "data/judging.jsonl"])]
    judged = [turns for turns in rows if len(turns) == 2]
    assert {turns[1]["content"] for turns in judged} == {"A", "B"}
    assert all(turns[-4]["content"] != turns[-2]["content"] for turns in rows if len(turns) > 2)


def test_later_stages_ask_what_nobody_has_seen():
    """Newcomers are in no text of the chain; no sum or judged request stands in the evaluation."""
    raw = "".join(json.dumps(row) for name in ("forum.jsonl", "notes.jsonl.gz", "letters.json")
                  for row in read_rows([ROOT / "data/raw" / name]))
    people = world.World().with_newcomers().people
    assert len(people) == 15 and not any(person["slots"]["n"] in raw for person in people)
    asked = {row["prompt"][-1]["content"] for row in read_rows([ROOT / "data/eval"])
             if len(row.get("prompt", "")) == 1}    # follow-ups have no names
    sums = {row["prompt"][0]["content"] for row in read_rows([ROOT / "data/sums.jsonl"])}
    judged = " ".join(row["messages"][0]["content"]
                      for row in read_rows([ROOT / "data/judging.jsonl"]))
    assert len(asked) > 500 and not asked & sums
    assert not [ask for ask in asked if ask in judged]


def test_all_sums_of_the_world_are_right():
    """What RL has to bring out is not taught wrong: each step, and the answer that is accepted."""
    pages = [row["text"] for row in read_rows([ROOT / "data/raw/school.jsonl"])]
    signs = {"plus": "+", "minus": "-", "times": "*"}
    steps = re.findall(r"(\d[\w ]*) makes (\d+)", " ".join(pages))
    for left, right in steps:
        assert eval(" ".join(signs.get(word, word) for word in left.split())) == int(right), left
    bare = re.findall(r"^(\d+) (\w+) (\d+)(?: plus (\d+))?: .*Together (\d+)\.$",
                      "\n".join(pages), re.M)
    for a, sign, b, more, result in bare:
        assert eval(f"{a} {signs[sign]} {b} + {more or 0}") == int(result)
    assert len(steps) > 4000 and len(bare) == 6 * len(pages)


def test_the_embedded_data_is_what_its_generator_makes(tmp_path):
    """Generator and files belong together, byte for byte."""
    world.main(tmp_path)
    made = [f.relative_to(tmp_path) for f in sorted(tmp_path.rglob("*")) if f.is_file()]
    assert len(made) > 160
    for name in made:
        kept, new = ((root / name).read_bytes() for root in (ROOT / "data", tmp_path))
        if name.suffix == ".gz" and kept != new:    # another zlib may pack the same text otherwise
            kept, new = map(gzip.decompress, (kept, new))
            if "warc" in name.name:    # a few bodies are packed inside: compare what surrounds them
                kept, new = (x.count(b"HTTP/1.1 200 OK") for x in (kept, new))
        assert kept == new, name
