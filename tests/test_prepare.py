"""Tests of prepare.py. Run: python -m pytest tests/test_prepare.py -q (no network)."""
import gzip
import json
import os
import random
import re
import time
import zlib
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import regex
from common import error, on_two_ranks, write

import prepare
from model import ENDOFTEXT, SPLIT_PATTERN, encoding_from_dict, encoding_hash, make_encoding
from prepare import Config

NASTY = ["", "   ", "\n\n  x", "a  b   c", "don't WE'LL they'Re", "\t\ttabs\r\nand\rreturns \r\n",
         "中文字符没有空格", "\U0001f600\U0001f468\u200d\U0001f469", "e\u0301 a\u00a0b\u2003\u3000",
         "\x00\x1c\x1d\x1f\x85", "١٢٣٤٥ ½ Ⅷ", "<|endoftext|><|im_start|>user\n<|im_end|><|pad|>",
         "a" * 300, " " * 300, "x\n" * 50, "!?!?\n\n\nfoo", "https://a.b/c?d=e&f=%20", "\ufffd"]
ARTICLE = ("The harbour was quiet in the morning, and the boats lay side by side as they had for "
           "years. Nobody could say why the old bell began to ring at six, but it was heard on "
           "both sides of the bay.")
jsonl = lambda texts: "\n".join(json.dumps(dict(text=text)) for text in texts)


def run(tmp_path, files, **flags):
    """Write files {name: str or bytes}, run prepare on their folder, return the tokens folder."""
    folder, out = tmp_path / "raw", tmp_path / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = dict(input=[str(folder)], out=str(out), tokenizer="bytes", eval="none",
                    skip=["language", "gopher_quality", "c4", "fineweb"])
    prepare.main(Config(**settings | flags))
    return out


def load(out, name="train"):
    """(texts of the documents, manifest, tokenizer) read back the way any consumer would."""
    manifest = json.loads((out / "manifest.json").read_text())
    enc = encoding_from_dict(json.loads((out / "encoding.json").read_text()))
    ids = np.fromfile(out / f"{name}.bin", dtype="<u2" if manifest["dtype"] == "uint16" else "<u4")
    ends = np.fromfile(out / f"{name}.idx", dtype="<u8").astype(int)
    assert len(ids) == manifest["tokens"][name] and len(ends) == manifest["documents"][name]
    assert (ends[-1] if len(ends) else 0) == len(ids)
    assert (np.flatnonzero(ids == enc.encode_single_token(ENDOFTEXT)) + 1).tolist() == ends.tolist()
    return [enc.decode(ids[a:b - 1].tolist()) for a, b in zip([0, *ends], ends)], manifest, enc


def ledger(out, kind="dropped"):
    """{reason or change: documents} of the rows of this kind."""
    rows = load(out)[1]["ledger"]
    return {row["name"]: row["documents"] for row in rows if row["kind"] == kind}


def words_of(seed, n):
    """A random document of n made-up words; a longer one of this seed begins the same."""
    rng, letters = random.Random(seed), "aeioubcdfgklmnprst"
    return " ".join("".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(n))


# Tokenizer

def slow_bpe(counts, size):
    """({bytes: id}, {word: its ids}) with every pair recounted before every merge."""
    words = {word: list(word.encode()) for word in counts}
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < size:
        pairs = Counter()
        for word, ids in words.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += counts[word]
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids in words.values():
            for i in range(len(ids)):
                if tuple(ids[i:i + 2]) == best:
                    ids[i:i + 2] = [len(tokens)]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {token: i for i, token in enumerate(tokens)}, words


def test_bpe_of_the_papers():
    """The textbook example and the one of Sennrich et al., with merges worked out by hand."""
    ranks = prepare.train_bpe({"aaabdaaabac": 1}, 259)
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    ids = make_encoding("t", SPLIT_PATTERN, ranks).encode_ordinary("aaabdaaabac")
    assert ids == [258, 100, 258, 97, 99]
    ranks = prepare.train_bpe(dict(low=5, lower=2, newest=6, widest=3), 256 + 10)
    assert [t.decode() for t in list(ranks)[256:]] == [
        "es", "est", "lo", "low", "ew", "new", "newest", "dest", "idest", "widest"]


def test_bpe_equals_recount():
    """The counts that training keeps up to date are true; tiktoken splits as training did."""
    rng = random.Random(0)
    for trial in range(300):
        alphabet = ("ab", "abc", "aé中")[trial % 3]
        counts = {"".join(rng.choices(alphabet, k=rng.randint(1, 12))): rng.randint(1, 4)
                  for _ in range(rng.randint(1, 6))}
        size = 256 + rng.randint(1, 25)
        ranks, words = slow_bpe(counts, size)
        assert prepare.train_bpe(counts, size) == ranks, counts
        enc = make_encoding("t", SPLIT_PATTERN, ranks)
        assert {word: enc.encode_ordinary(word) for word in words} == words


def test_pieces():
    """GPT-4's split but for digits; counting counts each piece, very long ones in parts."""
    assert regex.findall(SPLIT_PATTERN, "Hello world  12 3!! I'm\n\n  x") == [
        "Hello", " world", " ", " ", "1", "2", " ", "3", "!!", " I", "'m", "\n\n", " ", " x"]
    rng = random.Random(1)
    texts = NASTY + ["".join(rng.choices("ab'm1! \n\t\r\u00a0é中\x1c", k=200)) for _ in range(300)]
    pieces = [p for t in texts for p in regex.findall(SPLIT_PATTERN, t)]
    parts = [p[i:i + 256] for p in pieces for i in range(0, len(p), 256)]
    assert prepare.count_pieces(texts) == Counter(parts)


@pytest.mark.parametrize("name", ["bytes", "train", "chars"])
def test_text_comes_back_and_holds_no_control_token(tmp_path, name):
    """Whatever a text spells stays text, and comes back from the files as it was."""
    texts = [t for t in NASTY if t.strip() and "\ufffd" not in t] + ["plain text"] * 3
    files = {"a.jsonl": jsonl(texts), "b.txt": words_of(1, 900)}
    out = run(tmp_path, files, clean=False, val_fraction=0, tokenizer=name, vocab_size=270)
    assert load(out)[0] == [*texts, words_of(1, 900)]    # load() checks where documents end
    again = run(tmp_path / "again", {"a.txt": "plain text"}, tokenizer=str(out))
    assert encoding_hash(load(again)[2]) == encoding_hash(load(out)[2])


def test_encode(monkeypatch):
    """Cutting a long text, to save memory, leaves its tokens as they are; no id wraps at 65536."""
    text = words_of(2, 5000).replace("ta", "ta\n").replace("b", "1! ") + "   \n\n x" * 5
    enc = make_encoding("t", SPLIT_PATTERN, prepare.train_bpe(prepare.count_pieces([text]), 500))
    monkeypatch.setattr(prepare, "PIECE", 6000)
    assert len(list(prepare.cut_text(text, 6000))) > 3
    assert prepare.encode(enc, text, np.uint16)[:-1].tolist() == enc.encode_ordinary(text)
    assert "".join(prepare.cut_text("x" * 20000, 6000)) == "x" * 20000
    assert next(prepare.cut_text("aa_\nbbbb", 6)) == "aa_\nbb"    # "_\n" is one piece
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 65535, b"cd": 65536}
    enc = make_encoding("t", SPLIT_PATTERN, ranks, {ENDOFTEXT: 300})
    assert prepare.encode(enc, "ab", np.uint16).tolist() == [65535, 300]
    with pytest.raises(OverflowError):
        prepare.encode(enc, "cd", np.uint16)


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, r" ?\p{L}+|\p{N}+| ?[^\s\p{L}]+|\s+(?!\S)|\s"])
def test_a_million_times_the_same_character(pattern):
    """No run overflows the stack of tiktoken, in a pattern of ours or like that of GPT-2."""
    enc = make_encoding("t", pattern, {bytes([i]): i for i in range(256)})
    for text in (" " * 10 ** 6 + "x", "\n" * 10 ** 6 + "x", "a" * 10 ** 6):
        assert bytes(enc.encode_ordinary(text)) == text.encode()    # in every stage


def test_the_size_that_an_error_names_works(tmp_path):
    """Also above 1,024, where sizes are rounded up to 64s."""
    text = {"a.txt": words_of(1, 9000)}
    message = error(run, tmp_path, text, tokenizer="train", vocab_size=20_001)
    most = int(re.search(r"at most (\d+) ids", message)[1])
    run(tmp_path, text, tokenizer="train", vocab_size=most)
    assert most > 1024


def test_text_without_words_trains_a_tokenizer(tmp_path):
    """A text that the split leaves in one piece has pairs; where they end, the error is true."""
    dna = "".join(random.Random(3).choices("ACGT", k=20_000))
    enc = load(run(tmp_path, {"a.txt": dna}, tokenizer="train", vocab_size=300, clean=False))[2]
    assert enc.n_vocab == 300
    assert "at most 261 ids" in error(run, tmp_path, {"a.txt": "ab" * 2}, tokenizer="train",
                                      vocab_size=300, clean=False, val_fraction=0)


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
    assert " ".join(sorted(before)) == (
        "encoding.json manifest.json train.bin train.idx val.bin val.idx")
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


def test_hash_split_ignores_order_and_follows_the_seed(tmp_path, monkeypatch):
    """Other files or another tokenizer move no document to validation; another seed does."""
    texts = [words_of(i, 60) for i in range(300)]
    out = run(tmp_path, {"a.jsonl": jsonl(texts)}, tokenizer="train", vocab_size=320)
    val, enc_hash = load(out, "val")[0], load(out)[1]["encoding_hash"]
    monkeypatch.setattr(prepare, "SAMPLE", 8e3)    # a sample learns another one
    out = run(tmp_path, {}, tokenizer="train", vocab_size=320)
    assert load(out)[1]["encoding_hash"] != enc_hash and load(out, "val")[0] == val
    again = load(run(tmp_path / "two", {"b.jsonl": jsonl(texts[199::-1])}), "val")[0]
    assert sorted(again) == sorted(set(val) & set(texts[:200])) and 5 < len(val) < 30
    assert set(load(run(tmp_path / "two", {}, seed=2), "val")[0]) != set(again)


def test_copies_of_a_text_go_to_one_side():
    """Which copy stays changes with the input, so the split looks at their cluster."""
    docs = np.zeros(1000, prepare.DOC)
    docs["reason"], docs["chars"], docs["root"] = "", 9, np.arange(1000) // 2 * 2
    docs["key"] = np.random.default_rng(0).integers(0, 2 ** 64, (1000, 2), np.uint64)
    prepare.split_and_mix(docs, [1.0], Config(val_fraction=0.3))
    assert (docs["val"][::2] == docs["val"][1::2]).all() and 100 < docs["val"].sum() < 800


def test_weights(tmp_path):
    """A weight of 0.5 halves a source, one of 5 shows it five times, but not in a row."""
    files = {f"{i}.jsonl": jsonl(words_of(n, 30) for n in range(i, 400, 2)) for i in (0, 1)}
    inputs = [f"{tmp_path}/raw/0.jsonl:0.5", f"{tmp_path}/raw/1.jsonl:5"]
    texts = load(run(tmp_path, files, val_fraction=0, input=inputs))[0]
    counts = Counter(texts)
    assert set(counts.values()) == {1, 5} and 70 < sum(n == 1 for n in counts.values()) < 130
    assert not any(one == two for one, two in zip(texts, texts[1:]))


# Input

X = {"a.txt": "x"}
WET = "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: {}\r\n\r\n{}\r\n\r\n"


def response(body, *headers, status=b"200 OK"):
    block = b"\r\n".join([b"HTTP/1.1 " + status, *headers, b"", body])
    return (b"WARC/1.0\r\nWARC-Type: response\r\nwarc-target-uri: http://x.org/\r\n"
            b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (len(block), block))


def test_formats(tmp_path):
    """Every format is read as its users expect; hidden and unknown files are left alone. Half a
    character (JSON can spell it) and a bad byte lose no document; the bad byte is counted. What
    declares no charset and is not UTF-8 is windows-1252."""
    rows = [{"text": "plain"}, {"content": "from content"},
            {"question": "2+2?", "answer": "4\n#### 4"},
            {"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Hello"}]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey"}]},
            {"instruction": "Add", "input": "", "output": "3"},
            {"text": "half a \ud800 character", "url": "http://x.org/\ud800"}]
    page = "<html><head><title>t</title></head><body><nav>menu</nav><p>A &amp; B</p><script>x"
    files = {"1.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode()),
             "2.json": "\ufeff" + json.dumps([{"text": "in a list"}, "bare string"]),
             "3.txt": "\ufeffwhole\r\nfile\0\n", "4.html": page, "7.bin": b"\1\2",
             "5.warc.gz": gzip.compress(WET.format(12, "hé from WET").encode())
             + gzip.compress(response(b"<p>from WARC", b"Content-Type: text/html")),
             "sub/6.MD": "deep", ".hidden.txt": "no", "8.txt": "wïde".encode("utf-16"),
             "9.html": "<meta charset=latin-1><p>caf\xe9".encode("latin-1"),
             "99.md": "a fine “text” with one ".encode() + b"\xff bad byte",
             "99.txt": b"Latin caf\xe9 and \x93quotes\x94"}
    out = run(tmp_path, files, val_fraction=0)
    assert load(out)[0] == [
        "plain", "from content", "2+2?\n4\n#### 4", "User: Hi\n\nAssistant: Hello",
        "User: Hi\n\nAssistant: Hey", "Add\n3", "half a ? character", "in a list",
        "bare string", "whole\nfile", "A & B", "hé from WET", "from WARC", "wïde", "café",
        "a fine “text” with one \ufffd bad byte", "Latin café and “quotes”", "deep"]
    assert ledger(out, "changed") == {"characters that could not be read": 1}


def test_rows_are_those_of_the_other_stages(tmp_path):
    """JSON lines in a .json, a {"data": [...]}; what stands beside a question or an answer is kept,
    what cannot be told as text is dropped and counted, which does not end the run."""
    hi, yo = dict(role="user", content="Hi?"), dict(role="assistant", content="Yo.")
    rows = [dict(context="It is.", question="Hi?", answer="Yo.", messages=None),
            dict(system="", question="Hi?", chosen="Yo.", rejected="Go."),
            dict(instruction="Hi?", output="Yo.", history=[["One?", "1."]]),
            dict(messages=[hi, dict(yo, tool_calls=[{}])])]
    files = {"a.json": "\n".join(map(json.dumps, rows)), "b.JSON": json.dumps(dict(data=[rows[0]]))}
    out = run(tmp_path, files, val_fraction=0, clean=False)
    assert load(out)[0] == ["It is.\n\nHi?\nYo.", "Hi?\nYo.", "User: One?\n\nAssistant: 1.\n\nUser:"
                            " Hi?\n\nAssistant: Yo.", "It is.\n\nHi?\nYo."]
    assert ledger(out) == {"tool_calls beside the text": 1}


def test_warc_records(tmp_path):
    """A wrong Content-Length loses one record, no other; chunked and compressed pages are read."""
    texts = ["hé", *(words_of(i, 20) for i in range(300))]
    page, form = "<p>café</p>".encode(), b"Content-Type: Text/HTML"
    records = [WET.format(len(t.encode()), t).encode() for t in texts]
    records.insert(5, WET.format(9, "x" * 50).encode())
    records.append(b"WARC/1.0\r\nWARC-Type: resource\r\nContent-Length: %d\r\n%s\r\n\r\n%s"
                   b"\r\n\r\n" % (len(page), form, page))    # without HTTP
    chunked = b"Transfer-Encoding: chunked"
    chunks = b"4\r\n%s\r\n%x;x=y\r\n%s\r\n0\r\n\r\n" % (page[:4], len(page) - 4, page[4:])
    records += [response(chunks, form, chunked), response(page, form, chunked),
                response(gzip.compress(page), form), response(zlib.compress(page), form)]
    records += [response(page, form, status=status) for status in (
        b"404 Not Found", b"503 Down", b"301 Moved", b"404 Gone fishing", b"206 Partial Content")]
    coding = b"Content-Encoding: "
    records += [response(b"\x8b\x03\x80" + page, form, coding + b"br"),
                response(b"(\xb5/\xfd" + page, form, coding + b"zstd"),
                response(page, form, coding + b"br"),    # undone by the crawler
                response(b"\x1f\x8b" + page, form)]
    out = run(tmp_path, {"a.warc": b"".join(records)}, val_fraction=0, clean=False)
    assert load(out)[0] == [*texts, *["café"] * 7] and ledger(out) == {
        "unreadable: wrong Content-Length": 1, "HTTP status 404": 2, "HTTP status 503": 1,
        "HTTP status 301": 1, "unreadable: compressed by br": 1,
        "unreadable: compressed by zstd": 1, "unreadable: damaged compression": 1}


def test_broken_json_lines(tmp_path):
    """One broken line in a hundred is counted and skipped, more end the run."""
    lines = [json.dumps({"text": words_of(i, 20)}) for i in range(200)]
    lines[77], lines[100:105] = '{"text": "cut', ['{"text": null}'] * 5
    out = run(tmp_path, {"a.jsonl": "\n".join(lines)}, val_fraction=0)
    assert len(load(out)[0]) == 194 and ledger(out) == {"unreadable: not JSON": 1, "empty": 5}
    lines[10:15] = ["oops"] * 5
    message = error(run, tmp_path, {"a.jsonl": "\n".join(lines)})
    assert "a.jsonl" in message and "11" in message and len(load(out)[0]) == 194


def test_a_page_that_cannot_be_read_ends_no_run(tmp_path):
    """Files of one record count together; an error is an --input that is mostly unreadable."""
    bad = {"a.html": b"<p>" + ARTICLE.encode().replace(b" ", b" \x81 "), "b.json": "{",
           "c.html.gz": b"\x1f\x8bcut", "d.json": '{"version": 2}', "e.txt": b"\x81" * 99}
    good = {f"{i}.html": f"<p>{ARTICLE} {words_of(i, 60)}</p>" for i in range(len(bad))}
    out = run(tmp_path, {**bad, **good}, val_fraction=0)
    assert len(load(out)[0]) == len(good) and ledger(out) == {
        "unreadable: not UTF-8 text": 2, "unreadable: damaged file": 1, "unreadable: not JSON": 1,
        "unreadable: no field with text": 1}
    message = error(run, tmp_path, {}, input=[f"{tmp_path}/raw/[0-9]*", f"{tmp_path}/raw/[a-e]*"])
    assert "5 of 5" in message and "a.html" in message and "[a-e]*" in message


@pytest.mark.parametrize("files, flags", [
    ({"a.bin": b"\1"}, {}), ({"a.txt": ""}, {}), ({"a.jsonl": '{"foo": 1}'}, {}),
    ({"a.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 99)[:-10]}, {}),    # a cut archive
    ({"a.txt.gz": gzip.compress(gzip.compress(os.urandom(999)))}, {}), ({"a.txt.gz": b"plain"}, {}),
    ({"a.jsonl.gz": gzip.compress(b'{"text": "' + bytes(1 << 22))}, {}),    # bombs
    ({"a.json.gz": gzip.compress(b'["' + bytes(1 << 22))}, {}), ({"a.json": "[" * 99999}, {}),
    ({"a.warc": b"WARC/1.0\r\nContent-Length: 99999999999\r\n\r\nx"}, {}),
    ({"a.txt": bytes(range(128, 256)) * 20}, {}), (X, {"input": ["[/no/**/such*:2"]}),
    (X, {"eval": "nowhere"}), (X, {"tokenizer": "train"}), (X, {"tokenizer": "nonsense"}),
    (X, {"val_fraction": 1.0}), (X, {"skip": ["toxicity"]}), (X, {"languages": ["english"]}),
    (X, {"out": "/dev/null/here"})])
def test_bad_input(tmp_path, monkeypatch, files, flags):
    """A user's mistake or a hostile file gives one line, and nothing half-written."""
    monkeypatch.setattr(prepare, "CHUNK", 1 << 16)
    monkeypatch.setattr(prepare, "LARGEST", 1 << 20)
    error(run, tmp_path, files, **flags)
    assert not (tmp_path / "tokens").exists() and not list(tmp_path.glob(".*"))


def test_a_failed_run_keeps_the_old_folder(tmp_path, monkeypatch):
    """A full disk destroys no tokens of the previous run, and --out nothing of somebody else."""
    out = run(tmp_path, {"a.txt": words_of(1, 300)})
    error(run, tmp_path, {}, out=str(tmp_path / "raw"))
    before = (out / "train.bin").read_bytes()
    monkeypatch.setattr(prepare, "encode", Mock(side_effect=OSError(28, "No space left")))
    error(run, tmp_path, {"a.txt": words_of(2, 300)})
    assert (out / "train.bin").read_bytes() == before and not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    (out / "raw.txt").write_text("somebody's")    # beside the tokens
    error(run, tmp_path, {})
    assert (out / "raw.txt").exists()


def test_what_was_written_is_no_input(tmp_path):
    """With --out inside --input a second run reads what the first one read; what a kill left of an
    exchanged folder is in nobody's way. Names are taken literally before they are patterns."""
    where = dict(out=str(tmp_path / "raw/tokens"), dropped=True, val_fraction=0)
    run(tmp_path, {"a.txt": words_of(1, 300), "b.txt": words_of(1, 300), "b[1].txt": "b"}, **where)
    first = load(tmp_path / "raw/tokens")
    (tmp_path / "raw/.tokens.old/x").mkdir(parents=True)
    run(tmp_path, {}, **where)
    assert load(tmp_path / "raw/tokens")[:2] == first[:2]
    (tmp_path / "raw/c:2").mkdir()
    out = run(tmp_path, {"c:2/d.txt": "d", "b1.txt": "wrong"}, val_fraction=0, input=[
        str(tmp_path / "raw/b[1].txt"), str(tmp_path / "raw/c:2")])
    assert load(out)[0] == ["b", "d"]


def test_large_files_are_read_in_parts(tmp_path, monkeypatch):
    """The borders of parts lose, double or break no line and no character."""
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    texts = [f"{i} " + "é中" * (i % 400) for i in range(100)]
    text = "".join(random.Random(1).choices("aé中\U0001f600 \n", k=20000))
    files = {"a.jsonl": "\n".join(json.dumps(dict(text=t), ensure_ascii=False) for t in texts),
             "b.txt": text, "c.txt": "é" * 3000, "d.txt": text.encode("utf-16"),
             "e.txt.gz": gzip.compress(text.encode()), "f.txt": "nine more\n" * 300}
    found = load(run(tmp_path, files, clean=False, val_fraction=0))[0]
    assert found[:100] == texts and "".join(found[100:]) == (
        text + "é" * 3000 + text + text + "nine more\n" * 300)
    assert max(map(len, found)) <= 1000


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
<p>{}</p><p>It rang once more in the night, and the keeper wrote that down in the book.</p>
<div class=side><a href=1>Ten hats you will not believe are still on sale this week in town
</a></div><script>var x = "<p>not text</p>";</script><!-- <p>nor this</p> -->
<pre>  keep   this</pre><footer>© 2024 Harbour Post. All rights reserved.</footer></body></html>"""


@pytest.mark.parametrize("article, last", [
    (ARTICLE, ["  keep   this"]), (f"{ARTICLE} {ARTICLE}", [])])
def test_page_becomes_its_article(article, last):
    """No menu, teaser or script comes along; near good text only on small pages or beside good."""
    assert prepare.main_text(PAGE.format(article, article + "&nbsp;&eacute;")).split("\n") == [
        "The bell", article, "It rang twice.", article + " é",
        "It rang once more in the night, and the keeper wrote that down in the book.", *last]


@pytest.mark.parametrize("page", [
    "<nav><p>{}", "<table><tr><td>{}<br>", "<p>{}<!-- open", "<P CLASS='a'>{}</P><script>",
    "<!--><!-- x --!><p>{}", "<title>Bells<p>{}", "<a href=x><p>{}</p></a ><p>{}</p>"])
def test_page_that_closes_nothing(page):
    """A forgotten closing tag does not lose the page."""
    assert ARTICLE in prepare.main_text(page.replace("{}", ARTICLE))


@pytest.mark.parametrize("page", [
    "<form action=x><div>{}</div></form>", "<aside>{}</aside><p>Short.", "<header><p>{}</header>",
    "<noscript>{}</noscript>", "<a name=top><div>{}</div>", "<nav><div>{}</div></nav>",
    "<p title='a > b' data-x=\"<i>x</i>\" onclick=\"f('<a href=' + g)\">{}</p>",
    "<p title=it's>{}</p><p class='x'>Short.</p>"])
def test_page_with_its_text_where_none_is_expected(page):
    """Where nothing else is left the text of an aside or a header counts; attributes never do."""
    assert prepare.main_text(page.replace("{}", ARTICLE)).split("\n")[0] == ARTICLE


def test_page_without_text_is_counted(tmp_path):
    """What extraction took whole has a row of its own in the ledger."""
    out = run(tmp_path, {"a.html": "<a href=1>One</a>", "b.txt": words_of(1, 300), "c.md": " "})
    assert ledger(out)["page without running text"] == 1


SCRIPTS = dict(
    ru=("Утром в гавани было тихо, и лодки стояли рядом. Никто не мог сказать, почему в шесть "
        "часов вдруг зазвонил старый колокол, но его слышали на обоих берегах залива. "
        "Смотритель записал это в книгу. Вечером он снова вышел на берег, чтобы посмотреть, "
        "не вернулись ли рыбаки, которые уплыли ещё до рассвета. Ночью огни двух лодок "
        "показались у маяка, и все побежали к причалу, хотя дождь ещё шёл."),
    zh=("清晨的港口十分安静，渔船像往年一样并排停在岸边。没有人知道那口老钟为什么在六点钟突然响起"
        "来，可是海湾两岸的人都听见了钟声。看守人把这件事写进本子，然后冒着小雨走回家去。到了傍晚"
        "，他又来到岸边，想看看天亮以前出海的渔民有没有回来。他的妻子说，大海从来不会忘记等待它的"
        "人！"),
    ja=("朝の港は静かで、船はいつもの年と同じように並んでいた。六時に古い鐘がなぜ鳴り始めたのか、"
        "だれにも分からなかったが、湾の両岸でその音が聞こえた。番人はそれを帳面に書き留め、雨の中"
        "を家へ帰った。夕方になると、夜明け前に出た漁師たちが戻ったかどうかを見るために、彼はもう"
        "一度岸へ出かけた。"),
    ko=("아침 항구는 조용했고 배들은 여느 해처럼 나란히 서 있었다. 여섯 시에 낡은 종이 왜 울리기 "
        "시작했는지 아무도 몰랐지만 만의 양쪽에서 모두 그 소리를 들었다. 등대지기는 그 일을 공책에 "
        "적고 비를 맞으며 집으로 돌아갔다. 저녁이 되자 그는 새벽에 떠난 어부들이 돌아왔는지 보려고 "
        "다시 바닷가로 나갔다. 그의 아내는 바다가 기다리는 사람을 잊는 일은 한 번도 없었다고 "
        "말했다. 그날 밤 배 두 척이 불을 켜고 들어왔다."),
    th=("ท่าเรือยามเช้าเงียบสงบ เรือจอดเรียงกันเหมือนทุกปีที่ผ่านมา ไม่มีใครรู้ว่าทำไมระฆังเก่าจึงด"
        "ังขึ้นตอนหกโมง แต่ผู้คนทั้งสองฝั่งอ่าวต่างก็ได้ยินเสียงนั้น คนเฝ้าประภาคารจดเรื่องนี้ลงในส"
        "มุดแล้วเดินกลับบ้านท่ามกลางสายฝน"))


@pytest.mark.parametrize("code", SCRIPTS)
def test_page_in_another_script(code):
    """It is extracted whole and passes every rule where its language is wanted, and only there."""
    lines, menu = [SCRIPTS[code], SCRIPTS[code][::-1]], "<ul><li><a href=/>Home</a></ul>"
    page = f"{menu}<p>{lines[0]}</p><p>{lines[1]}</p><footer>Impressum</footer>".encode()
    assert prepare.page_text(page).split("\n") == lines
    keep = lambda *languages: prepare.clean(
        SCRIPTS[code], prepare.PAGE, Config(languages=[*languages]), Counter())[1]
    assert not keep(code) and not keep("en", code) and keep("en") == f"language: language {code}"


@pytest.mark.parametrize("label, codec, text", [
    ("iso-8859-1", "cp1252", "‘a’ “b” • – €"), ("us-ascii", "cp1252", "é…"),
    ("GB2312", "gbk", "朱镕基"), ("gb2312", "gb18030", "〇㐀"), ("shift_jis", "cp932", "①髙"),
    ("x-sjis", "cp932", "日本"), ("euc-kr", "cp949", "똠방"), ("koi8-r", "koi8-r", "Привет"),
    ("big5", "big5hkscs", "喺度"), ("iso-2022-jp", "iso2022_jp", "日本語"),
    ("latin5", "cp1254", "ğ€"), ("utf-8", "utf-8", "é"), ("utf-8", "cp1252", "café"),
    ("latin1", "utf-8", "“é”"), ("no-such", "cp1252", "é"), ("utf-7", "cp1252", "é+"),
    ("EUC-JP", "euc_jis_2004", "①"), ("TIS-620", "cp874", "สวัสดี")])
def test_charset(label, codec, text):
    """A declared charset is read as browsers do, wherever it stands; UTF-8 is told by itself."""
    page = f"<p>{text}</p>".encode(codec)
    for said in (f"<meta charset={label}>", f"<?xml version='1.0' encoding='{label}'?>",
                 f"<!-- {'x' * 9000} --><META content='text/html; CHARSET = {label}'>"):
        assert prepare.page_text(said.encode() + page) == text
    assert prepare.page_text(page, f"text/html; charset={label}") == text


@pytest.mark.parametrize("bait", [
    "<!--", "<nav>", "<tr><td>x", "<a href='", "<a =\"<a\" =", "<meta ", "<p>a <a>b", "a@", "A1B2 ",
    "Ã©"])
def test_every_pattern_is_linear(bait):
    """200 kB made to be slow take no more than seconds."""
    text, started = bait * (200_000 // len(bait)), time.process_time()
    prepare.main_text(text + f"<p>{ARTICLE} {ARTICLE}<p>end</p>")
    cfg = Config(skip=["language", "gopher_repetition", "gopher_quality"])
    text, _ = prepare.clean(text + "\n" + text.replace(" ", ""), prepare.PAGE, cfg, Counter())
    prepare.scrub(text)
    assert time.process_time() - started < 4


def test_a_long_table_takes_linear_time():
    """Short rows behind a paragraph of links, as many as a page may have."""
    page = f"<p>{ARTICLE} {ARTICLE}<p><a href=x>{ARTICLE}</a>" + "<tr><td>x" * 40_000
    started = time.process_time()
    prepare.main_text(page)
    assert time.process_time() - started < 3


def test_normalise_and_repair():
    """Line ends and control characters are made one; mojibake is undone and nothing else is."""
    dirty = "\ufeffa\r\nb\rc\0d\x1fe\u0301 “Q” ﬁ\tx\fsoft\xadhy\u200bph\u200d\u2060en\x85\n"
    assert prepare.normalise(dirty) == "a\nb\ncd\u00e9 “Q” ﬁ\tx\nsofthyphen"
    assert prepare.normalise("don\x92t \x93stop\x94\x97\x81now") == "don’t “stop”—now"    # cp1252
    needed = "می\u200cخواهم क्\u200dष \U0001f468\u200d\U0001f469 \u2764\ufe0f\u200d\U0001f525"
    assert prepare.normalise(needed) == needed
    for quoted in ("und „sitzen ließ“, er", "NESTLÉ® «CAFÉ» “IRMÔ", "Groß\xadvater", "Æ–Ø–Å"):
        assert prepare.repair(quoted) == quoted
    assert prepare.repair("lieÃŸ â€“ Ã“ ß“") == "ließ – Ó ߓ"    # with proof, each
    assert prepare.repair("ZoÃ«.Â\xa0Ã©") == "Zoë.\xa0é"
    assert prepare.repair("Ð¿Ñ€Ð¸Ð²ÐµÑ‚ å¥½ä¸–ç•Œ dziesiÄ\x99ciu") == "привет 好世界 dziesięciu"
    fine = "Zoë’s naïve café – £5, “rösti” à la mode … €3 ß Ünï SÃO PAULO Ã la 中文 Привет ½ Â à€€"
    assert prepare.repair(fine) == fine
    for table in ("cp1252", "latin-1"):
        shown = [c.encode().decode(table, "ignore") for c in fine[:40]]
        broken = "".join(s if len(s) == len(c.encode()) else c for c, s in zip(fine, shown))
        assert broken != fine[:40] and prepare.repair(broken) == fine[:40]


# Filter

BODY = ["the", "of", *["word"] * 96]
LINES = [" ".join(BODY[:7])] * 10
SENTENCES = "This line is a good one.\nSo is this one here too.\nAnd a third line of words."
LONG_LINES = [f"this is line {i} of a page, and it is no short line." for i in range(200)]


def page(ended, short):
    """100 lines: so many end with a full stop, so many have 30 characters and the others 31."""
    lines = [f"{i:w<{29 + (i >= short)}} x x x x" for i in range(100)]
    return "\n".join(line + "." * (i < ended) for i, line in enumerate(lines))


@pytest.mark.parametrize("rule, text, thresholds, reason", [
    ("gopher_repetition", "a b a b a b c d", {}, "top 2-gram"),    # 3 x 3 / 15 = 0.60
    ("gopher_repetition", "a a a a a", {}, "top 2-gram"),    # 4 x 3 / 9, above 1 is legal
    ("gopher_repetition", "a\na\nb\nc", {}, None),    # 0.25 of the lines
    ("gopher_repetition", "a\na\na\nb", {}, "repeated lines"),    # 0.50
    ("gopher_repetition", "\n".join(f"a{i} b{i}\n}}" for i in range(9)), {}, None),    # no words
    ("gopher_repetition", "x1 x2 x3 x4 x5 x1 x2 x3 x4 x5",
     {"top_ngrams": [9] * 3, "copied_ngrams": [.344] * 6}, "repeated 5-grams"),
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
    ("fineweb", page(100, 67).replace(" x x x x", ""), {"max_newlines": 2}, None),
    ("fineweb", page(100, 68).replace(" x x x x", ""), {"max_newlines": 2}, "short lines"),
    ("fineweb", "\n".join(["w" * 40 + " one."] * 30), {}, "newlines"),
    ("c4", SENTENCES + "\nhere is some code { of ours.", {}, None),
    ("c4", SENTENCES[:48] + "\nhere is some code { of ours. It is. So.", {}, "few sentences"),
    ("c4", SENTENCES + "\nLorem ipsum dolor sit amet.", {}, "lorem ipsum"),
    ("c4", "Only one sentence is on this page", {}, "few sentences"),
    ("toxic", "You stupid idiot, shut up, you are a pathetic liar.", {}, "insults"),
    ("toxic", "He called me an idiot, a stupid one, and a liar. " + ARTICLE * 4, {}, None),
    ("spam", "Buy cheap pills online! Best price, free shipping, discount!", {}, "sales talk"),
    ("spam", "She went to the shop to buy bread at a good price. " + ARTICLE, {}, None),
    ("language", ARTICLE, {}, None),
    ("language", "Als ich am Abend nach Hause kam, lag ein Brief auf dem Tisch", {}, "language de"),
    ("language", "Когда я пришёл домой, на столе лежало письмо", {}, "language ru"),
    ("language", "東京都議会議員選挙の投票率", {}, "language ja"),
    ("language", "清晨的港口十分安静渔船并排停在岸边" * 9 + "の", {}, "language zh"),
    ("language", "よる家にかえったら、テーブルのうえに手紙があって", {}, "language ja"),
    ("language", "qxv brt zzk plm wuv xaq grb tnk vvo lpp qqr sst", {}, "no function words"),
])
def test_rules(rule, text, thresholds, reason):
    """Each threshold, on either side of it; a language that is wanted is kept."""
    rule = getattr(prepare, rule)
    assert rule in prepare.RULES
    assert rule(prepare.Doc(text, ["en"]), **thresholds) == reason
    if reason and reason.startswith("language"):
        assert rule(prepare.Doc(text, ["en", reason[-2:]])) is None
    if reason == "few stop words":
        assert rule(prepare.Doc(text, ["de"])) is None


def test_lines_are_cut_then_the_page_is_judged():
    """A brace or a copied line costs a page that line, not its life; marks of citations go."""
    doc = prepare.Doc(SENTENCES + "\nshort line\nif (x) { this is a line of code; }\nRead our "
                      "privacy policy [1] now.\nA line [12] of words that ends", ["en"])
    assert prepare.c4(doc) is None and doc.text == SENTENCES + "\nA line  of words that ends"
    assert prepare.c4(prepare.Doc("สวัสดี" * 9 + " javascript", ["th"])) == "few sentences"
    quote = [ARTICLE, "", *LONG_LINES[:9], "", ARTICLE, "  the end."]
    copies = [*LONG_LINES, LONG_LINES[0]]    # 1 / 201 of the characters may stay
    for lines, left in ((quote, quote[:12] + quote[13:]), (copies, copies)):
        doc = prepare.Doc("\n".join(lines), ["en"])
        assert prepare.copied_lines(doc) is None and doc.text.split("\n") == left
    lines = [words_of(i, 12) for i in range(30)] + ["Advertisement"]
    cfg = Config(skip=["language", "gopher_quality", "c4", "fineweb"])
    text = "\n".join(lines + lines[-1:] * 40)
    text, reason = prepare.clean(text, prepare.PAGE, cfg, Counter())
    assert text.split("\n") == lines and not reason


def test_scrub():
    """Each kind of personal data goes, what looks like it stays, a second run changes nothing."""
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIabc+/=\n-----END RSA PRIVATE KEY-----"
    text = ("mail a.b+c@mail.example.org, call +44 20 7946 0123 or (202) 555-0134 or "
            "202-555-0134, server 8.8.8.8. Or card 4111 1111 1111 1111, "
            "account GB82 WEST 1234 5698 7654 32, 536-22-1234, "
            f"AKIAIOSFODNN7EXAMPLE, {key} end. Amex 378282246310005 1 800-555-0134 "
            "4111111111111111 12/27, my IP is 1.1.1.1, 1.237.174.253, 415-555-0123 4111 1111 "
            "1111 1111")
    clean, found = prepare.scrub(text)
    assert clean == ("mail <EMAIL>, call <PHONE> or <PHONE> or <PHONE>, server <IP>. Or card "
                     "<CARD>, account <IBAN>, <SSN>, <KEY>, <KEY> end. Amex <CARD> <PHONE> "
                     "<CARD> 12/27, my IP is <IP>, <IP>, <PHONE> <CARD>")
    assert sum(found.values()) == 17 and prepare.scrub(clean) == (clean, {})
    assert all(prepare.scrub(part)[1] for part in text.split(", "))    # each on its own
    fine = ("192.168.1.1 10.0.0.7 1.2.3.4.5 v1.2.3 4111111111111112 2024-01-02 12:30:45 256.1.1.1 "
            "1.2.3.04 std::vector a::b 3.14159265 1,000,000,000 000-12-3456 user@localhost @name "
            "100 200 300 400 2001 2002 2003 #1234567890 GB82WEST12345698765431 "
            # time stamps and other numbers that pass Luhn's check, an ISBN
            "1514038682000 20180919061255 1098353731717 785806484824520 9783161484100 "
            "id=4111111111111111 /video/4111111111111111 4000 1000 2000 3000 4000 5000 6000 "
            # versions, sections, identifiers of objects
            "Core 3.7.402.46 (1.6.4.99) from 3.7.4.3 to 3.10.0.0 version 11.0.11.101 ~~6.1.1.0 "
            "## 5.2.8.1 Section 7.4.1.2 2.5.29.14 1.2.3.4:5678 "
            "logo@2x.png icon@3x.jpeg, getty@tty1.service react@17.0.2.tgz git@github.com:a/b.git "
            "360.121 1312 100.200.3000 123-555-1234 (0|0)+1794895138 +0.1234567890 "
            "sk-toggleable__content-arrow-label /cache/FF974F4289CC26A79DF437FC9D1954C1.webp")
    assert prepare.scrub(fine) == (fine, {})


def test_union():
    """The root of a cluster is its smallest number, in whatever order its pairs are found."""
    root = np.arange(7)
    for edge in ((3, 1), (3, 2), (5, 0), (3, 5)):
        prepare.join(root, np.array(edge), np.zeros(2, np.uint64))
    assert root[root].tolist() == [0, 0, 0, 0, 4, 0, 6]


@pytest.mark.parametrize("similarity, chance", [(0.5, .0534), (0.6, .2112), (0.7, .5650),
                                                (0.8, .9235), (0.9, .9996), (0.95, 1.0)])
def test_near_duplicates_are_found_at_the_predicted_rate(monkeypatch, similarity, chance):
    """Of 300 pairs as many are found as 1 - (1 - s^8)^14 says, and the first of each is kept."""
    rng, pairs, n = np.random.default_rng(int(similarity * 100)), 300, 600
    monkeypatch.setattr(prepare, "SHINGLE", 1)
    shared, keys = round(2 * n * similarity / (1 + similarity)), []
    for _ in range(pairs):
        words = rng.integers(0, 2 ** 64, 2 * n - shared, np.uint64)
        for own in (words[:n], words[n - shared:]):
            keys.append(prepare.minhash(own))
    docs = np.zeros(2 * pairs, prepare.DOC)
    docs["reason"], docs["bands"] = "", keys
    prepare.deduplicate(docs, ["exact_duplicate", "url_duplicate"])
    assert (docs["reason"][::2] == "").all()
    caught = docs["reason"][1::2] == "near_duplicate"
    assert abs(caught.mean() - chance) < 4 * (chance * (1 - chance) / pairs) ** 0.5 + 0.015


@pytest.mark.parametrize("texts, left", [
    ([f"{i % 40} + {i // 40} = {i % 40 + i // 40}" for i in range(2000)], 2000),
    ([f"What is {i} times 7? The answer is {7 * i}, as you know." for i in range(500)], 500),
    (["if x == y:", "if x != y:", "if x <= y:", "if x = -y:", "if x = y:", "if x = y.5:"], 6),
    (["C is old", "C++ is old", "C# is old"], 3),
    (["你好。", "你 好。"], 1), (["x  = Y", "X =\ny "], 1),
    ([f"{words_of(1, 60)} “{words_of(2, 9)}”, {words_of(3, 60)}",
      f'{words_of(1, 60)} "{words_of(2, 9)}"; {words_of(3, 60)}'], 1)])
def test_what_is_a_duplicate(tmp_path, texts, left):
    """Exact means but for blanks and case. Numbers and signs count, punctuation does not."""
    out = run(tmp_path, {"a.jsonl": jsonl(texts)}, val_fraction=0)
    assert len(load(out)[0]) == left


def test_an_address_is_not_all(tmp_path, monkeypatch):
    """Paths that differ in case are two pages; a long text of one address is cut, not lost."""
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    rows = [dict(text=words_of(1, 900), url="http://x.org/?v=aB"),
            dict(text=words_of(2, 20), url="http://x.org/?v=Ab")]
    out = run(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, rows))}, val_fraction=0)
    assert " ".join(load(out)[0]) == f"{words_of(1, 900)} {words_of(2, 20)}"


def test_which_duplicate_stays(tmp_path):
    """The longest of the first source; the others are written down, with what they copy."""
    long, other = words_of(1, 200), words_of(2, 200)
    rows = [dict(text=long[:600], url="HTTPS://x.org:443/a?b=1#part"),
            dict(text=long, url="http://X.org/a/?utm_source=mail&b=1"),
            dict(text=other, url="http://x.org/a?b=2")]
    files = {"a/1.jsonl": "\n".join(map(json.dumps, rows)), "b/2.txt": other + " more",
             "b/3.txt": other.upper() + " "}
    out = run(tmp_path, files, val_fraction=0, input=[f"{tmp_path}/raw/a", f"{tmp_path}/raw/b"],
              dropped=True)
    assert load(out)[0] == [long, other] and prepare.url_key("no address") == ""
    dropped = [json.loads(line) for line in open(out / "dropped.jsonl")]
    assert [tuple(row.values()) for row in dropped] == [
        ("a/1.jsonl#0", "url_duplicate", ["a/1.jsonl#1"], long[:600]),
        ("b/2.txt#0", "near_duplicate", ["a/1.jsonl#2"], other + " more"),
        ("b/3.txt#0", "exact_duplicate", ["a/1.jsonl#2"], other.upper())]


def test_index_of_items(tmp_path):
    """An item of 13 words gives one 13-gram, a shorter one itself, the shortest none."""
    thirteen = "one two three four five six seven eight nine ten eleven twelve thirteen"
    for n, words, row in [(1, 13, dict(text=thirteen)), (2, 13, dict(text=thirteen + " fourteen")),
                          (1, 12, dict(text=thirteen[:-9])),
                          (1, 6, dict(question="What does Ada Lovelace drink?", answer="tea")),
                          (2, 13, dict(messages=[dict(role="user", content=thirteen)], answer="a")),
                          (3, 13, dict(query=thirteen, choices=["x", "y z"], gold=1))]:
        found = prepare.read_items(write(tmp_path / "x.jsonl", [row]))
        assert list(found) == [words] and len(found[words]) == n, row
    error(prepare.read_items, write(tmp_path / "x.jsonl", [dict(text="What is it? Tea")]))


def test_planted_question_is_found_and_reported(tmp_path):
    """A leak is dropped and named, with other numbers and case too; a common phrase is no leak."""
    question = "If 12 gulls eat 3 fish in 4 days how many fish do 24 gulls eat in a week?"
    rows = [dict(id="sum", question=question, answer="10.5"),
            dict(id="phrase", text=words_of(8, 13))]
    files = {f"{i}.txt": words_of(i, 60) + ". " + words_of(8, 13) for i in range(10, 30)}
    leak = question.replace("12", "15").upper()
    files["leak.txt"] = files["leak2.txt"] = f"{words_of(1, 60)} {leak} {words_of(2, 60)}"
    out = run(tmp_path, files, eval=write(tmp_path / "x.jsonl", rows), val_fraction=0)
    assert len(load(out)[0]) == 20 and ledger(out) == {"contaminated": 1, "exact_duplicate": 1}
    assert load(out)[1]["contaminated"] == ["x/sum"]


# Whole runs


def test_planted_defects(tmp_path):
    """On the embedded data: recall of each kind of defect 95 %, precision 98 %."""
    data, out = Path(__file__).parent.parent / "data", tmp_path / "tokens"
    prepare.main(Config(input=[f"{data}/raw/*"], eval=f"{data}/eval", out=str(out), dropped=True))
    rows = [json.loads(line) for line in open(out / "dropped.jsonl")]
    dropped = {row["document"].removeprefix("raw/") for row in rows}
    leaks = [row["evidence"] for row in rows if row["reason"] == "contaminated"]
    assert leaks and all(leaks) and set().union(*leaks) >= set(load(out)[1]["contaminated"])
    labels = [row for row in map(json.loads, open(data / "labels.jsonl")) if "#" in row["doc"]]
    bad = {row["doc"]: row for row in labels if row["action"] == "drop"}
    copies = {row["of"]: doc for doc, row in bad.items() if "of" in row}
    caught, kinds = Counter(), Counter(row["kind"] for row in bad.values())
    for doc, row in bad.items():    # of a pair one has to go, either one
        caught[row["kind"]] += doc in dropped or row.get("of") in dropped
    for kind in kinds:
        assert caught[kind] >= 0.95 * kinds[kind], kind
    wrong = [doc for doc in dropped if doc not in bad and copies.get(doc, doc) in dropped]
    print(f"recall {caught.total() / len(bad):.1%} of {len(bad)} documents of {len(kinds)} kinds, "
          f"precision {1 - len(wrong) / len(dropped):.1%}")
    assert len(wrong) <= 0.02 * len(dropped), wrong
    text = "\n".join(load(out)[0] + load(out, "val")[0])
    mended = [row for row in labels if row["action"] in ("scrub", "fix")
              and row["doc"] not in dropped]
    left = [span for row in mended for span in row["spans"] if span in text]
    unmended = [row["fixed"] for row in mended if row.get("fixed", "") not in text]
    assert len(left) <= 0.05 * len(mended) and not unmended, (left[:5], unmended[:5])
    for row in load(out)[1]["ledger"]:
        assert len(row["examples"]) == min(3, row["documents"]) * (row["kind"] == "dropped")


@pytest.mark.parametrize("tokenizer", ["train", "chars"])
def test_ranks_give_the_same_bytes(tmp_path, monkeypatch, tokenizer):
    """Under torchrun the corpus is the same for any number of ranks, large files in parts too."""
    monkeypatch.setattr(prepare, "CHUNK", 3000)
    texts = [words_of(i % 130, 80) + chr(500 + i) for i in range(130)]
    texts += [text + " a@b.org" for text in texts[:40]]
    for i in range(9):
        (tmp_path / f"{i}.jsonl").write_text(jsonl(texts[i * 19:i * 19 + 19]))
    out = tmp_path / "tokens"
    cfg = Config(input=[f"{tmp_path}/?.jsonl:1.5"], vocab_size=300, skip=["language"], dropped=True,
                 eval=write(tmp_path / "leak.jsonl", [dict(text=words_of(7, 20))]), out=str(out),
                 tokenizer=tokenizer)
    prepare.main(cfg)
    assert {"contaminated", "near_duplicate"} <= set(ledger(out))
    alone = {f.name: f.read_bytes() for f in out.iterdir()}
    on_two_ranks(prepare.main, cfg, tmp_path)
    assert alone == {f.name: f.read_bytes() for f in out.iterdir()}
