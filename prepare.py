"""Turn raw, dirty text into clean tokens: the first stage, and the most underrated one.

In:   files, folders or globs of .txt .md .jsonl .json .html .warc .wet (also .gz .zst), .parquet,
      or a data set to download by its short name (tinystories, fineweb-edu, ...)
Out:  out/tokens/ with train.bin val.bin (little-endian ids), train.idx val.idx (where documents
      end, uint64), encoding.json (the tokenizer), manifest.json (counts, hashes, settings, and the
      ledger: what was dropped and why), train.copies (how often each document was found, uint32)
      and eval_index.npz (hashes of the evaluation items, for evaluate.py)

    python prepare.py                                    # the embedded data
    python prepare.py --input corpus/ --vocab_size 8192  # your own files
    torchrun --nproc_per_node=8 prepare.py --input crawl/*.warc.gz    # the same bytes, sooner
    python prepare.py --input shakespeare.txt --tokenizer chars --no-clean --split tail

Steps: gather, extract, normalise, filter, scrub, deduplicate, decontaminate, split, mix, tokenize.
Rules made for web pages (Gopher's quality, C4, FineWeb) apply to HTML, WARC, WET and to rows with a
url, those against repetition and spam not to rows of questions or chats; --web changes that.
Ranks share the folder of --out. Texts longer than 16 MB are cut at a line end.

What to expect: the embedded data in 3 s, your own at 2 MB/s a core; memory for a chunk of text and
500 bytes a document; the same bytes from the same input and seed, for any number of ranks.

Sources: Gopher (arXiv 2112.11446, app. A), C4 (1910.10683), FineWeb (2406.17557) and datatrove,
jusText (Pomikalek 2011), MinHash in bands as in Lee et al. (2107.06499), GPT-3's decontamination
(2005.14165, app. C), byte-level BPE (Sennrich et al., 1508.07909; GPT-2) with rustbpe's tie rule.
Differs: words are what blanks separate; stop words ignore case; an n-gram repeats if it occurs
twice; a contaminated document goes whole; languages are told by function words, not by fastText;
toxic pages by the density of insults, not by one word.
"""
import gzip
import hashlib
import heapq
import html
import http.client
import io
import ipaddress
import itertools
import json
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


@dataclass
class Config:
    # input and output
    input: list[str] = field(default_factory=lambda: ["data/raw/*"])  # PATH[:WEIGHT] ...
    out: str = "out/tokens"  # folder to write
    downloads: str = "out/downloads"  # where data sets fetched by name are kept
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
    skip: list[str] = field(default_factory=list)  # rules to leave out, as the ledger names them
    web: Literal["auto", "all", "none"] = "auto"  # what to treat as web pages, with all rules
    languages: list[str] = field(default_factory=lambda: ["en"])  # to keep: en de fr es zh ru ...
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
    eval: str = "data/eval"  # evaluation items (.jsonl files) to keep out, or an eval_index.npz
    eval_words: int = 13  # words in a row that give an item away
    eval_common: int = 10  # what is in more documents than this is a phrase, not a leak


# ------------------------------------------------------------------------------------------------
# Ranks: one process, or torchrun's


def join():
    """The process group for exchanging numbers on the CPU, None in one process.

    A stage that has a process group calls prepare on one of its ranks, which then works alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return None
    dist.init_process_group("gloo")
    return dist.group.WORLD


def gather(x, group):
    """[x of rank 0, x of rank 1, ...] on every rank; also where ranks wait for each other."""
    if group is None:
        return [x]
    every = [None] * dist.get_world_size(group)
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
PART = 1 << 24       # bytes; longer .txt and .jsonl files are read in parts, longer texts are cut
CHUNK = 1 << 24      # bytes; a rank's unit of work
ROW, TEXT, PAGE = range(3)    # kinds of text: from the fields of a row, plain text, a web page
TEXT_FIELDS = ("text", "content", "messages", "conversations", "question answer",
               "instruction input output", "instruction output", "prompt completion",
               "prompt response", "prompt chosen", "chosen", "prompt")
HUB = "https://huggingface.co/datasets/"
GITHUB = "https://raw.githubusercontent.com/"
DATASETS = {    # short name: (address, sha256 where known, licence and size); also of sft.py, dpo.py
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
    sources, unknown = [], []
    for item in cfg.input:
        m = None if Path(item).exists() else re.fullmatch(r"(.+):(\d+(?:\.\d+)?)", item)
        path, weight = Path(m[1] if m else item), float(m[2]) if m else 1.0
        if str(path) in DATASETS and not path.exists():
            path = download(*DATASETS[str(path)][:2], cfg.downloads)
        if path.is_file() and file_kind(path) not in READERS:
            fail(f"{path}: unknown format; prepare reads {' '.join(READERS)}, also as .gz or .zst")
        if item in Config().input and not any(Path().glob(item)):
            path = HERE / item    # a run from another folder finds the embedded data
        matches = [path] if path.exists() else Path(path.anchor).glob(
            str(path.relative_to(path.anchor)))
        files = sorted(f for p in matches for f in (p.rglob("*") if p.is_dir() else [p])
                       if f.is_file() and not f.name.startswith("."))
        unknown += [f.name for f in files if file_kind(f) not in READERS]
        files = [f for f in files if file_kind(f) in READERS]
        if not files:
            fail(f"--input {item}: no {' '.join(READERS)} file there")
        sources.append((weight, files))
    if unknown:
        print0(f"skipped {len(unknown)} files of unknown format: {', '.join(unknown[:3])}"
               + ", ..." * (len(unknown) > 3))
    return sources


def file_kind(path):
    """The suffix that decides how a file is read: corpus.jsonl.gz -> .jsonl"""
    return Path(re.sub(r"\.(gz|zst)$", "", path.name.lower())).suffix


def plan(sources):
    """Chunks, lists of (source, file, from byte, to byte): the same for any number of ranks."""
    chunks, size = [[]], 0
    for source, (_, files) in enumerate(sources):
        for path in files:
            length = path.stat().st_size
            splits = path.suffix.lower() in (".txt", ".md", ".jsonl")
            for start in range(0, max(1, length), PART if splits else max(1, length)):
                if size >= CHUNK:
                    chunks, size = [*chunks, []], 0
                chunks[-1].append((source, path, start, min(length, start + PART)))
                size += min(length - start, PART)
    return chunks


def line_start(f, at, limit):
    """The first line start from byte `at` on; in text without lines, a place between characters."""
    if at:
        f.seek(at - 1)
        f.readline(limit)
        while (byte := f.peek(1)[:1]) and byte[0] & 0xC0 == 0x80:
            f.read(1)
    return f.tell() if at else 0


def read_part(path, start, end, cfg, unreadable):
    """Yield (number, record) of one part of a file; others go to unreadable(number, reason).

    More than 1 % of those is an error, and so is a compressed file that ends early."""
    seen = bad = 0
    first = None
    try:
        with open(path, "rb") as f:
            magic, size = f.read(4), LARGEST + 1
            f.seek(0)
            if magic[:2] == b"\x1f\x8b":
                if start:
                    return    # a compressed file is read as one part
                f = gzip.GzipFile(fileobj=f)
            elif magic == b"\x28\xb5\x2f\xfd":
                f = io.BufferedReader(optional("zstandard").ZstdDecompressor().stream_reader(
                    f, read_across_frames=True))
            elif file_kind(path) in (".txt", ".md", ".jsonl"):
                limit = -1 if file_kind(path) == ".jsonl" else 1 << 20
                size = line_start(f, end, limit) - (start := line_start(f, start, limit))
                f.seek(start)
            records = READERS[file_kind(path)](f, size, cfg)
            for number, (place, record) in enumerate(records):
                seen += 1
                if isinstance(record, dict):
                    yield number, record
                    continue
                bad, first = bad + 1, first or f"{place}: {record}"
                unreadable(number, record)
                if bad > 100 and bad > 0.01 * seen:
                    break
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        fail(f"{path}: damaged gzip after {seen} documents ({e}); fetch the file again")
    if bad > 0.01 * seen:
        fail(f"{path}{f' from byte {start}' if start else ''}: {bad} of {seen} records cannot be "
             f"read, the first at {first}")


def optional(package):
    try:
        return __import__(package, fromlist=["x"])
    except ImportError:
        fail(f"this file needs a package: pip install {package.split('.')[0]}")


def decode(data, charset=""):
    """(text, how many byte sequences were invalid and became U+FFFD)"""
    charset = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else charset
    for name in ("utf-8", charset or "utf-8"):
        try:
            return data.decode(name), 0
        except (UnicodeDecodeError, LookupError):
            continue
    text = data.decode("utf-8", errors="replace")
    return text, text.count("\ufffd")


def record_of(text, broken, kind, **origin):
    if broken > 0.1 * len(text):
        return "not UTF-8 text"
    return dict(text=text, broken=broken, kind=kind, **origin)


def read_txt(f, size, cfg):
    data = f.read(size)
    if len(data) > LARGEST or data[:2] == b"\x1f\x8b":
        yield "its start", "too large unpacked" if len(data) > LARGEST else "gzip inside gzip"
        return
    text, broken = decode(data)
    blocks = re.split(r"\n(?:[ \t\r]*\n)+", text) if cfg.blocks else [text]
    for number, block in enumerate(blocks):
        yield f"block {number + 1}", record_of(block, broken and block.count("\ufffd"), TEXT)


def read_jsonl(f, size, cfg):
    size = size if size <= LARGEST else 1 << 62    # what is unpacked has no known size
    for number in itertools.count(1):
        line = f.readline(LARGEST) if size > 0 else b""
        if not line:
            return
        size -= len(line)
        text, broken = decode(line)
        try:
            if text.strip():
                yield f"line {number}", row_record(json.loads(text), broken)
        except (ValueError, RecursionError):
            yield f"line {number}", "not JSON"


def read_json(f, size, cfg):
    text, broken = decode(f.read(LARGEST))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        yield "its start", f"not JSON ({e}); a file with one object a line is named .jsonl"
        return
    if isinstance(rows, dict):
        rows = next((v for v in rows.values() if isinstance(v, list)), [rows])
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"item {number + 1}", row_record(row, 0)


def read_parquet(f, size, cfg):
    batches = optional("pyarrow.parquet").ParquetFile(f).iter_batches(1000)
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        yield f"row {number + 1}", row_record(row, 0)


def row_record(row, broken):
    """The text of a row: plain text, a question with its answer, or a chat; and its origin."""
    if isinstance(row, str):
        return record_of(row, broken, TEXT)
    if not isinstance(row, dict):
        return "neither an object nor text"
    for names in TEXT_FIELDS:
        values = [row.get(name) for name in names.split()]
        if all(v is not None for v in values):
            text = "\n".join(filter(None, map(flatten, values)))
            origin = {k: row[k] for k in ("url", "date", "license") if isinstance(row.get(k), str)}
            return record_of(text, broken, TEXT if names in ("text", "content") else ROW, **origin)
    return f"no text (fields: {', '.join(map(str, list(row)[:5]))})"


def flatten(value):
    """A string as it is; a list of chat turns as "Role: what was said" paragraphs."""
    if isinstance(value, dict):
        who = str(value.get("role", value.get("from", ""))).capitalize()
        said = flatten(value.get("content", value.get("value", value.get("text", ""))))
        return f"{who}: {said}" if who else said
    return "\n\n".join(map(flatten, value)) if isinstance(value, list) else str(value)


def read_html(f, size, cfg):
    yield "its start", html_record(f.read(LARGEST))


def html_record(data, charset="", **origin):
    found = re.search(rb"charset=[\"']?([\w-]{1,40})", data[:2048])
    page, broken = decode(data, charset or (found[1].decode() if found else ""))
    text = main_text(page)
    return record_of(text, broken and text.count("\ufffd"), PAGE, **origin)


def read_warc(f, size, cfg):
    """WARC 1.x and WET (ISO 28500): web pages, and pages that were already turned into text."""
    for number in itertools.count(1):
        line = f.readline(1 << 16)
        while line and not line.startswith(b"WARC/"):    # blank, or lost after a wrong length
            line = f.readline(1 << 16)
        if not line:
            return
        headers = read_headers(f)
        kind, length = headers.get("warc-type"), headers.get("content-length", "")
        length = int(length) if re.fullmatch(r"\d{1,12}", length) else LARGEST + 1
        block = f.read(length) if length <= LARGEST else b""
        if len(block) < length or f.read(4) != b"\r\n\r\n":
            yield f"record {number}", "wrong Content-Length"
            continue
        origin = dict(url=headers.get("warc-target-uri", ""), date=headers.get("warc-date", ""))
        if kind == "conversion":
            yield f"record {number}", record_of(*decode(block), PAGE, **origin)
        elif kind == "response":
            body, form = http_body(block)
            html_start = body[:500].lstrip().lower().startswith((b"<!doctype", b"<html"))
            if "html" in form or html_start:
                found = re.search(r"charset=([\w-]+)", form)
                yield f"record {number}", html_record(body, found[1] if found else "", **origin)


def read_headers(f):
    """`Name: value` up to a blank line; names ignore case, a leading blank continues a value."""
    headers, name = {}, None
    while (line := f.readline(1 << 16).decode("utf-8", "replace")).strip():
        if line[0] in " \t" and name:
            headers[name] += " " + line.strip()
        else:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            headers[name] = value.strip()
    return headers


def http_body(block):
    """(body, content type) of an HTTP response, chunks joined, compression undone within bounds."""
    f = io.BytesIO(block)
    f.readline()
    headers = read_headers(f)
    body, chunks = f.read(), []
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


READERS = {".txt": read_txt, ".md": read_txt, ".jsonl": read_jsonl, ".json": read_json,
           ".html": read_html, ".htm": read_html, ".warc": read_warc, ".wet": read_warc,
           ".parquet": read_parquet}


def download(address, sha256, folder):
    """Fetch an address into a folder, going on where an earlier try stopped. Returns the file."""
    path = Path(folder) / "-".join(urllib.parse.urlparse(address).path.split("/")[-2:])
    part, shown, failures, problem = path.with_name(path.name + ".part"), 0, 0, "cut off"
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        have = before = part.stat().st_size if part.exists() else 0
        try:
            wanted = {"Range": f"bytes={have}-"} if have else {}
            request = urllib.request.Request(address, headers=wanted)
            with urllib.request.urlopen(request, timeout=30) as response, open(part, "ab") as f:
                if response.status != 206:    # the server sends it from the start
                    f.truncate(0)
                    have = 0
                total = have + int(response.headers["Content-Length"])
                while block := response.read(1 << 20):
                    f.write(block)
                    have += len(block)
                    if time.time() - shown > 5:
                        shown = time.time()
                        print0(f"  {path.name}: {have / 1e6:,.0f} of {total / 1e6:,.0f} MB")
            if have == total:
                if sha256 and file_hash(part) != sha256:
                    part.unlink()
                    fail(f"{address} does not have sha256 {sha256}; was it changed?")
                part.replace(path)
        except (OSError, TypeError, http.client.HTTPException) as e:    # URLError is an OSError
            problem = e
        failures = 0 if have > before else failures + 1
        if failures == 3 and not path.exists():
            fail(f"cannot fetch {address} ({problem}); fetch it by hand and put it at {path}")
    return path


# ------------------------------------------------------------------------------------------------
# Extract: the running text of a page, by jusText's rules (links, length, function words)

RAW = {"script", "style", "textarea", "title"}    # what is inside is no markup
SILENT = set("head nav header footer aside form button iframe noscript select svg template".split())
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
BLOCKS = HEADINGS | set("""address article blockquote body caption center dd div dl dt figcaption
figure hr html li main ol p pre section table tbody thead tr ul""".split())
TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)[^<>]*>|<!--|<[!?/][^<>]*>")
LINE = "\x1e"    # stands for <br>


def html_blocks(page):
    """[(tag, text, characters inside links)] of a page; one pass, whatever the page looks like.

    Silent elements are deleted when they close, so one that never does costs nothing else."""
    blocks, silent, tag, parts, linked = [], [], "", [], 0
    link, pre, article, comments, pos = False, 0, 0, True, 0

    def close(opened):
        nonlocal tag, parts, linked
        text = "".join(parts)
        lines = text.strip("\n").split(LINE)
        lines = lines if pre else (" ".join(line.split()) for line in lines)
        if text := "\n".join(filter(str.strip, lines)):
            blocks.append((tag, text, linked))
        tag, parts, linked = opened, [], 0

    while True:
        m = TAG.search(page, pos)
        text = page[pos:m.start() if m else len(page)]
        parts.append(html.unescape(text) if "&" in text else text)
        linked += len(text) * link
        if m is None:
            close("")
            return blocks
        pos, name, ends = m.end(), (m[2] or "").lower(), bool(m[1])
        if m[0] == "<!--":
            end = page.find("-->", pos) if comments else -1
            pos, comments = (end + 3, True) if end >= 0 else (pos, False)    # in vain only once
        elif name in RAW and not ends:
            code = name in ("script", "style")    # unclosed, it goes on to the end; a title does not
            end = re.compile(f"</{name}", re.I).search(page, pos, len(page) if code else pos + 9999)
            pos = end.start() if end else len(page) if code else pos
        elif name == "a":
            link = not ends
        elif name in ("br", "td", "th"):
            parts.append(LINE if name == "br" else " ")
        elif name in SILENT and not (name == "header" and article):
            close("")
            at = next((i for i in range(len(silent) - 1, -1, -1) if silent[i][0] == name), None)
            if not ends and len(silent) < 100:
                silent.append((name, len(blocks)))
            elif ends and at is not None:
                del blocks[silent[at][1]:], silent[at:]
        elif name in BLOCKS:
            close("" if ends else name)
            article += (name in ("article", "main")) * (-1 if ends else 1)
            pre = max(0, pre + (name == "pre") * (-1 if ends else 1))
            link = link and not (ends and name in ("p", "li", "tr"))    # an <a> left open


def main_text(page):
    """The running text of a page, a line for each block, without menus, banners and footers."""
    blocks, kinds = html_blocks(page), []
    for tag, text, linked in blocks:
        words = text.lower().split()
        density = sum(w in ANY_FUNCTION_WORD for w in words) / len(words)
        if linked > 0.2 * len(text) or re.search(r"©\s?\d", text) or linked and len(text) < 70:
            kinds.append("bad")
        elif len(text) < 70 and tag != "pre":
            kinds.append("short")
        elif density >= 0.3 and len(text) >= 200:
            kinds.append("good")
        else:
            kinds.append("near" if tag == "pre" or density >= 0.15 else "bad")

    def around(ignored):
        """For each block, the kinds of the nearest not ignored ones before and behind it."""
        def sweep(kinds):
            last = "bad"
            for kind in kinds:
                yield last
                last = last if kind in ignored else kind
        return list(zip(sweep(kinds), [*sweep(kinds[::-1])][::-1]))

    if not {"good", "near"} & set(kinds):    # a page of a few words; let the rules judge it
        return "\n".join(text for (_, text, _), kind in zip(blocks, kinds) if kind == "short")
    # near-good blocks are good beside good ones (or where there are none), short ones between two
    alone = "good" not in kinds
    kinds = [k if k != "near" else "good" if alone or "good" in near else "bad"
             for k, near in zip(kinds, around(("short", "near")))]
    keep = [k == "good" or k == "short" and near == ("good", "good")
            for k, near in zip(kinds, around(("short",)))]
    ahead = 1000    # characters to the next good block; headings close before one stay
    for i in range(len(blocks) - 1, -1, -1):
        keep[i] |= blocks[i][0] in HEADINGS and kinds[i] == "short" and ahead < 200
        ahead = 0 if keep[i] else ahead + len(blocks[i][1])
    return "\n".join(text for (_, text, _), kept in zip(blocks, keep) if kept)


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


def utf8(text):
    """UTF-8 bytes; half surrogate pairs (JSON can spell them) become U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# ------------------------------------------------------------------------------------------------
# What each distinct word looks like, worked out once and looked up by numpy ever after

FUNCTION_WORDS = {code: set(words.split()) for code, words in {
    "en": """the of and to in is that it was for on with as his he be at by had not are but from
    have they which one you were all her she there would their we him been has when who will no
    more if out so what up its about than into them can only other some could these then do any my
    now over such our me did many must through where your how because each just those very i this
    or an a before after""",
    "de": """der die das und ist nicht ein eine einen einem einer zu den dem des mit von auf für im
    ich sie es er wir ihr sich auch aus bei nach wie oder aber wenn noch wird sind war hat haben
    nur um am so man über vor zum zur dass daß seine ihre mein alle beim seit ins""",
    "fr": """le la les un une des du de et est que qui dans pour pas sur au aux avec ce cette il
    elle nous vous ils ne se sa son ses plus par mais ou où on je à leur comme tout très sont été
    fait être avoir d'une qu'il c'est j'ai ma mon mes près si""",
    "es": """el la los las un una de del y que en es por para con no se lo su sus al como más pero
    o este esta yo le ha sin sobre muy me ya fue son está hay porque cuando todo también entre
    desde mi nunca si""",
    "it": """il lo la i gli le un una di del della e che è in per con non si da dal al alla nel
    nella sono ma come più anche o questo questa ho ha suo sua mi io se tutti molto ci era nei
    delle dei mia mio sul alle""",
    "pt": """o a os as um uma de do da dos das e que em no na para com não se por mais como mas ou
    ao à é seu sua ele ela eu foi são está muito também já quando até isso este esta pelo pela""",
    "nl": """de het een en van ik te dat die in is niet zijn op aan met als voor er maar om hem dan
    zou of wat mijn dit zo door over ze zich bij ook tot je uit naar heb heeft hebben nog wel geen
    was wij al haar alle na""",
    "sv": """och att det som en på är av för med den till inte om ett han men var jag sig från vi
    så kan när ska hade eller vid hon de har""",
    "pl": """i w na się z że nie do to jest o jak po co ale za od tak tego przez już dla był być
    czy są jego jej tym który które""",
    "tr": """ve bir bu da de için ile ne çok daha gibi ama olarak kadar değil ben sen o var yok her
    olan sonra mi en ki""",
}.items()}
ANY_FUNCTION_WORD = set().union(*FUNCTION_WORDS.values())
SCRIPTS = dict(zh="\u4e00-\u9fff", ja="\u3040-\u30ff", ko="\uac00-\ud7af", ru="\u0400-\u04ff",
               ar="\u0600-\u06ff", he="\u0590-\u05ff", el="\u0370-\u03ff", hi="\u0900-\u097f",
               th="\u0e00-\u0e7f")
STOP_WORDS = "the be to of and that have with".split()
INSULTS = """arsehole ass asshole assholes bastard bastards bitch bitches brainless bullshit
cretin cunt cunts dickhead dimwit dirtbag disgusting dumb dumbass dummy faggot faggots filth filthy
fool fools fuck fucked fucker fucking garbage hag hate hideous idiot idiotic idiots imbecile
jackass jerk lazy liar liars loser losers lowlife maggot miserable moron moronic morons
motherfucker nigger niggers pathetic pig prick psycho pussy retard retarded retards revolting scum
scumbag shit shitty slut sluts stinking stupid subhuman suck sucks thug thugs trash twat ugly
useless vermin vile wanker whore whores worm worthless""".split()
SALES = """amazing approval approved bargain bargains best bonus brand buy buying card cart
casino cash cheap cheapest checkout cialis claim click code congratulations coupon credit customers
deal deals debt delivery discount discounted discounts doctors dollars earn exclusive free gift
guarantee guaranteed hurry instant jackpot limited loan loans lottery lowest lucky money offer
offers online order payday percent pills pounds price prices prize profit promo purchase refund
replica risk sale sales satisfaction save savings secret shipping shop stock store subscribe trial
trick unbeatable unlock unsubscribe viagra visit wholesale win winner winners""".split()
INSULTS, SALES = ({word: n for n, word in enumerate(words, 1)} for words in (INSULTS, SALES))
WORD = np.dtype([("hash", "u8"), ("length", "i4"), ("letters", "?"), ("insult", "u2"),
                 ("sales", "u2"), ("stop", "u1"), ("languages", "u2"), ("first", "i4"),
                 ("matches", "i4")])


class Words(dict):
    """word -> its row in `table`: Python looks at a distinct word once, then a text is an array.

    `match` has the hashes of the words as matching sees them, `matches` of them from `first` on:
    lower case, numbers as 0, punctuation as blanks, no accents. "Don't" is don t, "--" nothing."""

    def __init__(self):
        self.table, self.match = np.zeros(4096, WORD), np.zeros(4096, "u8")
        self.used = self.size = 0

    def __missing__(self, word):
        i, plain = len(self), word.lower().strip(".,;:!?()[]\"“”‘’'")
        found = re.sub(r"[\W_]+", " ", re.sub(r"\d+(?:[.,]\d+)?", "0", word.lower()))
        if not found.isascii():    # no accents; some characters are words of their own
            found = unicodedata.normalize("NFD", found)
            found = "".join(c for c in found if unicodedata.category(c) != "Mn")
            found = re.sub(r"([\u3040-\u30ff\u4e00-\u9fff])", r" \1 ", found)
        found = [hash64(utf8(w)) for w in found.split()]
        while i >= len(self.table):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
        while self.used + len(found) > len(self.match):
            self.match = np.concatenate([self.match, np.zeros_like(self.match)])
        stop = 1 << STOP_WORDS.index(plain) if plain in STOP_WORDS else 0
        languages = sum((plain in known) << n for n, known in enumerate(FUNCTION_WORDS.values()))
        self.table[i] = (hash64(utf8(word)), len(word), any(map(str.isalpha, word)),
                         INSULTS.get(plain, 0), SALES.get(plain, 0), stop, languages,
                         self.used, len(found))
        self.match[self.used:self.used + len(found)] = found
        self.used, self.size = self.used + len(found), self.size + len(word) + 200
        self[word] = i
        return i

    def rows(self, text):
        words = text.split()
        at = np.fromiter(map(self.__getitem__, words), np.int64, len(words))    # fills the table
        return self.table[at]

    def forget(self):
        """Keep memory within bounds, however many words there are."""
        if self.size > 1 << 26:
            self.clear()
            self.__init__()

    def matching(self, rows):
        """The hashes of a text's matching words, in order."""
        n = rows["matches"]
        if (n == 1).all():
            return self.match[rows["first"]]
        ends = np.cumsum(n)
        return self.match[np.repeat(rows["first"] - (ends - n), n) + np.arange(ends[-1])]


def hash64(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


FACTOR = np.uint64(0x9E3779B97F4A7C15)


def growing(hashes, longest):
    """Yield (n, hashes of all runs of n words), n = 1 ... longest: polynomials modulo 2^64."""
    grams = hashes
    for n in range(1, longest + 1):
        if n > 1:
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
    counts = (bits[:, None] >> np.arange(len(FUNCTION_WORDS), dtype=np.uint16) & 1).sum(axis=0)
    hits = dict(zip(FUNCTION_WORDS, counts.tolist()))
    wanted = max((hits.pop(code) for code in cfg.languages if code in hits), default=0)
    other, most = max(hits.items(), key=lambda item: item[1], default=("", 0))
    if max(wanted, most) < cfg.min_function_words * len(bits):
        return "no function words"
    return f"language {other}" if wanted < cfg.min_language * (wanted + most) else None


def first_true(**checks):
    """The name of the first check that holds, as words, or None."""
    return next((name.replace("_", " ") for name, holds in checks.items() if holds), None)


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


BULLETS = ("•", "‣", "▪", "*", "-", "–")
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}    # Gopher table A1: characters of the most frequent n-gram
COPIED_NGRAM = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}    # and of repeated n-grams


def copied(parts):
    """(second and later copies, characters in them)"""
    counts = Counter(parts)
    if len(counts) == len(parts):
        return 0, 0
    return len(parts) - len(counts), sum((n - 1) * len(p) for p, n in counts.items())


def gopher_repetition(doc, cfg):
    """Gopher table A1: repeated lines, paragraphs and n-grams of words."""
    size, h, length = len(doc.text), doc.rows["hash"], doc.rows["length"]
    for name, parts in (("lines", doc.lines), ("paragraphs", re.split(r"\n\s*\n", doc.text))):
        count, chars = copied(parts)
        if count > cfg.max_repeated * len(parts) or chars > cfg.max_repeated_chars * size:
            return f"repeated {name}"
    ends = np.concatenate([[0], np.cumsum(length)])
    at, grams = np.arange(len(h)), h
    for n in range(2, 11):    # only where n - 1 words repeat can n words repeat
        at = at[:np.searchsorted(at, len(h) - n + 1)]
        grams = grams[:len(at)] * FACTOR + h[at + n - 1]
        ordered = np.sort(grams)
        runs = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
        counts = np.diff(runs)
        if counts.max(initial=0) < 2:
            return None
        if n in TOP_NGRAM:
            here = at[np.isin(grams, ordered[runs[:-1][counts == counts.max()]])]
            if (ends[here + n] - ends[here] + n - 1).max() * counts.max() > TOP_NGRAM[n] * size:
                return f"top {n}-gram"
        values = ordered[runs[:-1][counts > 1]]
        again = values[np.searchsorted(values, grams) % len(values)] == grams
        at, grams = at[again], grams[again]
        if n in COPIED_NGRAM:
            seen, total, end = set(), 0, 0
            for i, gram in zip(at.tolist(), grams.tolist()):    # count a repeat and step over it
                if i >= end and gram in seen:
                    total, end = total + ends[i + n] - ends[i], i + n
                elif i >= end:
                    seen.add(gram)
            if total > COPIED_NGRAM[n] * size:
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


def phone(text):
    return 10 <= sum(c.isdigit() for c in text) <= 15


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
    ("<CARD>", NUMBER, r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?!\w|-\d)", luhn),
    ("<SSN>", NUMBER, r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])", None),
    ("<PHONE>", NUMBER, r"(?<![\w+])\+\d{1,3}(?:[ .()-]{0,2}\d{1,6}){2,6}(?!\w)"
     r"|(?<![\w.(-])(?:\d{3}[.-]|\(\d{3}\) ?)\d{3}[ .-]\d{4}(?![\w-])", phone))]


def scrub(text):
    """(text without personal data, {placeholder: how many})"""
    found, hints = Counter(), {}
    for placeholder, hint, pattern, check in PRIVATE:
        def replace(m):
            if check and not check(m[0]):
                return m[0]
            found[placeholder] += 1
            return placeholder
        if hint not in hints:
            hints[hint] = hint.search(text)
        text = pattern.sub(replace, text) if hints[hint] else text
    return text, found


# ------------------------------------------------------------------------------------------------
# Deduplicate: texts that are equal, have the same address, or share most of their shingles


def hash_functions(count):
    """(a, b): (a x + b mod 2^64) >> 32 is a strongly universal hash of 32-bit x."""
    rng = np.random.Generator(np.random.PCG64(20240601))
    a, b = rng.integers(0, 2 ** 64, (2, count), np.uint64)
    return a | np.uint64(1), b


def minhash(hashes, shingle, functions):
    """(count,) uint32 from a text's matching words; two texts agree in a share as their Jaccard."""
    *_, (_, grams) = growing(hashes, min(shingle, len(hashes)))
    a, b = functions
    low = np.full(len(a), np.iinfo(np.uint64).max)
    for i in range(0, len(grams), 512):    # blocks that stay in the cache
        h = np.multiply.outer(grams[i:i + 512] >> np.uint64(32), a)
        h += b
        np.minimum(low, h.min(axis=0), out=low)
    return (low >> np.uint64(32)).astype(np.uint32)


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


def same(rows):
    """Edges from the first number with a key to each other one. rows (N, c): a key, a number."""
    rows = rows[np.lexsort(rows.T[::-1])]
    new = np.ones(len(rows), bool)
    new[1:] = (rows[1:, :-1] != rows[:-1, :-1]).any(axis=1)
    first = rows[new, -1][np.cumsum(new) - 1]
    return np.stack([first, rows[:, -1]], axis=1)[~new].astype(np.int64)


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


def duplicates(docs, band_rows, cfg, group):
    """(verdict, root) of every document: which copy goes and why, and which cluster it is in.

    One of each cluster stays: of the first source, then the longest, then the first."""
    numbers = np.arange(len(docs))
    verdict, parent = np.full(len(docs), "", object), numbers.copy()

    def edges(name):
        if name == "exact_duplicate":
            return same(np.column_stack([docs["key"], numbers.astype(np.uint64)]))
        if name == "url_duplicate":
            chosen = (docs["url"] != 0) & (verdict == "")
            return same(np.column_stack([docs["url"], numbers.astype(np.uint64)])[chosen])
        found = []
        for band in range(cfg.bands):    # one at a time: 16 bytes a document
            rows = band_rows(band)
            rows = rows[verdict[rows[:, 1].astype(np.int64)] == ""]
            found += gather(same(exchange(rows, group)), group)
        return np.concatenate(found)

    for name in DUPLICATES:
        if name not in cfg.skip:
            union(parent, edges(name))
            root = roots(parent)
            length = docs["size"] * (name != "exact_duplicate")
            order = np.lexsort((numbers, -length, docs["source"], root))
            order = order[verdict[order] == ""]
            verdict[order[1:][root[order[1:]] == root[order[:-1]]]] = name
    return verdict, roots(parent)


# ------------------------------------------------------------------------------------------------
# Decontaminate: a hash index of the evaluation items

INDEX_FORMAT = 1


def item_text(row):
    """(question, right answer) of an evaluation item, or (its text, "")."""
    def said(value):
        if isinstance(value, list) and value:    # a chat: its last turn; several answers: the first
            value = value[-1]["content"] if isinstance(value[0], dict) else value[0]
        return value if isinstance(value, str) else ""
    question = next((said(row[k]) for k in ("prompt", "question", "query", "context") if k in row),
                    "")
    answer = next((said(row[k]) for k in ("answer", "continuation") if k in row), "")
    if isinstance(row.get("choices"), list) and isinstance(row.get("gold"), int):
        answer = row["choices"][row["gold"]]
    text = next((row[k] for k in ("text", "sentence", "sent_more") if k in row), "")
    return (question, answer.removeprefix("#### ")) if question else (said(text), "")


def build_index(cfg):
    """{"format", "names", for each n-gram: "hashes" (sorted), "lengths", "items"}, or None.

    Every eval_words words in a row that begin in the question count (an answer alone is knowledge,
    not a leak). A shorter item is one n-gram, lest phrases be leaks; questions of under 8 words,
    or 6 with the answer, are left out."""
    path = Path(cfg.eval) if Path(cfg.eval).exists() else HERE / cfg.eval
    if path.suffix == ".npz":
        return load_index(path)
    words, names, grams, lengths, items = Words(), [], [], [], []
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path] * path.exists():
        for number, line in enumerate(file.read_text("utf-8", "replace").splitlines()):
            try:
                row = json.loads(line)
                question, answer = (words.matching(words.rows(text)) for text in item_text(row))
            except (ValueError, TypeError, AttributeError, LookupError):
                fail(f"{file} line {number + 1} is not an evaluation item; see --eval")
            h = np.concatenate([question, answer])
            n = min(cfg.eval_words, len(h))
            if n >= (6 if len(answer) else 8):
                grams.append(dict(growing(h, n))[n][:len(question)])
                lengths.append(np.full(len(grams[-1]), n))
                items.append(np.full(len(grams[-1]), len(names)))
            names.append(str(row.get("id", f"{file.name}:{number + 1}")))
    if not grams:
        return None
    grams, lengths, items = (np.concatenate(x) for x in (grams, lengths, items))
    order = np.argsort(grams, kind="stable")
    return dict(format=INDEX_FORMAT, names=np.array(names), hashes=grams[order],
                lengths=lengths[order], items=items[order])


def save_index(index, path):
    """The entries named above and "found", items met in the text, as .npz without dates in it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("format", "names", "found", "hashes", "lengths", "items"):
            data = io.BytesIO()
            np.save(data, index[name])
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getvalue())


def load_index(path):
    """The eval_index.npz of a tokens folder; evaluate.py reads it too."""
    try:
        with np.load(path, allow_pickle=False) as f:
            index = dict(f)
        found = int(index["format"])
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as e:
        fail(f"{path} is not an index of evaluation items ({type(e).__name__})")
    if found != INDEX_FORMAT:
        fail(f"{path} is an index of format {found}, not {INDEX_FORMAT}; make it anew")
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
    goes, found = np.zeros(len(kept), bool), np.zeros(len(index["names"]), bool)
    goes[hits[np.isin(hits[:, 1], leaks), 0].astype(int)] = True
    found[index["items"][np.isin(index["hashes"], leaks)]] = True
    return goes, found


# ------------------------------------------------------------------------------------------------
# The ledger: (step, kind, name) -> [documents, bytes, examples], kind being kept, dropped, changed

STEPS = ("read", "normalise", "filter", "scrub", "deduplicate", "decontaminate")


def note(ledger, step, kind, name, documents=1, size=0, examples=()):
    entry = ledger.setdefault((step, kind, name), [0, 0, []])
    entry[0] += documents
    entry[1] += size
    entry[2] = [*entry[2], *examples][:3]


def drop(ledger, step, reason, document, text, file):
    """Note a dropped document; file, if any, takes all of it as a JSON line."""
    example = f"{document}: {' '.join(text[:200].split())[:60]}"
    note(ledger, step, "dropped", reason, 1, len(utf8(text)), [example])
    if file:
        file.write(json.dumps(dict(document=document, reason=reason, text=text)) + "\n")


def merge(ledgers):
    total = {}
    for ledger in ledgers:
        for key, entry in ledger.items():
            note(total, *key, *entry)
    return total


def ledger_rows(ledger):
    """The ledger for the manifest: step by step, the frequent first, what was kept last."""
    order = {kind: i for i, kind in enumerate(("changed", "dropped", "kept"))}
    keys = [key for key in ledger if key[0] in STEPS]
    keys.sort(key=lambda k: (STEPS.index(k[0]), order[k[1]], -ledger[k][0], k[2]))
    return [dict(step=step, kind=kind, name=name, documents=ledger[step, kind, name][0],
                 bytes=ledger[step, kind, name][1], examples=ledger[step, kind, name][2])
            for step, kind, name in keys]


def source_facts(ledger, number):
    """What the manifest says about an --input: its size, its licences, the newest date in it."""
    facts = {key[1:]: entry for key, entry in ledger.items() if key[0] == number}
    documents, size, _ = facts.get(("read", ""), (0, 0, 0))
    return dict(documents=documents, bytes=size, broken_utf8=facts.get(("broken", ""), [0])[0],
                licences={k[1]: e[0] for k, e in sorted(facts.items()) if k[0] == "licence"},
                newest=max((k[1] for k in facts if k[0] == "date"), default=""))


def report(manifest, out, seconds):
    """Print the ledger, and what to be wary of."""
    lost, total = Counter(), 0
    print0(f"\n{'':<38}{'documents':>11}{'bytes':>15}   for example")
    for row in manifest["ledger"]:
        name, sign = "  " + row["name"], -1 if row["kind"] == "dropped" else 1
        if row["kind"] == "kept":
            name, total = row["step"], max(total, row["documents"])
        elif sign < 0:
            lost[row["name"].split(":")[0]] += row["documents"]
        size = f"{sign * row['bytes']:>15,}" if row["bytes"] else " " * 15
        example = row["examples"][0].split(": ", 1)[1][:32] if row["examples"] else ""
        print0(f"{name:<38}{sign * row['documents']:>11,}{size}   {example}")
    for part in ("train", "val"):
        print0(f"{part:<38}{manifest['documents'][part]:>11,}{manifest['bytes'][part]:>15,}"
               f"   {manifest['tokens'][part]:,} tokens")
    if curve := manifest["near_duplicates"]:
        print0("near duplicates are found at similarity "
               + ", ".join(f"{s} with {chance:.0%}" for s, chance in curve.items()))
    tokens, size = sum(manifest["tokens"].values()), sum(manifest["bytes"].values())
    print0(f"{out}: {tokens:,} tokens of {manifest['vocab_size']:,} ids, "
           f"{size / max(1, tokens):.2f} bytes/token ({seconds})")
    if sum(lost.values()) > total / 2:
        rule, count = lost.most_common(1)[0]
        print0(f"warning: {sum(lost.values()) / total:.0%} of the documents were dropped, {count:,}"
               f" by {rule}. If they were good, this rule is not made for them: --skip {rule}")


# ------------------------------------------------------------------------------------------------
# Clean: a chunk of records -> its text in the working folder, and a row of numbers a document

DOC = np.dtype([("size", "i8"), ("chars", "i8"), ("key", "u8", 2), ("url", "u8"), ("source", "i4"),
                ("part", "i4"), ("at", "i8")])
NO_KEY = bytes(c for c in range(128) if not chr(c).isalnum())


def clean(text, kind, words, cfg, ledger):
    """(Doc of the text normalised, filtered and scrubbed, why it must go or None)"""
    if not text.isascii() and "repair" not in cfg.skip:
        text, before = repair(text), text
        if text != before:
            note(ledger, "normalise", "changed", "texts with mojibake repaired")
    doc = Doc(normalise(text), words)
    if not doc.text:
        return doc, "empty"
    note(ledger, "normalise", "kept", "", 1, len(utf8(doc.text)))
    for rule in RULES:
        if rule.__name__ not in cfg.skip and kind >= RULES[rule]:
            size = len(doc.text)
            if reason := rule(doc, cfg):
                return doc, f"{rule.__name__}: {reason}"
            if len(doc.text) != size:
                note(ledger, "filter", "changed", "texts with lines cut out by c4")
                doc = Doc(doc.text, words)
    note(ledger, "filter", "kept", "", 1, len(utf8(doc.text)))
    text, found = (doc.text, {}) if "scrub" in cfg.skip else scrub(doc.text)
    for placeholder, count in found.items():
        note(ledger, "scrub", "changed", placeholder, count)
    note(ledger, "scrub", "kept", "", 1, len(utf8(text)))
    return Doc(text, words) if found else doc, None


def clean_chunk(number, parts, work, cfg, index, words):
    """Writes the texts that stay to <number>.text, with --dropped the others to <number>.dropped.

    Returns dict(ledger, docs (N,) DOC, hits (., 2): document and evaluation n-gram, minhashes)."""
    ledger, rows, hits, minhashes = {}, [], [np.zeros((0, 2), np.uint64)], []
    functions = hash_functions(cfg.bands * cfg.rows)
    with open(work / f"{number}.text", "wb") as f, open(work / f"{number}.dropped", "w") as lost:
        lost = lost if cfg.dropped else None
        for i, (source, path, start, end) in enumerate(parts):
            def unreadable(at, reason):
                drop(ledger, "read", reason, document_name(parts[i], at), "", lost)

            for at, record in read_part(path, start, end, cfg, unreadable):
                url = url_key(record.get("url", ""))
                kind = dict(auto=PAGE if url else record["kind"], all=PAGE, none=ROW)[cfg.web]
                note(ledger, source, "read", "", 1, len(utf8(record["text"])))
                note(ledger, source, "broken", "", record["broken"] > 0)
                note(ledger, source, "date", record.get("date", "")[:10])
                note(ledger, source, "licence", record.get("license", "not stated"))
                for text in cut_text(record["text"], PART):
                    note(ledger, "read", "kept", "", 1, len(utf8(text)))
                    doc, reason = None, None if text.strip() else "empty"
                    if cfg.clean:
                        doc, reason = clean(text, kind, words, cfg, ledger)
                        text = doc.text
                    if reason:
                        drop(ledger, "filter", reason, document_name(parts[i], at), text, lost)
                        continue
                    data = key = utf8(text)
                    if cfg.clean:
                        key = utf8(text.lower()).translate(None, NO_KEY) or data
                        h = words.matching(doc.rows)
                        h = h if len(h) else np.array([hash64(data)], np.uint64)
                        if "near_duplicate" not in cfg.skip:
                            minhashes.append(minhash(h, cfg.shingle, functions))
                        if index and len(found := lookup(index, h)):
                            hits.append(np.stack([np.full_like(found, len(rows)), found], axis=1))
                    key = np.frombuffer(hashlib.blake2b(key, digest_size=16).digest(), "<u8")
                    rows.append((len(data), len(text), key, url and hash64(utf8(url)) or 0, source,
                                 i, at))
                    f.write(data)
                words.forget()
    return dict(ledger=ledger, docs=np.array(rows, DOC), hits=np.concatenate(hits),
                minhashes=np.array(minhashes, np.uint32).reshape(-1, cfg.bands * cfg.rows))


def document_name(part, at):
    """pages/007.html#0, raw/corpus.jsonl@16777216#12: file, first byte of the part, record."""
    _, path, start, _ = part
    return f"{path.parent.name}/{path.name}{f'@{start}' if start else ''}#{at}"


# ------------------------------------------------------------------------------------------------
# Tokenizer


def count_pieces(texts):
    """{piece of the GPT-4 split: how often}.

    Words with the blanks before them are counted first, and only distinct ones go through the slow
    pattern: no piece goes on behind a word, save for line ends behind symbols."""
    pieces, words = Counter(), Counter()
    for text in itertools.chain(texts, [None]):
        if text is not None:
            words.update(regex.findall(r"\s*+\S++(?:(?<=[^\s\p{L}\p{N}])[\r\n]++)?|\s++", text))
        if text is None or len(words) > 1_000_000:
            for word, n in words.items():
                for piece in regex.findall(GPT4_SPLIT, word):
                    if len(piece) <= 256:    # longer ones are junk that costs time
                        pieces[piece] += n
            words.clear()
    return pieces


def train_bpe(counts, size):
    """Byte-level BPE: {bytes: id} of `size` tokens from {piece: how often}.

    The most frequent pair of neighbours becomes a token, again and again; ties go to the smallest
    ids. A word is a str of one character a token, chr(id), so merging is str.split and str.join.
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
        left, right = pair
        new = chr(len(tokens))
        tokens.append(tokens[ord(left)] + tokens[ord(right)])
        born = set()
        for number in where.pop(pair):
            parts, n = words[number].split(pair), weights[number]
            words[number] = new.join(parts)
            for k in range(len(parts) - 1):    # an occurrence stands between parts k and k + 1
                before, after = parts[k][-1:], parts[k + 1][:1]
                if before:
                    pairs[before + left] -= n
                elif k:
                    before = new               # two of them touch; their pair is counted here
                if after:
                    pairs[right + after] -= n
                elif k < len(parts) - 2:
                    pairs[right + left] -= n
                for fresh in (before and before + new, after and new + after):
                    if fresh:
                        pairs[fresh] += n
                        where[fresh].add(number)
                        born.add(fresh)
        del pairs[pair]
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


TIKTOKEN_FILES = dict(    # sha1 of their addresses, the names of the files in tiktoken's cache
    gpt2="6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    cl100k_base="9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    o200k_base="fb374d419588a4632f3f557e76b4b70aebbca790")


def named_tokenizer(name):
    """A tokenizer that exists: bytes, one of tiktoken's by name, a rank file, or one of ours."""
    path = Path(name)
    if name == "bytes":
        return make_encoding("bytes", GPT4_SPLIT, {bytes([i]): i for i in range(256)})
    if name in tiktoken.list_encoding_names():
        socket.setdefaulttimeout(20)
        try:
            enc = tiktoken.get_encoding(name)
        except Exception as e:    # of requests, urllib3, sockets, files: no file and no network
            folder = os.environ.get("TIKTOKEN_CACHE_DIR", "a folder named by TIKTOKEN_CACHE_DIR")
            fail(f"--tokenizer {name}: cannot download it ({type(e).__name__}); put "
                 f"{TIKTOKEN_FILES.get(name, 'its files')} of tiktoken's cache into {folder}")
        finally:
            socket.setdefaulttimeout(None)
        return make_encoding(name, enc._pat_str, enc._mergeable_ranks, enc._special_tokens)
    if not path.exists():
        fail(f"--tokenizer {name}: choose train, bytes, chars, gpt2, a .tiktoken file, a tokens "
             f"folder or a checkpoint of ours")
    if path.name == "tokenizer.json":
        return import_tokenizer(path)[0]
    if path.suffix == ".pt" or (path / "tokenizer.json").exists():
        return encoding_from_dict(load_checkpoint(path, "python pretrain.py")["encoding"])
    path = path / "encoding.json" if (path / "encoding.json").exists() else path
    try:
        if path.suffix == ".tiktoken":
            return encoding_from_dict(dict(name=path.stem, pattern=GPT4_SPLIT, special_tokens={},
                                           ranks=path.read_text().strip()))
        if path.name == "encoding.json":
            return encoding_from_dict(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as e:
        fail(f"--tokenizer {path}: damaged ({type(e).__name__}: {e})")
    fail(f"--tokenizer {path}: give a .tiktoken or tokenizer.json file, a folder or a checkpoint")


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


def encode(enc, texts):
    """(ids uint32, ends int64): all texts, an end-of-text id after each; no text becomes one.

    tiktoken gets all texts in one call, joined by the control token, unless one of them contains
    its name; then they go one by one, as plain text."""
    stop = enc._special_tokens[ENDOFTEXT]
    if not any(len(text) > PIECE or ENDOFTEXT in text for text in texts):
        ids = enc.encode_to_numpy(ENDOFTEXT.join([*texts, ""]), allowed_special={ENDOFTEXT},
                                  disallowed_special=())
        return ids, np.flatnonzero(ids == stop) + 1
    ids = [np.concatenate([*(enc.encode_to_numpy(piece, disallowed_special=())
                             for piece in cut_text(text, PIECE)), [stop]]) for text in texts]
    return np.concatenate(ids).astype(np.uint32), np.cumsum([len(x) for x in ids])


def write_ids(f, ids, dtype):
    """Append little-endian ids to a file; one that does not fit is an error, never wrapped."""
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise ValueError(f"id {int(ids.max())} does not fit {np.dtype(dtype).name}")
    f.write(ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())


def encode_texts(enc, texts, path, dtype):
    """Write path.bin and path.idx (where documents end in this file). Returns the bytes of text."""
    size, done, batch, waiting = 0, 0, [], 0
    with open(f"{path}.bin", "wb") as ids_file, open(f"{path}.idx", "wb") as ends_file:
        for text in itertools.chain(texts, [None]):
            if text is not None:
                batch.append(text)
                waiting += len(text)
            if batch and (text is None or waiting > 4 << 20):
                ids, ends = encode(enc, batch)
                write_ids(ids_file, ids, dtype)
                write_ids(ends_file, ends + done, np.uint64)
                done += len(ids)
                size += sum(len(text.encode()) for text in batch)
                batch, waiting = [], 0
    return size


def join_files(pieces, path):
    """Put the .bin and .idx files of the pieces together in order. Returns (documents, tokens)."""
    documents = tokens = 0
    with open(f"{path}.bin", "wb") as ids_file, open(f"{path}.idx", "wb") as ends_file:
        for piece in pieces:
            ends = np.fromfile(f"{piece}.idx", "<u8")
            write_ids(ends_file, ends + np.uint64(tokens), np.uint64)
            documents, tokens = documents + len(ends), tokens + int(ends[-1] if len(ends) else 0)
            with open(f"{piece}.bin", "rb") as f:
                shutil.copyfileobj(f, ids_file, 1 << 22)
    return documents, tokens


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


def main(cfg):
    started = time.time()
    if not 0 <= cfg.val_fraction < 1:
        fail(f"--val_fraction {cfg.val_fraction}: from 0 to below 1")
    for flag, names, known in (("skip", cfg.skip, ALL_RULES),
                               ("languages", cfg.languages, [*FUNCTION_WORDS, *SCRIPTS])):
        for name in names:
            if name not in known:
                fail(f"--{flag} {name}: choose from {' '.join(known)}")
    out = Path(cfg.out)
    foreign = out.is_file() or out.exists() and any(out.iterdir())
    if foreign and not (out / "manifest.json").exists():
        fail(f"--out {out} exists and is not a tokens folder; choose another, it would be lost")
    enc = None if cfg.tokenizer in ("train", "chars") else named_tokenizer(cfg.tokenizer)
    group = join()
    rank = dist.get_rank(group) if group else 0
    sources = find_sources(cfg) if rank == 0 else None    # downloads what is asked for by name
    work = out.with_name(f".{out.name}.{gather(os.getpid(), group)[0]}.tmp")
    sources = gather(sources, group)[0]
    try:
        work.mkdir(parents=True, exist_ok=True)
        manifest, clock = prepare(cfg, sources, enc, work, rank, group)
        if rank == 0:
            replace_folder(work, out)
            clock["all"] = time.time() - started
            report(manifest, out, ", ".join(f"{k} {v:.1f} s" for k, v in clock.items()))
        gather(None, group)
    except OSError as e:
        fail(f"{e.filename or work}: {e.strerror or e}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if group:
            dist.destroy_process_group()    # else gloo's threads abort the process now and then


def prepare(cfg, sources, enc, work, rank, group):
    """Fill the working folder; rank 0 returns (manifest, seconds of each step).

    All ranks know 64 bytes of every document; its text stays with the rank that read it."""
    clock, started = {}, time.time()
    world = dist.get_world_size(group) if group else 1

    def lap(name):
        nonlocal started
        clock[name], started = time.time() - started, time.time()

    # clean: every rank its chunks
    index = build_index(cfg) if cfg.clean and "contaminated" not in cfg.skip else None
    chunks, words = plan(sources), Words()
    mine, shown = {}, time.time()
    for n in range(rank, len(chunks), world):
        mine[n] = clean_chunk(n, chunks[n], work, cfg, index, words)
        if time.time() > shown + 10:
            shown = time.time()
            print0(f"  {n + 1} of {len(chunks)} chunks cleaned, {shown - started:.0f} s")
    minhashes = [chunk.pop("minhashes") for chunk in mine.values()]
    every = {n: chunk for theirs in gather(mine, group) for n, chunk in theirs.items()}
    every = [every[n] for n in range(len(chunks))]
    ledger, docs = merge(c["ledger"] for c in every), np.concatenate([c["docs"] for c in every])
    first = np.cumsum([0] + [len(c["docs"]) for c in every])    # each chunk's first document
    size, kept, root = docs["size"], np.ones(len(docs), bool), np.arange(len(docs))
    lap("clean")

    def texts(chosen, among):
        """(number, text) of the chosen documents in some of this rank's chunks, in order."""
        for n in among:
            with open(work / f"{n}.text", "rb") as f:
                ends = np.cumsum(size[first[n]:first[n + 1]])
                for i in np.flatnonzero(chosen[first[n]:first[n + 1]]):
                    f.seek(ends[i] - size[first[n] + i])
                    yield first[n] + i, f.read(size[first[n] + i]).decode()

    def strike(step, reasons):
        """Drop the documents that have a reason, and enter them into the ledger."""
        nonlocal kept, ledger
        lost = [{} for _ in chunks]
        for n in mine:
            with open(work / f"{n}.dropped", "a") as file:
                for i, text in texts(reasons != "", [n]):
                    name = document_name(chunks[n][docs["part"][i]], docs["at"][i])
                    drop(lost[n], step, reasons[i], name, text, file if cfg.dropped else None)
        for theirs in zip(*gather(lost, group)):
            ledger = merge([ledger, *theirs])
        kept = kept & (reasons == "")
        note(ledger, step, "kept", "", int(kept.sum()), int(size[kept].sum()))

    # deduplicate, decontaminate
    if cfg.clean:
        numbers = [np.arange(first[n], first[n + 1], dtype=np.uint64) for n in mine]
        numbers = np.concatenate(numbers or [np.zeros(0, np.uint64)])
        minhashes = np.concatenate(minhashes or [np.zeros((0, cfg.bands * cfg.rows), np.uint32)])

        def band_rows(band):
            """(N, 2): the key of the band, and the number, of each of this rank's documents."""
            columns = minhashes[:, band * cfg.rows:(band + 1) * cfg.rows].T.astype(np.uint64)
            *_, (_, key) = growing(columns, cfg.rows)
            return np.stack([key.reshape(-1), numbers], axis=1)

        verdict, root = duplicates(docs, band_rows, cfg, group)
        strike("deduplicate", verdict)
        lap("deduplicate")
    if index:
        hits = [c["hits"] + np.array([first[n], 0], np.uint64) for n, c in enumerate(every)]
        goes, index["found"] = contaminated(np.concatenate(hits), kept, index, cfg.eval_common)
        strike("decontaminate", np.where(goes, "contaminated", "").astype(object))
        lap("decontaminate")
    if not kept.any():
        fail(f"--input {' '.join(cfg.input)}: nothing is left of "
             f"{ledger.get(('read', 'kept', ''), [0])[0]} documents after cleaning; leave rules "
             f"out with --skip, or all of them with --no-clean")

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
    copies *= chars > 0
    share = cfg.tokenizer_bytes / max(1, (copies * size).sum())
    sample = docs["key"][:, 0] * FACTOR / 2.0 ** 64 < share

    def train_texts(chosen, among):
        return (text[:chars[i]] for i, text in texts(chosen, among))

    def val_texts(among):
        return (text[chars[i]:] for i, text in texts(kept & (chars < docs["chars"]), among))

    # tokenizer, from the training text as it is mixed
    passes = range(copies.max(initial=0))
    if cfg.tokenizer == "train":
        counts = count_pieces(text for p in passes
                              for text in train_texts((copies > p) & sample, mine))
        enc = trained_tokenizer(sum(gather(counts, group), Counter()), cfg.vocab_size)
    elif cfg.tokenizer == "chars":
        letters = set().union(*train_texts(copies > 0, mine), *val_texts(mine))
        enc = chars_tokenizer(set().union(*gather(letters, group)))
    lap("tokenizer")

    # encode: files for each chunk and pass, which rank 0 puts together
    dtype, text_bytes = np.uint16 if enc.n_vocab <= 2 ** 16 else np.uint32, Counter()
    for n in mine:
        for p in passes:
            path = work / f"train.{p}.{n}"
            text_bytes["train"] += encode_texts(enc, train_texts(copies > p, [n]), path, dtype)
        text_bytes["val"] += encode_texts(enc, val_texts([n]), work / f"val.0.{n}", dtype)
    text_bytes = sum(gather(text_bytes, group), Counter())
    if rank:
        return None, None
    manifest = dict(format=1, dtype=np.dtype(dtype).name, vocab_size=enc.n_vocab,
                    encoding_hash=encoding_hash(enc), tokens={}, documents={}, bytes={}, sha256={})
    for name, count in (("train", len(passes)), ("val", 1)):
        pieces = [work / f"{name}.{p}.{n}" for p in range(count) for n in range(len(chunks))]
        manifest["documents"][name], manifest["tokens"][name] = join_files(pieces, work / name)
        manifest["bytes"][name] = text_bytes[name]
        manifest["sha256"][name] = file_hash(work / f"{name}.bin")
    manifest["sources"] = [
        dict(input=cfg.input[n], weight=weight, epochs=round(float(times[n]), 4), files=len(files),
             **source_facts(ledger, n)) for n, (weight, files) in enumerate(sources)]
    manifest["knowledge_cutoff"] = max(source["newest"] for source in manifest["sources"])
    manifest["settings"] = {k: v for k, v in asdict(cfg).items() if k not in ("out", "downloads")}
    searched = cfg.clean and "near_duplicate" not in cfg.skip
    manifest["near_duplicates"] = {    # the S-curve: Jaccard similarity -> chance to be found
        str(s): round(s_curve(s, cfg.bands, cfg.rows), 4)
        for s in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9) if searched}
    manifest["ledger"] = ledger_rows(ledger)
    with open(work / "train.copies", "wb") as f:
        for p in passes:
            write_ids(f, np.bincount(root)[root[copies > p]], np.uint32)
    (work / "encoding.json").write_text(json.dumps(encoding_to_dict(enc), indent=1))
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    if index:
        save_index(index, work / "eval_index.npz")
    if cfg.dropped:
        dropped = [(work / f"{n}.dropped").read_bytes() for n in range(len(chunks))]
        (work / "dropped.jsonl").write_bytes(b"".join(dropped))
    for pattern in ("*.text", "*.dropped", "train.*.*", "val.*.*"):
        for file in work.glob(pattern):
            file.unlink()
    lap("encode")
    return manifest, clock


def replace_folder(work, out):
    """Put the finished folder in place of the old one; a half-written one never has its name."""
    old = work.with_suffix(".old")
    if out.exists():
        os.replace(out, old)
    os.replace(work, out)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    main(parse_args(Config))
