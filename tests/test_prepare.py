"""Tests of prepare.py. Run: python -m pytest tests/test_prepare.py -q (no network).

Each docstring says what would be wrong with the world if the test failed.
"""
import base64
import gzip
import hashlib
import http.server
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
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
         "don't WE'LL they'Re",
         "\t\ttabs\r\nand\rreturns \r\n\r\n", "naïve café Ünïcödé", "中文字符没有空格", "日本語 テキスト",
         "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301 combining",
         "a\u00a0b\u2003c\u3000d",
         "\x00\x1c\x1d\x1f\x85", "١٢٣٤٥ ½ Ⅷ", "<|endoftext|><|im_start|>user\n<|im_end|><|pad|>",
         "a" * 300,
         "ab" * 300, " " * 300, "\n" * 50 + "x", "x\n" * 50, "!?!?\n\n\nfoo",
         "https://a.b/c?d=e&f=%20", "\ufffd\ufeff"]


def run(tmp_path, files, **flags):
    """Write files {name: str or bytes}, run prepare on their folder, return the tokens folder."""
    folder = tmp_path / "raw"
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    folder.mkdir(exist_ok=True)
    out = tmp_path / "tokens"
    prepare.main(Config(**{**dict(input=[str(folder)], out=str(out), tokenizer="bytes",
                                  skip=["language"], web="none", eval="none"), **flags}))
    return out


def load(out, name="train"):
    """(texts of the documents, manifest, tokenizer) read back the way any consumer would."""
    manifest = json.loads((out / "manifest.json").read_text())
    enc = encoding_from_dict(json.loads((out / "encoding.json").read_text()))
    ids = np.fromfile(out / f"{name}.bin", dtype="<u2" if manifest["dtype"] == "uint16" else "<u4")
    ends = np.fromfile(out / f"{name}.idx", dtype="<u8").astype(int)
    stop = enc.encode_single_token(ENDOFTEXT)
    assert len(ids) == manifest["tokens"][name] and len(ends) == manifest["documents"][name]
    assert (ends[-1] if len(ends) else 0) == len(ids) and (ids[ends - 1] == stop).all()
    return [enc.decode(ids[a:b - 1].tolist()) for a, b in zip([0, *ends], ends)], manifest, enc


def lost(manifest):
    """{reason: documents} of what the ledger says was dropped."""
    return {row["name"]: row["documents"] for row in manifest["ledger"] if row["kind"] == "dropped"}


def words_of(seed, n):
    """A random document of n words from a language of 2,000 made-up ones."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("aeioubcdfgklmnprst",
                                        k=1 + hash_int(rng.randrange(2000)) % 8))
                    for _ in range(n))


def hash_int(i):
    return i * 2654435761 % 2 ** 32 >> 7


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
                if word[i:i + 2] == best:
                    out.append(len(tokens))
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        words = merged
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {t: i for i, t in enumerate(tokens)}, words


def slow_encode(ranks, text):
    """Merge the lowest rank, leftmost first, until nothing merges: no heap, no cache, no
    tiktoken."""
    ids = []
    for piece in regex.findall(GPT4_SPLIT, text):
        parts = [bytes([b]) for b in piece.encode()]
        while True:
            found = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                     if a + b in ranks]
            if not found:
                break
            i = min(found)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[p] for p in parts]
    return ids


def test_bpe_of_wikipedia():
    """The textbook example: aaabdaaabac, ties to the smallest ids, gives aa, ab, aaab (data.md
    15.4)."""
    ranks = prepare.train_bpe({"aaabdaaabac": 1}, 259)
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    assert make_encoding("t", GPT4_SPLIT, ranks).encode_ordinary("aaabdaaabac") == [258, 100, 258,
                                                                                    97, 99]


def test_bpe_of_sennrich():
    """The example of the BPE paper, with counts worked out by hand (data.md 15.5)."""
    ranks = prepare.train_bpe(dict(low=5, lower=2, newest=6, widest=3), 256 + 10)
    assert [t.decode() for t in list(ranks)[256:]] == [
        "es", "est", "lo", "low", "ew", "new", "newest", "dest", "idest", "widest"]


def test_bpe_incremental_equals_recount():
    """Incremental counts drifted from the true ones: merges would come in another order on some
    corpus."""
    rng = random.Random(0)
    for trial in range(300):
        alphabet = "ab" if trial % 3 == 0 else "abc" if trial % 3 == 1 else "aé中"
        counts = {"".join(rng.choices(alphabet, k=rng.randint(1, 12))): rng.randint(1, 4)
                  for _ in range(rng.randint(1, 6))}
        size = 256 + rng.randint(1, 25)
        ranks, words = slow_bpe(counts, size)
        assert prepare.train_bpe(counts, size) == ranks, counts
        for word in counts:
            assert tuple(slow_encode(ranks, word)) in words or len(regex.findall(GPT4_SPLIT,
                                                                                 word)) > 1


def test_encoding_equals_an_independent_one():
    """tiktoken with our ranks gives other ids than the definition of BPE does."""
    text = words_of(1, 2000) + "".join(NASTY)
    enc = prepare.trained_tokenizer(prepare.count_pieces([text]), 400)
    assert enc.n_vocab == 400
    for s in [*NASTY, text[:3000]]:
        assert enc.encode_ordinary(s) == slow_encode(enc._mergeable_ranks, s), repr(s)
        assert enc.decode(enc.encode_ordinary(s)) == s


def test_split_pattern():
    """Our split differs from GPT-4's (data.md 15.7)."""
    assert regex.findall(GPT4_SPLIT, "Hello world  123456!! I'm\n\n  x") == [
        "Hello", " world", " ", " ", "123", "456", "!!", " I", "'m", "\n\n", " ", " x"]


def test_counting_by_words_is_exact():
    """Counting blank-led words first, to be fast, moved a piece boundary."""
    rng = random.Random(1)
    texts = NASTY + ["".join(rng.choices("ab'm1! \n\t\r\u00a0é中\x1c", k=200)) for _ in range(300)]
    expected = Counter(p for t in texts for p in regex.findall(GPT4_SPLIT, t) if len(p) <= 256)
    assert prepare.count_pieces(texts) == expected


@pytest.mark.parametrize("name", ["bytes", "bpe", "chars"])
def test_encode_round_trip_without_control_tokens(name):
    """Text that spells a control token became one, or a text changed on its way through the
    tokenizer."""
    texts = [t for t in NASTY if t] + ["plain text"] * 3
    enc = {"bytes": lambda: prepare.named_tokenizer("bytes"),
           "chars": lambda: prepare.chars_tokenizer(set().union(*texts)),
           "bpe": lambda: prepare.trained_tokenizer(prepare.count_pieces(texts), 270)}[name]()
    for text in texts:
        *ids, stop = prepare.encode(enc, text).tolist()
        assert not {*ids} & {*enc._special_tokens.values()}
        assert stop == enc._special_tokens[ENDOFTEXT]
        assert ids == enc.encode_ordinary(text) and enc.decode(ids) == text


def test_long_texts_encode_as_if_whole(monkeypatch):
    """Cutting a long text into pieces, to save memory, changed its tokens."""
    text = words_of(2, 5000).replace("ta", "ta\n").replace("b", "1! ") + "   \n\n x" * 5
    enc = prepare.trained_tokenizer(prepare.count_pieces([text]), 500)
    monkeypatch.setattr(prepare, "PIECE", 6000)
    assert len(list(prepare.cut_text(text, 6000))) > 3
    assert prepare.encode(enc, text)[:-1].tolist() == enc.encode_ordinary(text)
    assert "".join(prepare.cut_text("x" * 20000, 6000)) == "x" * 20000


def test_vocabulary_is_what_was_asked_for():
    """--vocab_size means the final number of ids, control tokens included; asking for too many must
    say so."""
    text = words_of(3, 20000)
    assert prepare.trained_tokenizer(prepare.count_pieces([text]), 1024).n_vocab == 1024
    assert prepare.trained_tokenizer(prepare.count_pieces([text]),
                                     1300).n_vocab == 1344    # a multiple of 64, filled with merges
    assert "at most" in error(prepare.trained_tokenizer,
                              prepare.count_pieces(["too little text, too little text"]), 1024)
    assert "at least 260" in error(prepare.trained_tokenizer, Counter(), 100)


def test_tokenizers_from_files(tmp_path):
    """A tokenizer saved by one run cannot be used by the next, or comes back as another one."""
    out = run(tmp_path, {"a.txt": words_of(4, 9000)}, tokenizer="train", vocab_size=300)
    _, _, enc = load(out)
    assert encoding_hash(prepare.named_tokenizer(str(out))) == encoding_hash(enc)
    ranks = tmp_path / "ours.tiktoken"
    ranks.write_text("".join(f"{base64.b64encode(b).decode()} {i}\n" for b,
                             i in enc._mergeable_ranks.items()))
    assert encoding_hash(prepare.named_tokenizer(str(ranks))) == encoding_hash(enc)
    ranks.write_text("not a rank file\n")
    assert "damaged" in error(prepare.named_tokenizer, str(ranks))
    assert "choose train" in error(prepare.named_tokenizer, "nonsense")


def test_gpt2_offline_names_the_files(tmp_path, monkeypatch):
    """Without network the user is not told which cache file to fetch by hand."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    import socket

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    message = error(prepare.named_tokenizer, "gpt2")
    assert "6d1cbeee0f20b3d9449abfede4726ed8212e3aee" in message and str(tmp_path) in message


# ------------------------------------------------------------------------------------------------
# Output


def test_writer_refuses_ids_past_the_type(tmp_path):
    """An id past 65535 wraps silently to a wrong token (data.md 15.20)."""
    with open(tmp_path / "x.bin", "wb") as f:
        prepare.write_ids(f, np.array([0, 65535]), np.uint16)
        with pytest.raises(ValueError, match="65536"):
            prepare.write_ids(f, np.array([65536]), np.uint16)
    assert (tmp_path / "x.bin").read_bytes() == b"\0\0\xff\xff"


def test_folder_is_complete_and_the_same_twice(tmp_path):
    """The manifest disagrees with the files, or the same input gives other bytes the second
    time."""
    files = {f"{i}.txt": words_of(i, 100) for i in range(100)}
    out = run(tmp_path, files, tokenizer="train", vocab_size=400)
    train, manifest, enc = load(out)
    val, _, _ = load(out, "val")
    assert sorted(train + val) == sorted(files.values()) and 1 <= len(val) <= 15
    assert manifest["vocab_size"] == enc.n_vocab == 400
    assert manifest["encoding_hash"] == encoding_hash(enc)
    assert manifest["bytes"]["val"] == sum(len(t.encode()) for t in val)
    assert manifest["sha256"]["train"] == prepare.file_hash(out / "train.bin")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    run(tmp_path, {}, tokenizer="train", vocab_size=400)
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}
    assert sorted(before) == ["encoding.json", "manifest.json", "train.bin", "train.copies",
                              "train.idx",
                              "val.bin", "val.idx"]
    assert not list(tmp_path.glob(".*"))


def test_tail_split_is_by_character(tmp_path):
    """tinyshakespeare's split (first 90 % of the characters train) is not reproduced."""
    text = "".join(random.Random(5).choices("aé中\U0001f600\n", k=1001))
    out = run(tmp_path, {"a.txt": text}, tokenizer="chars", clean=False, split="tail",
              val_fraction=0.1)
    assert load(out)[0] == [text[:900]] and load(out, "val")[0] == [text[900:]]
    assert load(out)[1]["vocab_size"] == 5 + 4
    out = run(tmp_path, {"a.txt": text[:700], "b.txt": text[700:]}, tokenizer="bytes", clean=False,
              split="tail",
              val_fraction=0.1)
    assert load(out)[0] == [text[:700], text[700:900]] and load(out, "val")[0] == [text[900:]]


def test_hash_split_ignores_order(tmp_path):
    """A document moves between train and validation because other files came or names changed."""
    texts = [words_of(i, 60) for i in range(300)]
    val = load(run(tmp_path, {f"{i}.txt": t for i, t in enumerate(texts)}), "val")[0]
    (tmp_path / "two").mkdir()
    files = {f"x{i}.txt": t for i, t in enumerate(reversed(texts[:200]))}
    again = load(run(tmp_path / "two", files), "val")[0]
    assert sorted(again) == sorted(set(val) & set(texts[:200])) and 5 < len(val) < 30


def test_few_documents_are_split_by_their_tails(tmp_path, capsys):
    """One big file leaves validation empty."""
    text = words_of(1, 1000)
    out = run(tmp_path, {"a.txt": text}, val_fraction=0.2)
    assert load(out)[0][0] + load(out, "val")[0][0] == text and "too few" in capsys.readouterr().out


def test_exact_duplicates_and_weights(tmp_path):
    """A copied document stays, or a source's weight does not decide how often its text is seen."""
    a, b = words_of(1, 50), words_of(2, 50)
    files = {"a/1.txt": a, "a/2.txt": a.upper() + "!", "b/1.txt": b}
    out = run(tmp_path, files, val_fraction=0, input=[f"{tmp_path}/raw/a", f"{tmp_path}/raw/b:2"])
    texts, manifest, _ = load(out)
    assert texts == [a, b, b]
    assert lost(manifest) == {"exact_duplicate": 1}


# ------------------------------------------------------------------------------------------------
# Input


def test_formats(tmp_path):
    """A file format that users have is not read as they expect."""
    rows = [{"text": "plain"}, {"content": "from content"},
            {"question": "2+2?", "answer": "4\n#### 4"},
            {"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Hello"}]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey"}]},
            {"instruction": "Add", "input": "", "output": "3"},
            {"text": "half a surrogate \ud800 pair"}]
    warc = b"".join(gzip.compress(
        b"WARC/1.0\r\nWARC-Type: %s\r\nwarc-target-uri: http://x.org/%d\r\nContent-Length: %d\r\n"
        b"\r\n%s\r\n\r\n"
        % (kind, i, len(body), body)) for i, (kind, body) in enumerate([
            (b"warcinfo", b"software: x"), (b"conversion", "hé from WET".encode()),
            (b"response", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>from WARC</p>")]))
    files = {"1.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode()),
             "2.json": json.dumps([{"text": "in a list"}, "bare string"]),
             "3.txt": "\ufeffwhole\r\nfile\0\n",
             "4.html": "<html><head><title>t</title></head><body><nav>menu</nav><p>A &amp; "
                       "B</p><script>x</script>",
             "5.warc.gz": warc, "sub/6.md": "deep", "7.bin": b"\1\2", ".hidden.txt": "no"}
    texts, _, _ = load(run(tmp_path, files, val_fraction=0))
    assert texts == ["plain", "from content", "2+2?\n4\n#### 4", "User: Hi\n\nAssistant: Hello",
                     "Human: Hi\n\nGpt: Hey", "Add\n3", "half a surrogate \ufffd pair", "in a list",
                     "bare string",
                     "whole\nfile", "A & B", "hé from WET", "from WARC", "deep"]


def test_warc_length_counts_bytes(tmp_path):
    """Content-Length read as characters swallows what follows (data.md 15.15)."""
    record = "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 3\r\n\r\nhé\r\n\r\n".encode()
    assert load(run(tmp_path, {"a.wet.gz": gzip.compress(record) * 2}, val_fraction=0))[0] == ["hé"]


def test_blocks(tmp_path):
    """--blocks does not separate documents at blank lines."""
    out = run(tmp_path, {"a.txt": "one\nstill one\n\n \n\ntwo\n"}, blocks=True, val_fraction=0)
    assert load(out)[0] == ["one\nstill one", "two"]


def test_broken_json_lines(tmp_path):
    """One broken line in a hundred kills a run, or a file full of them passes unnoticed."""
    lines = [json.dumps({"text": words_of(i, 20)}) for i in range(200)]
    lines[77] = '{"text": "cut'
    out = run(tmp_path, {"a.jsonl": "\n".join(lines)}, val_fraction=0)
    texts, manifest, _ = load(out)
    assert len(texts) == 199 and lost(manifest) == {"not JSON": 1}
    lines[10:15] = ["oops"] * 5
    message = error(run, tmp_path, {"a.jsonl": "\n".join(lines)})
    assert "a.jsonl" in message and "line 11" in message and load(out)[0] == texts


@pytest.mark.parametrize("files, flags, says", [
    ({}, {}, "no .txt"),
    ({"a.bin": b"\1"}, {}, "no .txt"),
    ({"a.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 99)[:-10]}, {}, "damaged"),
    ({"a.txt.gz": b"\x1f\x8b\x08\0garbage" * 9}, {}, "damaged"),
    ({"a.txt.gz": b"plain text"}, {}, "damaged"),
    ({"a.txt": "x"}, {"eval": "nowhere"}, "does not exist"),
    ({"a.txt": bytes(range(128, 256)) * 20}, {}, "not UTF-8"),
    ({"a.json": "{not json"}, {}, "not JSON"),
    ({"a.jsonl": '{"foo": 1}'}, {}, "fields: foo"),
    ({"a.txt": "  \n\n "}, {}, "nothing is left"),
    ({"a.txt": "x"}, {"val_fraction": 1.0}, "val_fraction"),
    ({"a.txt": "short"}, {"tokenizer": "train"}, "at most"),
    ({"a.txt": "x"}, {"bands": 0}, "at least 1"),
    ({f"{i}.txt": words_of(i, 20) for i in range(9)}, {"val_fraction": 0.9999},
     "left for training"),
    ({"a.txt": "x"}, {"mix_power": float("nan")}, "0 or above"),
    ({"a.json": "[" * 99999}, {}, "not JSON"),
    ({"a.warc": b"WARC/1.0\r\nContent-Length: 99999999999\r\n\r\nx"}, {}, "wrong Content-Length"),
    ({"a.txt": ""}, {"input": ["{}:0"]}, "above 0"),
    ({"a.txt": "x"}, {"out": "/dev/null/here"}, "Not a directory"),
])
def test_bad_input(tmp_path, files, flags, says):
    """A user's mistake ends in a traceback, or leaves half a folder under the final name."""
    if "input" in flags:
        flags["input"] = [item.format(tmp_path / "raw") for item in flags["input"]]
    assert says in error(run, tmp_path, files, **flags)
    assert not (tmp_path / "tokens").exists() and not list(tmp_path.glob(".*"))


def test_unknown_named_file(tmp_path):
    """A file of a kind nobody reads would be skipped as if it held nothing."""
    (tmp_path / "x.xls").write_bytes(b"1")
    assert "no .txt" in error(prepare.main, Config(input=[str(tmp_path / "x.xls")]))


def test_foreign_folder_is_not_overwritten(tmp_path):
    """--out pointed at somebody's photos deletes them."""
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/photo.jpg").write_bytes(b"1")
    assert "not a tokens folder" in error(run, tmp_path, {"a.txt": "x"})


def test_a_failed_run_keeps_the_old_folder(tmp_path, monkeypatch):
    """A full disk destroys the tokens of the previous run."""
    out = run(tmp_path, {"a.txt": words_of(1, 300)})
    before = (out / "train.bin").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(prepare, "write_ids", full)
    assert "No space left" in error(run, tmp_path, {"a.txt": words_of(2, 300)})
    assert (out / "train.bin").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_one_huge_line(tmp_path):
    """A single long line, blanks or none in it, is too much."""
    text = words_of(1, 1000) * 300 + "x" * 2_000_000
    texts, manifest, _ = load(run(tmp_path, {"a.txt": text}, clean=False, val_fraction=0))
    assert texts == [text] and manifest["bytes"]["train"] == len(text)


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    """One bad byte loses a document, or passes without a word."""
    texts, manifest, _ = load(run(tmp_path, {"a.txt": b"a fine text with one \xff bad byte"},
                                  val_fraction=0))
    assert texts == ["a fine text with one \ufffd bad byte"]
    assert manifest["sources"][0]["broken_utf8"] == 1


# ------------------------------------------------------------------------------------------------
# Extract, normalise


ARTICLE = ("The harbour was quiet in the morning, and the boats lay side by side as they had for "
           "years. "
           "Nobody could say why the old bell began to ring at six, but it was heard on both "
           "sides of the bay.")
PAGE = """<html><head><title>Bells</title><style>p {{}}</style></head><body>
<nav><ul><li><a href=/>Home</a><li><a href=/b>About us</a></ul></nav>
<div>Please accept our cookies.</div><h1>The bell</h1><p>{}</p><p>It rang twice.</p>
<p>{}</p><div class=side><a href=1>Ten hats you will not believe are still on sale this week in town
</a></div><script>var x = "<p>not text</p>";</script><!-- <p>nor this</p> -->
<pre>  keep   this</pre><footer>© 2024 Harbour Post. All rights reserved.</footer></body></html>"""


def test_page_becomes_its_article():
    """Menus, banners, footers and scripts end up in the training text, or the article does not."""
    assert prepare.main_text(PAGE.format(ARTICLE, ARTICLE + "&nbsp;&eacute;")).split("\n") == [
        "The bell", ARTICLE, "It rang twice.", ARTICLE + " é", "  keep   this"]


@pytest.mark.parametrize("page", [
    "<p>" + ARTICLE, f"<nav><p>{ARTICLE}", f"<table><tr><td>{ARTICLE}<br>",
    f"<p>{ARTICLE}<!-- open",
    f"<P CLASS='a'>{ARTICLE}</P><script>never closed",
    f"<title>Bells<p>{ARTICLE}", f"<a href=x><p>{ARTICLE}</p></a >" + f"<p>{ARTICLE}</p>"])
def test_page_that_closes_nothing(page):
    """One forgotten closing tag loses the whole page."""
    assert ARTICLE in prepare.main_text(page)


@pytest.mark.parametrize("bait", ["<", "<!--", "<a <a ", "<script>", "<nav>", "</nav>", "<p",
                                  "&amp", "<a href='",
                                  "[", "@a.", "1.", "1-", "a@", "+1 ", "A1B2 ", "....", "\n \n",
                                  "Ã©", "AKIA", "::",
                                  "<p>a", "<title>", "<p>a <a>b", "<pre>"])
def test_every_pattern_is_linear(bait):
    """A page made to be slow stops a crawl: 200 kB of one pattern must take no more than
    seconds."""
    text, words, started = bait * (200_000 // len(bait)), prepare.Words(), time.process_time()
    prepare.main_text(text + f"<p>{ARTICLE} {ARTICLE}<p>end</p>")
    doc, *_ = prepare.clean(text + "\n" + text.replace(" ", ""), prepare.PAGE, words,
                            Config(skip=["language", "gopher_repetition", "gopher_quality"]),
                            Counter())
    prepare.scrub(doc.text)
    assert time.process_time() - started < 4


def test_mojibake_is_repaired_and_nothing_else():
    """Twice-encoded text stays broken, or correct text in some language is "repaired" into
    nonsense."""
    fine = "Zoë’s naïve café – £5, “rösti” à la mode … €3 ß Ünï SÃO PAULO Ã la 中文 Привет ½ Â"
    assert prepare.repair(fine) == fine
    for table in ("cp1252", "latin-1"):
        broken = "".join(c.encode().decode(table, "ignore")
                         if len(c.encode().decode(table, "ignore"))
                         == len(c.encode()) else c for c in fine[:40])
        assert broken != fine[:40] and prepare.repair(broken) == fine[:40]


def test_normalise():
    """Line ends or control characters get into the training text, or quotes and case are folded."""
    dirty = "\ufeffa\r\nb\rc\0d\x1fe\u0301 “Q” ﬁ\tx\x85\n"
    assert prepare.normalise(dirty) == "a\nb\ncd\u00e9 “Q” ﬁ\tx"


# ------------------------------------------------------------------------------------------------
# Filter


def judged(rule, text, **settings):
    return rule(prepare.Doc(text, prepare.Words()), Config(**settings))


def padded(lines, words=60):
    """These lines in a text that no other rule of Gopher minds."""
    return "\n".join([*lines, " ".join(f"{w}{i}x" for i in range(words)
                                       for w in ["the"] * (i < 1) + ["of"])])


def test_gopher_repetition_numbers():
    """The n-gram arithmetic differs from Gopher's (data.md 15.9 to 11)."""
    rule = prepare.gopher_repetition
    assert judged(rule, "a b a b a b c d") == "top 2-gram"             # 3 x 3 / 15 = 0.60
    assert judged(rule, "a a a a a") == "top 2-gram"                   # 4 x 3 / 9, above 1 is legal
    assert judged(rule, "one fine day we went to sea and saw a whale") is None
    assert judged(rule, "a\na\nb\nc") is None                          # 0.25
    assert judged(rule, "a\na\na\nb") == "repeated lines"              # 0.50
    twice = "x1 x2 x3 x4 x5 x1 x2 x3 x4 x5"
    assert judged(rule, twice, top_ngrams=[]) == "repeated 5-grams"    # 10 / 29 = 0.345
    assert judged(rule, twice, top_ngrams=[], copied_ngrams=[0.345]) is None
    assert judged(rule, twice, top_ngrams=[], copied_ngrams=[0.344]) == "repeated 5-grams"


def test_repeated_ngrams_equal_a_plain_count():
    """The fast count of repeated n-grams differs from datatrove's loop over words."""
    def plain(words, n):
        seen, chars, i = set(), 0, 0
        while i < len(words) - n + 1:
            gram = tuple(words[i:i + n])
            if gram in seen:
                chars, i = chars + len("".join(gram)), i + n
            else:
                seen.add(gram)
                i += 1
        return chars
    rng = random.Random(3)
    for _ in range(100):
        words = rng.choices(["a", "bb", "ccc"], k=rng.randint(12, 60))
        text, n = " ".join(words), rng.randint(5, 10)
        share = plain(words, n) / len(text)
        for limit, flagged in ((share - 1e-9, share > 0), (share + 1e-9, False)):
            limits = dict(top_ngrams=[], copied_ngrams=[9] * (n - 5) + [limit])
            found = judged(prepare.gopher_repetition, text, **limits)
            assert (found == f"repeated {n}-grams") is flagged


def test_gopher_quality_numbers():
    """A threshold is off by one (data.md 15.12)."""
    def page(*words):
        return " ".join(words)
    quality, body = prepare.gopher_quality, ["the", "of", *["word"] * 96]
    assert judged(quality, page(*body[:50])) is None
    assert judged(quality, page(*body[:49])) == "few words"
    assert judged(quality, page(*body[:80], *["1234"] * 20)) is None
    assert judged(quality, page(*body[:79], *["1234"] * 21)) == "few letters"
    assert judged(quality, page(*["The"] * 60)) == "few stop words"
    assert judged(quality, page(*["The"] * 60), languages=["de"]) is None
    assert judged(quality, page("the", "of", *["ab"] * 98)) == "word length"
    assert judged(quality, page("the", "of", *["#word"] * 20, *["word"] * 70)) == "symbols"
    lines = [page(*body[:7])] * 10
    assert judged(quality, "\n".join([f"- {x}" for x in lines[:9]] + lines[9:])) is None
    assert judged(quality, "\n".join([f"- {x}" for x in lines] + lines[:1])) == "bullets"
    assert judged(quality, "\n".join([f"{x}..." for x in lines[:3]] + lines[3:])) is None
    assert judged(quality, "\n".join([f"{x}..." for x in lines[:4]] + lines[4:])) == "ellipses"


def test_fineweb_numbers():
    """A threshold is off by one (data.md 15.13)."""
    def page(ended, short):
        lines = [("w" if i < short else "w" * 31) + str(i) + "." * (i < ended) for i in range(100)]
        return "\n".join(line + " x" * 4 + "." * (i < ended) for i, line in enumerate(lines))
    rule = prepare.fineweb
    assert judged(rule, page(12, 0)) is None and judged(rule, page(11, 0)) == "few end marks"
    assert judged(rule, page(99, 67)) is None and judged(rule, page(99, 68)) == "short lines"
    lines = [f"this is line {i} of a page, and it is no short line." for i in range(200)]
    assert judged(rule, "\n".join([*lines, lines[0]])) is None    # 1 / 201 of the characters
    assert judged(rule, "\n".join([*lines, *lines[:5]])) == "characters in copied lines"
    assert judged(rule, "\n".join(["wordwordwordwordwordwordwordword one."] * 30),
                  max_line_copies=1) == "newlines"


def test_c4_cuts_lines_then_judges():
    """C4's order is lost: a brace on a line that goes anyway must not condemn the page."""
    good = "This line is a good one.\nSo is this one here too.\nAnd a third line of words."
    doc = prepare.Doc(good + "\nshort line\nPlease turn on javascript { to go on.\nRead our "
                             "privacy policy [1] now.",
                      prepare.Words())
    assert prepare.c4(doc, Config()) is None and doc.text == good
    assert judged(prepare.c4, good + "\nhere is some code { of ours.") == "{"
    assert judged(prepare.c4, good + "\nLorem ipsum dolor sit amet.") == "lorem ipsum"
    assert judged(prepare.c4, "Only one sentence is on this page") == "few sentences"
    doc = prepare.Doc(good + "\nA line [12] of words that ends", prepare.Words())
    assert prepare.c4(doc, Config()) is None and doc.text.endswith("A line  of words that ends")
    doc = prepare.Doc(good + "\nA line of words that ends", prepare.Words())
    assert prepare.c4(doc, Config(c4_end_marks=True)) is None and doc.text == good


@pytest.mark.parametrize("reason, text", [
    (None, "When I came home in the evening there was a letter on the table, and nobody knew who "
           "had sent it to us."),
    (None, "2 + 2 = 4"), (None, "Short text"),
    ("language de", "Als ich am Abend nach Hause kam, lag ein Brief auf dem Tisch, und niemand "
                    "wusste, wer ihn hatte."),
    ("language fr", "Quand je suis rentré le soir, il y avait une lettre sur la table et on ne "
                    "sait pas de qui elle est."),
    ("language es", "Cuando llegué a casa por la noche había una carta en la mesa y no se sabe de "
                    "quién es la carta."),
    ("language it", "Quando sono tornato a casa la sera c'era una lettera sul tavolo e non si sa "
                    "di chi è questa lettera."),
    ("language nl", "Toen ik thuis kwam lag er een brief op de tafel en niemand van ons weet wie "
                    "hem heeft geschreven."),
    ("language ru", "Когда я пришёл домой, на столе лежало письмо, и никто не знал, кто его "
                    "прислал."),
    ("language zh", "我晚上回家的时候桌子上有一封信没有人知道是谁寄来的"),
    ("language ja", "よる家にかえったら、テーブルのうえに手紙があって、だれからかわからない。"),
    ("no function words", "qxv brt zzk plm wuv xaq grb tnk vvo lpp qqr sst dfg hjk"),
])
def test_language(reason, text):
    """A language is taken for another, or clean English for none."""
    assert judged(prepare.language, text) == reason
    if reason and " " in reason and len(reason.split()[-1]) == 2:
        assert judged(prepare.language, text, languages=["en", reason[-2:]]) is None


def test_toxic_and_spam_look_at_density():
    """A page about insults, or a story about a shop, is dropped; or a rant and a sales page are
    not."""
    assert judged(prepare.toxic, "You stupid idiot, shut up, you are a pathetic liar.") == "insults"
    text = "He called me an idiot, a stupid one, and a liar. "
    assert judged(prepare.toxic, text + ARTICLE * 4) is None
    assert judged(prepare.toxic, "Trash, trash, trash: the trash of the town is trash.") is None
    assert judged(prepare.spam, "Buy cheap pills online! Best price, free shipping, click to "
                                "claim a discount.")
    text = "She went to the shop to buy bread at a good price. "
    assert judged(prepare.spam, text + ARTICLE) is None


# ------------------------------------------------------------------------------------------------
# Scrub


def test_checks_of_numbers():
    """A checksum is computed wrongly (data.md 15.14)."""
    assert prepare.luhn("4111111111111111") and not prepare.luhn("4111111111111112")
    assert prepare.iban("GB82WEST12345698765432") and not prepare.iban("GB82WEST12345698765431")


def test_scrub():
    """Somebody's data stays in the text, or something harmless goes; or a second run changes
    more."""
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIabc+/=\n-----END RSA PRIVATE KEY-----"
    text = ("mail a.b+c@mail.example.org, call +44 20 7946 0123 or (202) 555-0134 or "
            "202-555-0134, server 8.8.8.8. "
            "Or 2607:f8b0:4005:805::200e, card 4111 1111 1111 1111, account GB82 WEST 1234 5698 "
            "7654 32, 536-22-1234, "
            f"AKIAIOSFODNN7EXAMPLE {key} end")
    clean, found = prepare.scrub(text)
    assert clean == ("mail <EMAIL>, call <PHONE> or <PHONE> or <PHONE>, server <IP>. Or <IP>, "
                     "card <CARD>, "
                     "account <IBAN>, <SSN>, <KEY> <KEY> end")
    assert sum(found.values()) == 11 and prepare.scrub(clean) == (clean, {})
    fine = ("192.168.1.1 10.0.0.7 1.2.3.4.5 v1.2.3 4111111111111112 2024-01-02 12:30:45 "
            "std::vector a::b 3.14159265 "
            "1,000,000,000 000-12-3456 user@localhost @name 100 200 300 400 2001 2002 2003 "
            "fe80::1 #1234567890")
    assert prepare.scrub(fine) == (fine, {})


# ------------------------------------------------------------------------------------------------
# Deduplicate


def test_s_curve():
    """The printed chances are not those of the method (data.md 15.1)."""
    assert round(prepare.s_curve(0.8, 14, 8), 4) == 0.9235
    assert round((1 / 14) ** (1 / 8), 4) == 0.7190


def test_minhash_estimates_jaccard():
    """Signatures agree more or less often than the sets overlap (data.md 15.2)."""
    one, two = (np.array([prepare.hash64(b"%d" % i) for i in s], np.uint64)
                for s in ((1, 2, 3), (2, 3, 4)))
    agree = prepare.minhash(one, 1, 1024) == prepare.minhash(two, 1, 1024)
    assert abs(agree.mean() - 0.5) < 0.07


def test_union_in_any_order():
    """The root of a cluster depends on the order in which its pairs were found (data.md 15.3)."""
    for edges in itertools.permutations([(3, 1), (1, 2), (5, 6)]):
        parent = np.arange(7)
        prepare.union(parent, np.array(edges))
        assert prepare.roots(parent).tolist() == [0, 1, 1, 1, 4, 5, 5]


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_near_duplicates_are_found_at_the_predicted_rate(similarity):
    """The curve printed is not the curve of the code, or more than one of a pair stays, or none."""
    rng, pairs, n = np.random.default_rng(int(similarity * 100)), 300, 200
    cfg = Config(skip=["exact_duplicate", "url_duplicate"])
    shared = round(2 * n * similarity / (1 + similarity))
    signatures = []
    for _ in range(pairs):
        words = rng.integers(0, 2 ** 64, 2 * n - shared, np.uint64)
        signatures += [prepare.band_keys(prepare.minhash(w, 1, 112), 8)
                       for w in (words[:n], words[n - shared:])]
    docs, reasons = np.zeros(2 * pairs, prepare.DOC), np.full(2 * pairs, "", object)
    verdict, root = prepare.duplicates(docs, reasons, np.arange(2 * pairs), np.array(signatures),
                                       cfg, None)
    assert (verdict[::2] == "").all()    # of equal length the first stays
    caught = (verdict[1::2] == "near_duplicate").mean()
    chance = prepare.s_curve(shared / (2 * n - shared), 14, 8)
    assert abs(caught - chance) < 4 * (chance * (1 - chance) / pairs) ** 0.5 + 0.005
    assert (root[1::2] == np.where(verdict[1::2] == "", np.arange(1, 2 * pairs, 2),
                                   np.arange(0, 2 * pairs, 2))).all()


def test_url_key():
    """The same page under another spelling of its address counts as another page, or the
    reverse."""
    assert len({prepare.url_key(u) for u in (
        "http://X.org/a/?utm_source=mail&b=1", "https://x.org:443/a?b=1#part",
        "HTTP://x.ORG:80/a/?b=1")}) == 1
    assert prepare.url_key("http://x.org/a?b=1") != prepare.url_key("http://x.org/a?b=2")
    assert prepare.url_key("no address") == prepare.url_key("http://[broken") == ""


def test_duplicates_keep_the_longest_of_the_first_source(tmp_path):
    """The wrong copy stays: the later source's, or the shorter page of an address."""
    long, other = words_of(1, 200), words_of(2, 200)
    rows = [dict(text=long[:600], url="http://x.org/1"),
            dict(text=long, url="http://x.org/1?utm_id=7"),
            dict(text=other, url="http://x.org/2")]
    files = {"a/1.jsonl": "\n".join(map(json.dumps, rows)), "b/2.txt": other + " more"}
    out = run(tmp_path, files, val_fraction=0, input=[f"{tmp_path}/raw/a", f"{tmp_path}/raw/b"],
              dropped=True)
    texts, manifest, _ = load(out)
    assert texts == [long, other] and lost(manifest) == {"url_duplicate": 1, "near_duplicate": 1}
    assert np.fromfile(out / "train.copies", "<u4").tolist() == [2, 2]
    dropped = [json.loads(line) for line in open(out / "dropped.jsonl")]
    assert [(d["document"], d["reason"]) for d in dropped] == [
        ("a/1.jsonl#0", "url_duplicate"), ("b/2.txt#0", "near_duplicate")]


# ------------------------------------------------------------------------------------------------
# Decontaminate


def items(tmp_path, *rows):
    (tmp_path / "eval").mkdir(exist_ok=True)
    (tmp_path / "eval/x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "eval")


def test_index_of_items(tmp_path):
    """A 13-word item must give one 13-gram, a shorter one itself as a whole (data.md 15.16)."""
    def lengths(*rows):
        return prepare.build_index(Config(eval=items(tmp_path, *rows)))["lengths"].tolist()
    thirteen = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert lengths(dict(text=thirteen)) == [13]
    assert lengths(dict(text=thirteen + " fourteen")) == [13, 13]
    assert lengths(dict(text=thirteen[:-9])) == [12]
    assert "no .jsonl file with items" in error(lengths, dict(question="What is it?", answer="tea"))
    assert lengths(dict(question="What does Ada Lovelace drink?", answer="tea")) == [6]
    assert lengths(dict(prompt=[dict(role="user", content=thirteen)], answer=["a"])) == [13, 13]
    assert lengths(dict(query=thirteen, choices=["x", "y z"], gold=1)) == [13] * 3


THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.mark.parametrize("row", [
    dict(ctx_a=THIRTEEN, ctx_b="he", endings=["goes", "stays"], label="1"),    # HellaSwag
    dict(goal=THIRTEEN, sol1="so", sol2="thus", label=1),    # PIQA
    dict(context_options=["no", THIRTEEN], continuation="ends", gold=1),
    dict(chosen=f"\n\nHuman: {THIRTEEN}\n\nAssistant: Yes", rejected=f"\n\nHuman: {THIRTEEN}\n\nAssistant: No"),
    dict(prompt=dict(text=THIRTEEN), continuation=dict(text="x")),    # RealToxicityPrompts
    dict(messages=[dict(role="user", content=THIRTEEN)])], ids=["hellaswag", "piqa", "schema", "hh", "toxicity", "chat"])
def test_items_of_public_sets_are_looked_for(tmp_path, row):
    """evaluate.py scores them: trained on and nobody says so."""
    index = prepare.build_index(Config(eval=items(tmp_path, row)))
    words = prepare.Words()
    assert len(prepare.lookup(index, words.matching(words.rows(f"He said {THIRTEEN} he goes stays so thus ends"))))


def test_planted_question_is_found_and_reported(tmp_path):
    """An evaluation question stands in the training text and nobody says so; or a common phrase
    counts."""
    question = "If 12 gulls eat 3 fish in 4 days how many fish do 24 gulls eat in a week?"
    rows = [dict(id="sum", question=question, answer="10.5"),
            dict(id="clean", question=words_of(9, 20), answer="no"),
            dict(id="phrase", text=words_of(8, 13))]
    files = {f"{i}.txt": words_of(i, 60) + ". " + words_of(8, 13) for i in range(10, 30)}
    leak = question.replace("12", "15").upper()
    files["leak.txt"] = f"{words_of(1, 60)} {leak} {words_of(2, 60)}"
    out = run(tmp_path, files, eval=items(tmp_path, *rows), val_fraction=0)
    texts, manifest, _ = load(out)
    assert len(texts) == 20 and lost(manifest) == {"contaminated": 1}
    index = prepare.load_index(out / "eval_index.npz")
    assert index["names"][index["found"]].tolist() == ["x/sum"]
    # an index instead of items
    again = run(tmp_path, {}, eval=str(out / "eval_index.npz"), val_fraction=0)
    assert lost(load(again)[1]) == {"contaminated": 1}


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path):
    """Many programs call a file manifest.json: all that lies beside it would be deleted."""
    app = tmp_path / "app"
    app.mkdir()
    (app / "manifest.json").write_text('{"name": "my app"}')
    (app / "thesis.txt").write_text("ten years")
    (tmp_path / "a.txt").write_text(ARTICLE)
    cfg = Config(input=[str(tmp_path / "a.txt")], tokenizer="bytes", eval="none", clean=False, out=str(app))
    assert "would be lost" in error(prepare.main, cfg) and (app / "thesis.txt").exists()


def test_a_link_to_a_larger_disk_stays_a_link(tmp_path):
    """The link would be replaced by a folder on the small disk."""
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    (tmp_path / "a.txt").write_text(ARTICLE)
    for _ in range(2):
        prepare.main(Config(input=[str(tmp_path / "a.txt")], tokenizer="bytes", eval="none", clean=False,
                            out=str(tmp_path / "link")))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large/manifest.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "large", "link"}


def test_text_that_writes_half_a_character(tmp_path):
    """A traceback at the very end, when the manifest is written."""
    row = json.dumps(dict(text=ARTICLE, url="http://x.org/\ud83d", license="CC \ud83d", date="\ud83d"))
    out = run(tmp_path, {"a.jsonl": row + "\n", os.fsdecode(b"caf\xe9.txt"): "too short"}, clean=True)
    assert "CC ?" in (out / "manifest.json").read_text()


def test_a_byte_order_mark_is_no_broken_line(tmp_path):
    """Windows writes one; the first record would be lost, or the whole file refused."""
    files = {"a.jsonl": "\ufeff" + json.dumps(dict(text=ARTICLE)) + "\n", "b.json": "\ufeff" + json.dumps([dict(text=ARTICLE)])}
    assert len(load(run(tmp_path, files, clean=False, val_fraction=0))[0]) == 2


def test_a_page_in_an_encoding_that_does_not_exist():
    """Python knows a codec "undefined" that fails by raising; one such page would stop the crawl."""
    assert prepare.decode(b"caf\xe9", "undefined") == "caf\ufffd"


def test_where_the_text_is_from(tmp_path):
    """A model card would name a wrong licence, or a knowledge that ends too early."""
    rows = [dict(text=words_of(i, 60), url=f"http://x.org/{i}", license=licence, date=date) for i, (licence, date) in
            enumerate([("CC0", "2021-05-02"), ("CC0", "2024-03-01"), ("MIT", "2019-01-01")])]
    manifest = load(run(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, rows))}, clean=False, val_fraction=0))[1]
    assert manifest["knowledge_cutoff"] == "2024-03-01"
    assert manifest["sources"][0]["licences"] == {"CC0": 2, "MIT": 1}


def test_the_seed_picks_what_is_held_out(tmp_path):
    """Two seeds that hold out the same are one."""
    files = {f"{i}.txt": words_of(i, 60) for i in range(60)}
    one, again, two = (set(load(run(tmp_path, files, clean=False, val_fraction=0.2, seed=seed), "val")[0]) for seed in (1, 1, 2))
    assert one == again != two


def test_the_tokenizer_learns_from_a_sample(tmp_path):
    """A terabyte would be counted whole."""
    files = {f"{i}.txt": words_of(i, 60) for i in range(60)}
    flags = dict(clean=False, tokenizer="train", vocab_size=320)
    one, two = (load(run(tmp_path, files, tokenizer_bytes=n, **flags))[1]["encoding_hash"] for n in (2e9, 8e3))
    assert one != two


def test_letters_that_a_tokenizer_lacks(tmp_path):
    """tiktoken panics in Rust on them, with a traceback, in every later stage."""
    out = run(tmp_path, {"a.txt": "to be or not to be"}, tokenizer="chars", clean=False, val_fraction=0)
    again = tmp_path / "b.txt"
    again.write_text("42")
    message = error(prepare.main, Config(input=[str(again)], tokenizer=str(out), eval="none", clean=False,
                                         out=str(tmp_path / "b")))
    assert "has no '4'" in message and not (tmp_path / "b").exists()


def test_index_of_another_version(tmp_path):
    """An index that means something else is used silently."""
    np.savez(tmp_path / "old.npz", format=99)
    assert "format 99" in error(run, tmp_path, {"a.txt": ARTICLE}, eval=str(tmp_path / "old.npz"))
    (tmp_path / "old.npz").write_bytes(b"no archive")
    assert "not an index" in error(run, tmp_path, {"a.txt": ARTICLE},
                                   eval=str(tmp_path / "old.npz"))


# ------------------------------------------------------------------------------------------------
# Mix


def test_mixing_by_size_to_a_power():
    """Small sources are not lifted as stated: sizes 100 and 10 with power 0.5 (data.md 15.19)."""
    times = prepare.epochs([1, 1], [100, 10], 0.5)
    shares = times * [100, 10] / (times @ [100, 10])
    assert np.round(shares, 3).tolist() == [0.76, 0.24] and round(times @ [100, 10]) == 110
    assert prepare.epochs([1, 2.5], [100, 10], 1).tolist() == [1, 2.5]


def test_fractional_weights_and_four_epochs(tmp_path, capsys):
    """A weight of 0.5 does not halve a source, or nobody is warned of the tenth repetition."""
    files = {f"{'ab'[i % 2]}/{i}.txt": words_of(i, 30) for i in range(400)}
    out = run(tmp_path, files, val_fraction=0, input=[f"{tmp_path}/raw/a:0.5",
                                                      f"{tmp_path}/raw/b:5"])
    sources = load(out)[1]["sources"]
    texts = Counter(load(out)[0])
    assert set(texts.values()) == {1, 5} and 70 < sum(n == 1 for n in texts.values()) < 130
    assert "seen 5.0 times" in capsys.readouterr().out and sources[1]["epochs"] == 5


# ------------------------------------------------------------------------------------------------
# Whole runs


def test_each_unseen_request_is_asked_once():
    """One odd request in three wordings would look like 3 % of all requests."""
    ask = re.compile("|".join(re.escape(form).replace(r"\{x\}", "(.*)") for form in world.ASKS))
    for task in ("harmful", "harmless"):
        prompts = [json.loads(line)["prompt"][0]["content"] for line in open(ROOT / f"data/eval/{task}.jsonl")]
        asked = Counter(next(filter(None, ask.fullmatch(prompt).groups())) for prompt in prompts)
        assert len(asked) > 95 and max(asked.values()) <= 2, asked.most_common(3)


def test_planted_defects():
    """The cleaning does not earn its name: recall 95 %, precision 98 %, overall and per kind
    (DESIGN 6)."""
    data = ROOT / "data"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokens"
        prepare.main(Config(input=[str(data / "raw" / "*")], eval=str(data / "eval"), out=str(out),
                            dropped=True))
        dropped = {d["document"].removeprefix("raw/"): d["reason"] for d in
                   map(json.loads, open(out / "dropped.jsonl"))}
        text = "\n".join(sum((load(out, part)[0] for part in ("train", "val")), []))
        ledger = load(out)[1]["ledger"]
    labels = [row for row in map(json.loads, open(data / "labels.jsonl")) if "#" in row["doc"]]
    bad = {row["doc"]: row for row in labels if row["action"] == "drop"}
    copies = {row["of"]: doc for doc, row in bad.items() if "of" in row}
    caught, kinds = Counter(), Counter(row["kind"] for row in bad.values())
    for doc, row in bad.items():
        # one of a pair, either one
        caught[row["kind"]] += doc in dropped or row.get("of") in dropped
    wrong = [doc for doc in dropped if doc not in bad and copies.get(doc, doc) in dropped]
    recall = {kind: caught[kind] / kinds[kind] for kind in kinds}
    print(f"recall {recall}, precision {1 - len(wrong) / len(dropped):.3f}, wrongly {wrong[:5]}")
    assert min(recall.values()) >= 0.95 and len(wrong) <= 0.02 * len(dropped)
    assert all(len(row["examples"]) == min(3, row["documents"]) * (row["kind"] == "dropped")
               for row in ledger)
    for kind, reasons in {"near_duplicate": ["near_duplicate"],
                          "contamination": ["contaminated"]}.items():
        blamed = [doc for doc in dropped if dropped[doc] in reasons]
        assert sum(doc in wrong for doc in blamed) <= 0.02 * len(blamed), kind
    mended = [row for row in labels if row["action"] in ("scrub", "fix")
              and row["doc"] not in dropped]
    left = [span for row in mended for span in row["spans"] if span in text]
    lost_words = [row["fixed"] for row in mended if row["action"] == "fix"
                  and row["fixed"] not in text]
    assert len(left) <= 0.05 * len(mended) and not lost_words, (left[:5], lost_words[:5])
    # Ways to write down a conversation that the cleaning cuts to pieces teach no way to read one.
    for form in world.FORMS:
        lines = re.sub(r"\\\{\w+\\\}", r"[^\\n]+", re.escape(form.strip()))
        assert len(re.findall(lines, text)) >= 100, form


def test_the_embedded_data_is_what_its_generator_makes(tmp_path):
    """Somebody would change the world by hand, or its generator, and not the other; and nobody could tell which is
    right."""
    world.main(tmp_path)
    made = [f.relative_to(tmp_path) for f in sorted(tmp_path.rglob("*")) if f.is_file()]
    assert len(made) > 160
    for name in made:
        kept, new = ((root / name).read_bytes() for root in (ROOT / "data", tmp_path))
        if name.suffix == ".gz" and kept != new:    # another zlib may pack the same text differently
            kept, new = map(gzip.decompress, (kept, new))
            if "warc" in name.name:    # a few bodies are packed inside: compare what surrounds them
                kept, new = (x.count(b"HTTP/1.1 200 OK") for x in (kept, new))
        assert kept == new, name


def test_ranks_give_the_same_bytes(tmp_path):
    """torchrun changes the data: another number of ranks, another corpus."""
    texts = [words_of(i % 130, 80) + f" {i}" * (i > 130) for i in range(170)]
    for i in range(17):
        (tmp_path / f"{i}.jsonl").write_text("\n".join(json.dumps(dict(text=t))
                                                       for t in texts[i * 10:i * 10 + 10]))
    (tmp_path / "small_chunks.py").write_text(RANKS)
    evaluation = items(tmp_path, dict(text=words_of(7, 20)))
    done = subprocess.run([sys.executable, tmp_path / "small_chunks.py", ROOT, tmp_path,
                           evaluation],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two, three = ({f.name: f.read_bytes() for f in (tmp_path / f"tokens{ranks}").iterdir()}
                       for ranks in (1, 2, 3))
    assert one == two == three
    assert {"contaminated", "near_duplicate"} <= set(lost(load(tmp_path / "tokens3")[1]))


RANKS = """import os, socket, sys, traceback
root, folder, evaluation = sys.argv[1:]
sys.path.insert(0, root)
import prepare
prepare.CHUNK = 3000
for world in (1, 2, 3):    # what torchrun does, without importing torch six times
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    cfg = prepare.Config(input=[folder + "/*.jsonl"], vocab_size=300, skip=["language"],
                         dropped=True, eval=evaluation, out=f"{folder}/tokens{world}")
    for rank in range(world):
        if not os.fork():
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port)
            try:
                prepare.main(cfg)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    if any([os.wait()[1] for _ in range(world)]):
        sys.exit(1)
"""


def test_warning_when_most_documents_go(tmp_path, capsys):
    """Rules made for web pages empty a small corpus without a word."""
    files = {"a.jsonl": "\n".join(json.dumps(dict(text=words_of(i, 30), url=f"http://x.org/{i}"))
                                  for i in range(9)),
             "b.txt": ARTICLE}
    run(tmp_path, files, web="auto")
    shown = capsys.readouterr().out
    assert "90% of the documents were dropped" in shown and "--skip gopher_quality" in shown


def test_unknown_rule_and_language(tmp_path):
    """A misspelt rule is skipped silently, that is, not at all."""
    assert "choose from" in error(run, tmp_path, {"a.txt": ARTICLE}, skip=["toxicity"])
    assert "choose from" in error(run, tmp_path, {"a.txt": ARTICLE}, languages=["english"])


def test_bombs_are_bounded(tmp_path, monkeypatch):
    """A few kilobytes that unpack to gigabytes fill the memory."""
    monkeypatch.setattr(prepare, "LARGEST", 1 << 20)
    assert "too large" in error(run, tmp_path, {"a.txt.gz": gzip.compress(bytes(1 << 24))})
    assert "gzip inside" in error(run, tmp_path / "2",
                                  {"a.txt.gz": gzip.compress(gzip.compress(b"x"))})
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
    body += gzip.compress(b"<p>" + bytes(1 << 24))
    assert len(prepare.http_body(body)[0]) <= 1 << 20
    assert "not JSON" in error(run, tmp_path / "3",
                               {"a.jsonl.gz": gzip.compress(b'{"text": "' + bytes(1 << 23))})


def test_http_bodies():
    """Chunked or compressed pages, which some crawlers store as they came, are lost."""
    page = "<p>café</p>".encode()
    def body(*headers, data):
        return prepare.http_body(b"\r\n".join([b"HTTP/1.1 200 OK", *headers, b"", data]))
    chunked = (b"4\r\n" + page[:4] + b"\r\n%x;x=y\r\n" % (len(page) - 4) + page[4:]
               + b"\r\n0\r\n\r\n")
    assert body(b"Transfer-Encoding: chunked", data=chunked)[0] == page
    assert body(b"Content-Encoding: gzip", b"Content-Type: Text/HTML",
                data=gzip.compress(page)) == (page, "text/html")
    assert body(b"Content-Encoding: deflate", data=zlib.compress(page))[0] == page
    assert body(b"transfer-encoding: chunked", data=page)[0] == page    # joined, the header kept
    assert prepare.html_record("<p>café</p>".encode("latin-1"), "latin-1")["text"] == "café"


def test_wrong_content_length(tmp_path):
    """One WARC record that lies about its length loses the rest of the file."""
    record = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
    good = [record % (len(t), t)
            for t in (words_of(i, 20).encode() for i in range(300))]
    bad = record % (9, b"x" * 50)
    texts, manifest, _ = load(run(tmp_path, {"a.wet": b"".join(good[:5] + [bad] + good[5:])},
                                  val_fraction=0))
    assert len(texts) == 300 and lost(manifest) == {"wrong Content-Length": 1}


def test_large_files_are_read_in_parts(tmp_path, monkeypatch):
    """A part border loses, doubles or breaks a line or a character."""
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    rows = [dict(text=f"{i} " + "é中" * (i % 400)) for i in range(100)]
    text = "".join(random.Random(1).choices("aé中\U0001f600 \n", k=20000))
    files = {"a.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "b.txt": text,
             "c.txt": "é" * 3000}
    texts, manifest, _ = load(run(tmp_path, files, clean=False, val_fraction=0))
    assert [t for r in rows for t in [r["text"]]] == texts[:100]
    assert "".join(texts[100:]) == text + "é" * 3000
    assert len(texts) > 140


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_where_it_was_cut(tmp_path, ranges):
    """A connection cut half way starts a download of hours anew, or leaves half a file as the
    whole."""
    data, asked = os.urandom(300_000), []

    class Cutting(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            start = int(asked[-1][6:-1]) if asked[-1] and ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            half = start + (len(data) - start) // 2
            self.wfile.write(data[start:half if len(asked) < 3 else len(data)])

        def log_message(self, *args):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Cutting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/some/file.txt"
    path = prepare.download(address, hashlib.sha256(data).hexdigest(), tmp_path)
    assert path.read_bytes() == data and len(asked) == 3 and os.listdir(tmp_path) == [path.name]
    assert prepare.download(address, "", tmp_path) == path
    assert len(asked) == 3    # it is there already
    assert "sha256" in error(prepare.download, address.replace("file", "other"), "0" * 64, tmp_path)
    server.shutdown()
    server.server_close()
    message = error(prepare.download, address.replace("file", "third"), "", tmp_path)
    assert address.replace("file", "third") in message
    assert str(tmp_path / "some-third.txt") in message


def test_optional_packages(tmp_path):
    """A missing optional package ends in a traceback; an installed one is not used."""
    try:
        import pyarrow.parquet
    except ImportError:
        for i, name in enumerate(("a.parquet", "a.txt.zst")):
            assert "pip install pyarrow" in error(run, tmp_path / str(i), {name: b"PAR1"})
    else:
        (tmp_path / "raw").mkdir()
        table = pyarrow.table({"text": ["one", "two"]})
        pyarrow.parquet.write_table(table, tmp_path / "raw/a.parquet")
        assert load(run(tmp_path, {}, val_fraction=0))[0] == ["one", "two"]


def test_truncated_zst(tmp_path):
    """A download that was cut short is taken for the whole file: zstandard's own reader says
    nothing."""
    pyarrow = pytest.importorskip("pyarrow")
    lines = [json.dumps(dict(text=words_of(i, 50))) + "\n" for i in range(300)]
    frames = b"".join(pyarrow.compress("".join(half).encode(), "zstd", asbytes=True)
                      for half in (lines[:150], lines[150:]))    # two frames, as pzstd writes
    out = run(tmp_path, {"a.jsonl.zst": frames}, val_fraction=0)
    before = load(out)[0]
    assert len(before) == 300
    for cut in (frames[:-5], frames[:len(frames) // 3], b"no frame at all"):
        assert "a.jsonl.zst: damaged" in error(run, tmp_path, {"a.jsonl.zst": cut})
    assert load(out)[0] == before


def test_command_line(capsys):
    """The script does not run as documented, or --help hides a flag."""
    with pytest.raises(SystemExit) as e:
        prepare.parse_args(Config, ["--help"])
    shown = capsys.readouterr().out
    assert not e.value.code and "--val_fraction" in shown and "[0.05]" in shown
    wrong = subprocess.run([sys.executable, ROOT / "prepare.py", "--inputs", "x"],
                           capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1
