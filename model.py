"""What every stage shares: command line, devices, tokenizer, model, sampling, optimizers, files.

Only arithmetic and formats that must be bit-identical in several stages live here; the training
loop stands in each stage script. Nothing below runs on import. As a script it exports:

    python model.py export out/sft.pt exported    # a folder that transformers loads

Shapes: B batch, T time, S cached time, C channels, H heads, K key heads, D head size, V vocabulary.
Conventions: padding is on the right; masks are 1 where a token counts; log-probs are float32 nats.
"""
import argparse
import atexit
import base64
import ctypes
import dataclasses
import functools
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import resource
import sys
import time
import typing
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.distributed.nn    # imported later, its default arguments would keep the group alive
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------
# Command line and messages


def fail(message):
    """End the program because of something the user can mend: one line on stderr, exit code 1."""
    raise SystemExit(f"error: {message}")


def print0(*args, **kwargs):
    """Print on the first rank only, at once (a log that lags behind is no log)."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


def duration(seconds):
    """65 -> '1m05s'"""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


# Settings of which 0 makes no sense; all others may be 0, and only BELOW_0 may be less.
ABOVE_0 = re.compile(r"depth|n_\w+|\w+_every|max_(steps|minutes|skips|new_tokens)|\w*batch_size|"
                     r"(total_batch|eval)_tokens|block_size|group_size|epochs|minibatches|"
                     r"grad_clip|spike|beta|kl_horizon")
BELOW_0 = ("unfinished",)


def parse_args(Config, argv=None):
    """Turn a dataclass into a command line: `--field value`, booleans `--field` / `--no-field`.

    The trailing comment of each field is its help text and a comment above fields their heading, so
    that code and --help cannot disagree. --config FILE gives settings as JSON, --resume those of
    the run at --out; flags win over both.
    Returns a Config; unknown flags, bad values and Ctrl-C end the program with one line.
    """
    sys.excepthook = quiet_end
    name = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(sys.modules[Config.__module__]), allow_abbrev=False,
        usage=f"python {name} [--setting value ...]", formatter_class=lambda prog:
        argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=100))
    parser.error = lambda message: fail(f"{message} (see python {name} --help)")
    parser.add_argument("--config", metavar="FILE", help="settings from a JSON file, such as the "
                        "one that a run writes beside its --out; flags win over it")
    section, fields = parser, {f.name: f for f in dataclasses.fields(Config)}
    for line in inspect.getsource(Config).splitlines():
        if heading := re.match(r"    # (.*)", line):
            section = parser.add_argument_group(heading[1])
        if not (found := re.match(r"    (\w+): .*?  # (.*)$", line)):
            continue
        f = fields[found[1]]
        kind = next(k for k in (*typing.get_args(f.type), f.type) if k is not type(None))
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        shown = {"None": "derived", "": "none", "True": "yes", "False": "no"}.get(shown, shown)
        flag = dict(default=default, help=f"{found[2]} [{shown}]".replace("%", "%%"))
        if kind is bool:
            flag["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(f.type) is typing.Literal:
            flag.update(choices=typing.get_args(f.type), metavar=f.name.upper())
        else:
            flag.update(type=kind, metavar={int: "N", float: "X"}.get(kind, f.name.upper()))
        if typing.get_origin(f.type) is list:
            flag["nargs"] = "+"
        section.add_argument(f"--{f.name}", **flag)
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    own = beside(given.out, ".json") if getattr(given, "resume", False) else None
    if given.config or own and own.exists():
        given = parser.parse_args(settings_argv(given.config or own, Config) + argv)
    del given.config
    for name, value in vars(given).items():
        if isinstance(value, (int, float)) and name not in BELOW_0:
            above = ABOVE_0.fullmatch(name)
            if not (value > 0 if above else value >= 0):
                fail(f"--{name} {value}: has to be {'above 0' if above else '0 or more'}")
    return Config(**vars(given))


def beside(out, suffix):
    """The file that goes beside a checkpoint: out/base.pt, .jsonl -> out/base.jsonl"""
    return Path(str(out).removesuffix(".pt") + suffix)


def settings_argv(path, Config):
    """The settings in a JSON file, or in a manifest.json under "settings", as a command line."""
    settings, argv = read_json(path), []
    settings = settings.get("settings", settings)
    if unknown := settings.keys() - {f.name for f in dataclasses.fields(Config)}:
        fail(f"{path}: unknown setting {min(unknown)!r}")
    for name, value in settings.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


def read_json(path):
    """The object in a JSON file, or one line that says what is wrong with it."""
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        fail(f"{path} is missing")
    except (OSError, ValueError) as e:
        fail(f"{path} cannot be read as JSON: {e}")
    return data if isinstance(data, dict) else fail(f"{path} is not a JSON object")


def quiet_end(kind, e, trace):
    """Ctrl-C, and a pipe such as `| head` that closes, are no errors to show a traceback for."""
    if kind is KeyboardInterrupt:
        print("\ninterrupted; a stage that trains goes on with --resume", file=sys.stderr)
    elif kind is BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # for the flush at exit
    else:
        sys.__excepthook__(kind, e, trace)


# ------------------------------------------------------------------------------------------------
# One process or many, CPU or GPU


@dataclass
class Dist:
    """Where this process runs. `dtype`: of matrix products under autocast, None for float32."""
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype | None
    is_master: bool

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def setup(seed, precision="auto"):
    """Join torchrun's processes if there are any, pick device and precision, seed, say so."""
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif torch.backends.mps.is_available() and world_size == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave_group)
    torch.manual_seed(seed)
    dtype, why = pick_precision(device, precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{device.type}, {torch.get_num_threads()} threads")
    print0(f"device: {world_size} x {name}, {why}")
    return Dist(rank, local_rank, world_size, device, dtype, rank == 0)


def leave_group():
    """At exit: a thread of gloo that frees its last tensor while Python ends aborts it."""
    time.sleep(0.1)    # it can do so now; torch keeps the group of a sharded model to the end
    dist.destroy_process_group()


def pick_precision(device, precision):
    """(autocast dtype or None, why). bf16 only where the hardware multiplies it."""
    if precision not in ("auto", "bf16", "fp32"):
        fail(f"--precision {precision}: choose auto, bf16 or fp32")
    if precision == "fp32":
        return None, "float32 as asked"
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        has = any(flags.get(k) for k in ("amx_bf16", "avx512_bf16", "bf16"))
    if has or precision == "bf16":
        return torch.bfloat16, "bf16 autocast" + ("" if has else " (emulated: slow)")
    return None, "float32 (no bf16 matrix products here)"


def keep_freed_memory():
    """Let glibc keep freed blocks: by default each large tensor is mapped and page-faulted anew.

    Training steps on CPU ask for the same sizes again and again; measured 1.2-1.8 times faster.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD, bytes


def seed_step(seed, step, rank=0):
    """Make the draws of a step a function of (seed, step, rank): resuming needs no saved RNG."""
    torch.manual_seed(int.from_bytes(hashlib.blake2b(
        f"{seed}/{step}/{rank}".encode(), digest_size=6).digest(), "big"))


def can_compile(device):
    """True if torch.compile works here; else says why not, once, and the stage runs uncompiled."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as e:    # whatever the compiler stack raises, the answer is the same
        print0(f"torch.compile does not work here, running without it ({type(e).__name__})")
        return False


def sum_over_ranks(x, d):
    """Sum of a tensor over all ranks; itself in one process."""
    if d.world_size == 1 or not dist.is_initialized():
        return x
    total = x.to(d.device)
    dist.all_reduce(total)
    return total


def peak_memory(d):
    """Most memory this process held so far, as text."""
    if d.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(d.device) / 1e9:.2f} GB of GPU memory"
    unit = 1 if sys.platform == "darwin" else 1024    # macOS counts bytes, Linux kilobytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory"


def peak_flops(d):
    """(FLOP/s this rank could reach at d.dtype, how we know). Known GPUs by name, else measured."""
    known = dict(H100=989e12, H200=989e12, B200=2250e12, A100=312e12, L40S=362e12, L4=121e12,
                 RTX4090=165e12, RTX3090=71e12)    # dense bf16, vendor data sheets
    name = torch.cuda.get_device_name(d.device).replace(" ", "") if d.device.type == "cuda" else ""
    for key, flops in known.items():
        if key in name and d.dtype:
            return flops, "data sheet"
    a = torch.randn(1024, 1024, device=d.device, dtype=d.dtype or torch.float32)
    best = math.inf
    for _ in range(12):
        start = time.perf_counter()
        (a @ a).sum().item()    # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 ** 3 / best, "measured"


# ------------------------------------------------------------------------------------------------
# Tokenizer and chat format

ENDOFTEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
# Pre-tokenizer of GPT-4 (cl100k_base, openai/tiktoken): merges never cross these pieces.
GPT4_SPLIT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")


class ComposedEncoding(tiktoken.Encoding):
    """Composes characters (Unicode NFC) before encoding, as Qwen does: e + accent is e-acute."""

    def before(self, text):
        return unicodedata.normalize("NFC", text)

    def encode(self, text, **kwargs):
        return super().encode(self.before(text), **kwargs)

    def encode_ordinary(self, text):
        return super().encode_ordinary(self.before(text))

    def encode_to_numpy(self, text, **kwargs):
        return super().encode_to_numpy(self.before(text), **kwargs)


class LetterEncoding(ComposedEncoding):
    """Of single characters; one that it has no id for would be a panic in tiktoken."""

    def before(self, text):
        if missing := {c for c in set(text) if c.encode() not in self._mergeable_ranks}:
            fail(f"the tokenizer of single characters has no {min(missing)!r}, which is in "
                 f"{text[:60]!r}; use texts of its letters, or another --tokenizer")
        return text


def make_encoding(name, pattern, ranks, special_tokens=None, nfc=False):
    """tiktoken.Encoding with our four control tokens added after the last id unless there already.

    ranks: {bytes: id}. Large vocabularies get reserved ids up to a multiple of 64: matrix products
    of odd width are slow, and this way tokenizer and model have the same number of ids.
    """
    special_tokens = dict(special_tokens or {})
    free = max([*ranks.values(), *special_tokens.values()]) + 1
    for token in (ENDOFTEXT, IM_START, IM_END, PAD):
        if token not in special_tokens:
            special_tokens[token], free = free, free + 1
    while free > 1024 and free % 64:
        special_tokens[f"<|reserved_{free}|>"], free = free, free + 1
    kind = ComposedEncoding if nfc else LetterEncoding if name == "chars" else tiktoken.Encoding
    return kind(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def encoding_to_dict(enc):
    """Plain strings and ints, safe for JSON and torch.load; ranks as in .tiktoken files."""
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    return dict(name=enc.name, pattern=enc._pat_str, special_tokens=dict(enc._special_tokens),
                ranks="\n".join(f"{base64.b64encode(b).decode()} {i}" for b, i in ranks),
                **(dict(nfc=True) if type(enc) is ComposedEncoding else {}))


def encoding_from_dict(d):
    ranks = {base64.b64decode(b): int(i) for b, i in map(str.split, d["ranks"].splitlines())}
    return make_encoding(d["name"], d["pattern"], ranks, d["special_tokens"], d.get("nfc", False))


def encoding_hash(enc):
    """Identity of a tokenizer: the same hash means the same ids for the same text."""
    d = {k: v for k, v in encoding_to_dict(enc).items() if k != "name"}
    return hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest()[:16]


def token_bytes(enc):
    """(V,) int64: how many bytes of text each id stands for, 0 for control tokens."""
    sizes = np.zeros(enc.n_vocab, dtype=np.int64)
    for piece, i in enc._mergeable_ranks.items():
        sizes[i] = len(piece)
    return torch.from_numpy(sizes)


def render_chat(enc, messages, reply=False):
    """ChatML as (ids, mask): mask is 1 on what the assistant says and on its end-of-turn token.

    messages: [{"role", "content"}]. With reply=True the ids end where the assistant would speak.
    Built segment by segment with encode_ordinary: text that looks like a control token stays text.
    Raises ValueError for an unknown role. Layout: <|im_start|>role\\ncontent<|im_end|>\\n.
    """
    start, end = enc._special_tokens[IM_START], enc._special_tokens[IM_END]
    ids, mask = [], []
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role {message['role']!r} (one of {', '.join(ROLES)})")
        head = [start, *enc.encode_ordinary(message["role"] + "\n")]
        body = [*enc.encode_ordinary(message["content"]), end]
        tail = enc.encode_ordinary("\n")
        ids += head + body + tail
        said = int(message["role"] == "assistant")
        mask += [0] * len(head) + [said] * len(body) + [0] * len(tail)
    if reply:
        ids += [start, *enc.encode_ordinary("assistant\n")]
    return ids, mask + [0] * (len(ids) - len(mask))


def render_reply(enc, prompt, reply):
    """(ids, mask) of a prompt (messages) and one reply (text): mask 1 on the reply and its end."""
    head, _ = render_chat(enc, prompt, reply=True)
    body = [*enc.encode_ordinary(reply), enc._special_tokens[IM_END]]
    return head + body, [0] * len(head) + [1] * len(body)


# ------------------------------------------------------------------------------------------------
# Conversations, in the shapes that people's files have


def find_data(path):
    """A file's path as it is; a data set's short name as the path it is downloaded to, once."""
    if Path(path).exists():
        return Path(path)
    import prepare    # the table of names stands there
    if str(path) not in prepare.DATASETS:
        fail(f"{path} does not exist; it may also be one of {', '.join(prepare.DATASETS)}")
    address, sha256, about = prepare.DATASETS[str(path)]
    print0(f"{path}: {address} ({about})")
    if int(os.environ.get("RANK", 0)) == 0:    # the other ranks find its file
        prepare.download(address, sha256, "out/downloads")
    if dist.is_initialized():
        dist.barrier()
    return prepare.download(address, sha256, "out/downloads")


def read_rows(paths):
    """The rows (dicts) of .jsonl(.gz), .json, .parquet files; over 1 % broken lines: an error."""
    rows = []
    for path in map(find_data, paths):
        try:
            if path.suffix == ".parquet":
                import pyarrow.parquet
                rows += pyarrow.parquet.read_table(path).to_pylist()
                continue
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
                text = f.read().decode("utf-8-sig", errors="replace")
            if path.suffix == ".json":
                found = json.loads(text)
                rows += found if isinstance(found, list) else [found]
                continue
        except ImportError:
            fail(f"{path}: reading Parquet needs pyarrow: pip install pyarrow")
        except (OSError, EOFError, ValueError) as e:
            fail(f"cannot read {path}: {e}")
        lines, broken = text.split("\n"), []
        for n, line in enumerate(lines, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                broken.append(n)
        if len(broken) > 0.01 * len(lines):
            fail(f"{path}: {len(broken)} of {len(lines)} lines are not JSON, the first is line "
                 f"{broken[0]}")
        if broken:
            print0(f"{path}: {len(broken)} broken lines skipped, the first is line {broken[0]}")
    if not rows:
        fail(f"no rows in {' '.join(map(str, paths))}")
    return rows


def to_turns(value, role):
    """Messages of a text (one turn, or an HH-RLHF transcript) or of a list of turns."""
    if isinstance(value, str):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", value)
        if parts[0].strip() or len(parts) == 1:
            return [dict(role=role, content=value)]
        value = [dict(role=who, content=text.strip())
                 for who, text in zip(parts[1::2], parts[2::2])]
        if len(value) > 1 and not value[-1]["content"]:
            value.pop()    # the open end, "Assistant:", is where a reply goes
    names = dict(human="user", gpt="assistant", bot="assistant", chatbot="assistant",
                 model="assistant", prompter="user")
    turns = []
    for turn in value:
        who = str(turn.get("role", turn.get("from"))).lower()
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):    # OpenAI's list of parts
            content = "".join(part.get("text", "") for part in content)
        if names.get(who, who) not in ROLES:
            raise ValueError(f"unknown role {who!r}")
        if not isinstance(content, str):
            raise ValueError("a turn without text")
        turns.append(dict(role=names.get(who, who), content=content))
    return turns


def to_messages(row):
    """A demonstration as messages: OpenAI, ShareGPT, Alpaca, GSM8K, prompt + completion, chosen.

    Raises ValueError with the reason where the row is none of these or nothing is said in it.
    """
    if "messages" in row or "conversations" in row:
        turns = to_turns(row.get("messages", row.get("conversations")), "user")
    elif "chosen" in row:
        prompt, chosen, _ = to_pair(row)
        turns = [*prompt, dict(role="assistant", content=chosen)]
    elif "instruction" in row or "question" in row:    # no transcript, whatever it looks like
        ask = row.get("instruction", row.get("question"))
        ask += f"\n\n{row['input']}" if row.get("input") else ""
        reply = row.get("output", row.get("answer", ""))
        turns = [dict(role="user", content=ask), dict(role="assistant", content=reply)]
    elif "prompt" in row:
        reply = row.get("completion", row.get("response", ""))
        turns = to_turns(row["prompt"], "user") + to_turns(reply, "assistant")
    else:
        raise ValueError("none of messages, conversations, instruction, question, prompt in it")
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise ValueError("no assistant turn")
    return with_system(row, turns)


def with_system(row, turns):
    """The turns, after the row's own system message if it has one and they do not."""
    if not row.get("system") or turns[:1] and turns[0]["role"] == "system":
        return turns
    return [dict(role="system", content=row["system"]), *turns]


def to_prompt(row):
    """The messages an assistant should answer next. Raises ValueError."""
    talk = [row[key] for key in ("prompt", "messages", "conversations") if key in row]
    if talk:
        turns = with_system(row, to_turns(talk[0], "user"))
    else:
        turns = to_messages({"answer": "-", "output": "-", **row})
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not any(turn["content"].strip() for turn in turns if turn["role"] != "system"):
        raise ValueError("empty prompt")
    return turns


def to_pair(row):
    """(prompt messages, chosen text, rejected text): TRL, HH-RLHF, UltraFeedback. ValueError."""
    chosen, rejected = (to_turns(row.get(k) or "", "assistant") for k in ("chosen", "rejected"))
    prompt, asked = chosen[:-1], to_turns(row["prompt"], "user") if row.get("prompt") else []
    if prompt[:len(asked)] != asked and (not prompt or prompt[0]["role"] == "assistant"):
        prompt = asked + prompt    # the prompt apart, the conversation goes on in both answers
    if rejected[:-1] != chosen[:-1]:
        raise ValueError("the prompts differ")
    if not any(turn["content"].strip() for turn in prompt):
        raise ValueError("empty prompt")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise ValueError("no assistant turn")
    chosen, rejected = chosen[-1]["content"], rejected[-1]["content"]
    if not chosen.strip() or not rejected.strip():
        raise ValueError("empty answer")
    if chosen.strip() == rejected.strip():
        raise ValueError("equal answers")
    return with_system(row, prompt), chosen, rejected


def keep_valid(rows, convert, what):
    """[convert(row)] where that raises no ValueError; the other rows counted by reason."""
    kept, reasons = [], {}
    for row in rows:
        try:
            kept.append(convert(row))
        except (ValueError, TypeError, AttributeError, LookupError) as e:
            why = str(e) if isinstance(e, ValueError) else "not in a known format"
            reasons[why] = reasons.get(why, 0) + 1
    if reasons:
        print0(f"{what}: {sum(reasons.values())} of {len(rows)} rows dropped: "
               + ", ".join(f"{why} ({n})" for why, n in reasons.items()))
    if not kept:
        fail(f"{what}: no row is usable")
    return kept


def load_prompts(paths, enc, room):
    """Rows as dicts: ids (ready for an answer), messages, and the row itself for the verifier."""
    def convert(row):
        messages = to_prompt(row)
        ids, _ = render_chat(enc, messages, reply=True)
        if len(ids) > room:
            raise ValueError(f"longer than {room} tokens")
        return dict(ids=ids, messages=messages, row=row, prompt=str(messages))

    return keep_valid(read_rows(paths), convert, " ".join(paths))


# ------------------------------------------------------------------------------------------------
# Arithmetic that several stages need bit for bit


def token_logprobs(logits, ids):
    """log p(ids[t] | ids[<t]) as (B, T) float32 nats, aligned to `ids`; entry 0 is 0.

    logits (B, T, V): logits[:, t] predicts ids[:, t + 1], the only place that knows this shift.
    """
    nats = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:].long(),
                           reduction="none")
    return F.pad(-nats, (1, 0))


def pad_batch(rows, pad_id):
    """Right-pad lists of ids: (ids (B, T) int64, mask (B, T) float32, 1 on real tokens)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, :len(row)] = 1
    return ids, mask


def wilson(k, n, z=1.959964):
    """(low, high), 95 % interval of a share k / n. Wilson 1927."""
    if not n:
        return 0.0, 1.0
    p, zz = k / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return (p + zz / 2 - half) / (1 + zz), (p + zz / 2 + half) / (1 + zz)


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n).tolist()


def pick(n, index, seed):
    """Which of n rows the index-th draw of a run is: each once an epoch, in ever new order."""
    epoch, i = divmod(index, n)
    return epoch_order(seed, epoch, n)[i]


def cosine_lr(progress, warmup, learning_rate, min_lr):
    """Linear warm-up from 0, then half a cosine to min_lr; progress, warmup: shares of the run."""
    if progress < warmup:
        return learning_rate * progress / warmup
    x = min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * x))


# ------------------------------------------------------------------------------------------------
# The model: pre-norm decoder of the Llama / Qwen family


@dataclass
class GPTConfig:
    block_size: int = 256             # longest sequence, tokens
    vocab_size: int = 1024
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4                # fewer than n_head: grouped-query attention
    n_embd: int = 256
    n_hidden: int | None = None       # SwiGLU width; None: 8/3 of n_embd, rounded up to 64s
    head_size: int | None = None      # None: n_embd / n_head
    qk_norm: bool = True              # RMSNorm on queries and keys (Qwen3)
    qkv_bias: bool = False            # Qwen2
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    rope_scaling: dict | None = None  # Llama 3's, as config.json has it
    nope_layers: list | None = None   # layers without rotary positions (SmolLM3)
    dropout: float = 0.0

    def __post_init__(self):
        if self.n_embd % self.n_head and not self.head_size:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head "
                             f"{self.n_kv_head}")
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.head_size % 2:
            raise ValueError(f"heads of {self.head_size} channels cannot be rotated in pairs: "
                             f"choose another n_embd or n_head")
        self.n_hidden = self.n_hidden or -(-self.n_embd * 8 // 3 // 64) * 64


def rope_tables(config):
    """cos and signed sin (T, D) of the rotary angles, half-split. Su et al., arXiv 2104.09864."""
    d = config.head_size
    freq = config.rope_base ** -(torch.arange(0, d, 2, dtype=torch.float32) / d)
    s = config.rope_scaling
    if s and s.get("rope_type", s.get("type")) == "llama3":    # slow down the low frequencies
        old = s["original_max_position_embeddings"]
        turns = old * freq / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (blend + (1 - blend) / s["factor"])
    angles = torch.arange(config.block_size, dtype=torch.float32)[:, None] * freq
    return torch.cat([angles, angles], 1).cos(), torch.cat([-angles, angles], 1).sin()


class Rotate(torch.autograd.Function):
    """Rotate each pair (x[i], x[i + D/2]) by its angle. x (B, H, T, D); cos, sin (.., T, D)."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)

    @staticmethod
    def backward(ctx, grad):    # turn back; attention leaves the gradient of keys transposed
        cos, sin = ctx.saved_tensors
        return Rotate.apply(grad.contiguous(), cos, -sin), None, None


def attention(q, k, v, mask=None, fused=None):
    """softmax(q k' / sqrt(D)) v. q (B, H, T, D); k, v (B, K, S, D); -> (B, H, T, D).

    mask: bool, broadcastable to (B, 1, T, S), True where a query may look; None: causal, T == S.
    fused=None takes torch's fused kernel where it is faster: on GPUs and for long rows.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if q.is_cuda or T > 1024 if fused is None else fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                              enable_gqa=H != K)
    # The H/K queries that share a key head become rows of one product: keys are never copied.
    scores = (q * D ** -0.5).reshape(B, K, H // K * T, D) @ k.transpose(-2, -1)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    scores = scores.view(B, H, T, S) + bias
    with torch.autocast(q.device.type, enabled=False):    # bf16 in and out, summed in float32
        weights = scores.softmax(dim=-1)
    return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, D)


class KVCache:
    """Keys and values of all layers. Slot t of a row holds its token t; rows differ in length."""

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_size)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def update(self, layer, k, v, positions, end):
        """Write k, v (B, K, T, D) at positions (B, T); return all slots before `end`."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.k[layer][rows, :, positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer][rows, :, positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, :end].to(k.dtype), self.v[layer, :, :, :end].to(v.dtype)

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class Normalise(torch.autograd.Function):
    """x / rms(x) * weight, x (.., C). Autograd's own backward reads and writes twice as much."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)    # faster than x.square().mean()
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        x = x * scale
        inner = grad * x
        along = (inner @ weight).unsqueeze(-1) / x.shape[-1]
        grad_x = (grad * weight).addcmul_(x, along, value=-1).mul_(scale)
        return grad_x, inner.flatten(0, -2).sum(dim=0), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight. Zhang & Sennrich 2019, arXiv 1910.07467."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):    # CUDA's would turn half of it float32
            return Normalise.apply(x, self.weight.to(x.dtype), self.eps)


class CausalSelfAttention(nn.Module):

    def __init__(self, config, rotary=True):
        super().__init__()
        self.head_size, self.qk_norm, self.rotary = config.head_size, config.qk_norm, rotary
        q_size, kv_size = config.n_head * config.head_size, config.n_kv_head * config.head_size
        self.q_proj = nn.Linear(config.n_embd, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.n_embd, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.norm_eps)
            self.k_norm = RMSNorm(config.head_size, config.norm_eps)

    def forward(self, x, cos, sin, mask, write_cache):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_size).transpose(1, 2).contiguous()
                   for proj in (self.q_proj, self.k_proj, self.v_proj))    # (B, H or K, T, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)
        if write_cache:
            k, v = write_cache(k, v)                             # (B, K, S, D)
        y = attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))    # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):

    def __init__(self, config, rotary=True):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config, rotary)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, mask, write_cache):
        x = x + self.dropout(self.attn(self.attn_norm(x), cos, sin, mask, write_cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, rotary=i not in (config.nope_layers or ()))
                                    for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:    # keep the variance; what writes to the residual stream starts at 0
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.0 if writes else p.shape[1] ** -0.5)
        nn.init.normal_(self.embed.weight, std=0.02 if config.tie_embeddings else 1.0)
        nn.init.normal_(self.head.weight, std=0.02 * config.n_embd ** -0.5)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def hidden(self, ids, doc=None, cache=None, positions=None):
        """Final-norm states (B, T, C).

        doc (B, T): number of the document each token is in; tokens see their own document only,
        and positions restart with it. cache: KVCache, with positions (B, T) of the tokens.
        """
        B, T = ids.shape
        mask, write_caches = None, [None] * len(self.blocks)
        if doc is not None:
            t = torch.arange(T, device=ids.device)
            starts = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True)
            positions = t - torch.where(starts, t, 0).cummax(dim=1).values
            mask = (doc[:, :, None] == doc[:, None, :]) & (t[:, None] >= t)
            mask = mask[:, None]                                            # (B, 1, T, T)
        if cache is not None:
            end = int(positions.max()) + 1
            slots = torch.arange(end, device=ids.device)
            mask = (slots <= positions[:, :, None])[:, None]                # (B, 1, T, S)
            write_caches = [lambda k, v, i=i: cache.update(i, k, v, positions, end)
                            for i in range(len(self.blocks))]
        at = slice(T) if positions is None else positions[:, None]          # (B, 1, T)
        cos, sin = self.cos[at], self.sin[at]                               # (.., T, D)
        x = self.embed(ids)                                                 # (B, T, C)
        if torch.is_autocast_enabled(ids.device.type):    # activations bf16, weights float32
            dtype = torch.get_autocast_dtype(ids.device.type)
            x, cos, sin = x.to(dtype), cos.to(dtype), sin.to(dtype)
        for block, write_cache in zip(self.blocks, write_caches):
            x = block(x, cos, sin, mask, write_cache)
        return self.norm(x)

    def forward(self, ids, doc=None, cache=None, positions=None):
        """Logits (B, T, V) at every position, always."""
        return self.head(self.hidden(ids, doc, cache, positions))

    def flops_per_token(self):
        """Forward and backward, as PaLM (arXiv 2204.02311, app. B): 6 a weight + attention."""
        c = self.config
        weights = self.head.weight.numel()
        weights += sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        return 6 * weights + 12 * c.n_layer * c.n_head * c.head_size * c.block_size


class ScalarHead(nn.Module):
    """One number a position: a reward model, read at a text's last token, or a critic.

    Weights of the head ~ N(0, 1/(C + 1)), bias 0: Stiennon et al. 2020, arXiv 2009.01325.
    """

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.config = gpt, gpt.config
        gpt.head = None    # of no use here, and DDP would wait for its gradient
        self.score = nn.Linear(gpt.config.n_embd, 1)
        nn.init.normal_(self.score.weight, std=(gpt.config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.score.bias)

    def forward(self, ids, doc=None):
        """Scores (B, T), float32."""
        states = self.gpt.hidden(ids, doc).float()
        with torch.autocast(ids.device.type, enabled=False):    # bf16 would round the scores
            return self.score(states).squeeze(-1)


def at_last(scores, lengths):
    """(B,): the score of each row's last real token; scores (B, T), lengths (B,) in tokens."""
    return scores.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)


# ------------------------------------------------------------------------------------------------
# LoRA


class LoRALinear(nn.Module):
    """W x + alpha / rank * B (A x), W frozen, B = 0 at first. Hu et al. 2021, arXiv 2106.09685."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale, self.on = linear, alpha / rank, True
        weight = linear.weight
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.uniform_(self.a, -weight.shape[1] ** -0.5, weight.shape[1] ** -0.5)

    def forward(self, x):
        y = self.linear(x)
        return y + self.scale * F.linear(F.linear(x, self.a), self.b) if self.on else y


def add_lora(model, rank, alpha, targets):
    """Freeze the model and adapt its linear layers of these names ("all": every one in a block)."""
    layers = [(parent, name) for parent in model.modules() for name, child in
              parent.named_children() if isinstance(child, nn.Linear) and name.endswith("_proj")
              and ("all" in targets or name in targets)]
    if missing := set(targets) - {"all", *(name for _, name in layers)}:
        fail(f"--lora_targets {min(missing)}: no such layer; choose all or some of q_proj k_proj "
             f"v_proj o_proj gate_proj up_proj down_proj")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("score."))    # the head of a reward model stays trainable
    for parent, name in layers:
        setattr(parent, name, LoRALinear(getattr(parent, name), rank, alpha))
    return model


class Reference:
    """`with reference as model:` a frozen copy, or with LoRA the policy without its adapters."""

    def __init__(self, policy, frozen=None):
        self.policy, self.frozen = policy, frozen

    def switch(self, on):
        for m in self.model.modules():
            if isinstance(m, LoRALinear):
                m.on = on

    def __enter__(self):
        self.model = self.frozen or self.policy
        self.switch(False)
        self.was_training = self.model.training
        return self.model.eval()

    def __exit__(self, *exception):
        self.switch(True)
        self.model.train(self.was_training)


def plain_weights(model):
    """(state_dict with adapters merged in, state_dict of the adapted layers alone or None)."""
    weights, adapted = model.state_dict(), {}
    for name, m in model.named_modules():
        if isinstance(m, LoRALinear):
            parts = {k: weights.pop(f"{name}.{k}") for k, _ in m.named_parameters()}
            adapted |= {f"{name}.{k}": v for k, v in parts.items()}
            weights[f"{name}.weight"] = parts["linear.weight"] + m.scale * parts["b"] @ parts["a"]
            if "linear.bias" in parts:
                weights[f"{name}.bias"] = parts["linear.bias"]
    return weights, adapted or None


def load_adapted(model, checkpoint):
    """For --resume: adapters, and the frozen layers under them, which are merged in `weights`."""
    ours, saved = plain_weights(model)[1] or {}, checkpoint.get("adapted") or {}
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in saved.items()}:
        fail("--resume: this run was started with other --lora_rank or --lora_targets")
    made = checkpoint["stage_config"]
    if ours and any(m.scale != made["lora_alpha"] / made["lora_rank"] for m in model.modules()
                    if isinstance(m, LoRALinear)):
        fail(f"--resume: this run was started with --lora_alpha {made['lora_alpha']:g}")
    model.load_state_dict(saved, strict=False)


# ------------------------------------------------------------------------------------------------
# Sampling


def sample(logits, temperature, top_k, top_p, uniform):
    """Next ids (B,) from logits (B, V) by inverting the cumulative distribution at uniform (B,).

    One uniform number a row: what a row samples does not depend on its neighbours in the batch.
    temperature 0 is greedy. top_p keeps the smallest set of tokens whose mass reaches top_p.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = (logits / temperature).softmax(dim=-1), None
    if 0 < top_k < probs.shape[-1] or top_p < 1:    # sorting takes longer than all the rest
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        probs[:, top_k or probs.shape[-1]:] = 0
        if top_p < 1:
            probs[probs.cumsum(-1) - probs >= top_p * probs.sum(-1, keepdim=True)] = 0
    cdf = probs.cumsum(dim=-1)
    index = torch.searchsorted(cdf, (uniform[:, None] * cdf[:, -1:]), right=True)
    last = probs.shape[-1] - 1 - (probs > 0).byte().flip(-1).argmax(dim=-1, keepdim=True)
    index = index.minimum(last)    # rounding must not leave the kept tokens
    return (index if order is None else order.gather(1, index)).squeeze(1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_ids=(),
             pad_id=0, seed=0, seeds=None, dtype=None):
    """Continue each prompt (list of ids): ids (B, T) and mask (B, T), right-padded with pad_id.

    mask is 1 on sampled tokens, the stop token included. Row i draws its numbers from seeds[i]
    (default seed + i): it samples the same alone and in any batch. Rows that stop leave the batch.
    Raises ValueError for an empty prompt or when a row would outgrow the model's block_size.
    """
    config, device = model.config, model.embed.weight.device
    if min(map(len, prompts)) == 0:
        raise ValueError("generate: a prompt is empty")
    ids, _ = pad_batch(prompts, pad_id)
    B, P = ids.shape
    if P + max_new_tokens > config.block_size:
        raise ValueError(f"generate: {P} prompt + {max_new_tokens} new tokens exceed block_size "
                         f"{config.block_size}")
    ids = F.pad(ids, (0, max_new_tokens), value=pad_id).to(device)
    mask = torch.zeros_like(ids, dtype=torch.float32)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    seeds = [seed + i for i in range(B)] if seeds is None else seeds
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s))
                           for s in seeds]).to(device)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    rows = torch.arange(B, device=device)    # which rows of the result the running batch holds
    was_training = model.training
    model.eval()
    cache = KVCache(config, B, P + max_new_tokens, device, dtype or model.embed.weight.dtype)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        positions = torch.arange(P, device=device).expand(B, P)
        states = model.hidden(ids[:, :P], cache=cache, positions=positions)
        states = states[rows, lengths - 1]                                    # (B, C)
        for t in range(max_new_tokens):
            at = lengths[rows] + t
            token = sample(model.head(states), temperature, top_k, top_p, uniform[rows, t])
            ids[rows, at], mask[rows, at] = token, 1.0
            alive = ~torch.isin(token, stops)
            if t + 1 == max_new_tokens or not alive.any():
                break
            if not alive.all():
                rows, token, at = rows[alive], token[alive], at[alive]
                cache.select(alive)
            states = model.hidden(token[:, None], cache=cache, positions=at[:, None])[:, 0]
    model.train(was_training)
    width = int(torch.maximum(lengths, (mask > 0).cumsum(1).argmax(1) + 1).max())
    return ids[:, :width], mask[:, :width]


# ------------------------------------------------------------------------------------------------
# Optimizers


def orthogonalise(x, dtype, steps=3):
    """About the orthogonal matrices nearest to x (n, rows, columns): Newton-Schulz, Jordan et al.

    Each step applies 3.4445 s - 4.775 s^3 + 2.0315 s^5 to all singular values s, which pushes them
    to 0.7 ... 1.2. Three steps: the same loss as five at equal time, more tokens a second. They
    multiply the small Gram matrices, x only first and last: in bf16 singular values are off by at
    most 0.02 to 0.05 after three steps, by up to 1.7 after five.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.to(dtype) / x.norm(dim=(1, 2), keepdim=True).to(dtype).clamp(min=1e-7)
    gram = x.mT @ x if tall else x @ x.mT    # the smaller one; every power of it is symmetric
    product = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = factor @ product if step else factor
        if step < steps - 1:
            gram = factor @ gram @ factor
    return x @ product if tall else product @ x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of matrices. Jordan et al. 2024.

    Every row of the update, what goes into one neuron, has the same length (Muon+: Zhang et al.
    2026, arXiv 2602.21545): no neuron learns faster than its neighbours. It has the size of AdamW's
    update (Liu et al. 2025, arXiv 2502.16982), so one rate serves both. In a group with a head_size, each head's rows are a matrix of their own: no head
    drowns another's gradient, and the products are smaller (GLM-5, arXiv 2602.15763). torch.optim
    has the plain one, in bf16 always: more than ten times as long on processors without it.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.9, head_size=None,
                 dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum,
                                      head_size=head_size))
        self.dtype = dtype    # of the products

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}    # products of many matrices at once are faster
            for p in (p for p in group["params"] if p.grad is not None):
                alike.setdefault(p.shape, []).append(p)
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            for params in (ps[i:i + 16] for ps in alike.values() for i in range(0, len(ps), 16)):
                nesterov = params[0].new_empty(len(params), *params[0].shape)
                for p, out in zip(params, nesterov):
                    average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    torch.lerp(p.grad, average, group["momentum"], out=out)
                rows, columns = group["head_size"] or nesterov.shape[1], nesterov.shape[2]
                updates = orthogonalise(nesterov.view(-1, rows, columns), self.dtype)
                updates = F.normalize(updates, dim=2)
                for p, update in zip(params, updates.view_as(nesterov)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * columns ** 0.5)


def make_optimizers(model, optimizer, learning_rate, weight_decay, betas, zero1=False, dtype=None):
    """[AdamW], or [Muon for the hidden matrices, AdamW for the rest]; decay on the former only.

    dtype: of Muon's products, None for float32.
    zero1 (Rajbhandari et al. 2020, arXiv 1910.02054): each rank keeps the moments of its share of
    the parameters, steps those and sends them to the other ranks.
    """
    def make(kind, params, **settings):
        if not zero1:
            return kind(params, **settings)
        from torch.distributed.optim import ZeroRedundancyOptimizer    # slow to import
        return ZeroRedundancyOptimizer(params, kind, **settings)

    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in params.items() if p.dim() == 2 and "blocks." in n}
    others = [p for n, p in params.items() if n not in matrices]
    groups = [dict(params=others, weight_decay=0.0)]
    result = []
    if optimizer == "muon":
        heads = [n for n in matrices if re.search(r"[qkv]_proj\.weight$", n)]
        split = [dict(params=[matrices.pop(n) for n in heads], head_size=model.config.head_size),
                 dict(params=list(matrices.values()))]
        result.append(make(Muon, split, lr=learning_rate, weight_decay=weight_decay,
                           dtype=dtype or torch.float32))
    elif optimizer == "adamw":
        groups.insert(0, dict(params=list(matrices.values()), weight_decay=weight_decay))
    else:
        fail(f"--optimizer {optimizer}: choose muon or adamw")
    # ZeroRedundancyOptimizer loads step counts to the CPU, where fused CUDA kernels fail on them.
    fused = not zero1 and all(p.device.type in ("cuda", "cpu") for p in others)
    return [*result, make(torch.optim.AdamW, groups, lr=learning_rate, betas=betas, fused=fused)]


# ------------------------------------------------------------------------------------------------
# Files


def write_atomic(path, write):
    """Call write(file) on a temporary file beside path, flush to disk, rename: all or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:    # Ctrl-C leaves nothing behind either
        if temporary.is_file():
            temporary.unlink()
        if not isinstance(e, (OSError, RuntimeError)):
            raise
        # torch.save reports a full disk as a RuntimeError about positions; the cause comes with it
        fail(f"cannot write {path}: {e.__context__ or e}".splitlines()[0])


def gather(x):
    """x with its tensors whole and on the CPU of the first rank; None for each on other ranks.

    Where they are sharded all ranks call this together; a device holds one whole tensor at a time.
    """
    if isinstance(x, dict):
        return {k: gather(v) for k, v in x.items()}
    if isinstance(x, list):
        return [gather(v) for v in x]
    if not isinstance(x, torch.Tensor):
        return x
    x = x.full_tensor() if hasattr(x, "full_tensor") else x    # a DTensor's parts, from all ranks
    return x.detach().cpu() if int(os.environ.get("RANK", 0)) == 0 else None


def scatter(saved, opt):
    """The inverse for an optimizer's state: this rank's part of each whole moment, in place."""
    from torch.distributed.tensor import distribute_tensor    # slow to import
    params = [p for group in opt.param_groups for p in group["params"]]
    for i, moments in saved["state"].items():
        for name, x in moments.items():
            if x.dim():    # the step count has none
                moments[name] = distribute_tensor(x, params[i].device_mesh, params[i].placements)


def save_checkpoint(path, model, stage, step, enc, stage_config, **extra):
    """One self-contained file: float32 weights, sizes, tokenizer, settings, what resuming needs.

    The first rank writes it. The others may call this too, and must if the model is sharded.
    """
    weights, adapted = map(gather, plain_weights(model))
    if model.config.tie_embeddings:
        weights.pop("head.weight", None)
    checkpoint = dict(format=1, stage=stage, step=step, weights=weights, adapted=adapted,
                      model_config=dataclasses.asdict(model.config), encoding=encoding_to_dict(enc),
                      stage_config=dataclasses.asdict(stage_config), **gather(extra))
    if int(os.environ.get("RANK", 0)) == 0:
        write_atomic(path, lambda f: torch.save(checkpoint, f))


def check_out(cfg):
    """Refuse an --out that holds steps of an earlier run: a forgotten --resume would lose them."""
    if cfg.resume or cfg.overwrite or not Path(cfg.out).exists():
        return
    try:
        step = torch.load(cfg.out, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception as e:    # whatever is wrong with it, it is not ours to replace
        fail(f"--out {cfg.out} exists and is no checkpoint ({type(e).__name__}); choose another")
    if step > 0:
        fail(f"--out {cfg.out} holds {step:,} steps of an earlier run: go on with --resume, start "
             f"anew with --overwrite, or choose another --out")


def lineage(checkpoint):
    """How a checkpoint came about, oldest first: [dict(stage, step, settings, data)]; [] for None.

    A stage keeps that of its --init as state["history"], what it learned from in state["data"].
    """
    if checkpoint is None:
        return []
    state = checkpoint.get("state", {})
    return [*state.get("history", []), dict(
        stage=checkpoint["stage"], step=checkpoint["step"], settings=checkpoint["stage_config"],
        data=state.get("data", []))]


def load_checkpoint(path, made_by, stage=None):
    """What save_checkpoint wrote, or a public model's folder in the same form.

    Code is never unpickled. made_by: the command that makes the file, for the message.
    stage: the only stage that may have made it, for --resume.
    """
    if Path(path).is_dir():
        return import_model(path)
    if not Path(path).exists():
        fail(f"{path} does not exist; make it with: {made_by}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model_config"], checkpoint["weights"]
    except Exception as e:
        fail(f"{path} is not a checkpoint of this project, or is damaged ({type(e).__name__})")
    if stage not in (None, checkpoint["stage"]):
        fail(f"--resume: {path} was made by {checkpoint['stage']}, not by {stage}")
    return checkpoint


def resume_state(checkpoint, optimizers, max_steps, cfg):
    """The state to go on with, the optimizers' loaded; names every setting that has changed."""
    state, before = checkpoint["state"], checkpoint["stage_config"]
    if max_steps and state["step"] > max_steps:
        fail(f"--resume: {cfg.out} has {state['step']} steps already, more than the {max_steps} "
             f"that it should end after")
    try:
        for opt, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            opt.load_state_dict(saved)
    except ValueError:
        fail(f"--resume: {cfg.out} was trained with another --optimizer, or by another version")
    changed = [f"{k} {v} -> {getattr(cfg, k)}" for k, v in before.items()
               if k not in ("resume", "overwrite", "out") and v != getattr(cfg, k, None)]
    print0(f"resuming {cfg.out} at step {state['step']}", *changed, sep="; changed: ")
    return state


def load_weights(model, checkpoint):
    """Copy the checkpoint's weights into the model; every one must be there and fit."""
    weights = dict(checkpoint["weights"])
    if model.config.tie_embeddings and "embed.weight" in weights:
        weights["head.weight"] = weights["embed.weight"]
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as e:
        fail("weights do not fit the model: " + " ".join(str(e).split())[:300])


def load_model(checkpoint, device, dropout=0.0):
    """(model, tokenizer) of a loaded checkpoint; a ScalarHead if that is what was saved."""
    model = GPT(GPTConfig(**{**checkpoint["model_config"], "dropout": dropout}))
    if "score.weight" in checkpoint["weights"]:
        model = ScalarHead(model)
    load_weights(model, checkpoint)
    return model.to(device), encoding_from_dict(checkpoint["encoding"])


class Log:
    """One console line and one JSON line per call; the file is `out` with .jsonl instead of .pt.

    With cfg the settings go beside it as .json, for --config and --resume, and with cfg.tensorboard
    every number also into event files.
    """

    def __init__(self, out, resume_step=None, cfg=None):
        if not Path(out).name or Path(out).is_dir():
            fail(f"--out {out}: give the name of a file, such as out/model.pt")
        if cfg is not None:
            check_out(cfg)
        self.path, self.board, lines = beside(out, ".jsonl"), None, []
        settings = beside(out, ".json")
        for path, ours in ((self.path, rb'\{"step": \d'), (settings, rb'\{.*"resume": false')):
            if path.exists():
                with open(path, "rb") as f:
                    if not re.match(ours + rb"|$", f.read(10_000), re.DOTALL):  # somebody's data
                        fail(f"{path}, where the log goes, is something else; choose another --out")
        if os.environ.get("RANK", "0") != "0":
            return
        if resume_step is not None and self.path.exists():    # drop what came after the checkpoint
            lines = [line for line in self.path.read_text().splitlines(keepends=True)
                     if line.endswith("\n") and json.loads(line)["step"] < resume_step]
        write_atomic(self.path, lambda f: f.write("".join(lines).encode()))
        if cfg is not None:
            text = json.dumps({**dataclasses.asdict(cfg), "resume": False, "overwrite": False}, indent=1)
            write_atomic(settings, lambda f: f.write(text.encode()))
        if getattr(cfg, "tensorboard", False):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("--tensorboard needs a package: pip install tensorboard")
            self.board = SummaryWriter(beside(out, ".tensorboard"), purge_step=resume_step)

    def __call__(self, line, **metrics):
        if os.environ.get("RANK", "0") != "0":
            return
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            fail(f"cannot write {self.path}: {e.strerror}; the last checkpoint is kept")
        for name, value in row.items() if self.board else ():
            if name != "step" and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, row["step"])
        if line:
            print0(line)


# ------------------------------------------------------------------------------------------------
# Public models, in: a folder as transformers has it. What is not supported is named, never guessed

# What byte-level tokenizers split text with if they do not say, and with every digit on its own.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_SPLIT = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})"
                r"|\s+(?!\S)|\s+")
# tokenizer.json writes bytes as letters: printable ones stand for themselves, others follow 255.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in PRINTABLE} | {
    b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
BYTES = {letter: b for b, letter in LETTERS.items()}
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
WEIGHT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Our sizes under their names in a config.json.
PUBLIC_SIZES = dict(
    block_size="max_position_embeddings", vocab_size="vocab_size", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size",
    n_hidden="intermediate_size", head_size="head_dim", norm_eps="rms_norm_eps",
    tie_embeddings="tie_word_embeddings")


def public_name(name):
    """A weight's name in the folders of transformers."""
    for ours, theirs in ((".attn_norm.", ".input_layernorm."), (".attn.", ".self_attn."),
                         (".mlp_norm.", ".post_attention_layernorm."), ("blocks.", "model.layers."),
                         ("embed.", "model.embed_tokens."), ("head.", "lm_head.")):
        name = name.replace(ours, theirs)
    return "model.norm.weight" if name == "norm.weight" else name


def check_supported(path, *fields):
    """Each field is (name, value, the values that are supported)."""
    for name, value, supported in fields:
        if value not in supported:
            fail(f"{path}: {name} {value!r} is not supported, only "
                 + ", ".join(repr(s) for s in supported if s or s is supported[0]))


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped: 8 bytes length, JSON header, data."""
    tensors = {}
    try:
        data = np.memmap(path, np.uint8, mode="c")
        size, start = len(data), 8 + int.from_bytes(data[:8].tobytes(), "little")
        if start > size:
            fail(f"{path}: its header would end at byte {start} of {size}; is the file complete?")
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name == "__metadata__":
                continue
            check_supported(path, (f"{name}: dtype", entry["dtype"], [*WEIGHT_TYPES]))
            shape, dtype = entry["shape"], WEIGHT_TYPES[entry["dtype"]]
            begin, end = (start + offset for offset in entry["data_offsets"])
            if end > size:
                fail(f"{path}: {name} would end at byte {end} of {size}; is the file complete?")
            if not start <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
                fail(f"{path}: {name} has {end - begin} bytes, not those of shape {shape}")
            tensors[name] = torch.from_numpy(data[begin:end]).view(dtype).view(shape)
    except OSError as e:
        fail(f"{path} is missing" if not path.exists() else f"cannot read {path}: {e.strerror}")
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        fail(f"{path}: damaged header ({type(e).__name__}: {e})".splitlines()[0])
    return tensors


def import_config(path):
    """(GPTConfig, id of the token that ends a text or None) from a config.json."""
    c = read_json(path)
    family = c.get("model_type")

    def get(name, default=None, kind=int):
        value = default if c.get(name) is None else c[name]
        if type(value) is not kind or kind is int and not 1 <= value < 2 ** 24:
            fail(f"{path}: {name} is {value!r}, expected {kind.__name__}")
        return value

    try:
        rope = {"rope_theta": c.get("rope_theta")}    # of old, then under one roof
        rope |= (c.get("rope_scaling") or {}) | (c.get("rope_parameters") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        check_supported(
            path, ("model_type", family, ("llama", "mistral", "qwen2", "qwen3", "smollm3")),
            ("hidden_act", c.get("hidden_act"), ("silu", None)),
            ("attention_bias", c.get("attention_bias"), (False, None)),
            ("mlp_bias", c.get("mlp_bias"), (False, None)),
            ("quantization_config", c.get("quantization_config"), (None,)),
            ("rope_type", rope_type, ("default", "llama3")),
            ("partial_rotary_factor", rope.get("partial_rotary_factor"), (1, None)))
        scaling = None if rope_type == "default" else dict(rope_type="llama3", **{
            name: rope[name] + 0 for name in ("factor", "low_freq_factor", "high_freq_factor",
                                              "original_max_position_embeddings")})
        kinds = dict(rms_norm_eps=float, tie_word_embeddings=bool)
        defaults = dict(num_key_value_heads=c.get("num_attention_heads"), rms_norm_eps=1e-6,
                        tie_word_embeddings=family == "smollm3")
        sizes = {ours: get(theirs, defaults.get(theirs), kinds.get(theirs, int))
                 for ours, theirs in PUBLIC_SIZES.items()
                 if theirs != "head_dim" or c.get("head_dim") is not None}
        if c.get("use_sliding_window", family == "mistral") and c.get("sliding_window", 4096):
            window = get("sliding_window", 4096)
            if window < sizes["block_size"]:    # up to there a sliding window is no window at all
                print0(f"{path}: context {window}, its sliding window, not {sizes['block_size']}")
                sizes["block_size"] = window
        layers, rotary = range(sizes["n_layer"]), None
        if family == "smollm3":
            every = get("no_rope_layer_interval", 4)
            rotary = get("no_rope_layers", [(i + 1) % every for i in layers], list)
            if len(rotary) != len(layers):
                fail(f"{path}: no_rope_layers has {len(rotary)} entries for {len(layers)} layers")
        config = GPTConfig(
            **sizes, qk_norm=family == "qwen3", qkv_bias=family == "qwen2", rope_scaling=scaling,
            rope_base=float(rope["rope_theta"] or (2e6 if family == "smollm3" else 1e4)),
            nope_layers=rotary and [i for i in layers if not rotary[i]] or None)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as e:
        fail(f"{path}: a field is missing or damaged ({type(e).__name__}: {e})")
    eos = c.get("eos_token_id")
    return config, eos[0] if isinstance(eos, list) and eos else eos


def last_pair(ranks, token):
    """The two tokens whose merge makes this one, when merging by rank; None if that never does."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(
            zip(parts, parts[1:])))
        if rank == math.inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts) if all(part in ranks for part in parts) else None


def import_split(steps):
    """The pattern of a byte-level pre-tokenizer, a list of steps; None: not to be had as one."""
    *first, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        digits = [dict(type="Digits", individual_digits=True)]
        return GPT2_SPLIT if not first else DIGITS_SPLIT if first == digits else None
    if [step["type"] for step in first] != ["Split"]:
        return None
    keeps = (first[0]["behavior"], first[0].get("invert", False))
    keeps = keeps in (("Isolated", False), ("Removed", True))
    return first[0]["pattern"].get("Regex") if keeps else None


def import_tokenizer(path, vocab_size=0, eos=None):
    """(Encoding, ids it adds) from a tokenizer.json of the byte-level BPE kind: the same ids.

    tiktoken merges the pair whose result has the lowest id, transformers the pair that stands first
    in `merges`. Both agree if every token's last merge is in that list, in the order of the ids.
    Bytes that the vocabulary lacks (transformers drops them) and control tokens get new ids. A
    model without <|endoftext|> has another token that ends a text: that is then our name for it.
    """
    path = Path(path)
    if not path.exists():
        fail(f"{path} is missing" + ("; SentencePiece's tokenizer.model is not read"
                                     if (path.parent / "tokenizer.model").exists() else ""))
    t = read_json(path)
    try:
        model, normalizer = t["model"], (t.get("normalizer") or {}).get("type")
        check_supported(
            path, ("model.type", model["type"], ("BPE",)),
            ("normalizer", normalizer, (None, "NFC")),
            *((f"model.{name}", model.get(name) or None, (None,)) for name in (
                "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")))
        split = t.get("pre_tokenizer") or {}
        pattern = import_split(split.get("pretokenizers") or [split])
        if pattern is None:
            fail(f"{path}: pre_tokenizer {json.dumps(split)[:120]} is not supported")
        special = {token["content"]: token["id"] for token in t.get("added_tokens", [])}
        as_bytes = lambda token: bytes(BYTES[letter] for letter in token)
        ranks = {as_bytes(name): i for name, i in model["vocab"].items() if name not in special}
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        order = {tuple(map(as_bytes, pair)): n for n, pair in enumerate(merges)}
        last = -1
        for token in filter(lambda token: len(token) > 1, sorted(ranks, key=ranks.get)):
            pair = last_pair(ranks, token)
            if pair is None and model.get("ignore_merges"):
                continue    # it is found as a whole piece
            if order.get(pair, -1) <= last:
                fail(f"{path}: merging by id would not make token {ranks[token]}, {token!r}, as "
                     f"its merges do; such a tokenizer is not supported")
            last = order[pair]
        names = {i: name for name, i in special.items()}
        if ENDOFTEXT not in special and names.get(eos, PAD) not in (IM_START, IM_END, PAD):
            special[ENDOFTEXT] = eos
        known = {*ranks.values(), *special.values()}
        if not all(type(i) is int and 0 <= i < 2 ** 24 for i in known):
            raise ValueError("an id is not one")
        free = itertools.count(max(known) + 1)
        if not model.get("ignore_merges"):    # else whole pieces are tokens, and bytes need not be
            ranks |= {bytes([b]): next(free) for b in range(256)
                      if b not in NEVER_IN_UTF8 and bytes([b]) not in ranks}
        special |= {token: next(free) for token in (ENDOFTEXT, IM_START, IM_END, PAD)
                    if token not in special}
        used = {*ranks.values(), *special.values()}
        new = sorted(used - known)
        special |= {f"<|reserved_{i}|>": i for i in range(max(vocab_size, max(used) + 1))
                    if i not in used}    # every id that the model can say has a name
        enc = make_encoding(path.parent.name, pattern, ranks, special, normalizer == "NFC")
        probe = " a  B1\n\t\r\n #_'s\u00e9\u4e2d\u0301\U0001f600.\0"
        if len(ranks) >= 256 and enc.decode(enc.encode_ordinary(probe)) != probe:
            fail(f"{path}: pre_tokenizer {pattern!r} loses text")
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        fail(f"{path}: not a byte-level BPE tokenizer, or damaged ({type(e).__name__}: {e})")
    return enc, new


def import_weights(folder, config):
    """{our name: tensor} of all weights that the config asks for, no more and no fewer."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / files[0]).exists() and index.exists():
        try:
            files = sorted({Path(f).name for f in read_json(index)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError):
            fail(f"{index}: weight_map is missing or damaged")
    elif not (folder / files[0]).exists() and any(folder.glob("*.bin")):
        fail(f"{folder} has pickled weights only (.bin), which can run code when read; get "
             f"model.safetensors")
    theirs = {name: t for file in files for name, t in read_safetensors(folder / file).items()}
    with torch.device("meta"):
        wanted, weights = GPT(config).state_dict(), {}
    if config.tie_embeddings:
        del wanted["head.weight"]
    for name, shape in ((name, t.shape) for name, t in wanted.items()):
        if public_name(name) not in theirs:
            fail(f"{folder}: {public_name(name)} is in no weight file")
        weights[name] = theirs.pop(public_name(name))
        if weights[name].shape != shape:
            fail(f"{folder}: {public_name(name)} has shape {[*weights[name].shape]}, its "
                 f"config.json asks for {[*shape]}")
    tied = theirs.pop("lm_head.weight", weights["embed.weight"])
    if not torch.equal(tied, weights["embed.weight"]):
        fail(f"{folder}: tie_word_embeddings is true, but lm_head.weight is another matrix")
    if left := [name for name in theirs if not name.endswith("rotary_emb.inv_freq")]:
        fail(f"{folder}: {left[0]} is a weight that its config.json does not ask for")
    return weights


def import_model(folder):
    """A public model's folder as load_checkpoint returns our own files; nothing of it is copied
    to memory yet. Rows of the embeddings for ids that are new are the mean of the others."""
    folder = Path(folder)
    config, eos = import_config(folder / "config.json")
    enc, new = import_tokenizer(folder / "tokenizer.json", config.vocab_size, eos)
    weights = import_weights(folder, config)
    for name in {"embed.weight", "head.weight"} & weights.keys():
        rows = weights[name]
        mean = rows.mean(0, dtype=torch.float32).to(rows.dtype)
        if enc.n_vocab > len(rows):
            rows = torch.cat([rows, mean.expand(enc.n_vocab - len(rows), -1)])
        rows[new] = mean
        weights[name] = rows
    config.vocab_size = enc.n_vocab
    return dict(format=1, stage="imported", step=0, weights=weights, encoding=encoding_to_dict(enc),
                model_config=dataclasses.asdict(config), stage_config=dict(folder=str(folder)))


# ------------------------------------------------------------------------------------------------
# Public models, out: a folder that transformers, vLLM and lm-evaluation-harness load

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def public_config(c, dtype, eos, pad):
    """A config.json for our sizes, under both spellings of the rotary settings."""
    marks = dict(Qwen3=c.qk_norm, Qwen2=c.qkv_bias, SmolLM3=c.nope_layers)
    kinds = [kind for kind, yes in marks.items() if yes] or ["Llama"]
    if len(kinds) > 1:
        fail(f"no public architecture has what {' and '.join(kinds)} have (qk_norm, qkv_bias, "
             f"nope_layers) at once")
    nope = dict(no_rope_layers=[int(i not in c.nope_layers) for i in range(c.n_layer)]
                ) if c.nope_layers else {}
    rope = c.rope_scaling or dict(rope_type="default")
    return dict(
        architectures=[f"{kinds[0]}ForCausalLM"], model_type=kinds[0].lower(), hidden_act="silu",
        **{theirs: getattr(c, ours) for ours, theirs in PUBLIC_SIZES.items()}, **nope,
        attention_bias=False, mlp_bias=False, use_sliding_window=False, sliding_window=None,
        rope_theta=c.rope_base, rope_scaling=c.rope_scaling, bos_token_id=None, eos_token_id=eos,
        rope_parameters=dict(rope_theta=c.rope_base, **rope), pad_token_id=pad, torch_dtype=dtype)


def public_tokenizer(enc):
    """A tokenizer.json with the same ids. Tokens that no merge makes are found as whole pieces."""
    ranks = dict(sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]))
    letters = {token: "".join(LETTERS[b] for b in token) for token in ranks}
    pairs = {token: last_pair(ranks, token) for token in ranks if len(token) > 1}
    names = {i: name for name, i in reversed(enc._special_tokens.items())    # an alias comes last
             if name != f"<|reserved_{i}|>"}
    vocab = {letters[token]: i for token, i in ranks.items()} | {n: i for i, n in names.items()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = dict(type="Split", pattern=dict(Regex=enc._pat_str), behavior="Isolated", invert=False)
    as_letters = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return dict(
        version="1.0", decoder=as_letters,
        added_tokens=[dict(id=i, content=names[i], **flags, special=True) for i in sorted(names)],
        normalizer=dict(type="NFC") if type(enc) is ComposedEncoding else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, as_letters]),
        model=dict(
            type="BPE", ignore_merges=None in pairs.values(), vocab=vocab,
            merges=[[letters[part] for part in pair] for pair in pairs.values() if pair]))


def write_safetensors(path, tensors, dtype):
    """Tensors as one .safetensors file, one after the other: no second copy in memory."""
    code, header, end = {t: k for k, t in WEIGHT_TYPES.items()}[dtype], {}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * dtype.itemsize
        header[name] = dict(dtype=code, shape=[*t.shape], data_offsets=[begin, end])
    text = json.dumps(dict(__metadata__=dict(format="pt"), **header)).encode()
    text += b" " * (-len(text) % 8)

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.to(dtype).contiguous().view(-1).view(torch.uint8).numpy())

    write_atomic(path, write)


def model_card(checkpoint, path, public):
    """README.md of an exported model: what a stranger must know, as far as the checkpoint knows."""
    size = sum(t.numel() for t in checkpoint["weights"].values())
    steps, data, licences = lineage(checkpoint), [], set()
    for text in (text for step in steps for text in step["data"]):
        for source in text["sources"] or ():
            stated = source.get("licences", {})
            licences |= stated.keys()
            data.append(f"- `{source['input']}`: {source['documents']:,} documents, "
                        f"{source['epochs']:g} epochs; licences stated: "
                        + (", ".join(f"{k} ({n:,})" for k, n in stated.items()) or "none"))
        dropped = ", ".join(f"{k} {n:,}" for k, n in text["dropped"].items()) or "none"
        data.append(f"- {text['tokens']['train']:,} tokens; newest date (knowledge cutoff): "
                    f"{text['knowledge_cutoff'] or 'unknown'}; documents dropped: {dropped}")
    stages = [f"- **{step['stage']}**, {step['step']:,} steps: `{json.dumps(step['settings'])}`"
              for step in steps]
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "license: "
        + json.dumps(min(licences).lower() if len(licences) == 1 else "other"), "tags:",
        *(f"- {step['stage']}" for step in steps), "---", f"# {Path(path).stem}", "",
        f"A {public['architectures'][0]} of {size:,} parameters, {public['num_hidden_layers']} "
        f"layers x {public['hidden_size']}, context {public['max_position_embeddings']:,} tokens, "
        f"vocabulary {public['vocab_size']:,}; stages: {', '.join(s['stage'] for s in steps)}. "
        "Chats are ChatML (the template is in tokenizer_config.json); no token starts a text.", "",
        "## Training data", "", *(data or ["The checkpoint does not say."]), "", "## Stages", "",
        *stages, "", "## Evaluation", "", *evaluation_table(Path(path)), "", "## Weaknesses", "",
        "It invents facts fluently, the more so the smaller it is, and knows nothing after its "
        "training text; refusals and admissions of ignorance are habits that a new wording can "
        "break. What looks like a control token in a chat is one to transformers, though not to "
        "the code it was trained with. Try it on your own cases before you rely on it.", ""])


def evaluation_table(path):
    """Lines about this checkpoint from the report that evaluate.py wrote beside it."""
    file = path.parent / "report" / "report.json"
    report = read_json(file) if file.exists() else {}
    names = [name for name, c in report.get("checkpoints", {}).items()
             if Path(c["path"]).resolve() == path.resolve()]
    lines = ["| measure | value | 95 % interval | items |", "|---|---|---|---|"]
    for row in report.get("metrics", []):
        for v in (row["values"][name] for name in names if name in row["values"]):
            value, low, high = (f"{(v[k] or 0) * (100 if row['unit'] == '%' else 1):.4g}"
                                for k in ("value", "low", "high"))
            lines.append(f"| {row['name']} ({row['unit']}) | {value} | "
                         f"{'-' if v['low'] is None else f'{low} to {high}'} | {v['n']:,} |")
    return lines if names else ["None yet: run `python evaluate.py` and export again."]


def public_adapter(checkpoint, path):
    """(tensors, adapter_config.json) as the peft package has them, to go on top of --init."""
    settings, tensors, targets = checkpoint["stage_config"], {}, set()
    for name, t in (checkpoint.get("adapted") or {}).items():
        layer, part = name.rsplit(".", 1)
        if part in ("a", "b"):    # the others are the frozen layer's
            tensors[f"base_model.model.{public_name(layer)}.lora_{part.upper()}.weight"] = t
            targets.add(layer.split(".")[-1])
    if not tensors:
        fail(f"{path} has no adapter: it was not trained with --lora_rank; leave out --adapter")
    return tensors, dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=settings["init"],
        r=settings["lora_rank"], lora_alpha=settings["lora_alpha"], lora_dropout=0.0, bias="none",
        target_modules=sorted(targets), inference_mode=True)


def export_model(path, folder, dtype="float32", adapter=False):
    """Write a checkpoint (or a folder that was read) as a folder of public files."""
    checkpoint, folder = load_checkpoint(path, "python pretrain.py"), Path(folder)
    if "score.weight" in checkpoint["weights"]:
        fail(f"{path} is a reward model; only language models are exported")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} exists already; give a new folder")
    enc = encoding_from_dict(checkpoint["encoding"])
    config = GPTConfig(**checkpoint["model_config"])
    eot, end, pad = (enc._special_tokens[t] for t in (ENDOFTEXT, IM_END, PAD))
    tokenizer = public_tokenizer(enc)
    names = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    talks = checkpoint["stage"] not in ("pretrain", "imported")
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token=names[end if talks else eot],
        pad_token=names[pad], model_max_length=config.block_size,
        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE)}
    if adapter:
        tensors, files["adapter_config.json"] = public_adapter(checkpoint, path)
        base = checkpoint["stage_config"]["init"]
        weights, kind = "adapter_model", f"adapter for what `model.py export {base}` writes"
    else:
        tensors = {public_name(name): t for name, t in checkpoint["weights"].items()}
        public = public_config(config, dtype, eot, pad)
        weights, kind = "model", public["architectures"][0]
        files |= {"README.md": model_card(checkpoint, path, public), "config.json": public,
                  "generation_config.json": dict(eos_token_id=[end, eot], pad_token_id=pad)}
    write_safetensors(folder / f"{weights}.safetensors", tensors, getattr(torch, dtype))
    for name, data in files.items():
        text = data if isinstance(data, str) else json.dumps(data, indent=1, ensure_ascii=False)
        write_atomic(folder / name, lambda f, text=text: f.write(text.encode()))
    size = sum(t.numel() for t in tensors.values())
    print0(f"wrote {folder}: {kind}, {size:,} parameters as {dtype}, {enc.n_vocab:,} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see python model.py --help)")
    export = parser.add_subparsers(dest="command", required=True).add_parser(
        "export", help="write a checkpoint as a folder that transformers loads")
    export.error = parser.error
    export.add_argument("checkpoint", help="a .pt file of any stage, or a public model's folder")
    export.add_argument("folder", help="a new folder")
    export.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                        help="of the weights; float32 loses nothing [%(default)s]")
    export.add_argument("--adapter", action="store_true", help="of a run with --lora_rank: only "
                        "the adapter, as the peft package loads it on top of the exported --init")
    args = parser.parse_args()
    export_model(args.checkpoint, args.folder, args.dtype, args.adapter)


if __name__ == "__main__":
    main()
