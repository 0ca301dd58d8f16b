"""Tests of data/make_world.py. Run: python -m pytest tests/test_make_world.py -q (no network)."""
import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import make_world as world


def test_each_unseen_request_is_asked_once():
    """No request stands in the evaluation in three wordings, as if it were 3 % of all requests."""
    ask = re.compile("|".join(re.escape(form).replace(r"\{x\}", "(.*)") for form in world.ASKS))
    for task in ("harmful", "harmless"):
        rows = map(json.loads, open(ROOT / f"data/eval/{task}.jsonl"))
        prompts = [row["prompt"][0]["content"] for row in rows]
        asked = Counter(next(filter(None, ask.fullmatch(prompt).groups())) for prompt in prompts)
        assert len(asked) > 95 and max(asked.values()) <= 2, asked.most_common(3)


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
