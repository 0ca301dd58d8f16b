"""Pretraining: teach a randomly initialised decoder to predict the next token of the prepared text.

In:   out/tokens/ made by prepare.py (several folders can be mixed by weight)
Out:  out/base.pt (one self-contained checkpoint) and out/base.jsonl (one JSON line per step)

    python pretrain.py                                        # laptop: the embedded data, minutes
    python pretrain.py --data DIR --depth 12                  # one GPU
    torchrun --standalone --nproc_per_node=8 pretrain.py --data DIR --depth 20
    torchrun --standalone --nproc_per_node=8 pretrain.py --data DIR --depth 40 --shard fsdp

Loss: mean over tokens of -ln p(token | tokens before it), in nats. Validation also reports bits per
byte, the sum of nats / (ln 2 * bytes of text), which compares models across tokenizers. Expect 0.45
on the embedded data at the first validation, 0.27 at the end.

One dial: --depth N sets the layers, and from it follow width, heads, context, batch, learning rate
and number of tokens; each can be overridden. --plan prints what follows and trains nothing; with
--fit out/d[0-9]*.jsonl also the loss to expect, by the law that those runs follow.

References: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv 2302.13971 (Llama); Hoffmann et
al. 2022, arXiv 2203.15556 (20 tokens a parameter); Muennighoff et al. 2023, arXiv 2305.16264 (data
can be repeated); Liu et al. 2024, arXiv 2402.14905 (small models: deep and thin).
Differs from the papers in: Muon on the hidden matrices (see model.make_optimizers); output
projections start at zero; windows come from a shuffled, shifted grid: no token twice an epoch.
"""
import dataclasses
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from model import (ENDOFTEXT, GPT, PEAK_FLOPS, GPTConfig, Log, check_out, compiled, complete,
                   config_of, cosine_lr, duration, encoding_from_dict, fail, load_checkpoint,
                   load_weights, make_optimizers, open_tokens, parallel, peak_flops, peak_memory,
                   print0, read_rows, resume, run, save_checkpoint, setup, sum_over_ranks,
                   token_bytes, token_nats, window)

TOKENS_PER_PARAMETER, EPOCHS = 20, 4    # the run is as long as the shorter of the two
STEPS = 100                             # or about so many steps, in smaller batches
LONGEST = 2048                          # window, tokens, unless --block_size says otherwise
SPIKE, MAX_SKIPS = 10, 5                # skip steps of 10 times the usual gradient; 5 in a row end
EVAL_TOKENS = 2 ** 20                   # at most so many validation tokens, the same every time
SAMPLE_TOKENS = 48                      # of text shown at each validation
CPU_PASS, GPU_PASS = 2 ** 13, 2 ** 15   # at most so many tokens a forward pass
FILLED = 0.85                           # of a GPU's memory, by the estimate of memory()
H100_BYTES = 80e9                       # what --plan reckons with
HUBER = 1e-3                            # relative errors beyond it count less (Hoffmann et al.)
SHOWN = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")    # on the console


@dataclass
class Config:
    data: list[str] = field(default_factory=lambda: ["out/tokens"])  # folders, DIR or DIR:WEIGHT
    out: str = "out/base.pt"               # checkpoint to write; the log goes beside it
    init: str = ""                         # checkpoint or public model to continue pretraining from
    resume: bool = False                   # go on from the checkpoint at --out, if there is one
    overwrite: bool = False                # start anew although --out holds steps of another run
    plan: bool = False                     # print what the settings amount to, train nothing
    fit: list[str] = field(default_factory=list)  # with --plan: logs of runs to predict this one by
    # model; what is None follows from depth, and what GPTConfig has too goes into it by name
    depth: int = 4                         # layers, at least 1
    n_layer: int | None = None             # layers, where the dial sets the rest; at least 1
    n_head: int | None = None              # attention heads, at least 1
    n_kv_head: int | None = None           # key/value heads, fewer share keys; at least 1
    n_embd: int | None = None              # width, channels, at least 1
    block_size: int | None = None          # window, tokens; of a new model the context; at least 1
    tie_embeddings: bool = False           # one matrix for input and output embedding
    doc_mask: bool = False                 # tokens see their own document only
    # optimization
    optimizer: Literal["muon", "adamw"] = "muon"  # of the blocks' matrices
    total_batch_tokens: int | None = None  # tokens per optimizer step, over all ranks, at least 1
    device_batch_size: int | None = None   # sequences per forward pass and rank, at least 1
    max_steps: int | None = None           # optimizer steps, at least 1
    learning_rate: float | None = None     # peak, of AdamW and Muon alike, above 0
    min_lr: float = 0.0                    # at the end, share of the peak, at least 0, at most 1
    warmup: float = 0.02                   # fraction of the run, at least 0, at most 1
    weight_decay: float = 0.1              # on matrices of the blocks, decoupled, at least 0
    grad_clip: float = 1.0                 # largest global gradient norm, above 0
    # running
    shard: Literal["none", "fsdp"] = "none"  # fsdp splits weights, gradients and moments over ranks
    recompute: bool = False                # activations anew in the backward pass, to save memory
    eval_every: int = 250                  # optimizer steps between validations, at least 1
    save_every: int = 1000                 # optimizer steps between checkpoints, at least 1
    tensorboard: bool = False              # also write event files beside the log
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products
    compile: bool | None = None            # torch.compile; derived: on GPUs
    seed: int = 1                          # of weights and data order, at least 0


def model_config(cfg, vocab_size, checkpoint=None):
    """GPTConfig from --depth and the sizes given, or of the checkpoint to start from."""
    sizes = {f.name: getattr(cfg, f.name, None) for f in dataclasses.fields(GPTConfig)}
    given = {name: size for name, size in sizes.items() if size is not None}
    if checkpoint:    # of whose sizes only the context may grow
        config = config_of(checkpoint)
        own = vars(config) | dict(depth=config.n_layer)
        for name, size in (given | dict(depth=cfg.depth)).items():
            if name != "block_size" and size not in (own[name], getattr(Config, name)):
                fail(f"--{name} {size}: the model at {cfg.init} has {own[name]}; leave it out")
        return dataclasses.replace(config, block_size=max(config.block_size, cfg.block_size or 0))
    width = given.get("n_embd", 64 * math.ceil(48 * cfg.depth / 64))    # whole heads of 64
    heads = given.get("n_head", max(1, width // 64))
    derived = dict(n_layer=cfg.depth, n_embd=width, n_head=heads, n_kv_head=heads,
                   block_size=min(LONGEST, 64 * cfg.depth), vocab_size=vocab_size)
    try:
        return GPTConfig(**derived | given)
    except ValueError as e:
        fail(e)


def memory(cfg, config, rows, world_size, shard):
    """Bytes that one GPU holds at the peak of a step with so many sequences a pass, in bf16 and
    with the attention kernels of GPUs."""
    C, L = config.n_embd, config.n_layer
    q_size, kv_size = config.n_head * config.head_size, config.n_kv_head * config.head_size
    tokens = rows * config.block_size    # of a pass
    block = 2 * C * (q_size + kv_size) + 3 * C * config.n_hidden
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * C
    params = L * block + embeddings
    # float32: weights, gradients and moments, of which Muon has one and AdamW two
    held = 8 * params + 8 * embeddings + (4 if cfg.optimizer == "muon" else 8) * L * block
    copies = 2 * params    # of the weights, in bf16
    if shard == "fsdp":
        held /= world_size
        copies = 2 * (block + embeddings)    # one block at a time
        if cfg.total_batch_tokens > tokens * world_size:    # several passes: gradients stay whole
            held += 4 * params
    # what the backward pass needs: bf16, around norms, rotation, attention and SwiGLU
    of_block = 2 * tokens * (4.5 * C + 4 * q_size + 3 * kv_size + 4 * config.n_hidden)
    activations = L * of_block
    if cfg.recompute:    # the inputs of all blocks, and the one that is at work
        activations = L * 2 * tokens * C + of_block
    logits = 4 * tokens * config.vocab_size    # with their gradient
    return held + copies + activations + logits


def largest_pass(cfg, config, world_size, shard, most_tokens, most_bytes):
    """Sequences a pass: as many as divide those of a rank and fit."""
    rows, best = cfg.total_batch_tokens // (world_size * config.block_size), 1
    for n in range(2, min(rows, most_tokens // config.block_size) + 1):
        if rows % n == 0 and memory(cfg, config, n, world_size, shard) <= most_bytes:
            best = n
    return best


def derive(cfg, config, n_params, train_tokens, env):
    """cfg with all that is None and follows from sizes, text and device filled in."""
    cfg, T, cuda = dataclasses.replace(cfg), config.block_size, env.device.type == "cuda"
    tokens = min(TOKENS_PER_PARAMETER * n_params, EPOCHS * train_tokens)
    rows = min(8 * (config.n_layer / 4) ** 3, tokens / (STEPS * T))
    batch = T * 2 ** round(math.log2(max(1, rows)))
    passed = cfg.device_batch_size or 1
    unit = env.world_size * passed * T    # tokens that all ranks pass at once
    batch = cfg.total_batch_tokens or unit * max(1, round(batch / unit))
    if batch % unit:
        fail(f"--total_batch_tokens {batch} is not a multiple of {unit}, {env.world_size} ranks x "
             f"--device_batch_size {passed} x --block_size {T}")
    rate = 0.014 if cfg.optimizer == "muon" else 0.008
    rate *= (192 / config.n_embd) ** 0.5
    if cfg.init:    # far below the rate from scratch: what was learned is not to be lost
        rate = 3e-3 * 192 / config.n_embd
    cfg.block_size, cfg.total_batch_tokens = T, batch
    cfg.learning_rate = cfg.learning_rate or rate
    cfg.max_steps = cfg.max_steps or max(1, tokens // batch)
    if cfg.compile is None:
        cfg.compile = cuda
    most_tokens, most_bytes = CPU_PASS, math.inf
    if cuda:
        most_tokens = GPU_PASS
        most_bytes = FILLED * torch.cuda.get_device_properties(env.device).total_memory
    cfg.device_batch_size = cfg.device_batch_size or largest_pass(
        cfg, config, env.world_size, cfg.shard, most_tokens, most_bytes)
    return cfg


def plan(cfg, config, n_params, flops, train_tokens):
    """Say what the settings amount to; with --plan also memory per GPU and hours."""
    tokens = cfg.max_steps * cfg.total_batch_tokens
    print0(f"model: {n_params:,} parameters: {config.n_layer} layers x {config.n_embd}, "
           f"{config.n_head} heads ({config.n_kv_head} for keys), context {config.block_size} "
           f"(windows of {cfg.block_size}), vocabulary {config.vocab_size}")
    print0(f"run: {cfg.max_steps:,} steps x {cfg.total_batch_tokens:,} tokens = {tokens:,} tokens, "
           f"{tokens / n_params:.1f} per parameter, {tokens / max(1, train_tokens):.1f} epochs, "
           f"{tokens * flops:.2g} FLOPs")
    print0(f"optimizer: {cfg.optimizer}, peak learning rate {cfg.learning_rate:.2g}, "
           f"{cfg.device_batch_size} sequences a pass")
    if not cfg.plan:
        return
    config = dataclasses.replace(config, block_size=cfg.block_size)
    print0("\n   H100s   DDP: GB each, tokens a pass   FSDP: the same           hours at 40 %")
    for n in (1, 8, 64):
        line = f"{n:8d}"
        for shard in ("none", "fsdp"):
            rows = largest_pass(cfg, config, n, shard, GPU_PASS, FILLED * H100_BYTES)
            gigabytes = memory(cfg, config, rows, n, shard) / 1e9
            line += f"{gigabytes:15.1f} {rows * config.block_size:13,d}"
        print0(f"{line} {tokens * flops / (0.4 * PEAK_FLOPS['H100'] * n) / 3600:18.3g}")


def spiking(loss, grad_norm, usual_norm, step):
    """Is a step better left out? Something is not finite, or the gradient far above the usual."""
    if not math.isfinite(loss + grad_norm):
        return True
    return step > 20 and usual_norm is not None and grad_norm > SPIKE * usual_norm


# ------------------------------------------------------------------------------------------------
# Scaling laws: what small runs say of a large one


def fit_factors(terms):
    """(E, A, B) (grid, 3) that bring terms (grid, runs, 3) nearest to 1, and the Huber loss left.

    By least squares, ten times: a run that is off by more than HUBER weighs less the next time.
    """
    weights = np.ones((*terms.shape[:2], 1))                                    # (grid, runs, 1)
    for _ in range(10):
        factors = np.linalg.pinv(terms * weights) @ weights                     # (grid, 3, 1)
        errors = np.abs(terms @ factors - 1)
        weights = np.minimum(1, HUBER / errors.clip(1e-12)) ** 0.5
    losses = np.where(errors < HUBER, errors ** 2 / 2, HUBER * (errors - HUBER / 2))
    return factors[..., 0], losses.sum((1, 2))


def fit_loss(sizes, tokens, losses):
    """(E, A, B, a, b) of L = E + A N^-a + B D^-b: Hoffmann et al. 2022, arXiv 2203.15556, eq. 10.

    sizes N, tokens D, losses L (nats): arrays, a number for each run. Huber's loss of relative
    errors, which at this size are those of the logs. For given exponents L is linear in E, A and B:
    so only the exponents are searched, on a grid of 15 x 15 that closes in on the best of them.
    Raises ValueError where no positive E, A and B fit.
    """
    centre, width = np.array([0.6, 0.6]), 0.55    # of the grid
    for _ in range(8):
        a, b = np.meshgrid(*(np.linspace(c - width, c + width, 15) for c in centre))
        a, b = a.reshape(-1, 1), b.reshape(-1, 1)                               # (grid, 1)
        terms = np.stack([np.ones_like(sizes * a), sizes ** -a, tokens ** -b], 2)
        factors, cost = fit_factors(terms / losses[:, None])    # (grid, runs, 3)
        positive = (factors.min(1) > 0) & (a[:, 0] > 0) & (b[:, 0] > 0)
        if not positive.any():
            raise ValueError("no law with positive terms fits these losses")
        best = np.where(positive, cost, math.inf).argmin()
        centre, width = np.array([a[best, 0], b[best, 0]]), width / 3
    return np.array([*factors[best], *centre])


def predicted(law, sizes, tokens):
    E, A, B, a, b = law
    return E + A * sizes ** -a + B * tokens ** -b


def read_runs(paths):
    """(parameters, tokens, validation losses) of finished runs, from the last lines of logs."""
    runs = []
    for path in paths:
        row = read_rows([path])[-1]
        if not {"parameters", "val_loss"} <= row.keys() or row["step"] < row["max_steps"]:
            fail(f"--fit {path}: not the log of a finished pretraining run")
        runs.append([row["parameters"], row["tokens"], row["val_loss"]])
    if len(runs) < 6:
        fail(f"--fit: {len(runs)} runs cannot tell a law of 5 numbers; give 6 or more, of several "
             f"sizes and lengths")
    return np.array(runs, float).T


def print_fit(cfg, n_params, tokens):
    """The law of the runs in --fit, and what it says of the planned one."""
    runs = read_runs(cfg.fit)
    try:
        law = fit_loss(*runs)
        without = [fit_loss(*np.delete(runs, i, 1)) for i in range(runs.shape[1])]
    except ValueError as e:
        fail(f"--fit: {e}; give runs of more sizes and lengths")
    errors = predicted(law, *runs[:2]) / runs[2] - 1
    others = [predicted(other, n_params, tokens) for other in without]
    E, A, B, a, b = law
    print0(f"\nlaw: L = {E:.3f} + {A:.4g} N^-{a:.3f} + {B:.4g} D^-{b:.3f}, off by "
           f"{np.abs(errors).mean():.2%} on average, {np.abs(errors).max():.2%} at most, over "
           f"{len(errors)} runs")
    best = (a * A / (b * B) * (n_params * tokens) ** b) ** (1 / (a + b))    # the same N D
    print0(f"this run: {predicted(law, n_params, tokens):.3f} nats expected, {min(others):.3f} to "
           f"{max(others):.3f} if one of the runs is left out; its compute is best spent on "
           f"{best:,.0f} parameters and {n_params * tokens / best:,.0f} tokens")


# ------------------------------------------------------------------------------------------------
# Data: token folders, mixed by weight, cut into windows


def draw(sources, state, n):
    """The next n (source, index in that source): shares follow the weights as closely as they can.

    With each window every source is due its share of it, and the one that is due most gives it.
    state: taken and behind, windows that each source has given and that it is due, are updated.
    """
    total, picks = sum(s["weight"] for s in sources), []
    taken, behind = state["taken"], state["behind"]
    for _ in range(n):
        for i, s in enumerate(sources):
            behind[i] += s["weight"] / total
        most = behind.index(max(behind))
        picks.append((most, taken[most]))
        taken[most] += 1
        behind[most] -= 1
    return picks


def documents(ids, enc):
    """(B, T) number of the document each token is in; the end-of-text token closes its document."""
    ends = (ids == enc._special_tokens[ENDOFTEXT]).long()
    return ends.cumsum(dim=1) - ends


@torch.no_grad()
def validate(model, sources, cfg, env):
    """Nats per token and bits per byte over fixed windows of all validation text, on all ranks;
    of several folders also for each: what is learned, and what forgotten."""
    T, B, enc = cfg.block_size, cfg.device_batch_size, sources[0]["enc"]
    stride = T * math.ceil(sum(len(s["val"]) for s in sources) / EVAL_TOKENS)
    windows = [(n, i) for n, s in enumerate(sources) for i in range(0, len(s["val"]) - 1, stride)]
    per_rank = math.ceil(len(windows) / env.world_size)    # as many passes on all ranks
    local = windows[env.rank::env.world_size]
    n_bytes = token_bytes(enc).to(env.device)
    sums = torch.zeros(len(sources), 4, dtype=torch.float64)    # nats, tokens, those of text, bytes
    for start in range(0, per_rank, B):
        ids = torch.zeros(B, T + 1, dtype=torch.long)    # always of one shape: compiled once
        mask, source = torch.zeros(B, T), torch.zeros(B, dtype=torch.long)
        for row, (n, i) in enumerate(local[start:start + B]):
            text = torch.from_numpy(sources[n]["val"][i:i + T + 1].astype(np.int64))
            ids[row, :len(text)], mask[row, :len(text) - 1], source[row] = text, 1, n
        ids, mask = ids.to(env.device), mask.to(env.device)
        x, y = ids[:, :-1], ids[:, 1:]
        with env.autocast():
            logits = model(x, documents(x, enc) if cfg.doc_mask else None)
        nats, is_text = token_nats(logits, y) * mask, mask * (n_bytes[y] > 0)
        parts = (nats, mask, nats * is_text, n_bytes[y] * is_text)
        sums.index_add_(0, source, torch.stack([x.sum(1).cpu().double() for x in parts], 1))
    sums = sum_over_ranks(sums, env)
    totals = {"": sums.sum(0)}
    if len(sources) > 1:
        totals |= {f" {s['path']}": total for s, total in zip(sources, sums) if total[1]}
    metrics = {}
    for place, (nats, tokens, text_nats, text_bytes) in totals.items():
        metrics["val_loss" + place] = (nats / tokens.clamp(min=1)).item()
        metrics["val_bpb" + place] = (text_nats / math.log(2) / text_bytes.clamp(min=1)).item()
    return metrics


def sample_text(model, sources, cfg, env):
    """What the model makes of the first words of the validation text, as one line to print."""
    enc, prompt = sources[0]["enc"], sources[0]["val"][:8].tolist()
    n = min(SAMPLE_TOKENS, cfg.block_size - len(prompt))
    if not prompt or n < 1:
        return ""
    if cfg.shard == "fsdp":    # generate calls the model's parts, and the embeddings are its own
        model.unshard()
    with env.autocast():
        answer, = complete(model, [prompt], n, 1, temperature=0.8, seeds=[cfg.seed],
                           stop_ids=[enc._special_tokens[ENDOFTEXT]])
    head, text = enc.decode(prompt), enc.decode(prompt + answer)    # not cut inside a letter
    return f"\n    {head!r} -> {text[len(head):]!r}"


def prepare_default(cfg, env):
    """Run prepare.py if nothing was prepared yet, as somebody does who starts with this stage."""
    if cfg.data != Config().data or Path(cfg.data[0], "manifest.json").exists():
        return
    print0(f"no tokens in {cfg.data[0]} yet: preparing the embedded data first")
    if env.is_master:    # in a process of its own, which is not one of torchrun's
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run([sys.executable, Path(__file__).with_name("prepare.py")], env=alone)
        if done.returncode:
            fail("prepare.py failed, see above")
    if env.world_size > 1:
        dist.barrier()


def main(cfg):
    env = setup(cfg.seed, cfg.precision)
    if not cfg.plan:
        check_out(cfg, "pretrain")

    # tokenizer, sizes and data
    prepare_default(cfg, env)
    checkpoint, reader = None, cfg.init
    if cfg.init:
        checkpoint = load_checkpoint(cfg.init, "python pretrain.py")
        if "score.weight" in checkpoint["weights"]:
            fail(f"{cfg.init} is a reward model; give a language model")
        enc = encoding_from_dict(checkpoint["encoding"])
    else:
        first = open_tokens(cfg.data[0])
        enc, reader = first["enc"], first["path"]
    config = model_config(cfg, enc.n_vocab, checkpoint)
    T = cfg.block_size or min(LONGEST, config.block_size)
    sources = [open_tokens(spec, reader, enc, T) for spec in cfg.data]
    train_tokens = sum(len(s["train"]) for s in sources)
    if cfg.init:
        cfg = dataclasses.replace(cfg, depth=config.n_layer)
        # as much as there is until the folder that is used up first has been read once
        weights = sum(s["weight"] for s in sources)
        train_tokens = int(min(len(s["train"]) * weights / s["weight"] for s in sources))
    if sum(len(s["val"]) for s in sources) < 2:
        fail(f"{sources[0]['path']} has no validation text; prepare with --val_fraction above 0")

    # model, and what follows from its size
    with torch.device("meta" if cfg.plan else "cpu"):    # a plan needs its sizes only
        model = GPT(config)
    n_params, flops = sum(p.numel() for p in model.parameters()), model.flops_per_token(T)
    given = cfg    # is saved; cfg: with what follows
    cfg = derive(cfg, dataclasses.replace(config, block_size=T), n_params, train_tokens, env)
    max_steps, learning_rate = cfg.max_steps, cfg.learning_rate
    plan(cfg, config, n_params, flops, train_tokens)
    if cfg.fit:
        print_fit(cfg, n_params, max_steps * cfg.total_batch_tokens)
    if cfg.plan:
        return
    if checkpoint:
        load_weights(model, checkpoint["weights"])
    model.recompute = cfg.recompute
    torch.backends.cuda.enable_cudnn_sdp(True)    # all passes are of one shape

    if cfg.shard == "fsdp":    # from the CPU, block by block: no device ever holds the whole
        if env.world_size == 1:
            fail("--shard fsdp divides the model among processes and this is the only one: start "
                 "with torchrun --nproc_per_node=N, or leave it out")
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard    # slow to import
        policy = MixedPrecisionPolicy(env.dtype, torch.float32)    # gathers bf16, sums float32
        for module in (*model.blocks, model):
            fully_shard(module, mp_policy=policy, reshard_after_forward=True)
        wrapped = compiled(model) if cfg.compile else model
    else:
        model.to(env.device)
        wrapped = parallel(compiled(model) if cfg.compile else model, env)
    optimizers = make_optimizers(model, cfg.optimizer, learning_rate, cfg.weight_decay, env.dtype)
    # state: everything a resumed run needs besides weights and moments
    state = resume(given, model, optimizers, max_steps, taken=[0] * len(sources),
                   behind=[0.0] * len(sources), usual_norm=None, skipped=0, in_row=0)
    if len(state["taken"]) != len(sources):
        fail(f"--resume: {cfg.out} has read {len(state['taken'])} folders so far, now --data has "
             f"{len(sources)}; start a new run from it with --init")
    log = Log(cfg, state["step"], max_steps)
    peak_rate = peak_flops(env) / flops    # tokens a second

    started = time.perf_counter() - state["seconds"]
    for step in range(state["step"], max_steps + 1):
        state.update(step=step, seconds=time.perf_counter() - started)
        last = step == max_steps

        if last or step and step % cfg.eval_every == 0:
            metrics = validate(wrapped, sources, cfg, env)
            log(step, metrics, sample_text(model, sources, cfg, env), **metrics,
                parameters=n_params, tokens=step * cfg.total_batch_tokens, max_steps=max_steps,
                seconds=state["seconds"])
        if last or step % cfg.save_every == 0:    # also at 0: what cannot be written shows here
            save_checkpoint(cfg.out, model, "pretrain", step, enc, given, state, optimizers)
        if last:
            break

        lr = cosine_lr((step + 0.5) / max_steps, cfg.warmup, learning_rate,
                       cfg.min_lr * learning_rate)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr

        step_started = time.perf_counter()
        picks = draw(sources, state, cfg.total_batch_tokens // T)
        total, stride = torch.zeros((), device=env.device), env.world_size * cfg.device_batch_size
        for start in range(env.rank * cfg.device_batch_size, len(picks), stride):
            part = picks[start:start + cfg.device_batch_size]
            rows = [window(sources[n]["train"], T, i, (cfg.seed, n)) for n, i in part]
            ids = torch.from_numpy(np.stack(rows)).to(env.device)                   # (B, T + 1)
            x, y = ids[:, :-1], ids[:, 1:]
            last_pass = start + stride >= len(picks)
            if cfg.shard == "fsdp":    # exchange gradients once, after the last pass
                model.set_requires_gradient_sync(last_pass)
            elif env.world_size > 1:
                wrapped.require_backward_grad_sync = last_pass
            with env.autocast():
                logits = wrapped(x, documents(x, enc) if cfg.doc_mask else None)    # (B, T, V)
            loss = token_nats(logits, y).sum() / cfg.total_batch_tokens
            (loss * env.world_size).backward()    # because ranks average gradients
            total += loss.detach()
        loss = sum_over_ranks(total, env).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        grad_norm = (grad_norm.full_tensor() if cfg.shard == "fsdp" else grad_norm).item()

        skip = spiking(loss, grad_norm, state["usual_norm"], step)
        for opt in optimizers:
            if not skip:
                opt.step()
            opt.zero_grad()
        state["skipped"] += skip
        state["in_row"] = state["in_row"] + 1 if skip else 0
        if not skip:
            usual = state["usual_norm"]
            state["usual_norm"] = grad_norm if usual is None else 0.95 * usual + 0.05 * grad_norm
        if state["in_row"] == MAX_SKIPS:
            fail(f"{MAX_SKIPS} steps in a row were non-finite or spiking, the last at step {step} "
                 f"on windows {[f'{cfg.data[n]} {i}' for n, i in picks[:4]]}...: lower "
                 f"--learning_rate or look at that text. The last save is in {cfg.out}")

        seconds = time.perf_counter() - started
        rate = cfg.total_batch_tokens / (time.perf_counter() - step_started)
        log(step, SHOWN if step % 10 == 0 or skip else (), loss=loss, lr=lr, grad_norm=grad_norm,
            tokens_per_second=rate, mfu=rate / peak_rate, seconds=seconds, skipped=state["skipped"])

    print0(f"done: {cfg.out}: {max_steps:,} steps, {max_steps * cfg.total_batch_tokens:,} tokens "
           f"in {duration(state['seconds'])}, {state['skipped']} steps skipped, "
           f"at most {peak_memory(env)}")
    return metrics


if __name__ == "__main__":
    run(main, Config)
