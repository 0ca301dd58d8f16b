"""Tests of prepare.py. Run: python -m pytest tests/test_prepare.py -q (no network, under half a minute).

Each docstring says what would be wrong with the world if the test failed.
"""
import base64
import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare
from model import ENDOFTEXT, GPT4_SPLIT, encoding_from_dict, encoding_hash, make_encoding
from prepare import Config

NASTY = ["", " ", "   ", "\n", "\n\n  x", "a  b   c", "Hello world  123456!! I'm\n\n  x", "don't WE'LL they'Re",
         "\t\ttabs\r\nand\rreturns \r\n\r\n", "naïve café Ünïcödé", "中文字符没有空格", "日本語 テキスト",
         "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301 combining", "a\u00a0b\u2003c\u3000d",
         "\x00\x1c\x1d\x1f\x85", "١٢٣٤٥ ½ Ⅷ", "<|endoftext|><|im_start|>user\n<|im_end|><|pad|>", "a" * 300,
         "ab" * 300, " " * 300, "\n" * 50 + "x", "x\n" * 50, "!?!?\n\n\nfoo", "https://a.b/c?d=e&f=%20", "\ufffd\ufeff"]


def run(tmp_path, files, **flags):
    """Write files {name: str or bytes}, run prepare on their folder, return the tokens folder."""
    folder = tmp_path / "raw"
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    folder.mkdir(exist_ok=True)
    out = tmp_path / "tokens"
    prepare.main(Config(**{**dict(input=[str(folder)], out=str(out), tokenizer="bytes", skip=["language"], web="none", eval="none"), **flags}))
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


def error(function, *args, **kwargs):
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def words_of(seed, n):
    """A random document of n words from a language of 2,000 made-up ones."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("aeioubcdfgklmnprst", k=1 + hash_int(rng.randrange(2000)) % 8))
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
    """Merge the lowest rank, leftmost first, until nothing merges: no heap, no cache, no tiktoken."""
    ids = []
    for piece in regex.findall(GPT4_SPLIT, text):
        parts = [bytes([b]) for b in piece.encode()]
        while True:
            found = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not found:
                break
            i = min(found)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[p] for p in parts]
    return ids


def test_bpe_of_wikipedia():
    """The textbook example: aaabdaaabac, ties to the smallest ids, gives aa, ab, aaab (data.md 15.4)."""
    ranks = prepare.train_bpe({"aaabdaaabac": 1}, 259)
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    assert make_encoding("t", GPT4_SPLIT, ranks).encode_ordinary("aaabdaaabac") == [258, 100, 258, 97, 99]


def test_bpe_of_sennrich():
    """The example of the BPE paper, with counts worked out by hand (data.md 15.5)."""
    ranks = prepare.train_bpe(dict(low=5, lower=2, newest=6, widest=3), 256 + 10)
    assert [t.decode() for t in list(ranks)[256:]] == [
        "es", "est", "lo", "low", "ew", "new", "newest", "dest", "idest", "widest"]


def test_bpe_incremental_equals_recount():
    """Incremental counts drifted from the true ones: merges would come in another order on some corpus."""
    rng = random.Random(0)
    for trial in range(300):
        alphabet = "ab" if trial % 3 == 0 else "abc" if trial % 3 == 1 else "aé中"
        counts = {"".join(rng.choices(alphabet, k=rng.randint(1, 12))): rng.randint(1, 4)
                  for _ in range(rng.randint(1, 6))}
        size = 256 + rng.randint(1, 25)
        ranks, words = slow_bpe(counts, size)
        assert prepare.train_bpe(counts, size) == ranks, counts
        for word in counts:
            assert tuple(slow_encode(ranks, word)) in words or len(regex.findall(GPT4_SPLIT, word)) > 1


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
    """Text that spells a control token became one, or a text changed on its way through the tokenizer."""
    texts = [t for t in NASTY if t] + ["plain text"] * 3
    enc = {"bytes": lambda: prepare.named_tokenizer("bytes"), "chars": lambda: prepare.chars_tokenizer(set().union(*texts)),
           "bpe": lambda: prepare.trained_tokenizer(prepare.count_pieces(texts), 270)}[name]()
    ids, ends = prepare.encode(enc, texts)
    stop = enc._special_tokens[ENDOFTEXT]
    assert (np.flatnonzero(np.isin(ids, list(enc._special_tokens.values()))) == ends - 1).all()
    assert (ids[ends - 1] == stop).all() and len(ends) == len(texts)
    for text, a, b in zip(texts, [0, *ends], ends):
        assert ids[a:b - 1].tolist() == enc.encode_ordinary(text) and enc.decode(ids[a:b - 1].tolist()) == text


def test_long_texts_encode_as_if_whole(monkeypatch):
    """Cutting a long text into pieces, to save memory, changed its tokens."""
    text = words_of(2, 5000).replace("ta", "ta\n").replace("b", "1! ") + "   \n\n x" * 5
    enc = prepare.trained_tokenizer(prepare.count_pieces([text]), 500)
    monkeypatch.setattr(prepare, "PIECE", 6000)
    assert len(list(prepare.cut_text(text, 6000))) > 3
    ids, ends = prepare.encode(enc, [text])
    assert ids[:-1].tolist() == enc.encode_ordinary(text) and ends.tolist() == [len(ids)]
    assert "".join(prepare.cut_text("x" * 20000, 6000)) == "x" * 20000


def test_vocabulary_is_what_was_asked_for():
    """--vocab_size means the final number of ids, control tokens included; asking for too many must say so."""
    text = words_of(3, 20000)
    assert prepare.trained_tokenizer(prepare.count_pieces([text]), 1024).n_vocab == 1024
    assert prepare.trained_tokenizer(prepare.count_pieces([text]), 1300).n_vocab == 1344    # a multiple of 64, filled with merges
    assert "at most" in error(prepare.trained_tokenizer, prepare.count_pieces(["too little text, too little text"]), 1024)
    assert "at least 260" in error(prepare.trained_tokenizer, Counter(), 100)


def test_tokenizers_from_files(tmp_path):
    """A tokenizer saved by one run cannot be used by the next, or comes back as another one."""
    out = run(tmp_path, {"a.txt": words_of(4, 9000)}, tokenizer="train", vocab_size=300)
    _, _, enc = load(out)
    assert encoding_hash(prepare.named_tokenizer(str(out))) == encoding_hash(enc)
    ranks = tmp_path / "ours.tiktoken"
    ranks.write_text("".join(f"{base64.b64encode(b).decode()} {i}\n" for b, i in enc._mergeable_ranks.items()))
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
    """The manifest disagrees with the files, or the same input gives other bytes the second time."""
    files = {f"{i}.txt": words_of(i, 100) for i in range(100)}
    out = run(tmp_path, files, tokenizer="train", vocab_size=400)
    train, manifest, enc = load(out)
    val, _, _ = load(out, "val")
    assert sorted(train + val) == sorted(files.values()) and 1 <= len(val) <= 15
    assert manifest["vocab_size"] == enc.n_vocab == 400 and manifest["encoding_hash"] == encoding_hash(enc)
    assert manifest["bytes"]["val"] == sum(len(t.encode()) for t in val)
    assert manifest["sha256"]["train"] == prepare.file_hash(out / "train.bin")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    run(tmp_path, {}, tokenizer="train", vocab_size=400)
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}
    assert sorted(before) == ["encoding.json", "manifest.json", "train.bin", "train.copies", "train.idx",
                              "val.bin", "val.idx"]
    assert not list(tmp_path.glob(".*"))


def test_tail_split_is_by_character(tmp_path):
    """tinyshakespeare's split (first 90 % of the characters train) is not reproduced."""
    text = "".join(random.Random(5).choices("aé中\U0001f600\n", k=1001))
    out = run(tmp_path, {"a.txt": text}, tokenizer="chars", clean=False, split="tail", val_fraction=0.1)
    assert load(out)[0] == [text[:900]] and load(out, "val")[0] == [text[900:]]
    assert load(out)[1]["vocab_size"] == 5 + 4
    out = run(tmp_path, {"a.txt": text[:700], "b.txt": text[700:]}, tokenizer="bytes", clean=False, split="tail",
              val_fraction=0.1)
    assert load(out)[0] == [text[:700], text[700:900]] and load(out, "val")[0] == [text[900:]]


def test_hash_split_ignores_order(tmp_path):
    """A document moves between train and validation because other files came or names changed."""
    texts = [words_of(i, 60) for i in range(300)]
    val = load(run(tmp_path, {f"{i}.txt": t for i, t in enumerate(texts)}), "val")[0]
    (tmp_path / "two").mkdir()
    again = load(run(tmp_path / "two", {f"x{i}.txt": t for i, t in enumerate(reversed(texts[:200]))}), "val")[0]
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
    rows = [{"text": "plain"}, {"content": "from content"}, {"question": "2+2?", "answer": "4\n#### 4"},
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey"}]},
            {"instruction": "Add", "input": "", "output": "3"}, {"text": "half a surrogate \ud800 pair"}]
    warc = b"".join(gzip.compress(
        b"WARC/1.0\r\nWARC-Type: %s\r\nwarc-target-uri: http://x.org/%d\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
        % (kind, i, len(body), body)) for i, (kind, body) in enumerate([
            (b"warcinfo", b"software: x"), (b"conversion", "hé from WET".encode()),
            (b"response", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>from WARC</p>")]))
    files = {"1.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode()),
             "2.json": json.dumps([{"text": "in a list"}, "bare string"]), "3.txt": "\ufeffwhole\r\nfile\0\n",
             "4.html": "<html><head><title>t</title></head><body><nav>menu</nav><p>A &amp; B</p><script>x</script>",
             "5.warc.gz": warc, "sub/6.md": "deep", "7.bin": b"\1\2", ".hidden.txt": "no"}
    texts, _, _ = load(run(tmp_path, files, val_fraction=0))
    assert texts == ["plain", "from content", "2+2?\n4\n#### 4", "User: Hi\n\nAssistant: Hello",
                     "Human: Hi\n\nGpt: Hey", "Add\n3", "half a surrogate \ufffd pair", "in a list", "bare string",
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
    ({"a.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 99999)[:-100]}, {}, "damaged gzip"),
    ({"a.txt.gz": b"\x1f\x8b\x08\0garbage" * 9}, {}, "damaged gzip"),
    ({"a.txt": bytes(range(128, 256)) * 20}, {}, "not UTF-8"),
    ({"a.json": "{not json"}, {}, "not JSON"),
    ({"a.jsonl": '{"foo": 1}'}, {}, "fields: foo"),
    ({"a.txt": "  \n\n "}, {}, "nothing is left"),
    ({"a.txt": "x"}, {"val_fraction": 1.0}, "val_fraction"),
    ({"a.txt": "short"}, {"tokenizer": "train"}, "at most"),
])
def test_bad_input(tmp_path, files, flags, says):
    """A user's mistake ends in a traceback, or leaves half a folder under the final name."""
    assert says in error(run, tmp_path, files, **flags)
    assert not (tmp_path / "tokens").exists() and not list(tmp_path.glob(".*"))


def test_unknown_named_file(tmp_path):
    (tmp_path / "x.xls").write_bytes(b"1")
    assert "unknown format" in error(prepare.main, Config(input=[str(tmp_path / "x.xls")]))


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
    """A single line of 20 MB, blanks or none in it, is too much."""
    text = words_of(1, 1000) * 1000 + "x" * 5_000_000
    texts, manifest, _ = load(run(tmp_path, {"a.txt": text}, clean=False, val_fraction=0))
    assert texts == [text] and manifest["bytes"]["train"] == len(text)


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    """One bad byte loses a document, or passes without a word."""
    texts, manifest, _ = load(run(tmp_path, {"a.txt": b"a fine text with one \xff bad byte"}, val_fraction=0))
    assert texts == ["a fine text with one \ufffd bad byte"] and manifest["sources"][0]["broken_utf8"] == 1


def test_command_line(tmp_path):
    """The script does not run as documented, or --help hides a flag."""
    shown = subprocess.run([sys.executable, ROOT / "prepare.py", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--val_fraction" in shown.stdout and "[0.05]" in shown.stdout
    wrong = subprocess.run([sys.executable, ROOT / "prepare.py", "--inputs", "x"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1
