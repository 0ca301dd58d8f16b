"""Pretraining: teach a randomly initialised decoder to predict the next token of the prepared text.

In:   out/tokens/ made by prepare.py (several folders can be mixed by weight)
Out:  out/base.pt (one self-contained checkpoint) and out/base.jsonl (one JSON line per step)

    python pretrain.py                                        # laptop: the embedded data, minutes
    python pretrain.py --data DIR --depth 12                  # one GPU
    torchrun --standalone --nproc_per_node=8 pretrain.py --data DIR --depth 20
    torchrun --standalone --nproc_per_node=8 pretrain.py --data DIR --depth 40 --shard fsdp

Loss: mean over tokens of -ln p(token | tokens before it), in nats. Validation also reports bits per
byte, the sum of nats / (ln 2 * bytes of text), which compares models across tokenizers.

One dial: --depth N sets the layers, and from it follow width, heads, context, batch, learning rate
and number of tokens; each can be overridden. --plan prints what follows and trains nothing.

References: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv 2302.13971 (Llama); Hoffmann et
al. 2022, arXiv 2203.15556 (20 tokens a parameter); Muennighoff et al. 2023, arXiv 2305.16264 (data
can be repeated); Liu et al. 2024, arXiv 2402.14905 (small models: deep and thin).
Differs from the papers in: Muon on the hidden matrices (see model.make_optimizers); output
projections start at zero; windows come from a shuffled, shifted grid: each token once an epoch.
"""
import dataclasses
import functools
import itertools
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (ENDOFTEXT, GPT, GPTConfig, Log, can_compile, cosine_lr, duration,
                   encoding_from_dict, encoding_hash, fail, generate, lineage, load_checkpoint,
                   load_weights, make_optimizers, parse_args, peak_flops, peak_memory, print0,
                   read_json, resume_state, save_checkpoint, scatter, seed_step, setup,
                   sum_over_ranks, token_bytes)


@dataclass
class Config:
    data: list[str] = field(default_factory=lambda: ["out/tokens"])  # folders, DIR or DIR:WEIGHT
    out: str = "out/base.pt"               # checkpoint to write; the log goes beside it
    init: str = ""                         # checkpoint to continue pretraining from
    resume: bool = False                   # go on from the checkpoint at --out
    overwrite: bool = False                # start anew although --out holds steps of another run
    plan: bool = False                     # print what the settings amount to, train nothing
    # model; everything "derived" follows from depth
    depth: int = 4                         # layers; width is 64 times that
    n_layer: int | None = None             # layers
    n_head: int | None = None              # attention heads
    n_kv_head: int | None = None           # key/value heads, fewer share keys among heads
    n_embd: int | None = None              # width, channels
    block_size: int | None = None          # context, tokens
    tie_embeddings: bool = False           # one matrix for input and output embedding
    dropout: float = 0.0                   # on each block's output, probability
    doc_mask: bool = False                 # tokens see their own document only
    # optimization
    optimizer: str = "muon"                # muon or adamw
    total_batch_tokens: int | None = None  # tokens per optimizer step, over all ranks
    device_batch_size: int | None = None   # sequences per forward pass and rank
    max_steps: int | None = None           # optimizer steps
    max_minutes: float | None = None       # length of the run instead of max_steps, minutes
    learning_rate: float | None = None     # peak, of AdamW and Muon alike
    min_lr: float = 0.0                    # at the end, as a fraction of the peak
    warmup: float = 0.02                   # fraction of the run
    weight_decay: float = 0.1              # on matrices of the blocks, decoupled
    beta1: float = 0.9                     # AdamW
    beta2: float = 0.95                    # AdamW
    grad_clip: float = 1.0                 # largest global gradient norm
    spike: float = 10.0                    # skip a step of so many times the usual gradient norm
    max_skips: int = 5                     # stop after so many skipped steps in a row
    # running
    shard: Literal["none", "zero1", "fsdp"] = "none"  # split over ranks: moments, or everything
    eval_every: int = 250                  # optimizer steps between validations
    eval_tokens: int = 2 ** 20             # at most so many validation tokens, the same every time
    save_every: int = 250                  # optimizer steps between checkpoints
    log_every: int = 10                    # optimizer steps between console lines
    tensorboard: bool = False              # also write event files beside the log
    sample_tokens: int = 48                # tokens of text shown at each validation, 0 for none
    precision: str = "auto"                # auto, bf16 or fp32 matrix products
    compile: bool | None = None            # torch.compile; derived: on GPUs
    seed: int = 1                          # of weights and data order


def derive(cfg, d, vocab_size, train_tokens, checkpoint=None):
    """Fill every None of cfg from depth, or from the checkpoint: (model config, cfg)."""
    c = dataclasses.replace(cfg)
    if checkpoint:
        config = GPTConfig(**{**checkpoint["model_config"], "dropout": c.dropout})
        for name in ("depth", "n_layer", "n_head", "n_kv_head", "n_embd", "tie_embeddings"):
            size = getattr(config, name.replace("depth", "n_layer"))
            if getattr(c, name) not in (getattr(Config, name), size):
                fail(f"--{name} {getattr(c, name)}: the model in {c.out if c.resume else c.init} "
                     f"has {size}")
            setattr(c, name, size)
        c.block_size = config.block_size = c.block_size or config.block_size
    else:
        c.n_layer = c.n_layer or c.depth
        c.n_embd = c.n_embd or -(-48 * c.n_layer // 64) * 64    # whole heads of 64
        c.n_head = c.n_head or max(1, c.n_embd // 64)
        c.n_kv_head = c.n_kv_head or c.n_head
        c.block_size = c.block_size or min(2048, 64 * c.n_layer)
        try:
            config = GPTConfig(c.block_size, vocab_size, c.n_layer, c.n_head, c.n_kv_head, c.n_embd,
                               tie_embeddings=c.tie_embeddings, dropout=c.dropout)
        except ValueError as e:
            fail(e)
    rows = 2 ** max(0, round(math.log2(8 * (c.n_layer / 4) ** 3)))    # whatever the number of ranks
    c.total_batch_tokens = c.total_batch_tokens or c.block_size * rows
    peak = 0.014 if c.optimizer == "muon" else 0.008
    c.learning_rate = c.learning_rate or peak * min(1, 192 / c.n_embd) ** 0.5
    if c.compile is None:
        c.compile = d.device.type == "cuda"
    if c.max_minutes and c.max_steps:
        fail("give --max_steps or --max_minutes, not both")
    if not c.max_steps and not c.max_minutes:
        with torch.device("meta"):
            n_params = sum(p.numel() for p in GPT(config).parameters())
        c.max_steps = max(1, int(min(20 * n_params, 5 * train_tokens) / c.total_batch_tokens))
    rows, rest = divmod(c.total_batch_tokens, d.world_size * c.block_size)
    if rest:
        fail(f"--total_batch_tokens {c.total_batch_tokens} is not a multiple of {d.world_size} "
             f"ranks x --block_size {c.block_size}")
    limit = 2 ** 13 if d.device.type == "cpu" else 2 ** 15    # tokens a pass
    c.device_batch_size = c.device_batch_size or max(
        n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * c.block_size <= limit))
    if rows % c.device_batch_size:
        fail(f"{rows} sequences a step and rank are not a multiple of --device_batch_size "
             f"{c.device_batch_size}")
    return config, c


# ------------------------------------------------------------------------------------------------
# Data: token folders, mixed by weight, cut into windows


def open_tokens(spec):
    """DIR or DIR:WEIGHT -> dict(path, weight, train, val, enc); the arrays are memory-mapped."""
    path, weight = re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", spec).groups(default="1")
    if float(weight) == 0:
        fail(f"--data {spec}: a weight has to be above 0")
    if not Path(path, "manifest.json").exists():
        fail(f"{path} holds no tokens; make them with: "
             f"python prepare.py --input FILES --out {path}")
    manifest = read_json(Path(path, "manifest.json"))
    try:
        enc = encoding_from_dict(read_json(Path(path, "encoding.json")))
        dtype, counts = np.dtype(manifest["dtype"]), manifest["tokens"]
    except (KeyError, TypeError) as e:
        fail(f"{path}: manifest.json or encoding.json lacks {e}; run prepare.py again")
    facts = {k: manifest.get(k) for k in ("sources", "knowledge_cutoff", "tokens")}
    facts["dropped"] = {row["name"]: row["documents"] for row in manifest.get("ledger", [])
                        if row["kind"] == "dropped"}
    source = dict(path=path, weight=float(weight), enc=enc, facts=facts)
    for part in ("train", "val"):
        file, n = Path(path, f"{part}.bin"), counts[part]
        if not file.exists() or file.stat().st_size != n * dtype.itemsize:
            fail(f"{file} is missing or not as long as its manifest says; run prepare.py again")
        source[part] = np.memmap(file, dtype, mode="r") if n else np.zeros(0, dtype)
        if n and int(source[part][:: max(1, n // 2 ** 20)].max()) >= enc.n_vocab:
            fail(f"{file} holds ids past its vocabulary of {enc.n_vocab}; run prepare.py again")
    return source


def draw(sources, taken, n):
    """The next n (source, index in that source): shares follow the weights as closely as they can.

    taken (list of counts, one a source) is the whole state of the data order, and is updated.
    """
    total, picks = sum(s["weight"] for s in sources), []
    for _ in range(n):
        i = sum(taken)
        behind = [s["weight"] / total * max(i, 1) - t for s, t in zip(sources, taken)]
        best = behind.index(max(behind))
        picks.append((best, taken[best]))
        taken[best] += 1
    return picks


@functools.lru_cache(maxsize=16)
def epoch_grid(seed, epoch, n_tokens, block_size):
    """(shift, order of windows) of one epoch: a grid at a random shift over the ring of tokens."""
    rng = np.random.default_rng((*seed, epoch))
    return int(rng.integers(n_tokens)), rng.permutation((n_tokens - 1) // block_size)


def window(tokens, block_size, index, seed):
    """The index-th window, block_size + 1 ids. An epoch visits each window of its grid once."""
    epoch, i = divmod(index, (len(tokens) - 1) // block_size)
    shift, order = epoch_grid(seed, epoch, len(tokens), block_size)
    start = (shift + int(order[i]) * block_size) % len(tokens)
    head = tokens[start:start + block_size + 1]
    return np.concatenate([head, tokens[:block_size + 1 - len(head)]]).astype(np.int64)


def get_batch(sources, picks, block_size, seed, device):
    """Windows as ids (B, T) and targets (B, T), the same windows one token later."""
    rows = [window(sources[s]["train"], block_size, i, (seed, s)) for s, i in picks]
    batch = torch.from_numpy(np.stack(rows)).to(device)
    return batch[:, :-1], batch[:, 1:]


def documents(ids, enc):
    """(B, T) number of the document each token is in; the end-of-text token closes its document."""
    ends = (ids == enc._special_tokens[ENDOFTEXT]).long()
    return ends.cumsum(dim=1) - ends


@torch.no_grad()
def evaluate(model, sources, cfg, d):
    """(nats per token, bits per byte) over fixed windows of all validation text, over all ranks."""
    T, enc = cfg.block_size, sources[0]["enc"]
    stride = T * math.ceil(sum(len(s["val"]) for s in sources) / cfg.eval_tokens)
    windows = [(s["val"], i) for s in sources for i in range(0, len(s["val"]) - 1, stride)]
    per_rank = math.ceil(len(windows) / d.world_size)    # as many passes on all: they may exchange
    windows = windows[d.rank::d.world_size]
    sizes = token_bytes(enc).to(d.device)
    sums = torch.zeros(4, dtype=torch.float64)    # nats, tokens, nats of text, bytes of text
    model.eval()
    for start in range(0, per_rank, cfg.device_batch_size):
        ids = torch.zeros(cfg.device_batch_size, T + 1, dtype=torch.long)    # compiled once
        mask = torch.zeros(cfg.device_batch_size, T)
        for row, (tokens, i) in enumerate(windows[start:start + cfg.device_batch_size]):
            piece = torch.from_numpy(tokens[i:i + T + 1].astype(np.int64))
            ids[row, :len(piece)], mask[row, :len(piece) - 1] = piece, 1
        ids, mask = ids.to(d.device), mask.to(d.device)
        x, y = ids[:, :-1], ids[:, 1:]
        with d.autocast():
            logits = model(x, documents(x, enc) if cfg.doc_mask else None)
        nats = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none")
        nats, text = nats.view(y.shape) * mask, mask * (sizes[y] > 0)
        sums += torch.stack([z.sum().cpu().double() for z in
                             (nats, mask, nats * text, sizes[y] * text)])
    model.train()
    nats, tokens, text_nats, n_bytes = sum_over_ranks(sums, d).tolist()
    return nats / tokens, text_nats / math.log(2) / max(1, n_bytes)


@torch.no_grad()
def sample_text(model, sources, cfg, d):
    """What the model makes of the first words of the validation text, as one line to print."""
    enc, prompt = sources[0]["enc"], sources[0]["val"][:8].tolist()
    n = min(cfg.sample_tokens, cfg.block_size - len(prompt))
    if not prompt or n < 1:
        return ""
    if cfg.shard == "fsdp":    # generate calls the model's parts, and the embeddings are its own
        model.unshard()
    ids, _ = generate(model, [prompt], n, temperature=0.8, seed=cfg.seed, dtype=d.dtype,
                      stop_ids=[enc._special_tokens[ENDOFTEXT]])
    return f"\n    {enc.decode(prompt)!r} -> {enc.decode(ids[0, len(prompt):].tolist())!r}"


# ------------------------------------------------------------------------------------------------
# The run


def plan(cfg, config, n_params, flops, train_tokens):
    """Say what the settings amount to; with --plan also memory per GPU and hours."""
    steps, tokens = cfg.max_steps, (cfg.max_steps or 0) * cfg.total_batch_tokens
    print0(f"model: {n_params:,} parameters: {config.n_layer} layers x {config.n_embd}, "
           f"{config.n_head} heads ({config.n_kv_head} for keys), context {config.block_size}, "
           f"vocabulary {config.vocab_size}")
    if steps:
        print0(f"run: {steps:,} steps x {cfg.total_batch_tokens:,} tokens = {tokens:,} tokens, "
               f"{tokens / n_params:.1f} per parameter, {tokens / max(1, train_tokens):.1f} "
               f"epochs, {tokens * flops:.2g} FLOPs")
    else:
        print0(f"run: {cfg.max_minutes:g} minutes in steps of {cfg.total_batch_tokens:,} tokens")
    print0(f"optimizer: {cfg.optimizer}, peak learning rate {cfg.learning_rate:.2g}, "
           f"{cfg.device_batch_size} sequences a pass, {cfg.warmup:.0%} warm-up, "
           f"clip {cfg.grad_clip:g}, decay {cfg.weight_decay:g}")
    if not cfg.plan:
        return
    # Bytes a parameter: weight 4, gradient 4, its bf16 copy 2, moments 8 for AdamW or 4 for Muon.
    moments = 4 if cfg.optimizer == "muon" else 8
    # What autograd keeps: bf16, per token and layer about 17 C + 5 hidden; logits twice in float32.
    rows = cfg.device_batch_size * config.block_size
    kept = rows * (config.n_layer * 2 * (17 * config.n_embd + 5 * config.n_hidden)
                   + 8 * config.vocab_size)
    print0("\nGPUs   GB per GPU:  DDP  ZeRO-1    FSDP   hours at 40 % of an H100's 989 TFLOP/s")
    for n in (1, 8, 64):
        ddp, zero1, fsdp = ((n_params * b + kept) / 1e9 for b in
                            (10 + moments, 10 + moments / n, 2 + (8 + moments) / n))
        hours = f"{tokens * flops / (0.4 * 989e12 * n) / 3600:.3g}" if steps else "-"
        print0(f"{n:4d} {ddp:17.1f} {zero1:7.1f} {fsdp:7.1f}   {hours}")


def main(cfg):
    d, given = setup(cfg.seed, cfg.precision), cfg

    # data
    if cfg.data == Config().data and not Path(cfg.data[0], "manifest.json").exists():
        print0(f"no tokens in {cfg.data[0]} yet: preparing the embedded data first")
        if d.is_master:
            import prepare
            prepare.main(prepare.Config())
        if d.world_size > 1:
            dist.barrier()
    sources = [open_tokens(spec) for spec in cfg.data]
    enc, train_tokens = sources[0]["enc"], sum(len(s["train"]) for s in sources)
    for s in sources:
        if encoding_hash(s["enc"]) != encoding_hash(enc):
            fail(f"{s['path']} and {sources[0]['path']} were made with different tokenizers")

    # model
    checkpoint = None
    if start_from := cfg.out if cfg.resume else cfg.init:
        checkpoint = load_checkpoint(start_from, "python pretrain.py",
                                     "pretrain" if cfg.resume else None)
        if encoding_hash(encoding_from_dict(checkpoint["encoding"])) != encoding_hash(enc):
            fail(f"{start_from} was trained with another tokenizer than {cfg.data[0]}; prepare the "
                 f"text again with --tokenizer {start_from}")
    config, cfg = derive(cfg, d, enc.n_vocab, train_tokens, checkpoint)
    for s in sources:
        if len(s["train"]) <= cfg.block_size:
            fail(f"{s['path']} has {len(s['train'])} training tokens, fewer than one window of "
                 f"{cfg.block_size} + 1; prepare more text or lower --block_size")
    if sum(len(s["val"]) for s in sources) < 2:
        fail(f"{cfg.data[0]} has no validation text; prepare it with a --val_fraction above 0")
    raw = GPT(config)
    n_params, flops = sum(p.numel() for p in raw.parameters()), raw.flops_per_token()
    plan(cfg, config, n_params, flops, train_tokens)
    if cfg.plan:
        return
    if cfg.shard != "none" and d.world_size == 1:
        fail(f"--shard {cfg.shard} divides the model among processes and this is the only one: "
             f"start with torchrun --nproc_per_node=N, or leave it out")
    if checkpoint:
        load_weights(raw, checkpoint)
    if cfg.shard == "fsdp":    # from the CPU, block by block: no device ever holds the whole
        from torch.distributed.fsdp import fully_shard    # slow to import
        for module in (*raw.blocks, raw):
            fully_shard(module)
    else:
        raw.to(d.device)
    model = torch.compile(raw) if cfg.compile and can_compile(d.device) else raw
    if d.world_size > 1 and cfg.shard != "fsdp":
        model = DDP(model, device_ids=[d.local_rank] if d.device.type == "cuda" else None,
                    forward_sync_buffers=False, gradient_as_bucket_view=True)
    optimizers = make_optimizers(raw, cfg.optimizer, cfg.learning_rate, cfg.weight_decay,
                                 (cfg.beta1, cfg.beta2), zero1=cfg.shard == "zero1", dtype=d.dtype)

    # state: everything a resumed run needs besides weights and moments
    state = dict(step=0, taken=[0] * len(sources), seconds=0.0, usual_norm=None, skipped=0,
                 skips_in_row=0, history=lineage(checkpoint), data=[s["facts"] for s in sources])
    if cfg.resume:
        for opt, saved in zip(optimizers, checkpoint["optimizers"]):
            if cfg.shard == "fsdp":
                scatter(saved, opt)
        state = resume_state(checkpoint, optimizers, cfg.max_steps, cfg)
        if len(state["taken"]) != len(sources):
            fail(f"--resume: {cfg.out} has read {len(state['taken'])} folders so far, now --data "
                 f"has {len(sources)}; start a new run from it with --init")
    log = Log(cfg.out, state["step"] if cfg.resume else None, given)
    peak, how = peak_flops(d)
    peak *= d.world_size
    print0(f"peak for MFU: {peak / 1e12:.2f} TFLOP/s ({how})")

    def save():
        for opt in optimizers if cfg.shard == "zero1" else ():
            opt.consolidate_state_dict()    # on the first rank
        if d.is_master or cfg.shard == "fsdp":
            save_checkpoint(cfg.out, raw, "pretrain", state["step"], enc, cfg, state=state,
                            optimizers=[opt.state_dict() for opt in optimizers])

    micro_steps = cfg.total_batch_tokens // (cfg.block_size * cfg.device_batch_size * d.world_size)
    started = time.perf_counter() - state["seconds"]
    for step in itertools.count(state["step"]):
        state.update(step=step, seconds=time.perf_counter() - started)
        progress = step / (cfg.max_steps or math.inf)
        if cfg.max_minutes:    # by the first rank's clock, so that all ranks end at the same step
            clock = torch.tensor(state["seconds"] * d.is_master, dtype=torch.float64)
            progress = sum_over_ranks(clock, d).item() / (60 * cfg.max_minutes)
        last = progress >= 1

        if last or step and step % cfg.eval_every == 0:
            nats, bpb = evaluate(model, sources, cfg, d)
            log(f"step {step:6d} | val {nats:.4f} nats/token, {bpb:.4f} bits/byte"
                + sample_text(raw, sources, cfg, d),
                step=step, val_loss=nats, val_bpb=bpb, seconds=state["seconds"])
        if last or step % cfg.save_every == 0:    # also at 0: what cannot be written shows here
            save()
        if last:
            break

        seed_step(cfg.seed, step, d.rank)    # dropout is the only draw below
        middle = progress + 0.5 / (cfg.max_steps or math.inf)    # of the step
        lr = cosine_lr(middle, cfg.warmup, cfg.learning_rate, cfg.min_lr * cfg.learning_rate)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr

        step_started = time.perf_counter()
        loss = torch.zeros((), device=d.device)
        picks = draw(sources, state["taken"], cfg.total_batch_tokens // cfg.block_size)
        for micro in range(micro_steps):
            at = (micro * d.world_size + d.rank) * cfg.device_batch_size
            x, y = get_batch(sources, picks[at:at + cfg.device_batch_size], cfg.block_size,
                             cfg.seed, d.device)                                  # (B, T) each
            if isinstance(model, DDP):    # exchange gradients once, after the last micro-step
                model.require_backward_grad_sync = micro == micro_steps - 1
            with d.autocast():
                logits = model(x, documents(x, enc) if cfg.doc_mask else None)    # (B, T, V)
            nats = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")
            part = nats / cfg.total_batch_tokens    # of the mean over the tokens of all ranks
            (part * d.world_size).backward()        # because ranks average gradients
            loss += part.detach()
        loss = sum_over_ranks(loss, d).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip)
        grad_norm = (grad_norm.full_tensor() if cfg.shard == "fsdp" else grad_norm).item()

        usual = state["usual_norm"]
        bad = not math.isfinite(loss + grad_norm) or (
            step > 20 and usual is not None and grad_norm > cfg.spike * usual)
        if bad:
            print0(f"step {step}: skipped, loss {loss:.4g}, gradient norm {grad_norm:.3g} "
                   f"(usual {usual or 0:.3g})")
        else:
            state["usual_norm"] = grad_norm if usual is None else 0.95 * usual + 0.05 * grad_norm
        for opt in optimizers:
            if not bad:
                opt.step()
            opt.zero_grad()
        state["skipped"] += bad
        state["skips_in_row"] = state["skips_in_row"] + 1 if bad else 0
        if state["skips_in_row"] >= cfg.max_skips:
            state["step"] = step + 1
            save()
            fail(f"{cfg.max_skips} steps in a row were non-finite or spiking, the last at step "
                 f"{step} on windows {[i for _, i in picks[:4]]}... of {cfg.data[picks[0][0]]}. "
                 f"The weights from before are in {cfg.out}; lower --learning_rate or look at "
                 f"that text")

        seconds = time.perf_counter() - started
        rate = cfg.total_batch_tokens / (time.perf_counter() - step_started)
        left = seconds / (step + 1) * (cfg.max_steps - step - 1) if cfg.max_steps else (
            max(0, 60 * cfg.max_minutes - seconds))
        line = (f"step {step:6d} | loss {loss:.4f} | lr {lr:.2e} | norm {grad_norm:6.3f} | "
                f"{rate:9,.0f} tok/s | mfu {rate * flops / peak:5.1%} | eta {duration(left)}")
        log(line if step % cfg.log_every == 0 else "", step=step, loss=loss, lr=lr,
            grad_norm=grad_norm, tokens_per_second=rate, mfu=rate * flops / peak, seconds=seconds,
            **(dict(skipped=state["skipped"]) if bad else {}))

    print0(f"done: {cfg.out}: {step:,} steps, {step * cfg.total_batch_tokens:,} tokens in "
           f"{duration(state['seconds'])}, {state['skipped']} steps skipped, "
           f"at most {peak_memory(d)}")
    return dict(val_loss=nats, val_bpb=bpb)


if __name__ == "__main__":
    main(parse_args(Config))
