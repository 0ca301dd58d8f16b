"""Turn raw, dirty text into clean tokens: the first stage, and the most underrated one.

In:   files, folders or globs of .txt .md .jsonl .json .html .warc .wet (also .gz .zst), .parquet,
      or a data set to download by its short name (tinystories, fineweb-edu, ...)
Out:  out/tokens/: train.bin val.bin (little-endian ids), train.idx val.idx (where documents end,
      uint64), encoding.json (the tokenizer), manifest.json (counts, hashes, settings, the ledger),
      train.copies (how often each document was found, uint32), eval_index.npz (for evaluate.py)

    python prepare.py                                    # the embedded data
    python prepare.py --input corpus/ --vocab_size 8192  # your own files
    torchrun --nproc_per_node=8 prepare.py --input crawl/*.warc.gz    # the same bytes, sooner
    python prepare.py --input shakespeare.txt --tokenizer chars --no-clean --split tail

Steps: gather, extract, normalise, filter, scrub, deduplicate, decontaminate, split, mix, tokenize.
Rules made for web pages (Gopher's quality, C4, FineWeb) apply to HTML, WARC, WET and to rows with a
url, those against repetition and spam not to rows of questions or chats; --web changes that.
Texts longer than 16 MB are cut at a line end. Ranks share the folder of --out; the same input and
seed give the same bytes for any number of them.

Sources: Gopher (arXiv 2112.11446, app. A), C4 (1910.10683), FineWeb (2406.17557) and datatrove,
jusText (Pomikalek 2011), MinHash in bands as in Lee et al. (2107.06499), GPT-3's decontamination
(2005.14165, app. C), byte-level BPE (Sennrich et al., 1508.07909; GPT-2) with rustbpe's tie rule.
Differs: words are what blanks separate; stop words ignore case; an n-gram repeats if it occurs
twice; a contaminated document goes whole; languages are told by function words, not by fastText;
toxic pages by the density of insults, not by one word.
"""
import array
import functools
import glob
import gzip
import hashlib
import heapq
import html
import http.client
import io
import ipaddress
import itertools
import json
import math
import os
import re
import shutil
import socket
import time
import unicodedata
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist

from model import (ENDOFTEXT, GPT4_SPLIT, encoding_from_dict, encoding_hash, encoding_to_dict, fail,
                   import_tokenizer, load_checkpoint, make_encoding, parse_args, print0)

HERE = Path(__file__).parent


def listed(*values):
    return field(default_factory=lambda: list(values))


@dataclass
class Config:
    # input and output
    input: list[str] = listed("data/raw/*")  # PATH[:WEIGHT] ...
    out: str = "out/tokens"  # folder to write
    dropped: bool = False  # also write dropped.jsonl: every dropped document with its reason
    blocks: bool = False  # in .txt files blank lines separate documents (else a file is one)
    # tokenizer and split
    tokenizer: str = "train"  # train, bytes, chars, gpt2, .tiktoken, tokenizer.json, any model
    vocab_size: int = 2048  # ids of a trained tokenizer, control tokens included
    tokenizer_bytes: float = 2e9  # text to train the tokenizer on, a sample if there is more
    split: Literal["hash", "tail"] = "hash"  # validation: documents by hash, or the end of the text
    val_fraction: float = 0.05  # share of the documents (hash) or characters (tail)
    seed: int = 1  # which documents the hash picks
    mix_power: float = 1.0  # share of a source: weight x size ^ power; below 1 lifts small ones
    # rules
    clean: bool = True  # --no-clean keeps the text as it is
    skip: list[str] = listed()  # rules to leave out, as the ledger names them
    web: Literal["auto", "all", "none"] = "auto"  # what to treat as web pages, with all rules
    languages: list[str] = listed("en")  # to keep: en de fr es zh ru ...
    min_language: float = 0.5  # function words of these / (of these + of the best other language)
    min_function_words: float = 0.1  # share of words; below it, text is a list, code or gibberish
    min_words: int = 50  # Gopher
    max_words: int = 100_000  # Gopher
    min_word_length: float = 3.0  # Gopher: mean, characters
    max_word_length: float = 10.0  # Gopher: mean, characters
    max_symbols: float = 0.1  # Gopher: '#' by words, and ellipses by words
    max_bullets: float = 0.9  # Gopher: share of lines that start with a bullet
    max_ellipses: float = 0.3  # Gopher: share of lines that end with an ellipsis
    min_letters: float = 0.8  # Gopher: share of words with a letter
    min_stop_words: int = 2  # Gopher: different ones of the be to of and that have with
    max_repeated: float = 0.3  # Gopher: share of lines, of paragraphs
    max_repeated_chars: float = 0.2  # Gopher: share of characters in such lines, paragraphs
    top_ngrams: list[float] = listed(.20, .18, .16)  # Gopher: the top 2, 3, 4-gram's characters
    copied_ngrams: list[float] = listed(.15, .14, .13, .12, .11, .10)  # Gopher: 5 to 10, repeated
    c4_line_words: int = 5  # C4: lines with fewer words are cut out
    c4_sentences: int = 3  # C4: a page needs this many
    c4_end_marks: bool = False  # C4: also cut lines without an end mark (FineWeb does not)
    min_end_marks: float = 0.12  # FineWeb: share of lines that end with an end mark
    max_short_lines: float = 0.67  # FineWeb: share of lines of up to 30 characters
    max_line_copies: float = 0.01  # FineWeb: share of characters in repeated lines
    max_newlines: float = 0.3  # FineWeb: line ends by words
    max_insults: float = 0.03  # share of words, from 3 different insults on
    max_sales: float = 0.12  # share of words of sales talk, from 8 different ones on
    bands: int = 14  # MinHash: two texts meet if all hashes of one band agree
    rows: int = 8  # MinHash: hashes in a band
    shingle: int = 5  # MinHash: words
    eval: str = "data/eval"  # items to keep out: .jsonl files, an eval_index.npz, or none
    eval_words: int = 13  # words in a row that give an item away
    eval_common: int = 10  # what is in more documents than this is a phrase, not a leak


# ------------------------------------------------------------------------------------------------
# Ranks: one process, or torchrun's


def gather(x, group):
    """[x of rank 0, x of rank 1, ...] on every rank; also where ranks wait for each other."""
    every = [x] * (dist.get_world_size(group) if group else 1)
    if group:
        dist.all_gather_object(every, x, group=group)
    return every


def exchange(rows, group):
    """Send each row (N, c) uint64 to the rank that owns its first number; returns what came."""
    if group is None:
        return rows
    world = dist.get_world_size(group)
    owner = (rows[:, 0] % np.uint64(world)).astype(np.int64)
    rows, counts = rows[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=world)
    come = torch.empty(world, dtype=torch.int64)
    dist.all_to_all_single(come, torch.from_numpy(counts), group=group)
    out = torch.empty((int(come.sum()), rows.shape[1]), dtype=torch.int64)
    dist.all_to_all_single(out, torch.from_numpy(rows.view(np.int64)), come.tolist(),
                           counts.tolist(), group=group)
    return out.numpy().view(np.uint64)


# ------------------------------------------------------------------------------------------------
# Gather: files -> records {"text": ...}, or the reason (a str) why one cannot be read

LARGEST = 1 << 28    # bytes of a line, page or record; what is longer is a decompression bomb
CHUNK = 1 << 24      # bytes, a rank's unit of work; longer text files are read in parts, texts cut
ROW, TEXT, PAGE = range(3)    # kinds of text: from the fields of a row, plain text, a web page
TEXT_FIELDS = ("text", "content", "messages", "conversations", "question answer",
               "instruction input output", "instruction output", "prompt completion",
               "prompt response", "prompt chosen", "chosen", "prompt")
SPLITS = (".txt", ".md", ".jsonl")    # what ranks can share a file of
KINDS = (*SPLITS, ".json", ".html", ".htm", ".warc", ".wet", ".parquet")
HUB = "https://huggingface.co/datasets/"
GITHUB = "https://raw.githubusercontent.com/"
DATASETS = {    # short name: (address, sha256 where known, licence and size); also for sft, dpo
    "tinyshakespeare": (
        GITHUB + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", "public domain, 1 MB"),
    "tinystories": (HUB + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt", "",
                    "CDLA-Sharing-1.0, 2.2 GB"),
    "wikitext": (HUB + "Salesforce/wikitext/resolve/main/wikitext-103-raw-v1/"
                 "train-00000-of-00002.parquet", "", "CC BY-SA 3.0, 0.2 GB"),
    "fineweb-edu": (HUB + "HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/000_00000.parquet",
                    "", "ODC-By 1.0, 2 GB"),
    "alpaca": (GITHUB + "tatsu-lab/stanford_alpaca/main/alpaca_data.json", "",
               "CC BY-NC 4.0, 23 MB"),
    "gsm8k": (GITHUB + "openai/grade-school-math/master/grade_school_math/data/train.jsonl",
              "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", "MIT, 4 MB"),
    "hh-rlhf": (HUB + "Anthropic/hh-rlhf/resolve/main/helpful-base/train.jsonl.gz", "",
                "MIT, 16 MB"),
    "hh-rlhf-harmless": (HUB + "Anthropic/hh-rlhf/resolve/main/harmless-base/train.jsonl.gz", "",
                         "MIT, 13 MB"),
    "ultrafeedback": (HUB + "HuggingFaceH4/ultrafeedback_binarized/resolve/main/data/"
                      "train_prefs-00000-of-00001.parquet", "", "MIT, 0.2 GB")}


def find_sources(cfg):
    """[(weight, [files])], one for each --input in the order given, its files sorted by name."""
    sources = []
    for item in cfg.input:
        m = None if Path(item).exists() else re.fullmatch(r"(.+):(\d+(?:\.\d+)?)", item)
        path, weight = (m[1], float(m[2])) if m else (item, 1.0)
        if not weight:
            fail(f"--input {item}: a weight is above 0")
        if path in DATASETS and not Path(path).exists():
            path = download(*DATASETS[path][:2], "out/downloads")
        elif item in Config().input and not glob.glob(item):
            path = HERE / item    # a run from another folder finds the embedded data
        found = [path] if Path(path).exists() else glob.glob(str(path), recursive=True)
        found = [f for p in map(Path, found) for f in (p.rglob("*") if p.is_dir() else [p])]
        found = sorted(f for f in found if f.is_file() and not f.name.startswith("."))
        files = [f for f in found if file_kind(f) in KINDS]
        if not files:
            fail(f"--input {item}: no {' '.join(KINDS)} file there (each also as .gz or .zst)")
        if len(files) < len(found):
            print0(f"--input {item}: skipped {len(found) - len(files)} files of unknown format")
        sources.append((weight, files))
    return sources


def file_kind(path):
    """The suffix that decides how a file is read: corpus.jsonl.gz -> .jsonl"""
    return Path(re.sub(r"\.(gz|zst)$", "", path.name.lower())).suffix


def plan(sources):
    """(parts: each (source, file, from byte, to byte); chunks: the parts a rank takes at once)"""
    parts, chunks, size = [], [], CHUNK
    for source, (_, files) in enumerate(sources):
        for path in files:
            length = path.stat().st_size
            step = CHUNK if path.suffix.lower() in SPLITS else max(1, length)
            for start in range(0, max(1, length), step):
                if size >= CHUNK:
                    chunks.append([])
                    size = 0
                chunks[-1].append(len(parts))
                parts.append((source, path, start, start + step))
                size += min(step, length - start)
    return parts, chunks


def open_part(path, start, end):
    """(file, bytes to read of it): all of a compressed file, else from line start to line start."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path), math.inf
    if suffix == ".zst":
        return io.BufferedReader(arrow().input_stream(path, compression="zstd")), math.inf
    f = open(path, "rb")
    if suffix not in SPLITS:
        return f, math.inf
    longest = -1 if suffix == ".jsonl" else 1 << 20
    return f, line_start(f, end, longest) - line_start(f, start, longest)    # f is at its start now


def line_start(f, at, longest):
    """Go to the first line start from byte `at` on; in text without lines, between characters."""
    f.seek(max(0, at - 1))
    if at:
        f.readline(longest)
        while (byte := f.peek(1)[:1]) and byte[0] & 0xC0 == 0x80:
            f.read(1)
    return f.tell()


def read_part(path, start, end, cfg):
    """Yield (number, record, or the reason why it cannot be read) of one part of a file.

    More than 1 % of the latter is an error, and so is a compressed file that ends early."""
    seen, bad = 0, []
    try:
        f, size = open_part(path, start, end)
        with f:
            for number, record in enumerate(read_records(file_kind(path), f, size, cfg), 1):
                if record is None:
                    continue    # a blank line
                seen += 1
                if isinstance(record, str):
                    bad.append(f"{number}: {record}")
                yield number - 1, record
    except (OSError, EOFError, ValueError, zlib.error) as e:
        fail(f"{path}: damaged after {seen} documents ({e}); fetch the file again")
    if len(bad) > 0.01 * seen:
        what = "line" if file_kind(path) == ".jsonl" else "record"
        fail(f"{path}{f' from byte {start}' if start else ''}: {len(bad)} of {seen} records cannot "
             f"be read, the first is {what} {bad[0]}")


def read_records(kind, f, size, cfg):
    """Yield what a file of this kind holds: records, reasons, or None for a blank line."""
    if kind in (".txt", ".md"):
        data = f.read(min(size, LARGEST + 1))
        if len(data) > LARGEST or data[:2] == b"\x1f\x8b":
            yield "too large unpacked" if len(data) > LARGEST else "gzip inside gzip"
            return
        text = decode(data)
        for block in re.split(r"\n(?:[ \t\r]*\n)+", text) if cfg.blocks else [text]:
            yield record_of(block, TEXT)
    elif kind == ".jsonl":
        while size > 0 and (line := f.readline(LARGEST)):
            size -= len(line)
            try:
                yield row_record(json.loads(decode(line))) if line.strip() else None
            except (ValueError, RecursionError):
                yield "not JSON"
    elif kind == ".json":
        try:
            rows = json.loads(decode(f.read(LARGEST)))
        except (ValueError, RecursionError) as e:
            yield f"not JSON ({e}); a file with one object a line is named .jsonl"
            return
        if isinstance(rows, dict):
            rows = next((v for v in rows.values() if isinstance(v, list)), [rows])
        yield from map(row_record, rows if isinstance(rows, list) else [rows])
    elif kind == ".parquet":
        for batch in arrow().parquet.ParquetFile(f).iter_batches(1000):
            yield from map(row_record, batch.to_pylist())
    elif kind in (".html", ".htm"):
        yield html_record(f.read(LARGEST))
    else:
        yield from read_warc(f)


def arrow():
    try:
        import pyarrow.parquet
    except ImportError:
        fail(".parquet and .zst files need a package: pip install pyarrow")
    return pyarrow


def decode(data, charset=""):
    """Text of bytes; U+FFFD stands for what is invalid."""
    for name in ("utf-8", "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else charset):
        try:
            return data.decode(name).removeprefix("\ufeff")    # a byte order mark
        except (UnicodeError, LookupError):    # not in it, or no such one
            continue
    return data.decode("utf-8", errors="replace")


def record_of(text, kind, **origin):
    """JSON can spell half surrogate pairs, UTF-8 cannot; they become U+FFFD, as in tiktoken."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    broken = text.count("\ufffd")
    return "not UTF-8 text" if broken > 0.1 * len(text) else dict(text=text, kind=kind, **origin)


def row_record(row):
    """The text of a row: plain text, a question with its answer, or a chat; and its origin."""
    if isinstance(row, str):
        return record_of(row, TEXT)
    if not isinstance(row, dict):
        return "neither an object nor text"
    for names in TEXT_FIELDS:
        values = [row.get(name) for name in names.split()]
        if all(v is not None for v in values):
            text = "\n".join(filter(None, map(flatten, values)))
            origin = {k: row[k].encode("utf-8", "replace").decode()
                      for k in ("url", "date", "license") if isinstance(row.get(k), str)}
            return record_of(text, TEXT if names in ("text", "content") else ROW, **origin)
    return f"no text (fields: {', '.join(map(str, list(row)[:5]))})"


def flatten(value):
    """A string as it is; a list of chat turns as "Role: what was said" paragraphs."""
    if isinstance(value, dict):
        who = str(value.get("role", value.get("from", ""))).capitalize()
        said = flatten(value.get("content", value.get("value", value.get("text", ""))))
        return f"{who}: {said}" if who else said
    return "\n\n".join(map(flatten, value)) if isinstance(value, list) else str(value)


def html_record(data, charset="", **origin):
    found = re.search(rb"charset=[\"']?([\w-]{1,40})", data[:2048])
    page = decode(data, charset or (found[1].decode() if found else ""))
    return record_of(main_text(page), PAGE, **origin)


def read_warc(f):
    """WARC 1.x and WET (ISO 28500): web pages, and pages that were already turned into text."""
    for line in iter(lambda: f.readline(1 << 16), b""):
        if not line.startswith(b"WARC/"):
            continue    # blank, or lost after a wrong length
        headers = read_headers(f)
        kind, length = headers.get("warc-type"), headers.get("content-length", "")
        length = int(length) if re.fullmatch(r"\d{1,12}", length) else LARGEST + 1
        block = f.read(length) if length <= LARGEST else b""
        if len(block) < length or f.read(4) != b"\r\n\r\n":
            yield "wrong Content-Length"
            continue
        origin = dict(url=headers.get("warc-target-uri", ""), date=headers.get("warc-date", ""))
        if kind == "conversion":
            yield record_of(decode(block), PAGE, **origin)
        elif kind == "response":
            body, form = http_body(block)
            if "html" in form or body[:500].lstrip().lower().startswith((b"<!doctype", b"<html")):
                found = re.search(r"charset=([\w-]+)", form)
                yield html_record(body, found[1] if found else "", **origin)


def read_headers(f):
    """`Name: value` up to a blank line; names ignore case, a leading blank continues a value."""
    lines = iter(lambda: f.readline(1 << 16).decode("utf-8", "replace").rstrip(), "")
    lines = re.sub(r"\n[ \t]+", " ", "\n".join(lines)).split("\n")
    return {name.strip().lower(): value.strip() for name, _, value in
            (line.partition(":") for line in lines)}


def http_body(block):
    """(body, content type) of an HTTP response, chunks joined, compression undone within bounds."""
    f, chunks = io.BytesIO(block), []
    f.readline()
    headers = read_headers(f)
    body = f.read()
    if "chunked" in headers.get("transfer-encoding", "").lower():
        f = io.BytesIO(body)
        while (size := re.match(rb"[0-9a-fA-F]{1,8}", f.readline())) and int(size[0], 16):
            chunks.append(f.read(int(size[0], 16)))
            f.readline()
        body = b"".join(chunks) or body    # some crawlers join the chunks and keep the header
    if body[:2] in (b"\x1f\x8b", b"\x78\x9c", b"\x78\xda", b"\x78\x01"):    # gzip, deflate
        try:
            body = zlib.decompressobj(47).decompress(body, LARGEST)
        except zlib.error:
            body = b""
    return body, headers.get("content-type", "").lower()


def download(address, sha256, folder):
    """Fetch an address into a folder, going on where an earlier try stopped. Returns the file."""
    path = Path(folder) / "-".join(urllib.parse.urlparse(address).path.split("/")[-2:])
    part, shown, failures = path.with_name(path.name + ".part"), time.time(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        have = before = part.stat().st_size if part.exists() else 0
        problem = "cut off"
        try:
            request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=30) as response, open(part, "ab") as f:
                if response.status != 206:    # the server sends it from the start
                    f.truncate(have := 0)
                total = have + int(response.headers["Content-Length"])
                while block := response.read(1 << 20):
                    have += f.write(block)
                    if time.time() > shown + 5:
                        shown = time.time()
                        print0(f"  {path.name}: {have / 1e6:,.0f} of {total / 1e6:,.0f} MB")
            if have == total:
                if sha256 and file_hash(part) != sha256:
                    part.unlink()
                    fail(f"{address} does not have sha256 {sha256}; was it changed?")
                part.replace(path)
        except (OSError, TypeError, http.client.HTTPException) as e:    # URLError is an OSError
            problem = e
            if getattr(e, "code", 0) == 416:    # nothing behind what is here, so it is not whole
                part.unlink(missing_ok=True)
        failures = 0 if have > before else failures + 1
        if failures == 3:
            fail(f"cannot fetch {address} ({problem}); fetch it by hand and put it at {path}")
    return path


# ------------------------------------------------------------------------------------------------
# Extract: the running text of a page, by jusText's rules (links, length, function words)

HIDDEN = re.compile(r"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1\s*>?|\Z)", re.S | re.I)
SILENT = set("""aside button footer form head header iframe nav noscript select svg template
textarea title""".split())
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
BLOCKS = HEADINGS | set("""address article blockquote body caption center dd div dl dt figcaption
figure hr html li main ol p pre section table tbody thead tr ul""".split())
TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)[^<>]*>|<[!?/][^<>]*>")
LINE = "\x1e"    # stands for <br>


def html_blocks(page):
    """[(tag, text, characters inside links)] of a page; one pass, whatever the page looks like.

    Silent elements are deleted when they close, so one that never does costs nothing else."""
    blocks, silent, tag, parts, linked = [], [], "", [], 0
    link, pre, pos, page = False, 0, 0, HIDDEN.sub("", page)

    def close(opened):
        nonlocal tag, parts, linked
        lines = "".join(parts).strip("\n").split(LINE)
        lines = lines if pre else (" ".join(line.split()) for line in lines)
        if text := "\n".join(filter(str.strip, lines)):
            blocks.append((tag, text, linked))
        tag, parts, linked = opened, [], 0

    for m in itertools.chain(TAG.finditer(page), [None]):
        text = page[pos:m.start() if m else len(page)]
        parts.append(html.unescape(text) if "&" in text else text)
        linked += len(text) * link
        if m is None:
            close("")
            return blocks
        pos, name, ends = m.end(), (m[2] or "").lower(), bool(m[1])
        if name == "a":
            link = not ends
        elif name in ("br", "td", "th"):
            parts.append(LINE if name == "br" else " ")
        elif name in SILENT:
            close("")
            at = next((i for i in range(len(silent) - 1, -1, -1) if silent[i][0] == name), None)
            if not ends and len(silent) < 100:
                silent.append((name, len(blocks)))
            elif ends and at is not None:
                del blocks[silent[at][1]:], silent[at:]
        elif name in BLOCKS:
            close("" if ends else name)
            pre = max(0, pre + (name == "pre") * (-1 if ends else 1))
            link = link and not (ends and name in ("p", "li", "tr"))    # an <a> left open


def main_text(page):
    """The running text of a page, a line for each block, without menus, banners and footers."""
    blocks, kinds = html_blocks(page), ""    # a letter for each: good, near good, short, bad
    for tag, text, linked in blocks:
        words = text.lower().split()
        density = sum(w in KNOWN_IN for w in words) / len(words)
        if linked > 0.2 * len(text) or re.search(r"©\s?\d", text) or linked and len(text) < 70:
            kinds += "b"
        elif len(text) < 70 and tag != "pre":
            kinds += "s"
        elif density >= 0.3 and len(text) >= 200:
            kinds += "g"
        else:
            kinds += "n" if tag == "pre" or density >= 0.15 else "b"
    # near-good blocks are good beside good ones (or where there are none), short ones between two;
    # on a page of a few words let the rules judge the short ones
    def beside(m):
        return m[1] + m[2].replace("n", "g" if m[1] or m[3] or "g" not in kinds else "b")
    near = re.sub("(g?)([sn]+)(?=(g?))", beside, kinds)
    keep = re.sub("(?<=g)s+(?=g)", lambda m: "g" * len(m[0]), near)
    keep = keep if "g" in keep else keep.replace("s", "g")
    keep, ahead = list(keep), 1000    # characters to the next good block
    for i in range(len(blocks) - 1, -1, -1):    # headings close before one stay
        if blocks[i][0] in HEADINGS and kinds[i] == "s" and ahead < 200:
            keep[i] = "g"
        ahead = 0 if keep[i] == "g" else ahead + len(blocks[i][1])
    return "\n".join(text for (_, text, _), kind in zip(blocks, keep) if kind == "g")


# ------------------------------------------------------------------------------------------------
# Normalise: for training here, for matching in Words below; the two are never mixed

CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ufeff]+")    # not \t, not \n
TAIL = "".join(chr(i) + bytes([i]).decode("cp1252", "ignore") for i in range(0x80, 0xC0))
TAIL = f"[{re.escape(TAIL)}]"    # what the second and later bytes of a character look like
MOJIBAKE = re.compile(f"[\xc2-\xdf]{TAIL}|[\xe0-\xef]{TAIL}{{2}}|[\xf0-\xf4]{TAIL}{{3}}")


def repair(text):
    """UTF-8 that was read as cp1252 or latin-1 and written again, put right: "cafÃ©" -> "café"."""
    def fix(m):
        codes = (c.encode("latin-1" if ord(c) < 256 else "cp1252") for c in m[0])
        try:
            return b"".join(codes).decode()
        except UnicodeDecodeError:
            return m[0]
    return MOJIBAKE.sub(fix, text)


def normalise(text):
    """One kind of line end, NFC, no control characters; quotes, width and case stay as they are."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return CONTROL.sub("", unicodedata.normalize("NFC", text)).strip()


# ------------------------------------------------------------------------------------------------
# What each distinct word looks like, worked out once and looked up by numpy ever after

FUNCTION_WORDS = {line[:2]: set(line[3:].split()) for line in """\
en the of and to in is that it was for on with as his he be at by had not are but from have they \
which one you were all her she there would their we him been has when who will no more if out so \
what up its about than into them can only other some could these then do any my now over such our \
me did many must through where your how because each just those very i this or an a before after
de der die das und ist nicht ein eine einen einem einer zu den dem des mit von auf für im ich sie \
es er wir ihr sich auch aus bei nach wie oder aber wenn noch wird sind war hat haben nur um so
fr le la les un une des du de et est que qui dans pour pas sur au aux avec ce cette il elle nous \
vous ils ne se sa son ses plus par mais ou où on je à leur comme tout très sont été c'est qu'il
es el la los las un una de del y que en es por para con no se lo su sus al como más pero o este \
esta yo le ha sin sobre muy me ya fue son está hay porque cuando todo también entre desde mi
it il lo la i gli le un una di del della e che è in per con non si da dal al alla nel nella sono \
ma come più anche o questo questa ho ha suo sua mi io se tutti molto ci era nei delle dei mia
pt o a os as um uma de do da dos das e que em no na para com não se por mais como mas ou ao à é \
seu sua ele ela eu foi são está muito também já quando até isso este esta pelo pela
nl de het een en van ik te dat die in is niet zijn op aan met als voor er maar om hem dan zou of \
wat mijn dit zo door over ze zich bij ook tot je uit naar heb heeft nog wel geen was wij
sv och att det som en på är av för med den till inte om ett han men var jag sig från vi så kan
pl i w na się z że nie do to jest o jak po co ale za od tak tego przez już dla był być czy są
tr ve bir bu da de için ile ne çok daha gibi ama olarak kadar değil ben sen o var yok her olan
""".splitlines()}
KNOWN_IN = {}    # function word -> a bit for each language
for bit, known in enumerate(FUNCTION_WORDS.values()):
    KNOWN_IN.update({word: KNOWN_IN.get(word, 0) | 1 << bit for word in known})
SCRIPTS = dict(zh="\u4e00-\u9fff", ja="\u3040-\u30ff", ko="\uac00-\ud7af", ru="\u0400-\u04ff",
               ar="\u0600-\u06ff", he="\u0590-\u05ff", el="\u0370-\u03ff", hi="\u0900-\u097f",
               th="\u0e00-\u0e7f")
STOP_WORDS = {w: 1 << n for n, w in enumerate("the be to of and that have with".split())}
INSULTS = """arsehole ass asshole assholes bastard bastards bitch bitches brainless bullshit cretin
cunt cunts dickhead dimwit dirtbag disgusting dumb dumbass dummy faggot faggots filth filthy fool
fools fuck fucked fucker fucking garbage hag hate hideous idiot idiotic idiots imbecile jackass jerk
lazy liar liars loser losers lowlife maggot miserable moron moronic morons motherfucker nigger
niggers pathetic pig prick psycho pussy retard retarded retards revolting scum scumbag shit shitty
slut sluts stinking stupid subhuman suck sucks thug thugs trash twat ugly useless vermin vile wanker
whore whores worm worthless""".split()
SALES = """amazing approval approved bargain bargains best bonus brand buy buying card cart casino
cash cheap cheapest checkout cialis claim click code congratulations coupon credit customers deal
deals debt delivery discount discounted discounts doctors dollars earn exclusive free gift guarantee
guaranteed hurry instant jackpot limited loan loans lottery lowest lucky money offer offers online
order payday percent pills pounds price prices prize profit promo purchase refund replica risk sale
sales satisfaction save savings secret shipping shop stock store subscribe trial trick unbeatable
unlock unsubscribe viagra visit wholesale win winner winners""".split()
INSULTS, SALES = ({word: n for n, word in enumerate(words, 1)} for words in (INSULTS, SALES))
WORD = np.dtype([("hash", "u8"), ("length", "i4"), ("letters", "?"), ("insult", "u2"),
                 ("sales", "u2"), ("stop", "u1"), ("languages", "u2"), ("first", "i4"),
                 ("matches", "i4")])


class Words(dict):
    """word -> its row in `table`: Python looks at a distinct word once, then a text is an array.

    `match` has the hashes of the words as matching sees them, `matches` of them from `first` on:
    lower case, numbers as 0, punctuation as blanks, no accents. "Don't" is don t, "--" nothing."""

    def __init__(self):
        self.table, self.match, self.size = np.zeros(4096, WORD), array.array("Q"), 0

    def __missing__(self, word):
        i, plain = len(self), word.lower().strip(".,;:!?()[]\"“”‘’'")
        found = re.sub(r"[\W_]+", " ", re.sub(r"\d+(?:[.,]\d+)?", "0", word.lower()))
        if not found.isascii():    # no accents; some characters are words of their own
            found = unicodedata.normalize("NFD", found)
            found = "".join(c for c in found if unicodedata.category(c) != "Mn")
            found = re.sub(r"([\u3040-\u30ff\u4e00-\u9fff])", r" \1 ", found)
        found = [hash64(w.encode()) for w in found.split()]
        if i == len(self.table):
            self.table = np.resize(self.table, 2 * i)
        tables = (word_list.get(plain, 0) for word_list in (INSULTS, SALES, STOP_WORDS, KNOWN_IN))
        self.table[i] = (hash64(word.encode()), len(word), any(map(str.isalpha, word)), *tables,
                         len(self.match), len(found))
        self.match.extend(found)
        self.size += len(word) + 200
        self[word] = i
        return i

    def rows(self, text):
        if self.size > 1 << 26:    # keep memory within bounds, however many words there are
            self.clear()
            self.__init__()
        words = text.split()
        at = np.fromiter(map(self.__getitem__, words), np.int64, len(words))    # fills the table
        return self.table[at]

    def matching(self, rows):
        """The hashes of a text's matching words, in order."""
        n = rows["matches"].astype(np.int64)
        at = np.repeat(rows["first"] - (np.cumsum(n) - n), n) + np.arange(n.sum())
        return np.frombuffer(self.match, np.uint64)[at]


def hash64(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


FACTOR = np.uint64(0x9E3779B97F4A7C15)


def growing(hashes, longest):
    """Yield (n, hashes of all runs of n words), n = 1 ... longest: polynomials modulo 2^64."""
    grams = hashes
    yield 1, grams
    for n in range(2, longest + 1):
        grams = grams[:-1] * FACTOR + hashes[n - 1:]
        yield n, grams


# ------------------------------------------------------------------------------------------------
# Filter: each rule takes a Doc and the settings and returns why the text must go, or None


class Doc:
    """A text, and the views of it that several rules share."""

    def __init__(self, text, words):
        self.text, self.rows = text, words.rows(text)
        self.lines = [line.strip() for line in text.split("\n") if not line.isspace() and line]
        self.n = max(1, len(self.rows))


def language(doc, cfg):
    """Another language, or none: told by function words, or by the script where that is enough."""
    sample = doc.text[:20_000]
    if len(sample.encode("ascii", "ignore")) < 0.8 * len(sample):
        letters = sum(map(str.isalpha, sample))
        for code, script in SCRIPTS.items():
            if len(re.findall(f"[{script}]", sample)) > 0.4 * letters:
                return None if code in cfg.languages else f"language {code}"
    bits = doc.rows["languages"][doc.rows["letters"]]
    if len(bits) < 10:
        return None
    hits = {code: np.count_nonzero(bits & (1 << n)) for n, code in enumerate(FUNCTION_WORDS)}
    wanted = max((hits.pop(code) for code in cfg.languages if code in hits), default=0)
    other, most = max(hits.items(), key=lambda item: item[1], default=("", 0))
    if max(wanted, most) < cfg.min_function_words * len(bits):
        return "no function words"
    return f"language {other}" if wanted < cfg.min_language * (wanted + most) else None


def first_true(**checks):
    """The name of the first check that holds, as words, or None."""
    return next((name.replace("_", " ") for name, holds in checks.items() if holds), None)


BULLETS = ("•", "‣", "▪", "*", "-", "–")


def gopher_quality(doc, cfg):
    """Gopher A1.1, with the stop words only where nothing but English is wanted."""
    rows, text, n, lines = doc.rows, doc.text, doc.n, doc.lines
    words = np.count_nonzero(rows["matches"])    # words that are not just symbols
    symbols = max(text.count("#"), text.count("...") + text.count("…"))
    stop_words = int(np.bitwise_or.reduce(rows["stop"])).bit_count()
    return first_true(
        few_words=words < cfg.min_words,
        many_words=words > cfg.max_words,
        word_length=not cfg.min_word_length <= rows["length"].sum() / n <= cfg.max_word_length,
        symbols=symbols > cfg.max_symbols * n,
        bullets=sum(line.startswith(BULLETS) for line in lines) > cfg.max_bullets * len(lines),
        ellipses=sum(line.endswith(("...", "…")) for line in lines) > cfg.max_ellipses * len(lines),
        few_letters=np.count_nonzero(rows["letters"]) < cfg.min_letters * words,
        few_stop_words=cfg.languages == ["en"] and stop_words < cfg.min_stop_words)


def copied(parts):
    """(second and later copies, characters in them)"""
    counts = Counter(parts)
    return len(parts) - len(counts), sum((n - 1) * len(p) for p, n in counts.items())


def gopher_repetition(doc, cfg):
    """Gopher table A1: repeated lines, paragraphs and n-grams of words."""
    size, h, length = len(doc.text), doc.rows["hash"], doc.rows["length"]
    for name, parts in (("lines", doc.lines), ("paragraphs", re.split(r"\n\s*\n", doc.text))):
        count, chars = copied(parts)
        if count > cfg.max_repeated * len(parts) or chars > cfg.max_repeated_chars * size:
            return f"repeated {name}"
    ends, at, grams = np.append(0, np.cumsum(length)), np.arange(len(h)), h
    limits = dict([*zip((2, 3, 4), cfg.top_ngrams), *zip(range(5, 11), cfg.copied_ngrams)])
    for n in range(2, 11):
        limit = limits.get(n, math.inf) * size
        at = at[:np.searchsorted(at, len(h) - n + 1)]
        grams = grams[:len(at)] * FACTOR + h[at + n - 1]
        _, which, counts = np.unique(grams, return_inverse=True, return_counts=True)
        counts, most = counts[which], counts.max(initial=1)
        if most == 1:
            return None
        if n <= 4:
            top = at[counts == most]
            if (ends[top + n] - ends[top] + n - 1).max() * most > limit:
                return f"top {n}-gram"
        at, grams = at[counts > 1], grams[counts > 1]    # only these can be longer and repeat
        if n > 4:
            seen, total, end = set(), 0, 0
            for i, gram in zip(at.tolist(), grams.tolist()):    # count a repeat and step over it
                if i >= end and gram in seen:
                    total, end = total + ends[i + n] - ends[i], i + n
                elif i >= end:
                    seen.add(gram)
            if total > limit:
                return f"repeated {n}-grams"


END_MARKS = (".", "?", "!", '"')
CONDEMNED = ("lorem ipsum", "javascript", "{", "terms of use", "privacy policy", "cookie policy",
             "uses cookies", "use of cookies", "use cookies")


def c4(doc, cfg):
    """C4: cuts out lines that are no sentences (doc.text gets shorter), then judges the page.

    The order matters: a brace on a line that is cut anyway does not condemn the page."""
    lines, low = [], doc.text.lower()
    marks = [m for m in CONDEMNED if m in low]
    text = re.sub(r"\[(?:\d{0,4}|edit|citation needed)\]", "", doc.text) if "[" in low else doc.text
    for line in text.split("\n"):
        words = line.split()
        longest = max(map(len, words), default=0) if len(line) > 1000 else 0
        if words and len(words) < cfg.c4_line_words or longest > 1000:
            continue
        last = words[-1] if words else "."
        if cfg.c4_end_marks and (not last.endswith(END_MARKS) or last.endswith("...")):
            continue
        found = [m for m in marks if m in line.lower()] if marks else []
        if found[:1] in (["lorem ipsum"], ["{"]):    # after javascript only the line goes
            return found[0]
        if not found:
            lines.append(line)
    doc.text = "\n".join(lines).strip()
    if len(re.findall(r"[.?!][\"')\]”’]{0,3}(?=\s|$)", doc.text)) < cfg.c4_sentences:
        return "few sentences"


def fineweb(doc, cfg):
    """FineWeb's own rules, on lines that are not empty."""
    lines, n = doc.lines, len(doc.lines)
    ended = sum(line.endswith((*END_MARKS, "”", "’", "'", "…", "。", "！", "？")) for line in lines)
    return first_true(
        few_end_marks=ended < cfg.min_end_marks * n,
        short_lines=sum(len(line) <= 30 for line in lines) > cfg.max_short_lines * n,
        characters_in_copied_lines=copied(lines)[1] > cfg.max_line_copies * sum(map(len, lines)),
        newlines=doc.text.count("\n") > cfg.max_newlines * doc.n)


def toxic(doc, cfg):
    """Dense insults. One bad word, C4's rule, drops more good text than bad (arXiv 2104.08758)."""
    found = doc.rows["insult"][doc.rows["insult"] > 0]
    if len(found) > cfg.max_insults * doc.n and len(np.unique(found)) >= 3:
        return "insults"


def spam(doc, cfg):
    """Dense and varied sales talk; no published rule, the words are those of mail filters."""
    found = doc.rows["sales"][doc.rows["sales"] > 0]
    if len(found) > cfg.max_sales * doc.n and len(np.unique(found)) >= 8:
        return "sales talk"


RULES = {language: ROW, gopher_repetition: TEXT, gopher_quality: PAGE, c4: PAGE, fineweb: PAGE,
         toxic: ROW, spam: TEXT}    # in FineWeb's order, each with the first kind of text it is for
DUPLICATES = ("exact_duplicate", "url_duplicate", "near_duplicate")
ALL_RULES = ("repair", *(rule.__name__ for rule in RULES), "scrub", *DUPLICATES, "contaminated")


# ------------------------------------------------------------------------------------------------
# Scrub: personal data -> placeholders, which no pattern matches again


def luhn(text):
    """The check of card numbers: every second digit from the right twice, the sum ends in 0."""
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    return sum(sum(divmod(2 * d, 10)) if i % 2 else d for i, d in enumerate(digits)) % 10 == 0


def iban(text):
    """ISO 13616: the first four characters go last, letters are 10 to 35, mod 97 is 1."""
    text = text.replace(" ", "")
    number = int("".join(str(int(c, 36)) for c in text[4:] + text[:4]))
    return 15 <= len(text) <= 34 and number % 97 == 1


def public_address(text):
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


# (placeholder, hint: what a text must contain to be looked at, pattern, check of a match). Patterns
# start behind an edge and repeat within bounds, so that no text takes more than linear time.
NUMBER = r"\d(?:[ ().-]{0,2}\d){8}"    # nine digits close together
PRIVATE = [(name, re.compile(hint), re.compile(pattern), check) for name, hint, pattern, check in (
    ("<KEY>", r"AKIA|-----BEGIN|gh[pousr]_|sk-|xox[bp]-",
     r"\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_\w{36,255}\b|\bsk-[\w-]{20,200}|\bxox[bp]-[\w-]{10,200}"
     r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[A-Za-z0-9+/=\s]{0,10000}"
     r"-----END [A-Z ]{0,30}PRIVATE KEY-----)?", None),
    ("<EMAIL>", "@",
     r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b", None),
    ("<IBAN>", NUMBER,
     r"(?<!\w)[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", iban),
    ("<IP>", r"\d\.\d{1,3}\.\d{1,3}\.\d", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)",
     public_address),
    ("<IP>", r":[0-9a-fA-F]{0,4}:", r"(?<![\w:.])[23][0-9a-fA-F]{3}:"
     r"(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:])", public_address),
    ("<CARD>", NUMBER,    # in one piece, in fours, or as 4-6-5; 14000-3920-1000 is a sum
     r"(?<![\w.-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?"
     r"|\d{4}([ -])\d{6}\2\d{5})(?!\w|-\d)", luhn),
    ("<SSN>", NUMBER, r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])", None),
    ("<PHONE>", NUMBER, r"(?<![\w+])\+\d{1,3}(?:[ .()-]{0,2}\d{1,6}){2,6}(?!\w)"
     r"|(?<![\w.(-])(?:\d{3}[.-]|\(\d{3}\) ?)\d{3}[ .-]\d{4}(?![\w-])",
     lambda text: 10 <= sum(map(str.isdigit, text)) <= 15))]


def scrub(text):
    """(text without personal data, {placeholder: how many})"""
    found, hinted = Counter(), functools.cache(lambda hint: hint.search(text))
    for placeholder, hint, pattern, check in PRIVATE:
        def replace(m):
            if check and not check(m[0]):
                return m[0]
            found[placeholder] += 1
            return placeholder
        text = pattern.sub(replace, text) if hinted(hint) else text
    return text, found


# ------------------------------------------------------------------------------------------------
# Deduplicate: texts that are equal, have the same address, or share most of their shingles


@functools.cache
def hash_functions(count):
    """(a, b): (a x + b mod 2^64) >> 32 is a strongly universal hash of 32-bit x."""
    rng = np.random.Generator(np.random.PCG64(20240601))
    a, b = rng.integers(0, 2 ** 64, (2, count), np.uint64)
    return a | np.uint64(1), b


def minhash(hashes, shingle, count):
    """(count,) uint32 from a text's matching words; two texts agree in a share as their Jaccard."""
    *_, (_, grams) = growing(hashes, min(shingle, len(hashes)))
    a, b = hash_functions(count)
    low = np.full(len(a), np.iinfo(np.uint64).max)
    for i in range(0, len(grams), 512):    # blocks that stay in the cache
        h = np.multiply.outer(grams[i:i + 512] >> np.uint64(32), a)
        h += b
        np.minimum(low, h.min(axis=0), out=low)
    return (low >> np.uint64(32)).astype(np.uint32)


def band_keys(signature, rows):
    """(bands,) uint64: each `rows` hashes of a signature as one number."""
    *_, (_, keys) = growing(signature.reshape(-1, rows).T.astype(np.uint64), rows)
    return keys[0]


def s_curve(similarity, bands, rows):
    """The chance that two texts of this Jaccard similarity agree in a band."""
    return 1 - (1 - similarity ** rows) ** bands


def url_key(url):
    """An address without what does not matter: case, fragment, default port, tracking fields."""
    try:
        parts = urllib.parse.urlsplit(url.lower().strip())
    except ValueError:
        return ""
    query = "&".join(q for q in parts.query.split("&") if q and not q.startswith("utm_"))
    host = re.sub(r":(80|443)$", "", parts.netloc)
    return f"{host}{parts.path.rstrip('/')}?{query}" if host else ""


def same(keys, numbers):
    """Edges (E, 2) from the first number with a key to each other one. keys (N,) or (N, c)."""
    keys = keys[:, None] if keys.ndim == 1 else keys
    order = np.lexsort((numbers, *keys.T))
    keys, numbers = keys[order], numbers[order].astype(np.int64)
    new = np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)])[:len(keys)]
    return np.stack([numbers[new][np.cumsum(new) - 1], numbers], axis=1)[~new]


def union(parent, edges):
    """Join the ends of each edge; a cluster's root is its smallest number, whatever the order."""
    def find(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i
    for a, b in edges.tolist():
        a, b = find(a), find(b)
        parent[max(a, b)] = min(a, b)


def roots(parent):
    while (parent[parent] != parent).any():
        parent = parent[parent]
    return parent


def duplicates(docs, reasons, numbers, bands, cfg, group):
    """(reasons, root) of every document: why it goes or "", and which cluster it is in.

    All ranks know docs; bands (n, bands) are of this rank's documents, which have these numbers.
    One of each cluster stays: of the first source, then the longest, then the first."""
    every, reasons = np.arange(len(docs)), reasons.copy()
    parent = every.copy()
    for name in [name for name in DUPLICATES if name not in cfg.skip]:
        left = every[reasons == ""]
        if name == "exact_duplicate":
            union(parent, same(docs["key"][left], left))
        elif name == "url_duplicate":
            left = left[docs["url"][left] != 0]
            union(parent, same(docs["url"][left], left))
        else:
            mine = reasons[numbers] == ""
            for keys in bands[mine].T:    # one at a time: 16 bytes a document
                rows = exchange(np.column_stack([keys, numbers[mine].astype(np.uint64)]), group)
                for edges in gather(same(rows[:, 0], rows[:, 1]), group):
                    union(parent, edges)
        root, length = roots(parent), docs["size"] * (name != "exact_duplicate")
        order = np.lexsort((every, -length, docs["source"], root))
        order = order[reasons[order] == ""]
        reasons[order[1:][root[order[1:]] == root[order[:-1]]]] = name
    return reasons, roots(parent)


# ------------------------------------------------------------------------------------------------
# Decontaminate: a hash index of the evaluation items

INDEX_FORMAT = 2
INDEX = ("format", "names", "found", "hashes", "lengths", "items")


def item_text(row):
    """(question or text, right answer or "") of an evaluation item."""
    def said(*names):
        value = next((row[name] for name in names if name in row), "")
        if isinstance(value, list) and value:    # a chat: its last turn; several answers: the first
            value = value[-1]["content"] if isinstance(value[0], dict) else value[0]
        return value if isinstance(value, str) else ""
    label = int(row.get("label", -1)) if str(row.get("label", "")).isdigit() else -1
    if "ctx_a" in row and "endings" in row:    # HellaSwag
        return f"{row['ctx_a']} {row['ctx_b']}", row["endings"][label]
    if "goal" in row and "sol1" in row:    # PIQA
        return row["goal"], row["sol1"] if label == 0 else row["sol2"]
    if isinstance(row.get("prompt"), dict):    # RealToxicityPrompts
        return row["prompt"]["text"], ""
    if "context_options" in row:    # Winogrande
        return f"{row['context_options'][row['gold']]} {row['continuation']}", ""
    if "prompt" not in row and isinstance(row.get("chosen"), str):    # HH-RLHF
        return row["chosen"].rpartition("\n\nAssistant:")[0], ""
    question = said("prompt", "messages", "question", "query", "context")
    if not question:
        return said("text", "sentence", "sent_more"), ""
    if isinstance(row.get("choices"), list) and isinstance(row.get("gold"), int):
        return question, row["choices"][row["gold"]]
    return question, said("answer", "continuation").removeprefix("#### ")


def build_index(cfg):
    """{"format", "names", for each n-gram: "hashes" (sorted), "lengths", "items"}; later also
    "found", which of the names were met in the text.

    Every eval_words words in a row that begin in the question count (an answer alone is knowledge,
    not a leak). A shorter item is one n-gram, lest phrases be leaks; questions of under 8 words,
    or 6 with the answer, are left out."""
    path = Path(cfg.eval) if Path(cfg.eval).exists() else HERE / cfg.eval
    if not path.exists():
        fail(f"--eval {cfg.eval} does not exist; none compares with nothing")
    if path.suffix == ".npz":
        return load_index(path)
    words, names, grams = Words(), [], []
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(file.read_text("utf-8", "replace").split("\n")):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                question, answer = (words.matching(words.rows(text)) for text in item_text(row))
                names.append(f"{file.stem}/{row.get('id', f'{file.name}:{number + 1}')}")
            except (ValueError, TypeError, AttributeError, LookupError):
                fail(f"{file} line {number + 1} is not an evaluation item; see --eval")
            h = np.concatenate([question, answer])
            n = min(cfg.eval_words, len(h))
            if n >= (6 if len(answer) else 8):
                grams += [(gram, n, len(names) - 1)
                          for gram in dict(growing(h, n))[n][:len(question)]]
    if not grams:
        fail(f"--eval {cfg.eval}: no .jsonl file with items long enough to look for; --eval none "
             f"compares with nothing")
    hashes, lengths, items = map(np.array, zip(*sorted(grams)))
    return dict(format=INDEX_FORMAT, names=np.array(names), hashes=hashes, lengths=lengths,
                items=items)


def load_index(path):
    """The eval_index.npz of a tokens folder; evaluate.py reads it too."""
    try:
        with np.load(path, allow_pickle=False) as f:
            index = {name: f[name] for name in f}
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        fail(f"{path} is not an index of evaluation items ({type(e).__name__})")
    if index.get("format") != INDEX_FORMAT:
        fail(f"{path} has format {index.get('format')}, not {INDEX_FORMAT}; make it anew")
    return index


def lookup(index, hashes):
    """The evaluation n-grams in a text (sorted, unique), from the hashes of its matching words."""
    if "hint" not in index:    # 16 bits of a hash rule most of them out
        index["hint"] = np.zeros(1 << 16, bool)
        index["hint"][(index["hashes"] & np.uint64(0xFFFF)).astype(int)] = True
        index["widths"] = set(index["lengths"].tolist())
    found = []
    for n, grams in growing(hashes, max(index["widths"])):
        if n in index["widths"]:
            grams = grams[index["hint"][(grams & np.uint64(0xFFFF)).astype(int)]]
            at = np.searchsorted(index["hashes"], grams) % len(index["hashes"])
            found.append(grams[(index["hashes"][at] == grams) & (index["lengths"][at] == n)])
    return np.unique(np.concatenate(found))


def contaminated(hits, kept, index, common):
    """(which documents go, which items were found). hits (N, 2): document, evaluation n-gram.

    An n-gram of more than `common` documents is a phrase and gives nothing away (GPT-3)."""
    hits = hits[kept[hits[:, 0].astype(int)]]
    grams, counts = np.unique(hits[:, 1], return_counts=True)
    leaks = grams[counts <= common]
    goes = np.zeros(len(kept), bool)
    goes[hits[np.isin(hits[:, 1], leaks), 0].astype(int)] = True
    found = np.zeros(len(index["names"]), bool)
    found[index["items"][np.isin(index["hashes"], leaks)]] = True
    return goes, found


# ------------------------------------------------------------------------------------------------
# Clean: a chunk of records -> its texts in the working folder, and a row of numbers a document

DOC = np.dtype([("read", "i4"), ("normalised", "i4"), ("filtered", "i4"), ("size", "i4"),    # bytes
                ("chars", "i4"), ("key", "u8", 2), ("url", "u8"), ("source", "i4"), ("part", "i4"),
                ("at", "i4"), ("head", "S48")])    # where it stood, and how it begins
NO_KEY = bytes(c for c in range(128) if not chr(c).isalnum())


def clean(text, kind, words, cfg, counts):
    """(Doc of the text normalised, filtered and scrubbed, [bytes after the first, the second of
    these], why it must go or ""). Changes are counted under (step, what)."""
    if not text.isascii() and "repair" not in cfg.skip:
        text, before = repair(text), text
        counts["normalise", "texts with mojibake repaired"] += text != before
    doc = Doc(normalise(text), words)
    sizes = [len(doc.text.encode())] * 2
    if not doc.text:
        return doc, sizes, "empty"
    for rule in RULES:
        if rule.__name__ not in cfg.skip and kind >= RULES[rule]:
            before = doc.text
            if reason := rule(doc, cfg):
                return doc, sizes, f"{rule.__name__}: {reason}"
            if doc.text != before:
                counts["filter", "texts with lines cut out by c4"] += 1
                doc = Doc(doc.text, words)
                sizes[1] = len(doc.text.encode())
    text, found = (doc.text, {}) if "scrub" in cfg.skip else scrub(doc.text)
    counts.update({("scrub", placeholder): n for placeholder, n in found.items()})
    return Doc(text, words) if found else doc, sizes, ""


def clean_chunk(parts, numbers, file, cfg, index, words):
    """Write the texts of a chunk (the parts of these numbers) to a file, cleaned until dropped.

    Returns dict(docs (N,) DOC, reasons: why each goes or "", counts, hits (., 2): document and
    evaluation n-gram, bands (N, bands): MinHash keys of the documents that stay)."""
    rows, reasons, bands, counts, hits = [], [], [], Counter(), [np.zeros((0, 2), np.uint64)]
    none = np.zeros(cfg.bands, np.uint64)
    with open(file, "wb") as f:
        for part, (at, record) in ((n, x) for n in numbers for x in read_part(*parts[n][1:], cfg)):
            source, unreadable = parts[part][0], record if isinstance(record, str) else ""
            record = dict(text="", kind=ROW) if unreadable else record
            url = url_key(record.get("url", ""))
            kind = dict(auto=PAGE if url else record["kind"], all=PAGE,
                        none=min(record["kind"], TEXT))[cfg.web]
            counts[source, "broken", ""] += "\ufffd" in record["text"]
            counts[source, "date", record.get("date", "")[:10]] += 1
            counts[source, "licence", record.get("license", "not stated")] += not unreadable
            for text in cut_text(record["text"], CHUNK):
                reason = unreadable or ("" if text.strip() else "empty")
                read = len(text.encode())
                doc, sizes, keys = None, [read] * 2, none
                if cfg.clean and not reason:
                    doc, sizes, reason = clean(text, kind, words, cfg, counts)
                    text = doc.text
                data = key = text.encode()
                if doc and not reason:
                    key = text.lower().encode().translate(None, NO_KEY) or data
                    h = words.matching(doc.rows)
                    h = h if len(h) else np.array([hash64(data)], np.uint64)
                    if "near_duplicate" not in cfg.skip:
                        keys = band_keys(minhash(h, cfg.shingle, cfg.bands * cfg.rows), cfg.rows)
                    if index and len(found := lookup(index, h)):
                        hits.append(np.stack([np.full_like(found, len(rows)), found], axis=1))
                key = np.frombuffer(hashlib.blake2b(key, digest_size=16).digest(), "<u8")
                head = " ".join(text[:200].split()).encode()
                rows.append((read, *sizes, len(data), len(text), key,
                             hash64(url.encode()) if url else 0, source, part, at, head[:48]))
                reasons.append(reason)
                bands.append(keys)
                f.write(data)
    return dict(docs=np.array(rows, DOC), reasons=reasons, counts=counts,
                hits=np.concatenate(hits), bands=np.array(bands).reshape(-1, cfg.bands))


# ------------------------------------------------------------------------------------------------
# The ledger: what came in, what every rule changed and dropped, and what was left

STEPS = dict(read="read", normalise="normalised", filter="filtered", scrub="size",
             deduplicate="size", decontaminate="size")    # step: the bytes of what it leaves
STEP_OF = {**dict.fromkeys(DUPLICATES, "deduplicate"), "contaminated": "decontaminate",
           **{rule.__name__: "filter" for rule in RULES}}    # other reasons: read


def document_name(doc, parts):
    """pages/007.html#0, raw/corpus.jsonl@16777216#12: file, first byte of the part, record."""
    _, path, start, _ = parts[doc["part"]]
    return f"{path.parent.name}/{path.name}{f'@{start}' if start else ''}#{doc['at']}"


def make_ledger(steps, docs, reasons, counts, parts):
    """A row for whatever a step changed or dropped, the frequent first, and for what it kept."""
    rows, left, dropped = [], np.ones(len(docs), bool), Counter(reasons[reasons != ""])

    def add(step, kind, name, documents, size=0, shown=()):
        examples = [f"{document_name(docs[i], parts)}: {docs[i]['head'].decode(errors='ignore')}"
                    for i in shown]
        rows.append(dict(step=step, kind=kind, name=name, documents=int(documents),
                         bytes=int(size), examples=examples))

    def frequent(counter):
        return sorted(counter.items(), key=lambda item: (-item[1], str(item[0])))

    for step in steps:
        for (of, name, *_), n in frequent(counts):
            if of == step and n:
                add(step, "changed", name, n)
        for name, n in frequent(dropped):
            if STEP_OF.get(name.split(":")[0], "read") == step:
                these = np.flatnonzero(reasons == name)
                add(step, "dropped", name, n, docs["size"][these].sum(), these[:3])
                left[these] = False
        add(step, "kept", "", left.sum(), docs[STEPS[step]][left].sum())
    return rows


def report(manifest, out, seconds):
    """Print the ledger, and what to be wary of."""
    def line(name, documents, size, remark=""):
        print0(f"{name:<38}{documents:>11,}{f'{size:,}' if size else '':>15}   {remark}")

    print0(f"\n{'':<38}{'documents':>11}{'bytes':>15}   for example")
    lost, total = Counter(), max(row["documents"] for row in manifest["ledger"])
    for row in manifest["ledger"]:
        name = row["name"]
        if row["kind"] == "kept":
            line(row["step"], row["documents"], row["bytes"])
        elif row["kind"] == "changed":
            line(f"  {name}", row["documents"], 0)
        else:
            line(f"  {name}", -row["documents"], -row["bytes"],
                 row["examples"][0].split(": ", 1)[1][:32])
            lost[name.split(":")[0]] += row["documents"]
    tokens, size = sum(manifest["tokens"].values()), sum(manifest["bytes"].values())
    for part in ("train", "val"):
        line(part, manifest["documents"][part], manifest["bytes"][part],
             f"{manifest['tokens'][part]:,} tokens")
    if curve := manifest["near_duplicates"]:
        print0("near duplicates are found at similarity "
               + ", ".join(f"{s} with {chance:.0%}" for s, chance in curve.items()))
    print0(f"{out}: {tokens:,} tokens of {manifest['vocab_size']:,} ids, "
           f"{size / max(1, tokens):.2f} bytes/token, {seconds:.1f} s")
    if sum(lost.values()) > total / 2:
        rule, count = lost.most_common(1)[0]
        print0(f"warning: {sum(lost.values()) / total:.0%} of the documents were dropped, {count:,}"
               f" by {rule}. If they were good, this rule is not made for them: --skip {rule}")


# ------------------------------------------------------------------------------------------------
# Tokenizer


def count_pieces(texts):
    """{piece of the GPT-4 split: how often}, without the longest: they are junk that costs time."""
    pieces = Counter()
    for text in texts:
        for part in cut_text(text, PIECE):
            pieces.update(regex.findall(GPT4_SPLIT, part))
    return Counter({piece: n for piece, n in pieces.items() if len(piece) <= 256})


def train_bpe(counts, size):
    """Byte-level BPE: {bytes: id} of `size` tokens from {piece: how often}.

    The most frequent pair of neighbours becomes a token, again and again; ties go to the smallest
    ids. A word is a str of one character a token, chr(id), so merging is str.replace.
    A pair is born in the step that mints its newer member and then only gets rarer: a heap entry
    may be too high, never too low, and is put right when it comes up. So all counts are exact."""
    words, weights = [], []
    pairs, where = defaultdict(int), defaultdict(set)    # pair -> count, words that may hold it
    for number, (word, n) in enumerate(sorted(counts.items())):
        word = word.encode().decode("latin-1")           # byte b is chr(b)
        words.append(word)
        weights.append(n)
        for a, b in zip(word, word[1:]):
            pairs[a + b] += n
            where[a + b].add(number)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    while heap and len(tokens) < size:
        n, pair = heapq.heappop(heap)
        if pairs[pair] != -n:
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if n > -2:
            break    # no pair occurs twice
        new, born = chr(len(tokens)), set()
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        for number in where.pop(pair):
            word, n = words[number], weights[number]
            for a, b in zip(word, word[1:]):
                pairs[a + b] -= n
            words[number] = word = word.replace(pair, new)    # left to right, without overlap
            for a, b in zip(word, word[1:]):
                pairs[a + b] += n
                if new in (a, b):
                    where[a + b].add(number)
                    born.add(a + b)
        for pair in born:
            heapq.heappush(heap, (-pairs[pair], pair))
    assert len(set(tokens)) == len(tokens)
    return {token: i for i, token in enumerate(tokens)}


def trained_tokenizer(counts, vocab_size):
    size = vocab_size - 4                           # the control tokens of make_encoding, and its
    if vocab_size > 1024:                           # rounding, which shall not leave ids unused
        size = -(-vocab_size // 64) * 64 - 4
    if size < 256:
        fail(f"--vocab_size {vocab_size}: at least 260, for 256 bytes and 4 control tokens")
    ranks = train_bpe(counts, size)
    if len(ranks) < size:
        fail(f"--vocab_size {vocab_size}: this text supports at most {len(ranks) + 4} ids, then no "
             f"two tokens stand together twice; ask for fewer or give more text")
    return make_encoding("bpe", GPT4_SPLIT, ranks)


def chars_tokenizer(letters):
    """One id for each character, in code point order."""
    return make_encoding("chars", r"[\s\S]", {c.encode(): i for i, c in enumerate(sorted(letters))})


def named_tokenizer(name):
    """A tokenizer that exists: bytes, gpt2, a rank file, or one of ours."""
    path = Path(name)
    if name == "bytes":
        return make_encoding("bytes", GPT4_SPLIT, {bytes([i]): i for i in range(256)})
    if name == "gpt2":
        socket.setdefaulttimeout(20)
        try:
            enc = tiktoken.get_encoding(name)
        except Exception as e:    # of requests, urllib3, sockets, files: no file and no network
            folder = os.environ.get("TIKTOKEN_CACHE_DIR", "a folder named by TIKTOKEN_CACHE_DIR")
            fail(f"--tokenizer gpt2: cannot download it ({type(e).__name__}); put two files of "
                 f"tiktoken's cache into {folder}: 6d1cbeee0f20b3d9449abfede4726ed8212e3aee and "
                 f"6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")    # sha1 of their addresses
        return make_encoding(name, enc._pat_str, enc._mergeable_ranks, enc._special_tokens)
    if not path.exists():
        fail(f"--tokenizer {name}: choose train, bytes, chars, gpt2, a .tiktoken file, a tokens "
             f"folder or a checkpoint of ours")
    if path.name == "tokenizer.json":
        return import_tokenizer(path)[0]
    if path.suffix == ".pt" or (path / "tokenizer.json").exists():
        return encoding_from_dict(load_checkpoint(path, "python pretrain.py")["encoding"])
    try:
        if path.suffix == ".tiktoken":
            return encoding_from_dict(dict(name=path.stem, pattern=GPT4_SPLIT, special_tokens={},
                                           ranks=path.read_text().strip()))
        file = path if path.name == "encoding.json" else path / "encoding.json"
        return encoding_from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as e:
        fail(f"--tokenizer {path}: damaged or none of ours ({type(e).__name__}: {e})")


# ------------------------------------------------------------------------------------------------
# Encode and write

PIECE = 1 << 20    # characters; longer texts are encoded in pieces, so that memory stays small


def cut_text(text, size):
    """Pieces of at most `size` characters, cut where no split pattern joins: before the blank or
    line end between two words. Only a text without such a place is cut elsewhere."""
    start = 0
    while len(text) - start > size:
        end, low, place = start + size, max(start + 1, start + size - 5000), None
        for place in re.finditer(r"(?<=\w)[ \n](?=[^\W\d_])", text[low:end]):
            pass
        end = low + place.start() if place else end
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def encode(enc, text):
    """The ids of a text, as plain text whatever it spells, and the end-of-text id."""
    ids = [enc.encode_to_numpy(piece, disallowed_special=()) for piece in cut_text(text, PIECE)]
    return np.concatenate([*ids, np.array([enc._special_tokens[ENDOFTEXT]], np.uint32)])


def write_ids(f, ids, dtype):
    """Append little-endian ids to a file; one that does not fit is an error, never wrapped."""
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise ValueError(f"id {int(ids.max())} does not fit {np.dtype(dtype).name}")
    f.write(ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())


def encode_texts(enc, texts, path, dtype):
    """Write the ids of (number, text) to a file. Returns [(number, ids, bytes of the text)]."""
    rows = []
    with open(path, "wb") as f:
        for number, text in texts:
            ids = encode(enc, text)
            write_ids(f, ids, dtype)
            rows.append((number, len(ids), len(text.encode())))
    return np.array(rows, np.int64).reshape(-1, 3)


def join_files(files, path):
    with open(path, "wb") as joined:
        for file in files:
            with open(file, "rb") as f:
                shutil.copyfileobj(f, joined, 1 << 22)


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# Split and mix


def train_characters(docs, kept, cluster_key, cfg):
    """How many characters of each document are for training; the rest of it is for validation."""
    chars = docs["chars"] * kept
    if cfg.split == "tail":
        left = int(chars.sum() * (1 - cfg.val_fraction))
        return np.clip(left - (np.cumsum(chars) - chars), 0, chars)
    if 0 < kept.sum() * cfg.val_fraction < 4:
        print0(f"split: {kept.sum()} documents are too few to pick some by hash; the last "
               f"{cfg.val_fraction:.0%} of each is for validation")
        return (chars * (1 - cfg.val_fraction)).astype(np.int64)
    draw = cluster_key ^ np.uint64(hash64(str(cfg.seed).encode()))
    return np.where(draw / 2.0 ** 64 < cfg.val_fraction, 0, chars)


def epochs(weights, sizes, power):
    """How often each source is seen: its share goes as weight x size ^ power, the sum stays."""
    weights, sizes = np.array(weights, float), np.maximum(np.array(sizes, float), 1)
    return weights * sizes ** (power - 1) * (weights @ sizes) / (weights @ sizes ** power)


# ------------------------------------------------------------------------------------------------


def check(cfg):
    for name, fine, bounds in (
            ("val_fraction", 0 <= cfg.val_fraction < 1, "from 0 to below 1"),
            ("mix_power", 0 <= cfg.mix_power < math.inf, "0 or above"),
            *((name, getattr(cfg, name) >= 1, "at least 1")
              for name in ("bands", "rows", "shingle", "eval_words"))):
        if not fine:
            fail(f"--{name} {getattr(cfg, name)}: {bounds}")
    for name, known in (("skip", ALL_RULES), ("languages", [*FUNCTION_WORDS, *SCRIPTS])):
        for value in getattr(cfg, name):
            if value not in known:
                fail(f"--{name} {value}: choose from {' '.join(known)}")
    out = Path(cfg.out)
    if out.is_file() or out.exists() and any(out.iterdir()):
        try:
            ours = "encoding_hash" in json.loads((out / "manifest.json").read_text("utf-8"))
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            fail(f"--out {out} exists and is not a tokens folder; choose another, it would be lost")


def main(cfg):
    started, out = time.time(), Path(cfg.out).resolve()    # a link is kept, what it points to goes
    check(cfg)
    enc = None if cfg.tokenizer in ("train", "chars") else named_tokenizer(cfg.tokenizer)
    group, rank = None, 0    # one process, or a stage that calls this on one of its ranks
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        group, rank = dist.group.WORLD, dist.get_rank()
    sources = find_sources(cfg) if rank == 0 else None    # downloads what is asked for by name
    sources, pid = gather((sources, os.getpid()), group)[0]
    work = out.with_name(f".{out.name}.{pid}.tmp")
    try:
        manifest = prepare(cfg, sources, enc, work, rank, group)
        if rank == 0:
            old = work.with_suffix(".old")    # a half-written folder never has the final name
            if out.exists():
                os.replace(out, old)
            os.replace(work, out)
            shutil.rmtree(old, ignore_errors=True)
            report(manifest, Path(cfg.out), time.time() - started)
        gather(None, group)
    except OSError as e:
        fail(f"{e.filename or work}: {e.strerror or e}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if group:
            dist.destroy_process_group()    # else gloo's threads abort the process now and then


def prepare(cfg, sources, enc, work, rank, group):
    """Fill the working folder and return the manifest (on rank 0).

    All ranks know 100 bytes of every document; its text stays with the rank that read it."""
    def path(name, n):
        return work / "parts" / f"{name}.{n}"    # each chunk has files of its own

    def gathered(mine):
        return {n: value for theirs in gather(mine, group) for n, value in theirs.items()}

    # clean: every rank its chunks
    path("", 0).parent.mkdir(parents=True, exist_ok=True)
    searched = cfg.clean and "contaminated" not in cfg.skip and cfg.eval != "none"
    index = build_index(cfg) if searched else None
    (parts, chunks), words, mine, shown = plan(sources), Words(), {}, time.time()
    for n in range(rank, len(chunks), dist.get_world_size(group) if group else 1):
        mine[n] = clean_chunk(parts, chunks[n], path("text", n), cfg, index, words)
        if time.time() > shown + 10:
            shown = time.time()
            print0(f"  {n + 1} of {len(chunks)} chunks cleaned")
    bands = [np.zeros((0, cfg.bands), np.uint64), *(chunk.pop("bands") for chunk in mine.values())]
    every = [chunk for _, chunk in sorted(gathered(mine).items())]
    docs = np.concatenate([c["docs"] for c in every])
    counts = sum((c["counts"] for c in every), Counter())
    reasons = np.array([reason for c in every for reason in c["reasons"]], object)
    chunk_of = np.repeat(np.arange(len(chunks)), [len(c["docs"]) for c in every])
    first = np.searchsorted(chunk_of, np.arange(len(chunks) + 1))    # each chunk's first document
    size, root = docs["size"].astype(np.int64), np.arange(len(docs))
    starts = np.cumsum(size) - size
    starts -= starts[first[chunk_of]]    # in the file of its chunk

    def texts(times, n):
        """(number, text) of chunk n's documents, all with times > 0, then all with > 1, ..."""
        times = times[first[n]:first[n + 1]]
        with open(path("text", n), "rb") as f:
            for k in range(times.max(initial=0)):
                for i in first[n] + np.flatnonzero(times > k):
                    f.seek(starts[i])
                    yield i, f.read(size[i]).decode()

    # deduplicate, decontaminate
    if cfg.clean:
        numbers = np.flatnonzero(np.isin(chunk_of, [*mine]))
        reasons, root = duplicates(docs, reasons, numbers, np.concatenate(bands), cfg, group)
    if index:
        hits = [c["hits"] + np.array([first[n], 0], np.uint64) for n, c in enumerate(every)]
        goes, index["found"] = contaminated(np.concatenate(hits), reasons == "", index,
                                            cfg.eval_common)
        reasons[goes] = "contaminated"
    kept = reasons == ""
    if not kept.any():
        why = ", ".join(f"{n} {name}" for name, n in Counter(reasons).most_common(3)) or "no text"
        fail(f"--input {' '.join(cfg.input)}: nothing is left of {len(docs)} documents ({why}); "
             f"leave rules out with --skip, or all of them with --no-clean")

    # split by duplicate cluster, mix the sources
    cluster_key = docs["key"][:, 0].copy()
    np.minimum.at(cluster_key, root, docs["key"][:, 0])    # the same in any order of the input
    chars = train_characters(docs, kept, cluster_key[root], cfg)
    times = epochs([weight for weight, _ in sources],
                   np.bincount(docs["source"], size * (chars > 0), len(sources)), cfg.mix_power)
    for item, t in zip(cfg.input, times):
        if t > 4:
            print0(f"warning: {item} is seen {t:.1f} times; more than 4 epochs teach little")
    copies = np.floor(times[docs["source"]] + docs["key"][:, 1] / 2.0 ** 64).astype(int)
    copies, rest = copies * (chars > 0), 1 * (kept & (chars < docs["chars"]))
    if not copies.any():
        fail("no text is left for training; see --val_fraction and the weights")

    def train_texts(times, n):
        return ((i, text[:chars[i]]) for i, text in texts(times, n))

    def val_texts(n):
        return ((i, text[chars[i]:]) for i, text in texts(rest, n))

    # tokenizer, from the training text as it is mixed
    if cfg.tokenizer == "train":
        share = cfg.tokenizer_bytes / (copies * size).sum()
        sample = docs["key"][:, 0] * FACTOR / 2.0 ** 64 < share
        pieces = count_pieces(text for n in mine for _, text in train_texts(copies * sample, n))
        enc = trained_tokenizer(sum(gather(pieces, group), Counter()), cfg.vocab_size)
    elif cfg.tokenizer == "chars":
        letters = set()
        for n in mine:
            for _, text in texts(1 * (copies + rest > 0), n):
                letters.update(text)
        enc = chars_tokenizer(set().union(*gather(letters, group)))

    # encode: files for each chunk, which rank 0 puts together
    dtype = np.dtype(np.uint16 if enc.n_vocab <= 2 ** 16 else np.uint32)
    encoded = {}
    for n in mine:
        for name, part in (("train", train_texts(copies, n)), ("val", val_texts(n))):
            encoded[name, n] = encode_texts(enc, part, path(name, n), dtype)
        if cfg.dropped:
            with open(path("dropped", n), "w") as f:
                for i, text in texts(1 * ~kept, n):
                    row = dict(document=document_name(docs[i], parts), reason=reasons[i], text=text)
                    f.write(json.dumps(row) + "\n")
    encoded = gathered(encoded)
    if rank:
        return None
    manifest = dict(format=1, dtype=dtype.name, vocab_size=enc.n_vocab,
                    encoding_hash=encoding_hash(enc), tokens={}, documents={}, bytes={}, sha256={})
    for name in ("train", "val"):
        numbers, lengths, sizes = np.concatenate([encoded[name, n] for n in range(len(chunks))]).T
        join_files([path(name, n) for n in range(len(chunks))], work / f"{name}.bin")
        with open(work / f"{name}.idx", "wb") as f:
            write_ids(f, np.cumsum(lengths), np.uint64)
        if name == "train":
            with open(work / "train.copies", "wb") as f:
                write_ids(f, np.bincount(root)[root[numbers]], np.uint32)
        manifest["documents"][name], manifest["tokens"][name] = len(numbers), int(lengths.sum())
        manifest["bytes"][name] = int(sizes.sum())
        manifest["sha256"][name] = file_hash(work / f"{name}.bin")
    manifest.update(describe(cfg, sources, parts, docs, reasons, counts, times, bool(index)))
    (work / "encoding.json").write_text(json.dumps(encoding_to_dict(enc), indent=1))
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (work / "manifest.json").write_bytes(text.encode("utf-8", "replace"))    # names of files
    if index:
        np.savez(work / "eval_index.npz", **{name: index[name] for name in INDEX})    # no dates
    if cfg.dropped:
        join_files([path("dropped", n) for n in range(len(chunks))], work / "dropped.jsonl")
    shutil.rmtree(work / "parts")
    return manifest


def describe(cfg, sources, parts, docs, reasons, counts, times, searched):
    """What the manifest says of the text: where it is from, and what became of it."""
    of = [docs[docs["source"] == n] for n in range(len(sources))]
    sources = [
        dict(input=cfg.input[n], weight=weight, epochs=round(float(times[n]), 4), files=len(files),
             documents=len(of[n]), bytes=int(of[n]["read"].sum()),
             broken_utf8=counts[n, "broken", ""],
             licences={k[2]: counts[k] for k in sorted(counts, key=str) if k[:2] == (n, "licence")},
             newest=max((k[2] for k in counts if k[:2] == (n, "date")), default=""))
        for n, (weight, files) in enumerate(sources)]
    curve = {}    # Jaccard similarity -> chance to be found
    if cfg.clean and "near_duplicate" not in cfg.skip:
        curve = {str(s): round(s_curve(s, cfg.bands, cfg.rows), 4)
                 for s in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)}
    steps = list(STEPS)[:6 if searched else 5 if cfg.clean else 1]
    return dict(sources=sources, knowledge_cutoff=max(source["newest"] for source in sources),
                settings={k: v for k, v in asdict(cfg).items() if k != "out"},
                near_duplicates=curve, ledger=make_ledger(steps, docs, reasons, counts, parts))


if __name__ == "__main__":
    main(parse_args(Config))
