"""Turn raw, dirty text into clean, deduplicated tokens: the first stage, and the most underrated one.

In:   files, folders or globs: .txt .md .jsonl .json .html .warc .wet, each also as .gz
Out:  out/tokens/: train.bin val.bin (little-endian ids), train.idx val.idx (where documents end),
      encoding.json (the tokenizer) and manifest.json (counts, hashes, settings, what was dropped and why)

    python prepare.py                                               # the embedded data, seconds
    python prepare.py --input corpus/ --vocab_size 8192             # your own files, 1 core
    python prepare.py --input shakespeare.txt --tokenizer chars --no-clean --split tail --val_fraction 0.1

What to expect: the same input and seed give the same bytes, in any folder and on any day.

Sources: byte-level BPE of Sennrich et al. 2016 (arXiv 1508.07909) and GPT-2, with the tie rule of rustbpe.
"""
import gzip
import hashlib
import heapq
import html
import html.parser
import itertools
import json
import os
import re
import shutil
import socket
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import regex
import tiktoken

from model import (ENDOFTEXT, GPT4_SPLIT, encoding_from_dict, encoding_hash, encoding_to_dict, fail,
                   load_checkpoint, make_encoding, parse_args, print0)

DEFAULT_INPUT = "data/raw/*"


@dataclass
class Config:
    input: list[str] = field(default_factory=lambda: [DEFAULT_INPUT])  # files, folders, globs; PATH:3 counts it 3 times
    out: str = "out/tokens"                          # folder to write
    tokenizer: str = "train"                         # train, bytes, chars, gpt2, a .tiktoken file, a tokens folder or checkpoint of ours
    vocab_size: int = 1024                           # ids of a trained tokenizer, control tokens included
    clean: bool = True                               # --no-clean keeps the text as it is
    blocks: bool = False                             # blank lines separate documents in .txt files (else one file = one document)
    split: Literal["hash", "tail"] = "hash"          # validation: documents picked by hash, or the last part of the text
    val_fraction: float = 0.05                       # share of the documents (hash) or characters (tail) for validation
    seed: int = 1                                    # decides which documents the hash picks


# ------------------------------------------------------------------------------------------------
# Gather: files -> records {"text": ...} or, for what cannot be read, the reason as a string

TEXT_FIELDS = (("text",), ("content",), ("messages",), ("conversations",), ("question", "answer"),
               ("instruction", "input", "output"), ("instruction", "output"), ("prompt", "completion"),
               ("prompt", "response"), ("prompt", "chosen"), ("chosen",), ("prompt",))
LARGEST = 2 ** 30    # bytes of one line or document; what is longer is not text but a decompression bomb


def find_files(inputs):
    """[(source number, weight, [files])] in a fixed order: as named on the command line, then by file name."""
    sources, unknown = [], []
    for number, item in enumerate(inputs):
        pattern, weight = item, 1.0
        if not Path(item).exists() and re.fullmatch(r".+:\d+(\.\d+)?", item):
            pattern, weight = item.rsplit(":", 1)[0], float(item.rsplit(":", 1)[1])
        path = Path(pattern)
        if path.is_file():
            if file_kind(path) not in READERS:
                fail(f"{path}: unknown format; prepare reads {' '.join(READERS)}, each also as .gz")
            files = [path]
        else:
            if pattern == DEFAULT_INPUT and not any(Path().glob(pattern)):
                path = Path(__file__).parent / pattern    # a run from another folder finds the embedded data
            root = Path(path.anchor)
            matches = [path] if path.is_dir() else root.glob(str(path.relative_to(path.anchor)))
            files = sorted(f for m in matches for f in (m.rglob("*") if m.is_dir() else [m])
                           if f.is_file() and not f.name.startswith("."))
            unknown += [f for f in files if file_kind(f) not in READERS]
            files = [f for f in files if file_kind(f) in READERS]
        if not files:
            fail(f"--input {item}: no {' '.join(READERS)} file there")
        sources.append((number, weight, files))
    if unknown:
        print0(f"skipped {len(unknown)} files of unknown format: {', '.join(f.name for f in unknown[:3])}"
               + (", ..." if len(unknown) > 3 else ""))
    return sources


def file_kind(path):
    """The suffix that decides how a file is read: corpus.jsonl.gz -> .jsonl"""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read_file(path, cfg, ledger):
    """Yield the records of one file. Unreadable ones are counted; more than 1 % of them is an error."""
    seen = bad = 0
    first = None
    try:
        with open(path, "rb") as f:
            zipped = f.peek(2)[:2] == b"\x1f\x8b" if hasattr(f, "peek") else False
            stream = gzip.GzipFile(fileobj=f) if zipped else f
            for place, record in READERS[file_kind(path)](stream, cfg):
                seen += 1
                if isinstance(record, dict):
                    yield record
                    continue
                bad, first = bad + 1, first or f"{place}: {record}"
                drop(ledger, "read", record, 0, f"{path.name} {place}")
                if bad > 100 and bad > 0.01 * seen:
                    break
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        fail(f"{path}: damaged gzip after {seen} documents ({e}); fetch the file again")
    if bad > 0.01 * seen:
        fail(f"{path}: {bad} of {seen} records cannot be read, the first at {first}")


def decode(data):
    """(text, number of bytes sequences that were not UTF-8 and became U+FFFD)."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace"), 0
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
        return text, text.count("\ufffd")


def read_whole(stream):
    data = stream.read(LARGEST + 1)
    return ("larger than 1 GiB", None) if len(data) > LARGEST else decode(data)[::-1]


def text_record(text, broken, **fields):
    if broken > 0.1 * len(text):
        return "not UTF-8 text"
    return dict(text=text, broken=broken, **fields)


def read_txt(stream, cfg):
    data = stream.read(LARGEST + 1)
    if len(data) > LARGEST:
        yield "line 1", "larger than 1 GiB: split the file, or use --blocks and blank lines"
        return
    text, broken = decode(data)
    if not cfg.blocks:
        yield "line 1", text_record(text, broken)
        return
    for number, block in enumerate(re.split(r"\n(?:[ \t\r]*\n)+", text)):
        yield f"block {number + 1}", text_record(block, block.count("\ufffd") if broken else 0)


def read_jsonl(stream, cfg):
    for number in itertools.count(1):
        line = stream.readline(LARGEST)
        if not line:
            return
        if not line.strip():
            continue
        text, broken = decode(line)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = "not JSON"
        yield f"line {number}", row if isinstance(row, str) else row_record(row, broken)


def read_json(stream, cfg):
    text, broken = decode(stream.read(LARGEST))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        fail(f"{stream.name}: not JSON ({e}); a file with one object a line is named .jsonl")
    if isinstance(rows, dict):
        rows = next((v for v in rows.values() if isinstance(v, list)), [rows])
    for number, row in enumerate(rows):
        yield f"item {number + 1}", row_record(row, 0)


def row_record(row, broken):
    """The text of a JSON row: pretraining text, a question with its answer, or a chat."""
    if isinstance(row, str) and row:
        return text_record(row, broken)
    if not isinstance(row, dict):
        return "neither an object nor text"
    for fields in TEXT_FIELDS:
        if all(row.get(name) is not None for name in fields):
            texts = [flatten(row[name]) for name in fields]
            kept = {k: row[k] for k in ("url", "date", "license") if isinstance(row.get(k), str)}
            return text_record("\n".join(filter(None, texts)), broken, **kept)
    return f"no text (fields: {', '.join(map(str, list(row)[:5]))})"


def flatten(value):
    """A string as it is; a list of chat turns as "Role: what was said" paragraphs."""
    if not isinstance(value, list):
        return str(value)
    turns = []
    for turn in value:
        if isinstance(turn, dict):
            who = str(turn.get("role", turn.get("from", ""))).capitalize()
            said = turn.get("content", turn.get("value", turn.get("text", "")))
            turns.append(f"{who}: {flatten(said)}" if who else flatten(said))
        else:
            turns.append(flatten(turn))
    return "\n\n".join(turns)


def read_html(stream, cfg):
    text, broken = decode(stream.read(LARGEST))
    yield "page", text_record(html_text(text), broken)


def read_warc(stream, cfg):
    """WARC 1.0/1.1 and WET (ISO 28500): responses that are HTML and ready-made text conversions."""
    for number in itertools.count(1):
        line = stream.readline(65536)
        while line and not line.startswith(b"WARC/"):    # blank lines, or lost after a wrong length
            line = stream.readline(65536)
        if not line:
            return
        headers = read_headers(stream)
        try:
            size = int(headers.get("content-length", ""))
            block = stream.read(size if 0 <= size <= LARGEST else -1)
        except (ValueError, OverflowError):
            yield f"record {number}", "WARC record without a length"
            continue
        if len(block) < size:
            yield f"record {number}", "WARC record cut short"
            return
        kind = headers.get("warc-type")
        about = dict(url=headers.get("warc-target-uri", ""), date=headers.get("warc-date", "")[:10])
        if kind == "conversion":
            yield f"record {number}", text_record(*decode(block), **about)
        elif kind == "response":
            head, _, body = block.partition(b"\r\n\r\n")
            if b"html" in head.lower() or body[:500].lstrip().lower().startswith((b"<!doctype", b"<html")):
                text, broken = decode(body)
                yield f"record {number}", text_record(html_text(text), broken, **about)


def read_headers(stream):
    """`Name: value` lines up to a blank one; names are case-insensitive, a leading blank continues a line."""
    headers, name = {}, None
    while (line := stream.readline(65536)).strip():
        if line[:1] in b" \t" and name:
            headers[name] += " " + line.decode("utf-8", "replace").strip()
        else:
            name, _, value = line.decode("utf-8", "replace").partition(":")
            name = name.strip().lower()
            headers[name] = value.strip()
    return headers


READERS = {".txt": read_txt, ".md": read_txt, ".jsonl": read_jsonl, ".json": read_json, ".html": read_html,
           ".htm": read_html, ".warc": read_warc, ".wet": read_warc}


# ------------------------------------------------------------------------------------------------
# Extract and normalise

SILENT = {"script", "style", "noscript", "template", "svg", "head", "nav", "header", "footer", "aside", "form",
          "button", "iframe"}
BLOCKS = {"p", "div", "br", "li", "ul", "ol", "tr", "table", "h1", "h2", "h3", "h4", "h5", "h6", "section",
          "article", "main", "blockquote", "pre", "dt", "dd", "dl", "body", "html", "hr", "title"}


class TextOfHTML(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.silent = [], []

    def handle_starttag(self, tag, attrs):
        if tag in SILENT:
            self.silent.append(tag)
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if tag in self.silent:
            del self.silent[self.silent.index(tag):]
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.silent:
            self.parts.append(data)


def html_text(page):
    """The visible text of a page, one line a block, navigation and scripts left out."""
    parser = TextOfHTML()
    parser.feed(page)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(filter(None, lines))


CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), 0xFEFF])    # all but \t and \n


def normalise(text):
    """Training text: one kind of line end, NFC, no control characters; quotes, width and case stay."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", text).translate(CONTROL)
    return text.strip("\n")


def matching(text):
    """What counts as the same text: lower case, numbers as 0, no punctuation, no accents (datatrove's order)."""
    text = re.sub(r"\d+(?:[.,]\d+)*", "0", text.lower())
    text = unicodedata.normalize("NFD", re.sub(r"[^\w\s]|_", " ", text))
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Mn").split()
                    if not text.isascii() else text.split())


def utf8(text):
    """UTF-8 bytes; half surrogate pairs (JSON can spell them) become U+FFFD, as tiktoken does."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# ------------------------------------------------------------------------------------------------
# The ledger: what went in and out of every step, and what was dropped and why


def drop(ledger, step, reason, size, example):
    entry = ledger.setdefault(step, {}).setdefault(reason, dict(documents=0, bytes=0, examples=[]))
    entry["documents"] += 1
    entry["bytes"] += size
    if len(entry["examples"]) < 3:
        entry["examples"].append(" ".join(example[:200].split())[:80])


def print_table(title, rows, total):
    """rows: [(indent, name, documents, bytes)]"""
    print0(f"\n{title:<42}{'documents':>12}{'bytes':>16}{'share':>9}")
    for indent, name, documents, size in rows:
        share = f"{size / total:.1%}" if total else ""
        print0(f"{'  ' * indent + name:<42}{documents:>12,}{size:>16,}{share:>9}")


# ------------------------------------------------------------------------------------------------
# Clean: records of one chunk of files -> text and one row of numbers a document, in the working folder


def clean_chunk(files, number, work, cfg, ledger):
    """Writes chunk<number>.text (UTF-8) and .npz: ends (bytes), key (hash of the matching text), source."""
    ends, keys, sources = [], [], []
    facts = ledger.setdefault("facts", {})
    with open(work / f"chunk{number}.text", "wb") as f:
        for source, path in files:
            for record in read_file(path, cfg, ledger):
                text = record["text"]
                count = facts.setdefault(str(source), dict(documents=0, bytes=0, repaired=0, licenses={}, newest=""))
                count["documents"] += 1
                count["bytes"] += len(utf8(text))
                count["repaired"] += record["broken"] > 0
                count["newest"] = max(count["newest"], record.get("date", ""))
                if record.get("license"):
                    count["licenses"][record["license"]] = count["licenses"].get(record["license"], 0) + 1
                if cfg.clean:
                    text = normalise(text)
                if not text.strip():
                    drop(ledger, "read", "empty", 0, path.name)
                    continue
                f.write(utf8(text))
                ends.append(f.tell())
                key = matching(text) if cfg.clean else text
                keys.append(hashlib.blake2b(utf8(key), digest_size=16).digest())
                sources.append(source)
    np.savez(work / f"chunk{number}.npz", ends=np.array(ends, np.int64), source=np.array(sources, np.int32),
             key=np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2))


def exact_duplicates(keys):
    """For each document the number of the first one with the same key. keys (N, 2) uint64."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


# ------------------------------------------------------------------------------------------------
# Tokenizer


def train_bpe(counts, size):
    """Byte-level BPE: {bytes: id} of `size` tokens from {piece of text: how often}.

    The most frequent pair of neighbours becomes a token, again and again; ties go to the smallest ids.
    A word is a str with one character per token (chr(id)), so that merging is str.split and str.join.
    Counts are exact at every step: a pair is born in the step that mints its newer member and only shrinks
    afterwards, so a heap entry can be too high but never too low, and is corrected when it comes up.
    """
    words, weights = [], []
    pairs, where = defaultdict(int), defaultdict(set)    # pair -> count, pair -> words that may hold it
    for number, (word, n) in enumerate(sorted(counts.items())):
        word = word.encode().decode("latin-1")           # byte b is the character chr(b)
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
            if pairs[pair] > 1:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if n > -2:
            break
        left, right = pair
        new = chr(len(tokens))
        tokens.append(tokens[ord(left)] + tokens[ord(right)])
        born = set()
        for number in where.pop(pair):
            parts, n = words[number].split(pair), weights[number]
            words[number] = new.join(parts)
            for k in range(len(parts) - 1):    # the k-th occurrence stands between parts k and k + 1
                before, after = parts[k][-1:], parts[k + 1][:1]
                if before:
                    pairs[before + left] -= n
                elif k:
                    before = new               # two occurrences touch: their pair is counted here, once
                if before:
                    pairs[before + new] += n
                    where[before + new].add(number)
                    born.add(before + new)
                if after:
                    pairs[right + after] -= n
                    pairs[new + after] += n
                    where[new + after].add(number)
                    born.add(new + after)
                elif k < len(parts) - 2:
                    pairs[right + left] -= n
        del pairs[pair]
        for pair in born:
            heapq.heappush(heap, (-pairs[pair], pair))
    assert len(set(tokens)) == len(tokens)
    return {token: i for i, token in enumerate(tokens)}


def count_pieces(texts):
    """{piece of the GPT-4 split: how often}. Words with the blanks before them are counted first, and only the
    distinct ones go through the slower pattern: no piece goes on behind a word, save line ends after symbols."""
    pieces, words = Counter(), Counter()
    for text in itertools.chain(texts, [None]):
        if text is not None:
            words.update(regex.findall(r"\s*+\S++(?:(?<=[^\s\p{L}\p{N}])[\r\n]++)?|\s++", text))
        if text is None or len(words) > 1_000_000:
            for word, n in words.items():
                for piece in regex.findall(GPT4_SPLIT, word):
                    if len(piece) <= 256:    # longer ones are junk that costs memory
                        pieces[piece] += n
            words.clear()
    return pieces


def trained_tokenizer(texts, vocab_size):
    control = 4
    if vocab_size < 256 + control:
        fail(f"--vocab_size {vocab_size}: at least {256 + control} (256 bytes and {control} control tokens)")
    size = vocab_size - control
    if vocab_size > 1024:
        size = -(-vocab_size // 64) * 64 - control    # make_encoding would fill up with reserved ids
    ranks = train_bpe(count_pieces(texts), size)
    if len(ranks) < size:
        fail(f"--vocab_size {vocab_size}: this text supports at most {len(ranks) + control} (then no two tokens "
             f"stand together twice); lower it or give more text")
    return make_encoding("bpe", GPT4_SPLIT, ranks)


def chars_tokenizer(texts):
    """One id per character of the corpus, in code point order."""
    seen = set()
    for text in texts:
        seen.update(text)
    return make_encoding("chars", "(?s:.)", {c.encode(): i for i, c in enumerate(sorted(seen))})


def named_tokenizer(name):
    """A tokenizer that exists: bytes, one of tiktoken's by name, a rank file, or one of ours."""
    path = Path(name)
    if name == "bytes":
        return make_encoding("bytes", GPT4_SPLIT, {bytes([i]): i for i in range(256)})
    if name in tiktoken.list_encoding_names():
        return known_tokenizer(name)
    if (path / "encoding.json").is_file():
        path = path / "encoding.json"
    if not path.exists():
        fail(f"--tokenizer {name}: choose train, bytes, chars, gpt2, a .tiktoken file, a tokens folder or a checkpoint")
    if path.suffix == ".pt":
        return encoding_from_dict(load_checkpoint(path, "python pretrain.py")["encoding"])
    try:
        if path.suffix == ".tiktoken":
            lines = path.read_text().split("\n")
            return encoding_from_dict(dict(name=path.stem, pattern=GPT4_SPLIT, special_tokens={},
                                           ranks="\n".join(filter(None, lines))))
        if path.name == "encoding.json":
            return encoding_from_dict(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as e:
        fail(f"--tokenizer {path}: damaged ({type(e).__name__}: {e})")
    fail(f"--tokenizer {path}: tokenizer.json of transformers is not read yet; give a .tiktoken file")


def known_tokenizer(name):
    files = {"gpt2": ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
             "cl100k_base": ("9b5ad71b2ce5302211f9c61530b329a4922fc6a4",),
             "o200k_base": ("fb374d419588a4632f3f557e76b4b70aebbca790",)}    # sha1 of the address
    socket.setdefaulttimeout(20)
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as e:    # requests, urllib3, socket and file errors alike: there is no file and no network
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or "a folder named by TIKTOKEN_CACHE_DIR"
        fail(f"--tokenizer {name}: cannot download it ({type(e).__name__}); offline, put the file(s) "
             f"{' and '.join(files.get(name, ['(see tiktoken)']))} of tiktoken's cache into {folder}")
    finally:
        socket.setdefaulttimeout(None)
    return make_encoding(name, enc._pat_str, enc._mergeable_ranks, enc._special_tokens)


# ------------------------------------------------------------------------------------------------
# Encode and write

PIECE = 1 << 20    # characters; longer texts are encoded in pieces, so that memory stays small


def cut_text(text):
    """Pieces of at most PIECE characters. The cuts are where no split pattern joins: letter, then blank or
    line end with a letter behind it; only a text without such a place is cut elsewhere."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        place = None
        for place in re.finditer(r"(?<=\w)[ \n](?=[^\W\d_])", text[end - 5000:end]):
            pass
        if place:
            end = end - 5000 + place.start()
        yield text[start:end]
        start = end
    yield text[start:]


def encode(enc, texts):
    """(ids uint32, ends int64): all texts, an end-of-text id after each. Text never becomes a control token.

    tiktoken gets many texts in one call, joined by the control token itself; a text that contains its name
    goes alone, as plain text.
    """
    stop = enc._special_tokens[ENDOFTEXT]
    ids, ends, batch, size, total = [], [], [], 0, 0

    def flush():
        nonlocal size, total
        if batch:
            ids.append(enc.encode_to_numpy(ENDOFTEXT.join([*batch, ""]), allowed_special={ENDOFTEXT},
                                           disallowed_special=()))
            ends.append(np.flatnonzero(ids[-1] == stop) + 1 + total)
            total += len(ids[-1])
            batch.clear()
            size = 0

    for text in texts:
        if len(text) > PIECE or ENDOFTEXT in text:
            flush()
            for piece in cut_text(text):
                ids.append(enc.encode_to_numpy(piece, allowed_special=set(), disallowed_special=()))
                total += len(ids[-1])
            ids.append(np.array([stop], np.uint32))
            total += 1
            ends.append(np.array([total]))
        else:
            batch.append(text)
            size += len(text)
            if size > PIECE:
                flush()
    flush()
    return np.concatenate([np.empty(0, np.uint32), *ids]), np.concatenate([np.empty(0, np.int64), *ends])


def write_ids(f, ids, dtype):
    """Append ids to a file as little-endian dtype; an id that does not fit is an error, never a wrapped number."""
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise ValueError(f"id {int(ids.max())} does not fit {np.dtype(dtype).name}")
    f.write(ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# Split


def characters(data):
    """Where each character starts, as byte offsets. data: UTF-8 bytes."""
    return np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)


def split_by_hash(keys, val_fraction, seed):
    """True where a document is for validation: decided by its content and the seed, not by its place."""
    values = [int.from_bytes(hashlib.blake2b(b"%d:%s" % (seed, key.tobytes()), digest_size=8).digest(), "big")
              for key in keys]
    return np.array(values, dtype=np.uint64) < np.uint64(int(val_fraction * 2 ** 64))


def main(cfg):
    started = time.time()
    rank = int(os.environ.get("RANK", 0))
    if rank:
        return
    if not 0 <= cfg.val_fraction < 1:
        fail(f"--val_fraction {cfg.val_fraction}: from 0 to below 1")
    out = Path(cfg.out)
    if out.exists() and not (out / "manifest.json").exists() and (out.is_file() or any(out.iterdir())):
        fail(f"--out {out} exists and is not a tokens folder; choose another, it would be overwritten")
    enc = None if cfg.tokenizer in ("train", "chars") else named_tokenizer(cfg.tokenizer)
    sources = find_files(cfg.input)

    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        work.mkdir(parents=True)
        prepare(cfg, sources, enc, out, work, started)
    except OSError as e:
        fail(f"{e.filename or work}: {e.strerror or e}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def prepare(cfg, sources, enc, out, work, started):
    ledger = {}
    chunks = [[(number, path)] for number, _, files in sources for path in files]
    for number, files in enumerate(chunks):
        clean_chunk(files, number, work, cfg, ledger)
    tables = [np.load(work / f"chunk{number}.npz") for number in range(len(chunks))]
    keys = np.concatenate([t["key"] for t in tables])
    sizes = np.concatenate([np.diff(t["ends"], prepend=0) for t in tables])
    starts = np.cumsum([0] + [len(t["ends"]) for t in tables])    # first document of each chunk

    keep = np.ones(len(keys), bool)
    if cfg.clean and len(keys):
        keep = exact_duplicates(keys) == np.arange(len(keys))

    def texts(chosen, cut=None):
        """The chosen documents (bool a document) in input order, as bytes."""
        for number, table in enumerate(tables):
            with open(work / f"chunk{number}.text", "rb") as f:
                ends = table["ends"]
                for i in np.flatnonzero(chosen[starts[number]:starts[number + 1]]):
                    begin = ends[i - 1] if i else 0
                    f.seek(begin)
                    yield int(starts[number] + i), f.read(int(ends[i] - begin))

    for i, data in texts(~keep):
        drop(ledger, "deduplicate", "exact duplicate", len(data), data[:400].decode("utf-8", "replace"))
    if not keep.any():
        fail(f"--input {' '.join(cfg.input)}: nothing left after cleaning")

    # From here on a document's first train_bytes[i] bytes are for training, the rest for validation.
    train_bytes = sizes * keep
    n = int(keep.sum())
    if cfg.split == "tail":
        total = sum(len(characters(data)) for _, data in texts(keep))
        left = int(total * (1 - cfg.val_fraction))
        for i, data in texts(keep):
            places = characters(data)
            train_bytes[i] = len(data) if left >= len(places) else places[max(0, left)]
            left -= len(places)
    elif cfg.val_fraction and n * cfg.val_fraction < 4:
        print0(f"split: {n} documents are too few to pick some by hash; the last {cfg.val_fraction:.1%} "
               f"of each is for validation")
        for i, data in texts(keep):
            places = characters(data)
            cut = int(len(places) * (1 - cfg.val_fraction))
            train_bytes[i] = places[cut] if cut < len(places) else len(data)
    else:
        train_bytes[split_by_hash(keys, cfg.val_fraction, cfg.seed)] = 0

    weights = [weight for _, weight, _ in sources]
    source_of = np.concatenate([t["source"] for t in tables])

    def train_texts():
        for i, data in texts(keep & (train_bytes > 0)):
            for _ in range(copies(weights[source_of[i]], keys[i])):
                yield data[:train_bytes[i]].decode()

    def val_texts():
        for i, data in texts(keep & (train_bytes < sizes)):
            yield data[train_bytes[i]:].decode()

    if cfg.tokenizer == "train":
        enc = trained_tokenizer(train_texts(), cfg.vocab_size)
    elif cfg.tokenizer == "chars":
        enc = chars_tokenizer(itertools.chain(train_texts(), val_texts()))
    dtype = np.uint16 if enc.n_vocab <= 65536 else np.uint32

    manifest = dict(format=1, dtype=np.dtype(dtype).name, vocab_size=enc.n_vocab, encoding_hash=encoding_hash(enc),
                    tokens={}, documents={}, bytes={}, sha256={})
    for name, stream in (("train", train_texts()), ("val", val_texts())):
        size = 0

        def counted():
            nonlocal size
            for text in stream:
                size += len(utf8(text))
                yield text

        done = 0
        with open(work / f"{name}.bin", "wb") as bin_file, open(work / f"{name}.idx", "wb") as idx_file:
            documents = 0
            stream_counted = counted()
            while batch := list(itertools.islice(stream_counted, 4096)):
                ids, ends = encode(enc, batch)
                write_ids(bin_file, ids, dtype)
                write_ids(idx_file, ends + done, np.uint64)
                done += len(ids)
                documents += len(ends)
        manifest["tokens"][name], manifest["documents"][name] = done, documents
        manifest["bytes"][name], manifest["sha256"][name] = size, file_hash(work / f"{name}.bin")

    facts = ledger.pop("facts", {})
    manifest["sources"] = [dict(input=cfg.input[number], weight=weight, files=len(files), **facts.get(str(number), {}))
                           for number, weight, files in sources]
    manifest["settings"] = {k: v for k, v in asdict(cfg).items() if k != "out"}
    manifest["ledger"] = ledger
    (work / "encoding.json").write_text(json.dumps(encoding_to_dict(enc), indent=1))
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    for file in work.glob("chunk*"):
        file.unlink()
    replace_folder(work, out)
    report(manifest, out, started)


def copies(weight, key):
    """How often a document counts: the whole part of the weight, and once more with its fraction's probability."""
    return int(weight) + (int(key[1]) / 2 ** 64 < weight % 1)


def replace_folder(work, out):
    """Put the finished folder in place of the old one; at no moment is a half-written one under its name."""
    old = work.with_suffix(".old")
    if out.exists():
        os.replace(out, old)
    os.replace(work, out)
    shutil.rmtree(old, ignore_errors=True)


def report(manifest, out, started):
    read_bytes = sum(s.get("bytes", 0) for s in manifest["sources"])
    rows = [(0, "read", sum(s.get("documents", 0) for s in manifest["sources"]), read_bytes)]
    for step, reasons in manifest["ledger"].items():
        for reason, entry in reasons.items():
            rows.append((1, f"- {step}: {reason}", entry["documents"], entry["bytes"]))
    for name in ("train", "val"):
        rows.append((0, name, manifest["documents"][name], manifest["bytes"][name]))
    print_table("step", rows, read_bytes)
    tokens, size = sum(manifest["tokens"].values()), sum(manifest["bytes"].values())
    print0(f"{manifest['tokens']['train']:,} + {manifest['tokens']['val']:,} tokens of {manifest['vocab_size']:,} "
           f"ids, {size / max(1, tokens):.2f} bytes/token, in {out} ({time.time() - started:.1f} s)")


if __name__ == "__main__":
    main(parse_args(Config))
