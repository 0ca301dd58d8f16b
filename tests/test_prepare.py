"""Tests of prepare.py. Run: python -m pytest tests/test_prepare.py -q (no network)."""
import gzip
import json
import multiprocessing
import os
import random
import re
import socket
import sys
import time
import zlib
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import regex
from common import error

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import make_world as world
import prepare
from model import ENDOFTEXT, GPT4_SPLIT, encoding_from_dict, encoding_hash, make_encoding
from prepare import Config

NASTY = ["", " ", "   ", "\n", "\n\n  x", "a  b   c", "Hello world  123456!! I'm\n\n  x",
         "don't WE'LL they'Re", "\t\ttabs\r\nand\rreturns \r\n\r\n", "naïve café Ünïcödé",
         "中文字符没有空格", "日本語 テキスト", "\U0001f600\U0001f468\u200d\U0001f469",
         "e\u0301 combining", "a\u00a0b\u2003c\u3000d", "\x00\x1c\x1d\x1f\x85", "١٢٣٤٥ ½ Ⅷ",
         "<|endoftext|><|im_start|>user\n<|im_end|><|pad|>", "a" * 300, "ab" * 300, " " * 300,
         "\n" * 50 + "x", "x\n" * 50, "!?!?\n\n\nfoo", "https://a.b/c?d=e&f=%20", "\ufffd\ufeff"]
ARTICLE = ("The harbour was quiet in the morning, and the boats lay side by side as they had for "
           "years. Nobody could say why the old bell began to ring at six, but it was heard on "
           "both sides of the bay.")


def run(tmp_path, files, **flags):
    """Write files {name: str or bytes}, run prepare on their folder, return the tokens folder."""
    folder, out = tmp_path / "raw", tmp_path / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = dict(input=[str(folder)], out=str(out), tokenizer="bytes", skip=["language"],
                    web="none", eval="none")
    prepare.main(Config(**{**settings, **flags}))
    return out


def load(out, name="train"):
    """(texts of the documents, manifest, tokenizer) read back the way any consumer would."""
    manifest = json.loads((out / "manifest.json").read_text())
    enc = encoding_from_dict(json.loads((out / "encoding.json").read_text()))
    ids = np.fromfile(out / f"{name}.bin", dtype="<u2" if manifest["dtype"] == "uint16" else "<u4")
    ends = np.fromfile(out / f"{name}.idx", dtype="<u8").astype(int)
    assert len(ids) == manifest["tokens"][name] and len(ends) == manifest["documents"][name]
    assert (ends[-1] if len(ends) else 0) == len(ids)
    assert (ids[ends - 1] == enc.encode_single_token(ENDOFTEXT)).all()
    return [enc.decode(ids[a:b - 1].tolist()) for a, b in zip([0, *ends], ends)], manifest, enc


def lost(out):
    """{reason: documents} of what the ledger says was dropped."""
    ledger = load(out)[1]["ledger"]
    return {row["name"]: row["documents"] for row in ledger if row["kind"] == "dropped"}


def words_of(seed, n):
    """A random document of n made-up words; a longer one of this seed begins the same."""
    rng, words = random.Random(seed), []
    for _ in range(n):
        words.append("".join(rng.choices("aeioubcdfgklmnprst", k=rng.randint(1, 8))))
    return " ".join(words)


def jsonl(texts, **fields):
    return "\n".join(json.dumps(dict(text=text, **fields)) for text in texts)


# ------------------------------------------------------------------------------------------------
# Tokenizer


def slow_bpe(counts, size):
    """Recount every pair before every merge; ties to the smallest (left id, right id)."""
    words = {tuple(w.encode()): n for w, n in counts.items()}
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < size:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merged = {}
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                found = word[i:i + 2] == best
                out.append(len(tokens) if found else word[i])
                i += 2 if found else 1
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        words = merged
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {t: i for i, t in enumerate(tokens)}


def slow_encode(ranks, text):
    """Merge the lowest rank, leftmost first, until nothing merges."""
    ids = []
    for piece in regex.findall(GPT4_SPLIT, text):
        parts = [bytes([b]) for b in piece.encode()]
        while True:
            pairs = [a + b for a, b in zip(parts, parts[1:])]
            known = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks]
            if not known:
                break
            i = min(known)[1]
            parts[i:i + 2] = [pairs[i]]
        ids += [ranks[p] for p in parts]
    return ids


def test_bpe_of_the_papers():
    """The textbook example and the one of Sennrich et al., with merges worked out by hand."""
    ranks = prepare.train_bpe({"aaabdaaabac": 1}, 259)
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    ids = make_encoding("t", GPT4_SPLIT, ranks).encode_ordinary("aaabdaaabac")
    assert ids == [258, 100, 258, 97, 99]
    ranks = prepare.train_bpe(dict(low=5, lower=2, newest=6, widest=3), 256 + 10)
    assert [t.decode() for t in list(ranks)[256:]] == [
        "es", "est", "lo", "low", "ew", "new", "newest", "dest", "idest", "widest"]


def test_bpe_incremental_equals_recount():
    """The counts that training keeps up to date are the true ones, on 300 random corpora."""
    rng = random.Random(0)
    for trial in range(300):
        alphabet = ("ab", "abc", "aé中")[trial % 3]
        counts = {"".join(rng.choices(alphabet, k=rng.randint(1, 12))): rng.randint(1, 4)
                  for _ in range(rng.randint(1, 6))}
        size = 256 + rng.randint(1, 25)
        assert prepare.train_bpe(counts, size) == slow_bpe(counts, size), counts


def test_encoding_equals_an_independent_one():
    """tiktoken with our ranks gives the ids of the definition of BPE, and decodes to the text."""
    text = words_of(1, 2000) + "".join(NASTY)
    enc = prepare.trained_tokenizer(prepare.count_pieces([text]), 400)
    assert enc.n_vocab == 400
    for s in [*NASTY, text[:3000]]:
        assert enc.encode_ordinary(s) == slow_encode(enc._mergeable_ranks, s), repr(s)
        assert enc.decode(enc.encode_ordinary(s)) == s


def test_pieces():
    """The split is GPT-4's, and counting its pieces counts each, but for the very long ones."""
    assert regex.findall(GPT4_SPLIT, "Hello world  123456!! I'm\n\n  x") == [
        "Hello", " world", " ", " ", "123", "456", "!!", " I", "'m", "\n\n", " ", " x"]
    rng = random.Random(1)
    texts = NASTY + ["".join(rng.choices("ab'm1! \n\t\r\u00a0é中\x1c", k=200)) for _ in range(300)]
    pieces = [p for t in texts for p in regex.findall(GPT4_SPLIT, t) if len(p) <= 256]
    assert prepare.count_pieces(texts) == Counter(pieces)


@pytest.mark.parametrize("name", ["bytes", "train", "chars"])
def test_text_comes_back_and_holds_no_control_token(tmp_path, name):
    """Whatever a text spells stays text, and comes back from the files as it was."""
    texts = [t for t in NASTY if t.strip() and "\ufffd" not in t] + ["plain text"] * 3
    files = {"a.jsonl": jsonl(texts), "b.txt": words_of(1, 900)}
    out = run(tmp_path, files, clean=False, val_fraction=0, tokenizer=name, vocab_size=270)
    assert load(out)[0] == [*texts, words_of(1, 900)]    # load() checks where documents end
    again = run(tmp_path / "again", {"a.txt": "plain text"}, tokenizer=str(out))
    assert encoding_hash(load(again)[2]) == encoding_hash(load(out)[2])


def test_long_texts_encode_as_if_whole(monkeypatch):
    """Cutting a long text into pieces, to save memory, leaves its tokens as they are."""
    text = words_of(2, 5000).replace("ta", "ta\n").replace("b", "1! ") + "   \n\n x" * 5
    enc = prepare.trained_tokenizer(prepare.count_pieces([text]), 500)
    monkeypatch.setattr(prepare, "PIECE", 6000)
    assert len(list(prepare.cut_text(text, 6000))) > 3
    assert prepare.encode(enc, text, np.uint16)[:-1].tolist() == enc.encode_ordinary(text)
    assert "".join(prepare.cut_text("x" * 20000, 6000)) == "x" * 20000


def test_ids_never_wrap():
    """An id past 65535 is refused by 16 bits."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 65535, b"cd": 65536}
    enc = make_encoding("t", GPT4_SPLIT, ranks, {ENDOFTEXT: 300})
    assert prepare.encode(enc, "ab", np.uint16).tolist() == [65535, 300]
    with pytest.raises(OverflowError):
        prepare.encode(enc, "cd", np.uint16)


def test_folder_is_complete_and_the_same_twice(tmp_path):
    """The manifest agrees with the files, no text is lost, a second run gives the same bytes."""
    files = {f"{i}.txt": words_of(i, 100) for i in range(100)}
    out = run(tmp_path, files, tokenizer="train", vocab_size=400)
    train, manifest, enc = load(out)
    val, _, _ = load(out, "val")
    assert sorted(train + val) == sorted(files.values()) and 1 <= len(val) <= 15
    assert manifest["vocab_size"] == enc.n_vocab == 400
    assert manifest["encoding_hash"] == encoding_hash(enc)
    assert manifest["bytes"]["val"] == sum(len(t.encode()) for t in val)
    assert "min_words=50" in manifest["thresholds"]["gopher_quality"]
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    run(tmp_path, {}, tokenizer="train", vocab_size=400)
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}
    assert sorted(before) == ["encoding.json", "manifest.json", "train.bin", "train.copies",
                              "train.idx", "val.bin", "val.idx"]
    assert not list(tmp_path.glob(".*"))


def test_tail_split_is_by_character(tmp_path):
    """The first 90 % of the characters train, in one document or several; so do few documents."""
    text = "".join(random.Random(5).choices("aé中\U0001f600\n", k=1001))
    flags = dict(clean=False, val_fraction=0.1)
    out = run(tmp_path, {"a.txt": text}, tokenizer="chars", split="tail", **flags)
    assert load(out)[0] == [text[:900]] and load(out, "val")[0] == [text[900:]]
    assert load(out)[1]["vocab_size"] == 5 + 4
    for split in ("tail", "hash"):
        out = run(tmp_path, {"a.txt": text[:700], "b.txt": text[700:]}, split=split, **flags)
        assert load(out)[0] == [text[:700], text[700:900]] and load(out, "val")[0] == [text[900:]]


def test_hash_split_ignores_order_and_follows_the_seed(tmp_path):
    """Other files or another tokenizer move no document to validation; another seed does."""
    texts = [words_of(i, 60) for i in range(300)]
    files = {f"{i}.txt": t for i, t in enumerate(texts)}
    out = run(tmp_path, files, tokenizer_bytes=8e3, tokenizer="train", vocab_size=320)
    val, enc_hash = load(out, "val")[0], load(out)[1]["encoding_hash"]
    whole = run(tmp_path, {}, tokenizer="train", vocab_size=320)    # a sample learns another one
    assert load(whole)[1]["encoding_hash"] != enc_hash and load(whole, "val")[0] == val
    files = {f"x{i}.txt": t for i, t in enumerate(reversed(texts[:200]))}
    again = load(run(tmp_path / "two", files), "val")[0]
    assert sorted(again) == sorted(set(val) & set(texts[:200])) and 5 < len(val) < 30
    assert set(load(run(tmp_path / "two", {}, seed=2), "val")[0]) != set(again)


def test_weights(tmp_path):
    """A weight of 0.5 halves a source, one of 5 shows it five times, but not in a row."""
    files = {f"{i}.jsonl": jsonl(words_of(n, 30) for n in range(i, 400, 2)) for i in (0, 1)}
    inputs = [f"{tmp_path}/raw/0.jsonl:0.5", f"{tmp_path}/raw/1.jsonl:5"]
    texts = load(run(tmp_path, files, val_fraction=0, input=inputs))[0]
    counts = Counter(texts)
    assert set(counts.values()) == {1, 5} and 70 < sum(n == 1 for n in counts.values()) < 130
    assert not any(one == two for one, two in zip(texts, texts[1:]))


def test_half_characters_in_rows(tmp_path):
    """JSON can spell half a character, UTF-8 cannot: such a row is read, not fatal."""
    rows = [dict(text=words_of(n, 60) + " \ud83d", url=f"http://x.org/{n}\ud83d") for n in (1, 2)]
    manifest = load(run(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, rows))}, clean=False))[1]
    assert manifest["sources"][0]["documents"] == 2


# ------------------------------------------------------------------------------------------------
# Input

WET = "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: {}\r\n\r\n{}\r\n\r\n"


def response(body, *headers):
    head = b"\r\n".join([b"HTTP/1.1 200 OK", *headers])
    block = head + b"\r\n\r\n" + body
    return (b"WARC/1.0\r\nWARC-Type: response\r\nwarc-target-uri: http://x.org/\r\n"
            b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (len(block), block))


def test_formats(tmp_path):
    """Every format is read as its users expect; hidden and unknown files are left alone."""
    rows = [{"text": "plain"}, {"content": "from content"},
            {"question": "2+2?", "answer": "4\n#### 4"},
            {"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Hello"}]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey"}]},
            {"instruction": "Add", "input": "", "output": "3"},
            {"text": "half a surrogate \ud800 pair"}]
    page = "<html><head><title>t</title></head><body><nav>menu</nav><p>A &amp; B</p><script>x"
    files = {"1.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode()),
             "2.json": "\ufeff" + json.dumps([{"text": "in a list"}, "bare string"]),
             "3.txt": "\ufeffwhole\r\nfile\0\n", "4.html": page, "7.bin": b"\1\2",
             "5.warc.gz": gzip.compress(WET.format(12, "hé from WET").encode())
             + gzip.compress(response(b"<p>from WARC", b"Content-Type: text/html")),
             "sub/6.MD": "deep", ".hidden.txt": "no", "8.txt": "wïde".encode("utf-16"),
             "9.html": "<meta charset=latin-1><p>caf\xe9".encode("latin-1")}
    assert load(run(tmp_path, files, val_fraction=0))[0] == [
        "plain", "from content", "2+2?\n4\n#### 4", "User: Hi\n\nAssistant: Hello",
        "Human: Hi\n\nGpt: Hey", "Add\n3", "half a surrogate \ufffd pair", "in a list",
        "bare string", "whole\nfile", "A & B", "hé from WET", "from WARC", "wïde", "café", "deep"]


def test_warc_records(tmp_path):
    """Content-Length counts bytes, and a wrong one loses one record, not the rest; pages that
    came in chunks or compressed, as some crawlers store them, are read."""
    texts = ["hé", *(words_of(i, 20) for i in range(300))]
    records = [WET.format(len(t.encode()), t).encode() for t in texts]
    records.insert(5, WET.format(9, "x" * 50).encode())
    page, form = "<p>café</p>".encode(), b"Content-Type: Text/HTML"
    chunked = b"Transfer-Encoding: chunked"
    chunks = b"4\r\n%s\r\n%x;x=y\r\n%s\r\n0\r\n\r\n" % (page[:4], len(page) - 4, page[4:])
    records += [response(chunks, form, chunked), response(page, form, chunked),
                response(gzip.compress(page), form), response(zlib.compress(page), form)]
    out = run(tmp_path, {"a.warc": b"".join(records)}, val_fraction=0, clean=False)
    assert load(out)[0] == [*texts, *["café"] * 4] and lost(out) == {"wrong Content-Length": 1}


def test_broken_json_lines(tmp_path):
    """One broken line in a hundred is counted and skipped, more end the run."""
    lines = [json.dumps({"text": words_of(i, 20)}) for i in range(200)]
    lines[77] = '{"text": "cut'
    out = run(tmp_path, {"a.jsonl": "\n".join(lines)}, val_fraction=0)
    assert len(load(out)[0]) == 199 and lost(out) == {"not JSON": 1}
    lines[10:15] = ["oops"] * 5
    message = error(run, tmp_path, {"a.jsonl": "\n".join(lines)})
    assert "a.jsonl" in message and "11" in message and len(load(out)[0]) == 199


@pytest.mark.parametrize("files, flags", [
    ({"a.txt": "x"}, {"input": ["[/no/**/such*:2"]}), ({"a.bin": b"\1"}, {}),
    ({"a.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 99)[:-10]}, {}),    # a cut archive
    ({"a.txt.gz": gzip.compress(gzip.compress(os.urandom(999)))}, {}), ({"a.txt.gz": b"plain"}, {}),
    ({"a.jsonl.gz": gzip.compress(b'{"text": "' + bytes(1 << 22))}, {}),    # bombs
    ({"a.json.gz": gzip.compress(b'["' + bytes(1 << 22))}, {}), ({"a.json": "[" * 99999}, {}),
    ({"a.warc": b"WARC/1.0\r\nContent-Length: 99999999999\r\n\r\nx"}, {}),
    ({"a.txt": bytes(range(128, 256)) * 20}, {}), ({"a.jsonl": '{"foo": 1}'}, {}),
    ({"a.txt": ""}, {}), ({"a.txt": "x"}, {"eval": "nowhere"}),
    ({"a.txt": "short"}, {"tokenizer": "train"}), ({"a.txt": "x"}, {"tokenizer": "nonsense"}),
    ({"a.txt": words_of(1, 99)}, {"tokenizer": "train", "vocab_size": 100}),
    ({"a.txt": "x"}, {"val_fraction": 1.0}), ({"a.txt": "x"}, {"skip": ["toxicity"]}),
    ({"a.txt": "x"}, {"languages": ["english"]}), ({"a.txt": "x"}, {"out": "/dev/null/here"})])
def test_bad_input(tmp_path, monkeypatch, files, flags):
    """A user's mistake or a hostile file gives one line, and nothing half-written."""
    monkeypatch.setattr(prepare, "CHUNK", 1 << 16)
    monkeypatch.setattr(prepare, "LARGEST", 1 << 20)
    error(run, tmp_path, files, **flags)
    assert not (tmp_path / "tokens").exists() and not list(tmp_path.glob(".*"))


def test_a_failed_run_keeps_the_old_folder(tmp_path, monkeypatch):
    """A full disk destroys no tokens of the previous run, and --out nothing of somebody else."""
    out = run(tmp_path, {"a.txt": words_of(1, 300)})
    before = (out / "train.bin").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(prepare, "encode", full)
    error(run, tmp_path, {"a.txt": words_of(2, 300)})
    assert (out / "train.bin").read_bytes() == before and not list(tmp_path.glob(".*"))
    (out / "manifest.json").write_text('{"name": "my app"}')
    error(run, tmp_path, {})
    assert (out / "train.bin").read_bytes() == before


def test_invalid_utf8_and_one_huge_line(tmp_path):
    """One bad byte loses no document but is counted; a line of 3 MB is a text as others."""
    text = words_of(1, 1000) * 100 + "x" * 2_000_000
    files = {"a.txt": b"a fine text with one \xff bad byte", "b.txt": text}
    texts, manifest, _ = load(run(tmp_path, files, clean=False, val_fraction=0))
    assert texts == ["a fine text with one \ufffd bad byte", text]
    changed = {row["name"]: row["documents"] for row in manifest["ledger"]}
    assert changed["texts with invalid UTF-8"] == 1


def test_large_files_are_read_in_parts(tmp_path, monkeypatch):
    """The borders of parts lose, double or break no line and no character."""
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    texts = [f"{i} " + "é中" * (i % 400) for i in range(100)]
    text = "".join(random.Random(1).choices("aé中\U0001f600 \n", k=20000))
    files = {"a.jsonl": "\n".join(json.dumps(dict(text=t), ensure_ascii=False) for t in texts),
             "b.txt": text, "c.txt": "é" * 3000, "d.txt": text.encode("utf-16"),
             "e.txt.gz": gzip.compress(text.encode())}
    found = load(run(tmp_path, files, clean=False, val_fraction=0))[0]
    assert found[:100] == texts and "".join(found[100:]) == text + "é" * 3000 + text + text
    assert len(found) > 160


def test_parquet_and_zst(tmp_path):
    """The optional package is used where it is there; a cut archive is no whole one."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "raw").mkdir()
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "raw/a.parquet")
    texts = [words_of(i, 50) for i in range(300)]
    halves = (jsonl(texts[:150]) + "\n", jsonl(texts[150:]))    # two frames, as pzstd writes
    frames = b"".join(pyarrow.compress(h.encode(), "zstd", asbytes=True) for h in halves)
    out = run(tmp_path, {"b.jsonl.zst": frames}, val_fraction=0)
    assert load(out)[0] == ["one", "two", *texts]
    for cut in (frames[:-5], frames[:len(frames) // 3], b"no frame at all"):
        error(run, tmp_path, {"b.jsonl.zst": cut})
    error(run, tmp_path, {"b.jsonl.zst": frames, "a.parquet": b"PAR1"})


PAGE = """<html><head><title>Bells</title><style>p {{}}</style></head><body>
<nav><ul><li><a href=/>Home</a><li><a href=/b>About us</a></ul></nav>
<div>Please accept our cookies.</div><h1>The bell</h1><p>{}</p><p>It rang twice.</p>
<p>{}</p><div class=side><a href=1>Ten hats you will not believe are still on sale this week in town
</a></div><script>var x = "<p>not text</p>";</script><!-- <p>nor this</p> -->
<pre>  keep   this</pre><footer>© 2024 Harbour Post. All rights reserved.</footer></body></html>"""


def test_page_becomes_its_article():
    """The article comes out, with no menu, banner, teaser, footer or script."""
    assert prepare.main_text(PAGE.format(ARTICLE, ARTICLE + "&nbsp;&eacute;")).split("\n") == [
        "The bell", ARTICLE, "It rang twice.", ARTICLE + " é", "  keep   this"]


@pytest.mark.parametrize("page", [
    "<nav><p>{}", "<table><tr><td>{}<br>", "<p>{}<!-- open", "<P CLASS='a'>{}</P><script>",
    "<title>Bells<p>{}", "<a href=x><p>{}</p></a ><p>{}</p>"])
def test_page_that_closes_nothing(page):
    """A forgotten closing tag does not lose the page."""
    assert ARTICLE in prepare.main_text(page.replace("{}", ARTICLE))


@pytest.mark.parametrize("bait", ["<!--", "<nav>", "<a href='", "<p>a <a>b", "a@", "A1B2 ", "Ã©"])
def test_every_pattern_is_linear(bait):
    """200 kB made to be slow take no more than seconds."""
    text, started = bait * (200_000 // len(bait)), time.process_time()
    prepare.main_text(text + f"<p>{ARTICLE} {ARTICLE}<p>end</p>")
    cfg = Config(skip=["language", "gopher_repetition", "gopher_quality"])
    text, _ = prepare.clean(text + "\n" + text.replace(" ", ""), prepare.PAGE, cfg, Counter())
    prepare.scrub(text)
    assert time.process_time() - started < 4


def test_normalise_and_repair():
    """Line ends and control characters are made one; mojibake is undone and nothing else is."""
    dirty = "\ufeffa\r\nb\rc\0d\x1fe\u0301 “Q” ﬁ\tx\x85\n"
    assert prepare.normalise(dirty) == "a\nb\ncd\u00e9 “Q” ﬁ\tx"
    fine = "Zoë’s naïve café – £5, “rösti” à la mode … €3 ß Ünï SÃO PAULO Ã la 中文 Привет ½ Â"
    assert prepare.repair(fine) == fine
    for table in ("cp1252", "latin-1"):
        shown = [c.encode().decode(table, "ignore") for c in fine[:40]]
        broken = "".join(s if len(s) == len(c.encode()) else c for c, s in zip(fine, shown))
        assert broken != fine[:40] and prepare.repair(broken) == fine[:40]


# ------------------------------------------------------------------------------------------------
# Filter

BODY = ["the", "of", *["word"] * 96]
LINES = [" ".join(BODY[:7])] * 10
SENTENCES = "This line is a good one.\nSo is this one here too.\nAnd a third line of words."
LONG_LINES = [f"this is line {i} of a page, and it is no short line." for i in range(200)]
TWICE = "x1 x2 x3 x4 x5 x1 x2 x3 x4 x5"


def page(ended, short):
    """100 lines: so many end with a full stop, so many are short."""
    lines = [("w" if i < short else "w" * 31) + f"{i} x x x x" for i in range(100)]
    return "\n".join(line + "." * (i < ended) for i, line in enumerate(lines))


@pytest.mark.parametrize("rule, text, thresholds, reason", [
    ("gopher_repetition", "a b a b a b c d", {}, "top 2-gram"),    # 3 x 3 / 15 = 0.60
    ("gopher_repetition", "a a a a a", {}, "top 2-gram"),    # 4 x 3 / 9, above 1 is legal
    ("gopher_repetition", "a\na\nb\nc", {}, None),    # 0.25 of the lines
    ("gopher_repetition", "a\na\na\nb", {}, "repeated lines"),    # 0.50
    ("gopher_repetition", TWICE, {"top_ngrams": [9] * 3, "copied_ngrams": [.344] * 6},
     "repeated 5-grams"),
    ("gopher_quality", " ".join(BODY[:50]), {}, None),
    ("gopher_quality", " ".join(BODY[:49]), {}, "few words"),
    ("gopher_quality", " ".join([*BODY[:80], *["1234"] * 20]), {}, None),
    ("gopher_quality", " ".join([*BODY[:79], *["1234"] * 21]), {}, "few letters"),
    ("gopher_quality", " ".join(["The"] * 60), {}, "few stop words"),
    ("gopher_quality", " ".join(["the", "of", *["ab"] * 98]), {}, "word length"),
    ("gopher_quality", " ".join(["the", "of", *["#word"] * 20, *["word"] * 70]), {}, "symbols"),
    ("gopher_quality", "\n".join([f"- {x}" for x in LINES[:9]] + LINES[9:]), {}, None),
    ("gopher_quality", "\n".join([f"- {x}" for x in LINES] + LINES[:1]), {}, "bullets"),
    ("gopher_quality", "\n".join([f"{x}..." for x in LINES[:3]] + LINES[3:]), {}, None),
    ("gopher_quality", "\n".join([f"{x}..." for x in LINES[:4]] + LINES[4:]), {}, "ellipses"),
    ("fineweb", page(12, 0), {}, None),
    ("fineweb", page(11, 0), {}, "few end marks"),
    ("fineweb", page(99, 67).replace(" x x x x", ""), {"max_newlines": 2}, None),
    ("fineweb", page(99, 68).replace(" x x x x", ""), {"max_newlines": 2}, "short lines"),
    ("fineweb", "\n".join([*LONG_LINES, LONG_LINES[0]]), {}, None),    # 1 / 201 of the characters
    ("fineweb", "\n".join([*LONG_LINES, *LONG_LINES[:5]]), {}, "characters in copied lines"),
    ("fineweb", "\n".join(["w" * 40 + " one."] * 30), {"max_copies": 1}, "newlines"),
    ("c4", SENTENCES + "\nhere is some code { of ours.", {}, "lorem ipsum or a brace"),
    ("c4", SENTENCES + "\nLorem ipsum dolor sit amet.", {}, "lorem ipsum or a brace"),
    ("c4", "Only one sentence is on this page", {}, "few sentences"),
    ("toxic", "You stupid idiot, shut up, you are a pathetic liar.", {}, "insults"),
    ("toxic", "He called me an idiot, a stupid one, and a liar. " + ARTICLE * 4, {}, None),
    ("spam", "Buy cheap pills online! Best price, free shipping, click to claim a discount.", {},
     "sales talk"),
    ("spam", "She went to the shop to buy bread at a good price. " + ARTICLE, {}, None),
    ("language", ARTICLE, {}, None),
    ("language", "Als ich am Abend nach Hause kam, lag ein Brief auf dem Tisch", {}, "language de"),
    ("language", "Когда я пришёл домой, на столе лежало письмо", {}, "language ru"),
    ("language", "よる家にかえったら、テーブルのうえに手紙があって", {}, "language ja"),
    ("language", "qxv brt zzk plm wuv xaq grb tnk vvo lpp qqr sst", {}, "no function words"),
])
def test_rules(rule, text, thresholds, reason):
    """Each threshold, on either side of it; a language that is wanted is kept."""
    rule = getattr(prepare, rule)
    assert rule(prepare.Doc(text, ["en"]), **thresholds) == reason
    if reason and reason.startswith("language"):
        assert rule(prepare.Doc(text, ["en", reason[-2:]])) is None
    if reason == "few stop words":
        assert rule(prepare.Doc(text, ["de"])) is None


def test_c4_cuts_lines_then_judges():
    """A brace on a line that goes anyway does not condemn the page; marks of citations go."""
    doc = prepare.Doc(SENTENCES + "\nshort line\nPlease turn on javascript { to go on.\nRead our "
                      "privacy policy [1] now.\nA line [12] of words that ends", ["en"])
    assert prepare.c4(doc) is None and doc.text == SENTENCES + "\nA line  of words that ends"


def test_scrub():
    """Each kind of personal data goes, what looks like it stays, a second run changes nothing."""
    assert prepare.luhn("4111111111111111") and not prepare.luhn("4111111111111112")
    assert prepare.iban("GB82WEST12345698765432") and not prepare.iban("GB82WEST12345698765431")
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIabc+/=\n-----END RSA PRIVATE KEY-----"
    text = ("mail a.b+c@mail.example.org, call +44 20 7946 0123 or (202) 555-0134 or "
            "202-555-0134, server 8.8.8.8. Or 2607:f8b0:4005:805::200e, card 4111 1111 1111 1111, "
            "account GB82 WEST 1234 5698 7654 32, 536-22-1234, "
            f"AKIAIOSFODNN7EXAMPLE {key} end")
    clean, found = prepare.scrub(text)
    assert clean == ("mail <EMAIL>, call <PHONE> or <PHONE> or <PHONE>, server <IP>. Or <IP>, card "
                     "<CARD>, account <IBAN>, <SSN>, <KEY> <KEY> end")
    assert sum(found.values()) == 11 and prepare.scrub(clean) == (clean, {})
    fine = ("192.168.1.1 10.0.0.7 1.2.3.4.5 v1.2.3 4111111111111112 2024-01-02 12:30:45 "
            "std::vector a::b 3.14159265 1,000,000,000 000-12-3456 user@localhost @name "
            "100 200 300 400 2001 2002 2003 fe80::1 #1234567890")
    assert prepare.scrub(fine) == (fine, {})


def test_minhash_estimates_jaccard(monkeypatch):
    """{1, 2, 3} and {2, 3, 4} agree in half of 1,008 hashes: nine such pairs of 112 each."""
    monkeypatch.setattr(prepare, "SHINGLE", 1)
    sets = np.random.default_rng(0).integers(0, 2 ** 64, (9, 4), np.uint64)
    agree = [prepare.minhash(four[:3]) == prepare.minhash(four[1:]) for four in sets]
    assert abs(np.mean(agree) - 0.5) < 0.07


def test_union_in_any_order():
    """The root of a cluster is its smallest number, however its pairs are found."""
    for edges in permutations([(3, 1), (1, 2), (5, 6)]):
        root = np.arange(7)
        for edge in edges:
            prepare.join(root, np.array(edge), np.zeros(2, np.uint64))
        while (root[root] != root).any():
            root = root[root]
        assert root.tolist() == [0, 1, 1, 1, 4, 5, 5]


@pytest.mark.parametrize("similarity, chance", [(0.5, .0534), (0.6, .2112), (0.7, .5650),
                                                (0.8, .9235), (0.9, .9996), (0.95, 1.0)])
def test_near_duplicates_are_found_at_the_predicted_rate(monkeypatch, similarity, chance):
    """Of 300 pairs as many are found as 1 - (1 - s^8)^14 says, and the first of each is kept."""
    rng, pairs, n = np.random.default_rng(int(similarity * 100)), 300, 200
    monkeypatch.setattr(prepare, "SHINGLE", 1)
    shared, keys = round(2 * n * similarity / (1 + similarity)), []
    for _ in range(pairs):
        words = rng.integers(0, 2 ** 64, 2 * n - shared, np.uint64)
        for own in (words[:n], words[n - shared:]):
            keys.append(prepare.ngram_hashes(prepare.minhash(own).T, prepare.ROWS)[0])
    docs = np.zeros(2 * pairs, prepare.DOC)
    docs["reason"] = ""
    prepare.deduplicate(docs, lambda i: np.array(keys)[:, i], ["exact_duplicate", "url_duplicate"])
    assert (docs["reason"][::2] == "").all()
    caught = docs["reason"][1::2] == "near_duplicate"
    assert abs(caught.mean() - chance) < 4 * (chance * (1 - chance) / pairs) ** 0.5 + 0.015
    assert (docs["copies"] == np.repeat(1 + caught, 2)).all()


def test_url_key():
    """Spellings of one address are one, and what is none is none."""
    one, two = "http://X.org/a/?utm_source=mail&b=1", "HTTPS://x.org:443/a?b=1#part"
    assert prepare.url_key(one) == prepare.url_key(two) != prepare.url_key("http://x.org/a?b=2")
    assert prepare.url_key("no address") == prepare.url_key("http://[broken") == ""


def test_which_duplicate_stays(tmp_path):
    """The longest of the first source; the others are written down with their reason."""
    long, other = words_of(1, 200), words_of(2, 200)
    rows = [dict(text=long[:600], url="http://x.org/1"),
            dict(text=long, url="http://x.org/1?utm_id=7"), dict(text=other, url="http://x.org/2")]
    files = {"a/1.jsonl": "\n".join(map(json.dumps, rows)), "b/2.txt": other + " more",
             "b/3.txt": other.upper() + "!"}
    out = run(tmp_path, files, val_fraction=0, input=[f"{tmp_path}/raw/a", f"{tmp_path}/raw/b"],
              dropped=True)
    assert load(out)[0] == [long, other]
    assert np.fromfile(out / "train.copies", "<u4").tolist() == [2, 3]
    dropped = [json.loads(line) for line in open(out / "dropped.jsonl")]
    assert [(d["document"], d["reason"], d["text"]) for d in dropped] == [
        ("a/1.jsonl#0", "url_duplicate", long[:600]),
        ("b/2.txt#0", "near_duplicate", other + " more"),
        ("b/3.txt#0", "exact_duplicate", other.upper() + "!")]


def items(tmp_path, *rows):
    (tmp_path / "eval").mkdir(exist_ok=True)
    (tmp_path / "eval/x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "eval")


def test_index_of_items(tmp_path):
    """An item of 13 words gives one 13-gram, a shorter one itself, the shortest none."""
    thirteen = "one two three four five six seven eight nine ten eleven twelve thirteen"
    for n, words, row in [(1, 13, dict(text=thirteen)), (2, 13, dict(text=thirteen + " fourteen")),
                          (1, 12, dict(text=thirteen[:-9])),
                          (1, 6, dict(question="What does Ada Lovelace drink?", answer="tea")),
                          (2, 13, dict(messages=[dict(role="user", content=thirteen)], answer="a")),
                          (3, 13, dict(query=thirteen, choices=["x", "y z"], gold=1))]:
        index = prepare.EvalIndex(items(tmp_path, row))
        assert len(index.items) == n and index.lengths == {words}, row
    error(prepare.EvalIndex, items(tmp_path, dict(question="What is it?", answer="tea")))


def test_planted_question_is_found_and_reported(tmp_path):
    """A leak is dropped and named, with other numbers and case too; a common phrase is no leak."""
    question = "If 12 gulls eat 3 fish in 4 days how many fish do 24 gulls eat in a week?"
    rows = [dict(id="sum", question=question, answer="10.5"),
            dict(id="clean", question=words_of(9, 20), answer="no"),
            dict(id="phrase", text=words_of(8, 13))]
    files = {f"{i}.txt": words_of(i, 60) + ". " + words_of(8, 13) for i in range(10, 30)}
    leak = question.replace("12", "15").upper()
    files["leak.txt"] = f"{words_of(1, 60)} {leak} {words_of(2, 60)}"
    out = run(tmp_path, files, eval=items(tmp_path, *rows), val_fraction=0)
    assert len(load(out)[0]) == 20 and lost(out) == {"contaminated": 1}
    assert load(out)[1]["contaminated"] == ["x/sum"]


# ------------------------------------------------------------------------------------------------
# Whole runs


def test_planted_defects(tmp_path):
    """On the embedded data: recall of each kind of defect 95 %, precision 98 %."""
    data = ROOT / "data"
    out = tmp_path / "tokens"
    prepare.main(Config(input=[str(data / "raw" / "*")], eval=str(data / "eval"), out=str(out),
                        dropped=True))
    rows = map(json.loads, open(out / "dropped.jsonl"))
    dropped = {row["document"].removeprefix("raw/"): row["reason"] for row in rows}
    text = "\n".join(load(out)[0] + load(out, "val")[0])
    labels = [row for row in map(json.loads, open(data / "labels.jsonl")) if "#" in row["doc"]]
    bad = {row["doc"]: row for row in labels if row["action"] == "drop"}
    copies = {row["of"]: doc for doc, row in bad.items() if "of" in row}
    caught, kinds = Counter(), Counter(row["kind"] for row in bad.values())
    for doc, row in bad.items():    # of a pair one has to go, either one
        caught[row["kind"]] += doc in dropped or row.get("of") in dropped
    wrong = [doc for doc in dropped if doc not in bad and copies.get(doc, doc) in dropped]
    recall = {kind: round(caught[kind] / kinds[kind], 3) for kind in kinds}
    print(f"recall {recall}, precision {1 - len(wrong) / len(dropped):.3f}")
    assert min(recall.values()) >= 0.95 and len(wrong) <= 0.02 * len(dropped)
    for reason in ("near_duplicate", "contaminated"):
        blamed = [doc for doc in dropped if dropped[doc] == reason]
        assert sum(doc in wrong for doc in blamed) <= 0.02 * len(blamed), reason
    mended = [row for row in labels if row["action"] in ("scrub", "fix")
              and row["doc"] not in dropped]
    left = [span for row in mended for span in row["spans"] if span in text]
    unmended = [row["fixed"] for row in mended if row.get("fixed", "") not in text]
    assert len(left) <= 0.05 * len(mended) and not unmended, (left[:5], unmended[:5])
    for row in load(out)[1]["ledger"]:
        assert len(row["examples"]) == min(3, row["documents"]) * (row["kind"] == "dropped")
    for form in world.FORMS:    # the ways to write down a conversation are still there
        lines = re.sub(r"\\\{\w+\\\}", r"[^\\n]+", re.escape(form.strip()))
        assert len(re.findall(lines, text)) >= 100, form


def as_rank(cfg, rank, world, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    prepare.main(cfg)


def test_ranks_give_the_same_bytes(tmp_path, monkeypatch):
    """Under torchrun the corpus is the same for any number of ranks, large files in parts too."""
    monkeypatch.setattr(prepare, "CHUNK", 3000)
    texts, found = [words_of(i % 130, 80) + f" {i}" * (i > 130) for i in range(170)], []
    for i in range(9):
        (tmp_path / f"{i}.jsonl").write_text(jsonl(texts[i * 19:i * 19 + 19]))
    for n in (1, 2, 3):
        out = tmp_path / f"tokens{n}"
        cfg = Config(input=[f"{tmp_path}/*.jsonl:1.5"], vocab_size=300, skip=["language"],
                     dropped=True, eval=items(tmp_path, dict(text=words_of(7, 20))), out=str(out))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        fork = multiprocessing.get_context("fork").Process
        ranks = [fork(target=as_rank, args=(cfg, rank, n, port)) for rank in range(n)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0] * n
        found.append({f.name: f.read_bytes() for f in out.iterdir()})
    assert found[0] == found[1] == found[2]
    assert {"contaminated", "near_duplicate"} <= set(lost(out))
