"""Turn raw, dirty text into clean tokens: the first stage, and the most underrated one.

In:   files, folders, patterns: .txt .md .jsonl .json .html .warc .wet (also .gz .zst), .parquet
Out:  out/tokens/: train.bin val.bin (little-endian ids), train.idx val.idx (where documents end,
      uint64), encoding.json, manifest.json

    python prepare.py                                    # the embedded data
    python prepare.py --input corpus/ notes.jsonl.gz:2   # your own; :2 shows a source twice
    torchrun --nproc_per_node=8 prepare.py --input crawl/*.warc.gz    # the same bytes, sooner
    python prepare.py --input shakespeare.txt --tokenizer chars --no-clean --split tail

You will see what each rule dropped, with an example: of 4,368 embedded documents 3,631 stay. Rules
for web pages (Gopher's quality, C4, FineWeb) apply to HTML, WARC, WET and rows with a url, those
against repetition and spam not to rows of questions or chats. Thresholds are the defaults of the
rules: change them there, or leave a rule out with --skip.
Differs from the papers: words are what blanks separate, or characters where none do; an n-gram
repeats if it occurs twice; a contaminated document goes whole; languages are told by function words
or scripts (ru: Cyrillic, ar: Arabic, ...), not by fastText.
"""
import codecs
import functools
import glob
import hashlib
import heapq
import html
import inspect
import io
import ipaddress
import json
import math
import os
import re
import shutil
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
import torch.distributed as dist

from model import (ENDOFTEXT, INSULTS, PHRASE_DOCUMENTS, PIECE, REPLIES, SPLIT_PATTERN, TALKS,
                   UTF16, conversation, cut_text, encoding_from_dict, encoding_hash,
                   encoding_to_dict, fail, find_file, item_ngrams, json_rows, keep_valid,
                   load_checkpoint, make_encoding, match_words, need, ngram_hashes, open_file,
                   parse_args, print0, read_encoding, read_rows, row_files)


@dataclass
class Config:
    input: list[str] = field(default_factory=lambda: ["data/raw/*"])  # PATH[:WEIGHT] ...
    out: str = "out/tokens"  # folder to write
    dropped: bool = False  # also write dropped.jsonl: each dropped document, reason and evidence
    clean: bool = True  # --no-clean keeps the text as it is
    skip: list[str] = field(default_factory=list)  # rules to leave out: a reason up to its colon
    languages: list[str] = field(default_factory=lambda: ["en"])  # to keep: en de fr es zh ru ...
    eval: str = "data/eval"  # .jsonl items to keep out of the text; none compares with nothing
    tokenizer: str = "train"  # train, bytes, chars, gpt2, a tokens folder, checkpoint or model
    vocab_size: int = 2048  # ids of a trained tokenizer, control tokens included; at least 260
    split: Literal["hash", "tail"] = "hash"  # validation: by hash (a few: tail), or the text's end
    val_fraction: float = 0.05  # share of the documents or characters, at least 0, at most 0.99
    seed: int = 1  # which documents the hash picks, at least 0


# ------------------------------------------------------------------------------------------------
# Gather: files -> records dict(text, kind, url), or a str: why one cannot be read

CHUNK = 1 << 24      # bytes of a file that a rank takes at a time, characters of a document
LARGEST = 1 << 28    # bytes of a line, page or record; what is longer is a decompression bomb
ROW, TEXT, PAGE = range(3)    # kinds of text: from the fields of a row, plain text, a web page
FORMATS = "txt md jsonl json html htm warc wet parquet"
SUFFIX = re.compile(rf"\.({FORMATS.replace(' ', '|')})(\.gz|\.zst)?$", re.I)
SHARED = re.compile(r"\.(txt|md|jsonl)$", re.I)    # files that ranks can read in parts
UNREADABLE = "unreadable: "    # so begins the reason of a record whose text cannot be read


def find_parts(cfg):
    """([(number of the --input, file, from byte, to byte), ...] in order, weights of the inputs)"""
    parts, weights, out = [], [], Path(cfg.out).resolve()
    for source, item in enumerate(cfg.input):
        path, weight = re.fullmatch(r"(.*?)(?::(\d+(?:\.\d+)?))?", item).groups("1")
        if Path(item).exists():    # whose name ends like a weight
            path, weight = item, "1"
        weights.append(float(weight))
        files = set()
        places = [path] if Path(path).exists() else glob.glob(path, recursive=True)
        for place in map(Path, places or [find_file(path)]):
            inside = place.rglob("*") if place.is_dir() else [place]
            files.update(f for f in inside if f == place or out not in f.resolve().parents)
        files = [f for f in files if SUFFIX.search(f.name) and f.is_file() and f.name[0] != "."]
        if not files:
            fail(f"--input {item}: no {FORMATS} file (or .gz, .zst) there")
        for file in sorted(files):
            if SHARED.search(file.name):
                starts = range(0, file.stat().st_size, CHUNK)
                parts += [(source, file, start, start + CHUNK) for start in starts]
            else:
                parts.append((source, file, 0, math.inf))
    return parts, weights


def read_part(path, start, end):
    """Yield the records of a part of a file. A damaged archive ends the run, a damaged page not."""
    file_format = SUFFIX.search(path.name)[1].lower()
    try:
        with open_file(path) as f:
            yield from read_records(file_format, f, start, end)
    except (OSError, EOFError, ArithmeticError, ValueError, RecursionError, zlib.error) as e:
        archive = file_format in ("jsonl", "parquet", "warc", "wet")
        if archive or path.stat().st_size > CHUNK:
            fail(f"{path} cannot be read: {' '.join(str(e).split())}")
        yield "damaged file"


def read_records(file_format, f, start, end):
    """Yield what the bytes from start to end of a file hold."""
    if file_format in ("txt", "md"):
        for text in read_blocks(f, start, end):
            yield dict(text=text, kind=TEXT)
    elif file_format == "jsonl":
        for text in read_blocks(f, start, end):
            yield from map(row_record, json_rows(text))
    elif file_format == "json":
        yield from map(row_record, json_rows(read_whole(f)))
    elif file_format == "parquet":
        for batch in need("pyarrow.parquet").ParquetFile(f).iter_batches(1000):
            yield from map(row_record, batch.to_pylist())
    elif file_format in ("html", "htm"):
        yield dict(text=page_text(f.read(LARGEST)), kind=PAGE)
    else:
        yield from read_warc(f)


def read_whole(f):
    data = f.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError("longer than 256 MB, which neither .json nor UTF-16 may be")
    return decode(data)


def read_blocks(f, start, end):
    """Yield the text of the lines that begin from byte start to end, about CHUNK bytes a time."""
    if f.peek(2)[:2] in UTF16:    # a byte b"\n" may be half of another letter
        if start == 0:
            yield read_whole(f)
        return
    at = start
    if start:    # the line that goes on here is of the part before
        f.seek(start - 1)
        at = start - 1 + len(f.readline(LARGEST))
    while at < end and (data := f.read(min(CHUNK, end - at))):
        if data[-1:] != b"\n":
            data += f.readline(LARGEST)
        if len(data) > LARGEST:
            raise ValueError("a line is longer than 256 MB")
        at += len(data)
        yield decode(data)


# what browsers take for these charsets (encoding.spec.whatwg.org), as Python calls both
CHARSETS = dict(pair.split("=") for pair in """ascii=cp1252 iso8859-1=cp1252 iso8859-9=cp1254
iso8859-11=cp874 windows-874=cp874 iso-8859-8-i=iso8859-8 gb2312=gb18030 gbk=gb18030 euc_kr=cp949
tis-620=cp874 windows-949=cp949 big5=big5hkscs euc_jp=euc_jis_2004 shift_jis=cp932
windows-31j=cp932""".split())


def decode(data, charset=""):
    """Text of bytes: UTF-8 if they are, or in this charset, or windows-1252; U+FFFD if invalid."""
    if data[:2] in UTF16:
        return data.decode("utf-16", errors="replace")
    charset = charset.lower().removeprefix("x-")
    try:
        codec = codecs.lookup(CHARSETS.get(charset, charset)).name
    except LookupError:
        codec = ""
    codec = CHARSETS.get(codec, codec)
    text = data.decode(errors="replace").removeprefix("\ufeff")    # a byte order mark
    not_ascii = len(text) - len(text.encode("ascii", "ignore"))
    if not_ascii >= 2 * text.count("\ufffd") and codec != "iso2022_jp":    # which looks like ASCII
        return text
    if re.match("big5|cp|euc|gb|iso|koi|mac", codec):    # no UTF, and no "base64" or "idna"
        return data.decode(codec, errors="replace")
    try:
        return data.decode("cp1252")
    except UnicodeError:
        return text


def row_record(row):
    """A row as a record: plain text, a question with its answer, or a chat."""
    if row is None:
        return "not JSON"
    row = row if isinstance(row, dict) else dict(text=row)
    url = str(row.get("url") or "")
    for name in ("text", "content"):
        if isinstance(row.get(name), str):
            return dict(text=row[name], kind=TEXT, url=url)
    try:
        turns = conversation(row, *REPLIES)
    except ValueError as e:    # read, but not to be told as text
        return dict(text="", kind=ROW, reason=str(e))
    except (TypeError, AttributeError, LookupError):
        return "not in a known format"
    if not turns:
        if any(name in row and row[name] is None for name in ("text", "content")):
            return dict(text="", kind=ROW)
        return "no field with text"
    if len(turns) > 2 or any(row.get(name) for name in TALKS):
        text = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    else:    # a question with its answer
        text = "\n".join(turn["content"] for turn in turns)
    return dict(text=text, kind=ROW, url=url)


def read_warc(f):
    """WARC 1.x and WET (ISO 28500): web pages, and pages that were already turned into text."""
    while line := f.readline(1 << 16):
        if not line.startswith(b"WARC/"):
            continue    # blank, or lost after a wrong length
        headers = read_headers(f)
        length = headers.get("content-length", "")
        known = length.isdecimal() and int(length) <= LARGEST
        block = f.read(int(length)) if known else b""
        if not known or f.read(4) != b"\r\n\r\n":
            yield "wrong Content-Length"
            continue
        record = dict(kind=PAGE, url=headers.get("warc-target-uri", ""))
        if headers.get("warc-type") == "conversion":
            yield dict(record, text=decode(block))
        elif headers.get("warc-type") in ("response", "resource"):
            body, content_type, reason = block, headers.get("content-type", "").lower(), ""
            if headers["warc-type"] == "response":
                body, content_type, reason = http_body(io.BytesIO(block))
            begin = body[:500].lstrip().lower()
            if "html" in content_type or begin.startswith((b"<!doctype", b"<html")):
                text = "" if reason else page_text(body, content_type)
                yield dict(record, text=text, reason=reason)


def read_headers(f):
    """{name in lower case: value} up to a blank line."""
    headers = {}
    while line := f.readline(1 << 16).decode("utf-8", "replace").strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return headers


def http_body(f):
    """(body, content type, why it is no page or "") of an HTTP response, decoded within bounds."""
    status = re.match(rb"HTTP/\S+ +(\d{3})", f.readline())
    headers = read_headers(f)
    body, reason = f.read(), ""
    if "chunked" in headers.get("transfer-encoding", "").lower():
        f, chunks = io.BytesIO(body), []
        while (size := re.match(rb"[0-9a-fA-F]{1,8}", f.readline())) and int(size[0], 16):
            chunks.append(f.read(int(size[0], 16)))
            f.readline()
        body = b"".join(chunks) or body    # some crawlers join the chunks and keep the header
    if body[:2] in (b"\x1f\x8b", b"\x78\x9c", b"\x78\xda", b"\x78\x01"):    # gzip, deflate
        try:
            body = zlib.decompressobj(47).decompress(body, LARGEST)    # 47: either of them
        except zlib.error:
            reason = UNREADABLE + "damaged compression"
    elif headers.get("content-encoding") in ("br", "zstd") and not body.lstrip().startswith(b"<"):
        reason = f"{UNREADABLE}compressed by {headers['content-encoding']}"
    if status and not status[1].startswith(b"2"):
        reason = f"HTTP status {status[1].decode()}"
    return body, headers.get("content-type", "").lower(), reason


# ------------------------------------------------------------------------------------------------
# Extract: the running text of a page, by jusText's rules (links, length, function words)

HIDDEN = re.compile(r"<!--(?:-?>|.*?(?:--!?>|\Z))|<(script|style)\b.*?(?:</\1\s*>?|\Z)",
                    re.S | re.I)
TAG = re.compile(r"""<(/?)([a-zA-Z][a-zA-Z0-9]*)([^<>=]*    # attributes, with < and > in quotes
    (?:=\s*(?:"[^"]*"|'[^']*'|(?!["'\s]))[^<>=]*){0,99})>|<[!?/a-zA-Z][^<>]*>""", re.X)
SILENT = set("button head iframe select svg template textarea title".split())
BESIDE = set("aside footer header nav noscript".split())    # silent too, if there is other text
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
BLOCKS = HEADINGS | BESIDE | set("""address article blockquote body caption center dd div dl dt
figcaption figure form hr html li main ol p pre section table tbody thead tr ul""".split())
SPACES = dict(br="\x1e", td=" ", th=" ")    # \x1e: a line end that stays one


def html_blocks(page, silent_tags):
    """[(tag, text, characters inside links), ...] of a page, in one pass. What stands in a silent
    element is deleted when that closes, so that one which never does costs nothing else."""
    pieces = TAG.split(HIDDEN.sub("", page))    # text, "/" or "", name, attributes, text, ...
    blocks, silent, link = [dict(tag="", parts=[html.unescape(pieces[0])], linked=0)], [], False
    tags = zip(pieces[1::4], pieces[2::4], pieces[3::4], pieces[4::4])
    for closing, name, attributes, text in tags:
        name = (name or "").lower()    # none: a comment or a declaration
        if name == "a":
            link = not closing and "href" in attributes.lower()
        elif name in SPACES:
            blocks[-1]["parts"].append(SPACES[name])
        elif name in silent_tags:
            if not closing and len(silent) < 100:    # deeper is no page
                silent.append((name, len(blocks)))
            elif closing and name in [opened for opened, _ in silent]:
                opened, begin = silent.pop()
                while opened != name:    # left open inside of it
                    opened, begin = silent.pop()
                del blocks[begin:]
            blocks.append(dict(tag="", parts=[], linked=0))
        elif name in BLOCKS:
            blocks.append(dict(tag="" if closing else name, parts=[], linked=0))
            link = link and not (closing and name in ("p", "li", "tr"))    # an <a> left open
        text = html.unescape(text)
        blocks[-1]["parts"].append(text)
        if link:
            blocks[-1]["linked"] += len(text)
    found = []
    for block in blocks:
        lines = "".join(block["parts"]).strip("\n").split(SPACES["br"])
        if block["tag"] != "pre":
            lines = [" ".join(line.split()) for line in lines]
        if text := "\n".join(filter(str.strip, lines)):
            found.append((block["tag"], text, block["linked"]))
    return found


def function_words(words):
    """Share of the words that are function words of some language."""
    return sum(word in ANY_LANGUAGE for word in words) / max(1, len(words))


def judge_blocks(page, silent_tags):
    """(blocks of a page, a letter for each: kind_of_block)"""
    blocks = html_blocks(page, silent_tags)
    texts = [text for _, text, linked in blocks if linked <= 0.2 * len(text)]
    longest = " ".join(sorted(texts, key=len, reverse=True))[:3000]
    known = function_words(split_words(longest.lower())) >= 0.15    # of its language
    return blocks, "".join(kind_of_block(*block, known) for block in blocks)


def main_text(page):
    """The running text of a page, a line for each block, without menus, banners and footers."""
    blocks, kinds = judge_blocks(page, SILENT | BESIDE)
    if not re.search("[gn]", kinds):    # it may stand where there seldom is any
        everything = judge_blocks(page, SILENT)
        if "s" not in kinds or re.search("[gn]", everything[1]):
            blocks, kinds = everything
    if "g" not in kinds:    # a small page
        kinds = kinds.replace("n", "g")
    if "g" not in kinds:    # a few words, which the rules will judge
        kinds = kinds.replace("s", "g")
    # near-good blocks stay beside another or a good one, short ones between two, headings before
    kinds = re.sub("(?<=g)[nsh]+|(?<![nsh])[nsh]+(?=g)|n[nsh]*n",
                   lambda m: m[0].replace("n", "g"), kinds)
    kinds = re.sub("(?<=g)[sh]+(?=g)|h(?=g)", lambda m: "g" * len(m[0]), kinds)
    return "\n".join(text for (_, text, _), kind in zip(blocks, kinds) if kind == "g")


def kind_of_block(tag, text, linked, known):
    """A letter: good or near good running text, heading, short, bad."""
    size = text_size(text[:200])
    if linked > (0 if size < 70 else 0.2) * len(text) or re.search(r"©\s?\d", text):
        return "b"
    if size < 70 and tag != "pre":
        return "h" if tag in HEADINGS else "s"
    density = function_words(text.lower().split()) if known else 1
    if density >= 0.3 and size >= 200:
        return "g"
    return "n" if density >= 0.15 or tag == "pre" else "s"


def page_text(data, content_type=""):
    """The running text of a page, in the charset that its content type or the page itself names."""
    named = re.search(rb"(?i)(?:<meta\b[^>]{0,500}?\bcharset|<\?xml\b[^>]{0,99}?\bencoding)"
                      rb"\s*=\s*[\"']?\s*([\w.:-]{1,40})",
                      b"<meta " + content_type.encode() + b">" + data[:1 << 16])
    return main_text(decode(data, named[1].decode() if named else ""))


# ------------------------------------------------------------------------------------------------
# Normalise and filter: each rule takes a Doc and returns why the text must go, or None

LATER = "".join(chr(i) + bytes([i]).decode("cp1252", "ignore") for i in range(0x80, 0xC0))
TAIL = f"[{re.escape(LATER)}]"    # what the second and later bytes of a character look like
MOJIBAKE = f"[\xc2-\xdf]{TAIL}|[\xe0-\xef]{TAIL}{{2}}|[\xf0-\xf4]{TAIL}{{3}}"
# what nobody writes: Ã© Â° lÃ­ â€™ ðŸ˜€, or three in a row; but ß“ and É» are the end of a quotation
PROOF = re.compile(f"[ÂÃ][\xa1-\xaa\xac-\xba\xbc-\xbf]|Â\xa0|[a-z]Ã{TAIL}|â€|ðŸ"
                   f"|[\xc2-\xf4][\x80-\x9f]|(?:{MOJIBAKE}){{3}}")
# not \t, \n; nor joiners behind what is no Latin, Greek or Cyrillic letter: there they are needed
INVISIBLE = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u200b-\u200d\u2060-\u2064\ufeff]"
                       "(?<![^\0-\u052f][\u200c\u200d])")


def repair(text):
    """UTF-8 that was read as cp1252 or latin-1 put right, where there is PROOF: cafÃ© -> café."""
    def fix(m):
        data = b"".join(c.encode("latin-1" if ord(c) < 256 else "cp1252") for c in m[0])
        return data.decode(errors="ignore") or m[0]
    return re.sub(MOJIBAKE, fix, text) if PROOF.search(text) else text


def normalise(text):
    """One kind of line end, NFC, nothing invisible; quotes, width and case stay as they are."""
    for line_end in ("\r\n", *"\r\x0b\x0c\x85\u2028\u2029"):
        text = text.replace(line_end, "\n")
    # of cp1252 that was read as latin-1, as browsers do
    text = re.sub("[\x80-\x9f]", lambda m: m[0].encode("latin-1").decode("cp1252", "ignore"), text)
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text)).strip()


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
nl de het een en van ik te dat die in is niet zijn op aan met als voor er maar om hem dan zou of \
wat mijn dit zo door over ze zich bij ook tot je uit naar heb heeft nog wel geen was wij
""".splitlines()}
ANY_LANGUAGE = set().union(*FUNCTION_WORDS.values())
SCRIPTS = dict(zh="\u3400-\u9fff", ja="\u3041-\u3096\u30a1-\u30fa", ko="\uac00-\ud7af",
               ru="\u0400-\u04ff", ar="\u0600-\u06ff", he="\u0590-\u05ff",
               el="\u0370-\u03ff\u1f00-\u1fff", hi="\u0900-\u097f", th="\u0e00-\u0e7f")
WIDE = re.compile("[\u3041-\ud7af\U00020000-\U0003ffff]")    # kana, Han, Hangul
UNSPACED = re.compile(    # no blanks between words, so that each character counts as one
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u9fff\U00020000-\U0003ffff]")
STOP_WORDS = set("the be to of and that have with".split())
SALES = set("""amazing approval approved bargain bargains best bonus brand buy buying card cart
casino cash cheap cheapest checkout cialis claim click code congratulations coupon credit customers
deal deals debt delivery discount discounted discounts doctors dollars earn exclusive free gift
guarantee guaranteed hurry instant jackpot limited loan loans lottery lowest lucky money offer
offers online order payday percent pills pounds price prices prize profit promo purchase refund
replica risk sale sales satisfaction save savings secret shipping shop stock store subscribe trial
trick unbeatable unlock unsubscribe viagra visit wholesale win winner winners""".split())
BULLETS = ("•", "‣", "▪", "*", "-", "–")
END_MARKS = (*".?!\"”’'…。！？」』»।؟۔",)    # of a line
BOILERPLATE = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies",
               "use of cookies", "use cookies", "{")


def split_words(text):
    """What blanks separate, and each character of a script without blanks."""
    return (text if text.isascii() else UNSPACED.sub(r" \g<0> ", text)).split()


def text_size(text):
    """Characters; a wide one says as much as two others."""
    return len(text) + len(WIDE.findall(text))


class Doc:
    """A text, and the views of it that several rules share. languages: those that are wanted."""

    def __init__(self, text, languages):
        self.text, self.languages = text, languages
        self.words = split_words(text)
        spaced = text.isascii() or len(self.words) < 0.25 * len(text)    # looks no closer: slow
        self.unspaced = not spaced and len(UNSPACED.findall(text)) > 0.5 * len(self.words)
        self.unended = self.unspaced and re.search("[\u0e00-\u0eff]", text)    # Thai, Lao: no marks
        self.lines = [line.strip() for line in text.split("\n") if line.strip()]
        self.counts = Counter(word.lower().strip(".,;:!?()[]\"“”‘’'") for word in self.words)

    def count(self, known):
        """How many of the words are in this set."""
        return sum(self.counts[word] for word in self.counts.keys() & known)

    def count_with(self, check):
        """How many of the words have such a character."""
        return sum(n for word, n in self.counts.items() if any(map(check, word)))


def first_true(**checks):
    """The name of the first check that holds, as words, or None."""
    return next((name.replace("_", " ") for name, holds in checks.items() if holds), None)


def language(doc, min_share=0.5, min_function_words=0.1):
    """Another language, or none: told by function words, or by the script where that is enough.

    min_share: function words of the wanted / (of these + of the best other language)."""
    words = doc.count_with(str.isalpha)
    hits = Counter({code: doc.count(known) for code, known in FUNCTION_WORDS.items()})
    if not doc.text.isascii():
        others = [(word, n) for word, n in doc.counts.items() if not word.isascii()]
        for code, script in SCRIPTS.items():    # its words count like the function words in them
            hits[code] = 0.4 * sum(n for word, n in others if re.match(f"[{script}]", word))
        if hits["ja"] > 0.01 * hits["zh"]:    # any kana, however many kanji
            hits["ja"] += hits.pop("zh")
    wanted = max(hits.pop(code, 0) for code in doc.languages)
    other = max(hits, key=hits.get, default="")
    if words < 10 and other not in SCRIPTS:
        return None
    if max(wanted, hits[other]) < min_function_words * words:
        return "no function words"
    if wanted < min_share * (wanted + hits[other]):
        return f"language {other}"


def copied(parts):
    """(second and later copies, characters in them)"""
    counts = Counter(parts)
    return len(parts) - len(counts), sum((n - 1) * len(part) for part, n in counts.items())


def copied_lines(doc, max_chars=0.01):
    """FineWeb drops a page with more copied lines, mostly a good one with a quote or a credit: the
    copies are cut out (doc.text gets shorter), and the other rules judge the rest."""
    if copied(doc.lines)[1] > max_chars * sum(map(len, doc.lines)):
        first = {}    # of equal lines, and every empty one
        for number, line in enumerate(doc.text.split("\n")):
            first.setdefault(line.strip() or number, line)
        doc.text = "\n".join(first.values())


def gopher_repetition(doc, max_repeated=0.3, max_chars=0.2, top_ngrams=(.20, .18, .16),
                      copied_ngrams=(.15, .14, .13, .12, .11, .10)):
    """Gopher table A1: repeated lines, paragraphs and n-grams of words, as shares of the text.

    top_ngrams: the top 2, 3, 4-gram; copied_ngrams: 5 to 10-grams that were there before. Without
    blanks two characters are taken for a word."""
    size, words, scale = len(doc.text), doc.words, 1 + doc.unspaced
    lines = [line for line in doc.lines if re.search(r"\w", line)]    # no fences, no braces
    for name, parts in (("lines", lines), ("paragraphs", re.split(r"\n\s*\n", doc.text))):
        copies, chars = copied(parts)
        if copies > max_repeated * len(parts) or chars > max_chars * size:
            return f"repeated {name}"
    starts = range(len(words))    # where an n-gram may begin that occurs more than once
    for n in range(2, 11):
        m = n * scale
        grams = [" ".join(words[i:i + m]) for i in starts if i + m <= len(words)]
        counts = Counter(grams)
        most = max(counts.values(), default=1)
        if most == 1:
            return None    # nothing repeats, so nothing longer does
        if n <= 4:
            longest = max(len(gram) for gram in counts if counts[gram] == most)
            if longest * most > top_ngrams[n - 2] * size * scale:
                return f"top {n}-gram"
        elif repeated_chars(starts, grams, m) > copied_ngrams[n - 5] * size:
            return f"repeated {n}-grams"
        starts = [i for i, gram in zip(starts, grams) if counts[gram] > 1]


def repeated_chars(starts, grams, n):
    """Characters, without blanks, in n-grams that were there before, without overlap."""
    seen, chars, end = set(), 0, 0
    for i, gram in zip(starts, grams):
        if i >= end and gram in seen:    # count a repeat and step over it
            chars, end = chars + len(gram) - (n - 1), i + n
        elif i >= end:
            seen.add(gram)
    return chars


def gopher_quality(doc, min_words=50, max_words=100_000, word_length=(3, 10), max_symbols=0.1,
                   max_bullets=0.9, max_ellipses=0.3, min_letters=0.8, min_stop_words=2):
    """Gopher A1.1, with the stop words only where nothing but English is wanted."""
    text, lines, n = doc.text, doc.lines, len(doc.words)
    words = doc.count_with(str.isalnum)    # the others are just symbols
    width = text_size(text[:2000]) / len(text[:2000])
    length = sum(map(len, doc.words)) / n * width
    symbols = max(text.count("#"), text.count("...") + text.count("…"))
    bullets = sum(line.startswith(BULLETS) for line in lines)
    ellipses = sum(line.endswith(("...", "…")) for line in lines)
    stop_words = len(doc.counts.keys() & STOP_WORDS)
    return first_true(
        few_words=words < min_words,
        many_words=words > max_words,
        word_length=not doc.unspaced and not word_length[0] <= length <= word_length[1],
        symbols=symbols > max_symbols * n,
        bullets=bullets > max_bullets * len(lines),
        ellipses=ellipses > max_ellipses * len(lines),
        few_letters=doc.count_with(str.isalpha) < min_letters * words,
        few_stop_words=doc.languages == ["en"] and stop_words < min_stop_words)


def c4(doc, line_words=5, word_chars=1000, sentences=3):
    """C4: cuts out lines that are no sentences (doc.text gets shorter), then judges the page. Lines
    without an end mark stay, as in FineWeb; a brace costs its line, in C4 the page."""
    lines = []
    for line in re.sub(r"\[(?:\d{0,4}|edit|citation needed)\]", "", doc.text).split("\n"):
        words = split_words(line) if doc.unspaced else line.split()
        if 0 < len(words) < line_words or any(len(word) > word_chars for word in words):
            continue
        if "lorem ipsum" in line.lower():
            return "lorem ipsum"
        if not any(mark in line.lower() for mark in BOILERPLATE):
            lines.append(line)
    doc.text = "\n".join(lines).strip()
    ends = len(re.findall(r"[.?!][\"')\]”’»]{0,3}(?=\s|$)", doc.text))
    ends += sum(map(doc.text.count, "。！？।؟۔"))
    if not doc.text or ends < sentences and not doc.unended:
        return "few sentences"


def fineweb(doc, min_end_marks=0.12, max_short_lines=0.67, max_newlines=0.3):
    """FineWeb's own rules, on lines that are not empty; short ones have up to 30 characters."""
    ended = sum(line.endswith(END_MARKS) for line in doc.lines)
    short = sum(text_size(line[:31]) <= 30 for line in doc.lines)
    return first_true(
        few_end_marks=ended < min_end_marks * len(doc.lines) and not doc.unended,
        short_lines=short > max_short_lines * len(doc.lines),
        newlines=doc.text.count("\n") > max_newlines * len(doc.words))


def toxic(doc, share=0.03, different=3):
    """Dense insults. One bad word, C4's rule, drops more good text than bad (arXiv 2104.08758)."""
    various = len(doc.counts.keys() & INSULTS) >= different
    return "insults" if various and doc.count(INSULTS) > share * len(doc.words) else None


def spam(doc, share=0.12, different=8):
    """Dense and varied sales talk; no published rule, the words are those of mail filters."""
    various = len(doc.counts.keys() & SALES) >= different
    return "sales talk" if various and doc.count(SALES) > share * len(doc.words) else None


RULES = {language: ROW, copied_lines: PAGE, gopher_repetition: TEXT, gopher_quality: PAGE,
         c4: PAGE, fineweb: PAGE, toxic: ROW, spam: TEXT}    # with the first kind each is for
DUPLICATES = ("exact_duplicate", "url_duplicate", "near_duplicate")
ALL_RULES = ("repair", *(rule.__name__ for rule in RULES), "scrub", *DUPLICATES, "contaminated")


# ------------------------------------------------------------------------------------------------
# Scrub: personal data -> placeholders, which no pattern matches again

def luhn(text):
    """The check of card numbers: every second digit from the right twice, the sum ends in 0."""
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def iban(text):
    """ISO 13616: the first four characters go last, letters are 10 to 35, mod 97 is 1."""
    text = text.replace(" ", "")
    number = int("".join(str(int(c, 36)) for c in text[4:] + text[:4]))
    return 15 <= len(text) <= 34 and number % 97 == 1


# (placeholder, hint: what a text must contain to be looked at, pattern, check of a match). Patterns
# start behind an edge and repeat within bounds, so that no text takes more than linear time.
NUMBER = r"\d(?:[ ().-]{0,2}\d){8}"    # nine digits close together
BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# Four numbers are a version or a section, unless they are long or behind such a word.
ADDRESS = r"(?<=//|(?:\b(?:address|at|dns|from|r?host|ip|ping|server)|s to)(?: is)?[ :=]{1,2})"
FILES = r"\.(?:css|csv|exe|gif|html?|jpe?g|js|json|pdf|png|service|svg|t?gz|txt|webp|xml|ya?ml|zip)"
PRIVATE = [
    ("<KEY>", r"AKIA|-----BEGIN|gh[pousr]_|sk-|xox[bp]-",
     r"\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_\w{36,255}\b|\bxox[bp]-[\w-]{10,200}"
     r"|\bsk-(?=[\w-]{0,200}\d)(?=[\w-]{0,200}[A-Z])[\w-]{20,200}"    # no class of a stylesheet
     r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
     r"(?:[A-Za-z0-9+/=\s]{0,10000}-----END [A-Z ]{0,30}PRIVATE KEY-----)?", None),
    ("<EMAIL>", "@",    # not logo@2x.png, react@17.0.2.tgz, git@github.com
     rf"(?<![\w.%+-])(?!git@)[\w.%+-]{{1,64}}@(?![\w.-]{{0,200}}{FILES}(?!\.?\w)|v?\d+\.\d)"
     r"(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b", None),
    ("<IBAN>", NUMBER,
     r"(?<![\w/])[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", iban),
    ("<IP>", r"\d\.\d{1,3}\.\d{1,3}\.\d",
     rf"(?i)(?<![\w.])(?<!ersion )(?:{ADDRESS}|(?=\d\d[\d.]{{8}}\d|[\d.]{{12}}\d))"
     rf"{BYTE}(?:\.{BYTE}){{3}}(?!\w|\.\d| to \d)",
     lambda text: ipaddress.ip_address(text).is_global),
    ("<CARD>", NUMBER,    # issuers and lengths of ISO/IEC 7812, in one piece, in fours or as 4-6-5
     r"(?<![\w.=/-])(?:(?:4\d|5[1-5]|2[2-7]|35|6[0245])\d{14}|3[47]\d{13}|3[068]\d{12}"
     r"|(?<!(?<![\d-])\d{4} )[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?! \d{4}\b)"
     r"|3[47]\d\d([ -])\d{6}\2\d{5})(?!\w|-\d)", luhn),
    ("<PHONE>", NUMBER,    # +..., or North America's: its first two parts begin with 2 to 9
     r"(?<![\w+)\]])\+[1-9](?:[ .()-]{0,2}\d){9,14}(?!\w)|(?<![\w.(/-])(?:1[ .-])?"
     r"(?:[2-9]\d\d([.-])[2-9]\d\d\1|\([2-9]\d\d\) ?[2-9]\d\d[ .-])\d{4}(?!\w|[.-]\d)", None),
    ("<SSN>", NUMBER, r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])", None)]


def scrub(text):
    """(text without personal data, {placeholder: how many})"""
    found = Counter()
    for placeholder, hint, pattern, check in PRIVATE:
        def replace(m):
            if check and not check(m[0]):
                return m[0]
            found[placeholder] += 1
            return placeholder
        if re.search(hint, text):    # else cleaning takes a third longer
            text = regex.sub(pattern, replace, text)
    return text, found


# ------------------------------------------------------------------------------------------------
# Deduplicate: texts that are equal, have the same address, or share most of their shingles

BANDS, ROWS, SHINGLE = 14, 8, 5    # FineWeb's: texts meet if all 8 hashes of one of 14 bands agree
FACTORS, SHIFTS = np.random.default_rng(20240601).integers(0, 2 ** 64, (2, BANDS * ROWS), np.uint64)
NO_KEY = bytes(c for c in range(128) if not chr(c).isalnum())


def hash64(text):
    data = text.encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def text_key(text):
    """128 bits (2,) uint64 of a text without its case and ASCII punctuation: what draws."""
    data = text.lower().encode().translate(None, NO_KEY) or text.encode()
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "<u8")


@functools.lru_cache(1 << 18)
def shingle_word(word):
    """Hash of a word with its numbers and signs, but without the punctuation around it."""
    return hash64(word.rstrip(".,;:!?)'\"’”").lstrip("('\"‘“"))


def compared_by(text, items):
    """The fields of DOC by which a text is told from others and from evaluation items."""
    words = split_words(text.lower())
    hashes = np.fromiter(map(shingle_word, words), np.uint64, len(words))
    leaks, plain_words = {}, match_words(text)
    for n, known in items.items():
        for gram in known.keys() & ngram_hashes(plain_words, n).tolist():
            leaks[gram] = known[gram]
    return dict(same=hash64(" ".join(words)), bands=minhash(hashes), leaks=leaks)


def minhash(words):
    """Keys (BANDS,) uint64 of a text from the hashes (N,) uint64 of its words.

    A key stands for the least of ROWS hash functions over all runs of SHINGLE words. Of two texts a
    share of the leasts agrees that is their Jaccard similarity s, so they have a key in common with
    a chance of 1 - (1 - s ^ ROWS) ^ BANDS: 21 % at 0.6, 92 % at 0.8."""
    grams = ngram_hashes(words, min(SHINGLE, len(words))) >> np.uint64(32)
    least = np.full(BANDS * ROWS, np.iinfo(np.uint64).max)
    for i in range(0, len(grams), 512):    # blocks that stay in the cache
        # (a x + b mod 2^64) >> 32 with odd a is a strongly universal hash of 32-bit x
        hashes = np.multiply.outer(grams[i:i + 512], FACTORS | np.uint64(1)) + SHIFTS
        least = np.minimum(least, hashes.min(axis=0))
    bands = (least >> np.uint64(32)).reshape(BANDS, ROWS)
    return ngram_hashes(bands.T, ROWS)[0]


def url_key(url):
    """An address without scheme, case of the host, default port, fragment and tracking fields."""
    _, _, url = url.strip().partition("#")[0].partition("://")
    address, _, query = url.partition("?")
    host, slash, path = address.rstrip("/").partition("/")
    host = re.sub(":(80|443)$", "", host.lower())
    query = "&".join(q for q in query.split("&") if q and not q.startswith("utm_"))
    return f"{host}{slash}{path}?{query}" if host else ""


def join(root, numbers, keys):
    """Put documents (of these numbers) with equal keys into one cluster, by union-find: root leads
    from each document to the smallest number of its cluster, in whatever order they come."""
    def find(i):
        while root[i] != i:
            root[i] = root[root[i]]    # a shorter way for the next one
            i = root[i]
        return i
    first = {}
    for number, key in zip(numbers.tolist(), keys.tolist()):
        if (other := first.setdefault(key, number)) != number:
            a, b = find(other), find(number)
            root[max(a, b)] = min(a, b)


def deduplicate(docs, skip):
    """Of each cluster one stays: of the first source, then the longest, then the first; the others
    get a reason."""
    root = docs["root"]
    root[:] = np.arange(len(docs))
    for name, columns in zip(DUPLICATES, ([docs["same"]], [docs["url"]], docs["bands"].T)):
        if name in skip:
            continue
        left = np.flatnonzero(docs["reason"] == "")
        for keys in columns:
            join(root, left, keys[left])
        while (root[root] != root).any():
            root[:] = root[root]
        order = np.lexsort((left, -docs["bytes"][left], docs["source"][left], root[left]))
        left = left[order]    # the best one of each cluster first
        copies = root[left[1:]] == root[left[:-1]]
        docs["reason"][left[1:][copies]] = name


# ------------------------------------------------------------------------------------------------
# Decontaminate: GPT-3's rule (2005.14165, app. C), but a document with a hit goes as a whole

def read_items(path):
    """{n: {hash of n words in a row: the evaluation item that they give away}}"""
    items = defaultdict(dict)
    for file in row_files(find_file(path)):
        rows = keep_valid(read_rows([file]), lambda row: (row, *item_ngrams(row)), file)
        for number, (row, n, grams) in enumerate(rows):
            for gram in grams:
                items[n][gram] = f"{file.stem}/{row.get('id', number)}"
    if not items:
        fail(f"--eval {path}: no items that are long enough; none compares with nothing")
    return items


def decontaminate(docs):
    """Give a reason to documents with words of evaluation items; returns the names of these."""
    kept, leaked = np.flatnonzero(docs["reason"] == ""), set()
    common = Counter(gram for i in kept for gram in docs["leaks"][i])
    for i in kept:
        for gram, item in docs["leaks"][i].items():
            if common[gram] <= PHRASE_DOCUMENTS:
                docs["reason"][i] = "contaminated"
                leaked.add(item)
    return sorted(leaked)


# ------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE, ties to the smallest ids

SAMPLE = 2e9    # bytes of text that a tokenizer is trained on: more teach it nothing new


def count_pieces(texts):
    """{piece of the GPT-4 split: how often}; longer ones, as DNA, in parts that cost less time."""
    pieces = Counter()
    for text in texts:
        for part in cut_text(text, PIECE):
            pieces.update(regex.findall(SPLIT_PATTERN, part))
    for junk in [piece for piece in pieces if len(piece) > 256]:
        for start in range(0, len(junk), 256):
            pieces[junk[start:start + 256]] += pieces[junk]
        del pieces[junk]
    return pieces


def train_bpe(counts, size):
    """Byte-level BPE: {bytes: id} of `size` tokens from {piece: how often}.

    The most frequent pair of neighbours becomes a token, again and again; ties go to the smallest
    ids. A word is a str of one character a token, chr(id), so merging is str.replace.
    A pair is born in the step that mints its newer member and then only gets rarer: a heap entry
    may be too high, never too low, and is put right when it comes up. So all counts are exact."""
    def neighbours(word):
        return [a + b for a, b in zip(word, word[1:])]

    words = [word.encode().decode("latin-1") for word in counts]    # byte b is chr(b)
    weights = list(counts.values())
    pairs, where = defaultdict(int), defaultdict(set)    # pair -> count, words that may hold it
    for number, word in enumerate(words):
        for pair in neighbours(word):
            pairs[pair] += weights[number]
            where[pair].add(number)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    while heap and len(tokens) < size:
        n, best = heapq.heappop(heap)
        if pairs[best] < -n:    # rarer by now
            heapq.heappush(heap, (-pairs[best], best))
            continue
        if pairs[best] < 2:
            break
        new, born = chr(len(tokens)), set()
        tokens.append(b"".join(tokens[ord(c)] for c in best))
        for number in where.pop(best):
            for pair in neighbours(words[number]):
                pairs[pair] -= weights[number]
            words[number] = words[number].replace(best, new)    # left to right, without overlap
            for pair in neighbours(words[number]):
                pairs[pair] += weights[number]
                if new in pair:
                    where[pair].add(number)
                    born.add(pair)
        for pair in born:
            heapq.heappush(heap, (-pairs[pair], pair))
    return {token: i for i, token in enumerate(tokens)}


def load_tokenizer(spec):
    """The Encoding of "bytes", "gpt2", a folder of tokens, a checkpoint or a public model."""
    if spec == "bytes":
        return make_encoding("bytes", SPLIT_PATTERN, {bytes([i]): i for i in range(256)})
    if spec == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as e:    # of requests, sockets, files: no file and no network
            fail(f"--tokenizer gpt2: tiktoken cannot fetch it ({type(e).__name__})")
        return make_encoding("gpt2", gpt2._pat_str, gpt2._mergeable_ranks, gpt2._special_tokens)
    if Path(spec, "encoding.json").exists():
        return read_encoding(spec)
    made_by = "python pretrain.py (or give --tokenizer train, bytes, chars or gpt2)"
    return encoding_from_dict(load_checkpoint(spec, made_by)["encoding"])


def encode(enc, text, dtype):
    """The ids of a text, as plain text whatever it spells, with what begins and ends every text. An
    id that does not fit dtype raises OverflowError."""
    ids = [np.array(enc.encode_ordinary(piece), dtype) for piece in cut_text(text, PIECE)]
    start, end = np.array(enc.bos, dtype), np.array([enc._special_tokens[ENDOFTEXT]], dtype)
    return np.concatenate([start, *ids, end])


# ------------------------------------------------------------------------------------------------
# The run. Every rank cleans its share of the input and writes the texts to a file of its own; all
# ranks know a row of numbers for each document, by which they come to the same decisions

PARTS = ("train", "val")
WRITTEN = {"train.bin", "val.bin", "train.idx", "val.idx", "encoding.json", "manifest.json",
           "dropped.jsonl"}
DOC = np.dtype([
    ("source", "i4"), ("part", "i4"), ("at", "i4"),    # where it was: input, part of it, record
    ("rank", "i4"), ("start", "i8"), ("bytes", "i8"), ("chars", "i8"),    # where its text is now
    ("same", "u8"), ("url", "u8"), ("bands", "u8", BANDS), ("leaks", object),    # compared by
    ("key", "u8", 2),    # drawn by
    ("reason", object), ("root", "i8"),    # why it goes or "", its cluster
    ("cut", "i8"),    # characters for training; the rest is for validation
    ("train", "i4"), ("val", "i4"), ("dropped", "i4")])    # how often it is read for these


def clean(text, kind, cfg, counts):
    """(clean text, why it must go or ""); what was changed is counted."""
    if not text.isascii() and "repair" not in cfg.skip:
        before, text = text, repair(text)
        if text != before:
            counts["texts with mojibake repaired"] += 1
    doc = Doc(normalise(text), cfg.languages)
    if not doc.text:
        return "", "empty"
    for rule, first_kind in RULES.items():
        if kind < first_kind or rule.__name__ in cfg.skip:
            continue
        before = doc.text
        if reason := rule(doc):
            return doc.text, f"{rule.__name__}: {reason}"
        if doc.text != before:
            counts[f"texts shortened by {rule.__name__}"] += 1
            doc = Doc(doc.text, cfg.languages)
    if "scrub" in cfg.skip:
        return doc.text, ""
    text, found = scrub(doc.text)
    counts.update(found.keys())
    return text, ""


def clean_part(number, part, cfg, items, f, counts):
    """Write the texts of a part of the input to f, cleaned until dropped. Returns docs (N,) DOC."""
    source, path, start, end = part
    docs, bad = [], []
    for at, record in enumerate(read_part(path, start, end)):
        if isinstance(record, str):
            bad.append(f"record {at + 1}: {record}")
            record = dict(text="", kind=ROW, reason=UNREADABLE + record)
        whole = record["text"].encode(errors="replace").decode()    # JSON can spell half a letter
        why = record.get("reason", "")
        if invalid := whole.count("\ufffd"):
            counts["characters that could not be read"] += invalid
        if invalid > 0.1 * len(whole):
            whole, why = "", UNREADABLE + "not UTF-8 text"
        elif not why and not whole.strip():
            why = "page without running text" if record["kind"] == PAGE else "empty"
        url = url_key(record.get("url", ""))
        kind = PAGE if url else record["kind"]
        for piece, text in enumerate(cut_text(whole, CHUNK)):
            reason, compared = why, dict(leaks={})
            if cfg.clean and not reason:
                text, reason = clean(text, kind, cfg, counts)
            if cfg.clean and not reason:
                compared = compared_by(text, items)
            doc = dict(source=source, part=number, at=at, start=f.tell(), chars=len(text),
                       bytes=f.write(text.encode()), key=text_key(text), reason=reason,
                       url=hash64(f"{url or (number, at)} {piece}"), **compared)
            docs.append(tuple(doc.get(name, 0) for name in DOC.names))
    if len(bad) > max(1, 0.01 * len(docs)):
        fail(f"{path}: {len(bad)} of {len(docs)} records cannot be read, the first is {bad[0]}")
    return np.array(docs, DOC)


def check_readable(docs, parts, cfg):
    """An error where most of an --input cannot be read."""
    for source, item in enumerate(cfg.input):
        these = docs[docs["source"] == source]
        bad = [doc for doc in these if doc["reason"].startswith(UNREADABLE)]
        if len(bad) > 0.5 * len(these):
            fail(f"--input {item}: {len(bad)} of {len(these)} records cannot be read, the first is "
                 f"in {parts[bad[0]['part']][1]}, {bad[0]['reason']}")


def split_and_mix(docs, weights, cfg):
    """Decide how many characters of each document are for training (the rest is for validation),
    and how often it is seen in either."""
    kept = docs["reason"] == ""
    chars = docs["chars"] * kept
    if cfg.split == "tail" or 0 < kept.sum() * cfg.val_fraction < 4:    # too few to pick by hash
        before = np.cumsum(chars) - chars
        docs["cut"] = np.clip(int(chars.sum() * (1 - cfg.val_fraction)) - before, 0, chars)
    else:    # the least key of a cluster draws for all its texts, whatever the order of the input
        least = docs["key"][:, 0].copy()
        np.minimum.at(least, docs["root"], docs["key"][:, 0])
        draw = (least[docs["root"]] ^ np.uint64(hash64(str(cfg.seed)))) / 2.0 ** 64
        docs["cut"] = np.where(draw < cfg.val_fraction, 0, chars)
    draw = docs["key"][:, 1] / 2.0 ** 64    # a weight of 1.5: one or two times
    docs["train"] = np.floor(np.array(weights)[docs["source"]] + draw) * (docs["cut"] > 0)
    docs["val"] = docs["cut"] < chars
    docs["dropped"] = ~kept
    if not docs["train"].any():
        reasons = Counter(docs["reason"]).most_common(3)
        fail(f"nothing is left to train on of {len(docs)} records ({reasons}); "
             f"see --skip, --no-clean, --val_fraction and the weights in --input")


def read_texts(work, docs, part):
    """Yield (document, its text for train, val or dropped), as often as it is seen: of each part of
    the input all documents once, then those that are seen twice, ..."""
    for own in np.split(docs, np.flatnonzero(np.diff(docs["part"])) + 1):
        for k in range(own[part].max(initial=0)):
            for doc in own[own[part] > k]:
                with open(work / f"text.{doc['rank']}", "rb") as f:
                    f.seek(doc["start"])
                    text = f.read(doc["bytes"]).decode()
                yield doc, text[:doc["cut"]] if part == "train" else text[doc["cut"]:]


def learn_tokenizer(cfg, docs, own, work):
    """A tokenizer of the training text as it is mixed, or of a sample if there is much."""
    if cfg.tokenizer == "chars":
        letters = set()
        for part in PARTS:
            for _, text in read_texts(work, own, part):
                letters.update(text)
        letters = sorted(set().union(*gather(letters)))
        return make_encoding("chars", r"[\s\S]", {c.encode(): i for i, c in enumerate(letters)})
    share = SAMPLE / (docs["train"] * docs["bytes"]).sum()
    own = own[own["key"][:, 0] * np.uint64(0x9E3779B97F4A7C15) / 2.0 ** 64 < share]
    pieces = count_pieces(text for _, text in read_texts(work, own, "train"))
    size = cfg.vocab_size - 4    # the control tokens of make_encoding
    if cfg.vocab_size > 1024:    # and its rounding up, which shall not leave ids unused
        size += -cfg.vocab_size % 64
    ranks = train_bpe(sum(gather(pieces), Counter()), size)
    if len(ranks) < size:
        most = len(ranks) + 4
        most -= most % 64 if most > 1024 else 0
        fail(f"--vocab_size {cfg.vocab_size}: this text supports at most {most} ids; ask for fewer "
             f"or give more text")
    return make_encoding("bpe", SPLIT_PATTERN, ranks)


def write_tokens(enc, dtype, part, own, work, rank):
    """Write the ids of the texts for train or val, little-endian: every rank of its own texts, then
    the first rank puts them together. Returns the numbers of documents, tokens, bytes of text."""
    sizes = []    # (tokens, bytes) of each document
    with open(work / f"{part}.{rank}", "wb") as f:
        for _, text in read_texts(work, own, part):
            ids = encode(enc, text, dtype)
            f.write(ids.tobytes())
            sizes.append((len(ids), len(text.encode())))
    every = gather(np.array(sizes, np.int64).reshape(-1, 2))
    sizes = np.concatenate(every)
    if rank == 0:
        np.cumsum(sizes[:, 0]).astype("<u8").tofile(work / f"{part}.idx")
        with open(work / f"{part}.bin", "wb") as joined:
            for number in range(len(every)):
                with open(work / f"{part}.{number}", "rb") as f:
                    shutil.copyfileobj(f, joined, 1 << 22)
    return len(sizes), *sizes.sum(axis=0).tolist()


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank; also where ranks wait for each other."""
    if not dist.is_initialized():
        return [x]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, x)
    return every


def clean_share(cfg, parts, work, rank, world_size):
    """Clean this rank's share of the parts: as many bytes as the others, in order. Returns (docs
    (N,) DOC, {what was changed: how often})."""
    searched = cfg.clean and cfg.eval != "none" and "contaminated" not in cfg.skip
    items = read_items(cfg.eval) if searched else {}
    sizes = [max(1, min(end, path.stat().st_size) - start) for _, path, start, end in parts]
    owner = (np.cumsum(sizes) - sizes) * world_size // sum(sizes)
    docs, counts, shown = [np.zeros(0, DOC)], Counter(), time.time()
    with open(work / f"text.{rank}", "wb") as f:
        for n in np.flatnonzero(owner == rank).tolist():
            docs.append(clean_part(n, parts[n], cfg, items, f, counts))
            if time.time() > shown + 10:
                shown = time.time()
                print0(f"  part {n + 1} of {len(parts)} cleaned")
    docs = np.concatenate(docs)
    docs["rank"] = rank
    return docs, counts


def prepare(cfg, parts, weights, enc, work, rank, world_size):
    """Fill the working folder; returns the manifest (on the first rank)."""
    # 1. Clean: every rank its share
    docs, counts = clean_share(cfg, parts, work, rank, world_size)
    docs, counts = np.concatenate(gather(docs)), sum(gather(counts), Counter())
    check_readable(docs, parts, cfg)

    # 2. Decide which documents stay, and for what
    deduplicate(docs, cfg.skip if cfg.clean else DUPLICATES)
    leaks = decontaminate(docs)
    split_and_mix(docs, weights, cfg)

    # 3. Learn a tokenizer
    own = docs[docs["rank"] == rank]
    enc = enc or learn_tokenizer(cfg, docs, own, work)

    # 4. Encode
    dtype = np.dtype("<u2" if enc.n_vocab <= 2 ** 16 else "<u4")
    totals = dict(documents={}, tokens={}, bytes={})
    for part in PARTS:
        for name, n in zip(totals, write_tokens(enc, dtype, part, own, work, rank)):
            totals[name][part] = n

    # 5. Write down what happened
    if rank == 0:
        settings = {name: value for name, value in asdict(cfg).items() if name != "out"}
        thresholds = {rule.__name__: str(inspect.signature(rule)) for rule in RULES}
        manifest = dict(dtype=dtype.name, vocab_size=enc.n_vocab, encoding_hash=encoding_hash(enc),
                        **totals, settings=settings, thresholds=thresholds, contaminated=leaks,
                        ledger=make_ledger(docs, counts, work))
        (work / "encoding.json").write_text(json.dumps(encoding_to_dict(enc), indent=1))
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        if cfg.dropped:
            write_dropped(docs, parts, work)
        for file in work.glob("*.[0-9]*"):    # of single ranks
            file.unlink()
        return manifest


def make_ledger(docs, counts, work):
    """[dict(kind: changed, dropped or kept; name, documents, bytes, examples)]"""
    changed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [dict(kind="changed", name=name, documents=n, bytes=0, examples=[])
            for name, n in changed]
    for reason, n in Counter(docs["reason"]).most_common():
        these = docs[docs["reason"] == reason]
        examples = [" ".join(text[:200].split())[:60]
                    for _, text in read_texts(work, these[:3], "dropped")]
        rows.append(dict(kind="dropped" if reason else "kept", name=reason or "kept", documents=n,
                         bytes=int(these["bytes"].sum()), examples=examples))
    return rows


def write_dropped(docs, parts, work):
    """A row for each dropped document: evidence is what it is a copy of, or the items that it gives
    away. Names are pages/007.html#0 or raw/big.jsonl@16777216#12: file, first byte of part, record.
    """
    def name_of(doc):
        _, path, start, _ = parts[doc["part"]]
        return Path(*path.parts[-2:]).as_posix() + (f"@{start}" if start else "") + f"#{doc['at']}"

    stays = {doc["root"]: name_of(doc) for doc in docs if not doc["reason"]}    # of each cluster
    with open(work / "dropped.jsonl", "w") as f:
        for doc, text in read_texts(work, docs, "dropped"):
            evidence = sorted(set(doc["leaks"].values())) if doc["reason"] == "contaminated" else []
            if doc["reason"] in DUPLICATES and doc["root"] in stays:
                evidence = [stays[doc["root"]]]
            row = dict(document=name_of(doc), reason=doc["reason"], evidence=evidence, text=text)
            f.write(json.dumps(row) + "\n")


def report(manifest, out, seconds):
    """Print the ledger, and what to be wary of."""
    print0(f"{'':<47}{'documents':>11}{'bytes':>15}   for example")
    counts = Counter()
    for row in manifest["ledger"]:
        counts[row["kind"]] += row["documents"]
        example = row["examples"][0] if row["examples"] else ""
        size = f"{row['bytes']:,}" if row["bytes"] else ""
        print0(f"{row['kind']:<9}{row['name']:<38}{row['documents']:>11,}{size:>15}   "
               f"{example[:32]}")
    for part in PARTS:
        print0(f"{'':<9}{part:<38}{manifest['documents'][part]:>11,}{manifest['bytes'][part]:>15,}"
               f"   {manifest['tokens'][part]:,} tokens")
    if counts["dropped"] > counts["kept"]:
        print0("warning: most documents were dropped; if they were good, see --skip")
    print0(f"{out}: {sum(manifest['tokens'].values()):,} tokens, {seconds:.1f} s")


def main(cfg):
    started, out = time.time(), Path(cfg.out).resolve()    # a link is kept, what it points to goes
    for name, known in (("skip", ALL_RULES), ("languages", [*FUNCTION_WORDS, *SCRIPTS])):
        if wrong := set(getattr(cfg, name)) - set(known):
            fail(f"--{name} {min(wrong)}: choose from {' '.join(known)}")
    there = {f.name for f in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or there - WRITTEN or there and "train.idx" not in there:
        fail(f"--out {out} holds something else than tokens; choose another, it would be lost")
    enc = None if cfg.tokenizer in ("train", "chars") else load_tokenizer(cfg.tokenizer)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
    work = out.with_name(f".{out.name}.tmp")
    try:
        if rank == 0:
            shutil.rmtree(work, ignore_errors=True)    # of a run that was killed
            if out.exists():    # else the old one is the only copy
                shutil.rmtree(work.with_suffix(".old"), ignore_errors=True)
        inputs = find_parts(cfg) if rank == 0 else None    # fetches what is on the hub
        parts, weights = gather(inputs)[0]
        work.mkdir(parents=True, exist_ok=True)
        manifest = prepare(cfg, parts, weights, enc, work, rank, world_size)
        if rank == 0:
            old = work.with_suffix(".old")    # a half-written folder never has the final name
            if out.exists():
                out.rename(old)
            work.rename(out)
            shutil.rmtree(old, ignore_errors=True)
            report(manifest, cfg.out, time.time() - started)
        gather(None)    # the folder is of all
    except OSError as e:
        fail(f"{e.filename or work}: {e.strerror or e}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if world_size > 1:
            dist.destroy_process_group()    # else gloo's threads abort the process now and then


if __name__ == "__main__":
    main(parse_args(Config))
