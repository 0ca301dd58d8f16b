"""Supervised fine-tuning: teach a base model to answer, by example.

In:   out/base.pt, demonstrations (data/sft.jsonl: OpenAI messages, ShareGPT, Alpaca, GSM8K, ...),
      and for --replay the tokens the base model was trained on
Out:  out/sft.pt (one self-contained checkpoint) and out/sft.jsonl (one JSON line per step)

    python sft.py                                             # laptop: the embedded data, a minute
    python sft.py --init DIR --data mine.jsonl --lora_rank 16  # a downloaded model
    torchrun --standalone --nproc_per_node=8 sft.py --data mine.jsonl

Loss: -(1/N) sum of ln p(token | tokens before it) over what the assistant says and its end-of-turn
token, in every turn; N counts these tokens in the whole step, over all micro-steps and ranks.
Conversations are packed into rows; each sees itself only, and its positions start at 0. Part of
each step replays pretraining text, with a loss on every token, so that the base is not forgotten.
--show_batch prints the first row, what is learned in colour, and trains nothing.

References: Ouyang et al. 2022, arXiv 2203.02155 (InstructGPT); Krell et al. 2021, arXiv 2107.02027
(packing without crosstalk); Hu et al. 2021, arXiv 2106.09685 (LoRA).
Differs from the papers in: loss on the assistant only (InstructGPT trains on the whole text);
replay in SFT itself (InstructGPT mixes pretraining gradients into PPO).
"""
import math
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import pretrain
from model import (GPT, IM_END, PAD, Log, add_lora, can_compile, cosine_lr, duration, encoding_hash,
                   fail, generate, keep_valid, lineage, load_adapted, load_checkpoint, load_model,
                   make_optimizers, parse_args, peak_flops, peak_memory, pick, print0, read_rows,
                   render_chat, resume_state, save_checkpoint, seed_step, setup, sum_over_ranks,
                   to_messages, token_logprobs)


@dataclass
class Config:
    init: str = "out/base.pt"              # checkpoint to start from
    data: list[str] = field(default_factory=lambda: ["data/sft.jsonl"])  # conversation files
    out: str = "out/sft.pt"                # checkpoint to write; the log goes beside it
    resume: bool = False                   # go on from the checkpoint at --out
    overwrite: bool = False                # start anew although --out holds steps of another run
    show_batch: bool = False               # print the first row coloured by mask, train nothing
    # data
    pack: bool = True                      # several conversations a row; no: one, padded
    block_size: int = 2048                 # row, tokens; at most the context of the model
    val_fraction: float = 0.04             # share of the conversations held out
    replay: float = 0.1                    # rows of pretraining text per row of conversations
    replay_data: str = "out/tokens"        # folder of tokens for replay and bits per byte
    # model
    dropout: float = 0.0                   # on each block's output, probability
    lora_rank: int = 0                     # rank of the adapters, 0: train all weights
    lora_alpha: float = 16.0               # their scale is alpha / rank
    lora_targets: list[str] = field(default_factory=lambda: ["all"])  # q_proj ... down_proj or all
    # optimization
    epochs: float = 4.0                    # times each conversation is seen
    max_steps: int | None = None           # optimizer steps instead of epochs
    batch_size: int = 8                    # rows of conversations per step, over all ranks
    device_batch_size: int = 16            # rows per forward pass and rank
    learning_rate: float | None = None     # peak, of AdamW; derived: 1e-3 * 192 / width
    min_lr: float = 0.0                    # at the end, as a fraction of the peak
    warmup: float = 0.05                   # fraction of the run
    weight_decay: float = 0.0              # on matrices of the blocks, decoupled
    beta1: float = 0.9                     # AdamW
    beta2: float = 0.95                    # AdamW
    grad_clip: float = 1.0                 # largest global gradient norm
    # running
    eval_every: int = 100                  # optimizer steps between validations
    save_every: int = 100                  # optimizer steps between checkpoints
    log_every: int = 10                    # optimizer steps between console lines
    tensorboard: bool = False              # also write event files beside the log
    sample_tokens: int = 64                # longest answer to a held-out prompt, tokens
    precision: str = "auto"                # auto, bf16 or fp32 matrix products
    compile: bool = False                  # torch.compile
    seed: int = 1                          # of data order


# ------------------------------------------------------------------------------------------------
# Data: conversations as (ids, mask), packed into rows


def load_conversations(cfg, enc, block_size):
    """[(ids, mask)] of all usable conversations, cut to block_size; says what is cut or dropped."""
    def convert(row):
        ids, mask = render_chat(enc, to_messages(row))
        if not any(mask[1:block_size]):
            raise ValueError(f"nothing to learn within {block_size} tokens")
        return ids, mask

    kept = keep_valid(read_rows(cfg.data), convert, " ".join(cfg.data))
    if cut := sum(len(ids) > block_size for ids, _ in kept):
        print0(f"{cut} of {len(kept)} conversations are cut to the {block_size} tokens of a row; "
               f"their ends are not learned")
    return [(ids[:block_size], mask[:block_size]) for ids, mask in kept]


def pack_rows(lengths, width, seed):
    """Rows (lists of indices), each of at most `width` tokens: first fit over a shuffled order."""
    rows, room = [], []
    for i in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        fits = (n for n in range(max(0, len(rows) - 64), len(rows)) if room[n] >= lengths[i])
        n = next(fits, None)
        if n is None:
            rows.append([])
            room.append(width)
            n = len(rows) - 1
        rows[n].append(i)
        room[n] -= lengths[i]
    return rows


def collate(rows, pad_id, device):
    """Rows (lists of (ids, mask)) -> ids (B, T), mask (B, T), doc (B, T): a number for each piece.

    Padding is a piece of its own. The first token of a piece has mask 0, so that no piece is
    predicted from the one before it.
    """
    width = max(sum(len(ids) for ids, _ in row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask, doc = torch.zeros(len(rows), width), torch.full((len(rows), width), -1, dtype=torch.long)
    for b, row in enumerate(rows):
        t = 0
        for n, (piece, learned) in enumerate(row):
            span = slice(t, t + len(piece))
            ids[b, span], mask[b, span] = torch.tensor(piece), torch.tensor(learned).float()
            mask[b, t], doc[b, span], t = 0, n, t + len(piece)
    return ids.to(device), mask.to(device), doc.to(device)


def show(rows, enc):
    """Print a row with the learned tokens in green (in brackets where colour is off)."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    on, off = ("[", "]") if plain else ("\033[1;32m", "\033[0m")
    for ids, mask in rows:
        text, before = "", 0
        for i, m in zip(ids, mask):
            text += (on if m > before else off if m < before else "") + enc.decode([i])
            before = m
        print0(text + (off if before else ""), end="\n---\n")
    learned, total = sum(sum(mask) for _, mask in rows), sum(len(ids) for ids, _ in rows)
    print0(f"{len(rows)} conversations, {learned} of {total} tokens are learned")


# ------------------------------------------------------------------------------------------------
# Validation


@torch.no_grad()
def evaluate(model, held_out, sources, cfg, d, enc):
    """Over all ranks: nats per learned token, share guessed right, bits per byte of replay text."""
    sums = torch.zeros(3, dtype=torch.float64)    # nats, right guesses, learned tokens
    model.eval()
    mine = held_out[d.rank::d.world_size]
    for start in range(0, len(mine), cfg.device_batch_size):
        batch = [[one] for one in mine[start:start + cfg.device_batch_size]]
        ids, mask, _ = collate(batch, enc._special_tokens[PAD], d.device)
        with d.autocast():
            logits = model(ids)
        right = (logits[:, :-1].argmax(-1) == ids[:, 1:]) * mask[:, 1:]
        sums += torch.stack([x.sum().cpu().double() for x in
                             (-token_logprobs(logits, ids) * mask, right, mask)])
    nats, right, n = sum_over_ranks(sums, d).tolist()
    metrics = dict(val_loss=nats / n, val_accuracy=right / n)
    if sources:
        shape = pretrain.Config(block_size=min(cfg.block_size, model.config.block_size),
                                eval_tokens=2 ** 17, device_batch_size=cfg.device_batch_size)
        _, metrics["val_bpb"] = pretrain.evaluate(model, sources, shape, d)
    model.train()
    return metrics


@torch.no_grad()
def answers(model, held_out, cfg, d, enc):
    """Greedy answers to held-out prompts: share that stop by themselves, mean length; and two."""
    prompts = [ids[:mask.index(1)] for ids, mask in held_out]
    room = model.config.block_size - cfg.sample_tokens
    prompts = sorted((p for p in prompts if len(p) <= room), key=len)[:64]
    if not prompts or cfg.sample_tokens < 1:
        return {}, ""
    end = enc._special_tokens[IM_END]
    ids, mask = generate(model, prompts, cfg.sample_tokens, temperature=0, stop_ids=[end],
                         pad_id=enc._special_tokens[PAD], dtype=d.dtype)
    stopped = ((ids == end) & (mask > 0)).any(1).float().mean().item()
    shown = "".join(f"\n    {enc.decode(prompts[i])!r} -> "
                    f"{enc.decode(ids[i][mask[i] > 0].tolist())!r}" for i in (0, len(prompts) // 2))
    return dict(stopped=stopped, length=mask.sum(1).mean().item()), shown


# ------------------------------------------------------------------------------------------------
# The run


def main(cfg):
    d, given = setup(cfg.seed, cfg.precision), cfg

    # model
    checkpoint = (load_checkpoint(cfg.out, "python sft.py", "sft") if cfg.resume else
                  load_checkpoint(cfg.init, "python pretrain.py"))
    raw, enc = load_model(checkpoint, d.device, cfg.dropout)
    if not isinstance(raw, GPT):
        fail(f"{cfg.init} is a reward model; give a language model")
    if cfg.lora_rank:
        add_lora(raw, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    if cfg.resume:
        load_adapted(raw, checkpoint)
    if cfg.learning_rate is None:
        cfg = replace(cfg, learning_rate=1e-3 * 192 / raw.config.n_embd)
    T, pad_id = min(cfg.block_size, raw.config.block_size), enc._special_tokens[PAD]

    # data
    conversations = load_conversations(cfg, enc, T)
    order = np.random.default_rng(cfg.seed).permutation(len(conversations)).tolist()
    n_val = max(1, round(cfg.val_fraction * len(order)))
    if n_val >= len(order):
        fail(f"{' '.join(cfg.data)}: {len(order)} conversation is too few to train and validate")
    held_out, train = ([conversations[i] for i in part] for part in (order[:n_val], order[n_val:]))
    lengths = [len(ids) for ids, _ in train]
    rows = pack_rows(lengths, T, cfg.seed) if cfg.pack else [[i] for i in range(len(train))]
    if cfg.show_batch:
        return show([train[i] for i in rows[pick(len(rows), 0, cfg.seed)]], enc)
    sources, n_replay = [], math.ceil(cfg.batch_size * cfg.replay)
    if Path(cfg.replay_data, "manifest.json").exists():
        sources = [pretrain.open_tokens(cfg.replay_data)]
        if encoding_hash(sources[0]["enc"]) != encoding_hash(enc):
            fail(f"{cfg.replay_data} was made with another tokenizer than {cfg.init}; prepare it "
                 f"with --tokenizer {cfg.init}, or set --replay 0 --replay_data none")
        if n_replay and len(sources[0]["train"]) <= T:
            fail(f"{cfg.replay_data} has fewer than one window of {T} + 1 tokens; set --replay 0")
    elif n_replay:
        print0(f"no tokens in {cfg.replay_data}: training without replay, without bits per byte")
        n_replay = 0
    if cfg.batch_size < d.world_size:
        fail(f"--batch_size {cfg.batch_size} is less than one row for each of {d.world_size} ranks")
    max_steps = cfg.max_steps or max(1, int(cfg.epochs * len(rows) / cfg.batch_size))
    learned = sum(sum(mask) for _, mask in train)
    print0(f"data: {len(train):,} conversations in {len(rows):,} rows of at most {T} tokens, "
           f"{learned:,} of {sum(lengths):,} tokens learned, {n_val} held out")
    print0(f"run: {max_steps} steps x {cfg.batch_size} rows + {n_replay} of replay")

    model = torch.compile(raw) if cfg.compile and can_compile(d.device) else raw
    if d.world_size > 1:
        model = DDP(model, device_ids=[d.local_rank] if d.device.type == "cuda" else None,
                    forward_sync_buffers=False, gradient_as_bucket_view=True)
    optimizers = make_optimizers(raw, "adamw", cfg.learning_rate, cfg.weight_decay,
                                 (cfg.beta1, cfg.beta2))
    n_params = sum(p.numel() for p in raw.parameters() if p.requires_grad)
    print0(f"model: {n_params:,} parameters trained, {cfg.init}")

    state = dict(step=0, seconds=0.0, history=lineage(checkpoint))
    if cfg.resume:
        state = resume_state(checkpoint, optimizers, max_steps, cfg)
    log = Log(cfg.out, state["step"] if cfg.resume else None, given)
    flops, peak = raw.flops_per_token(), peak_flops(d)[0] * d.world_size

    def save():
        if d.is_master:
            save_checkpoint(cfg.out, raw, "sft", state["step"], enc, cfg, state=state,
                            optimizers=[opt.state_dict() for opt in optimizers])

    started, spent = time.perf_counter() - state["seconds"], []    # spent: since the last line
    for step in range(state["step"], max_steps + 1):
        state.update(step=step, seconds=time.perf_counter() - started)
        last = step == max_steps

        if last or step % cfg.eval_every == 0:
            metrics = evaluate(raw, held_out, sources, cfg, d, enc)
            said, shown = answers(raw, held_out, cfg, d, enc) if d.is_master else ({}, "")
            metrics.update(said)
            log(f"step {step:6d} | val " + ", ".join(f"{k.removeprefix('val_')} {v:.4f}"
                                                     for k, v in metrics.items()) + shown,
                step=step, **metrics, seconds=state["seconds"])
        if last or step % cfg.save_every == 0:    # also at 0: what cannot be written shows here
            save()
        if last:
            break

        seed_step(cfg.seed, step, d.rank)    # dropout is the only draw below
        lr = cosine_lr((step + 0.5) / max_steps, cfg.warmup, cfg.learning_rate,
                       cfg.min_lr * cfg.learning_rate)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr

        step_started = time.perf_counter()
        batch = [[train[i] for i in rows[pick(len(rows), step * cfg.batch_size + n, cfg.seed)]]
                 for n in range(cfg.batch_size)]
        for n in range(n_replay):
            ids = pretrain.window(sources[0]["train"], T, step * n_replay + n, (cfg.seed, 0))[:T]
            batch.append([(ids.tolist(), [1] * T)])
        # every rank knows the whole step, so the divisor needs no exchange
        n_learned = sum(sum(mask[1:]) for row in batch for _, mask in row)
        mine = batch[d.rank::d.world_size]
        loss, n_tokens = torch.zeros((), device=d.device), 0
        for at in range(0, len(mine), cfg.device_batch_size):
            ids, mask, doc = collate(mine[at:at + cfg.device_batch_size], pad_id, d.device)
            if d.world_size > 1:    # exchange gradients once, after the last micro-step
                model.require_backward_grad_sync = at + cfg.device_batch_size >= len(mine)
            with d.autocast():
                logits = model(ids, doc if cfg.pack else None)                      # (B, T, V)
            part = -(token_logprobs(logits, ids) * mask).sum() / n_learned
            (part * d.world_size).backward()    # because DDP averages over ranks
            loss += part.detach()
            n_tokens += ids.numel() * d.world_size
        loss = sum_over_ranks(loss, d).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip).item()
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; lower --learning_rate. "
                 f"The weights of the last save are in {cfg.out}")
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)

        spent.append((time.perf_counter() - step_started, n_tokens))
        rate, line = n_tokens / spent[-1][0], ""
        if step % cfg.log_every == 0:
            total, tokens = map(sum, zip(*spent))
            line = (f"step {step:6d} | loss {loss:.4f} | lr {lr:.2e} | norm {grad_norm:6.3f} | "
                    f"{tokens / total:9,.0f} tok/s | mfu {tokens / total * flops / peak:5.1%} | "
                    f"eta {duration((max_steps - step) * total / len(spent))}")
            spent = []
        log(line, step=step, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_second=rate,
            mfu=rate * flops / peak, learned_tokens=n_learned,
            seconds=time.perf_counter() - started)

    print0(f"done: {cfg.out}: {max_steps:,} steps in {duration(state['seconds'])}, "
           f"at most {peak_memory(d)}")
    return metrics


if __name__ == "__main__":
    main(parse_args(Config))
