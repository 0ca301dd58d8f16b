"""Supervised fine-tuning: teach a base model to answer, by example.

In:   out/base.pt, demonstrations (data/sft.jsonl: OpenAI messages, ShareGPT, Alpaca, GSM8K, ...),
      and for --replay the tokens the base model was trained on
Out:  out/sft.pt (one self-contained checkpoint) and out/sft.jsonl (one JSON line per step)

    python sft.py                                             # laptop: the embedded data, a minute
    python sft.py --init DIR --data mine.jsonl --lora_rank 16  # a downloaded model
    python sft.py --init out/sft.pt --revise data/prompts.jsonl --out out/revised.pt
    torchrun --standalone --nproc_per_node=8 sft.py --data mine.jsonl

Loss: -(1/N) sum of ln p(token | tokens before it) over what the assistant says and its end-of-turn
token, in every turn but those with "weight": 0; N counts these tokens in the whole step, over all
micro-steps and ranks. Conversations are packed into rows; each sees itself only, and its positions
start at 0. Part of each step replays pretraining text, so that the base is not forgotten: all of
its tokens are learned and count in N, so a row beside eight of talk is a fifth of it.
--show_batch prints the first row, what is learned in colour, and trains nothing. Expect 93 % of the
held-out tokens right, answers that stop by themselves, and 0.28 bits per byte of the replayed text.

References: Ouyang et al. 2022, arXiv 2203.02155 (InstructGPT); Krell et al. 2021, arXiv 2107.02027
(packing without crosstalk); Hu et al. 2021, arXiv 2106.09685 (LoRA).
Differs from the papers in: nothing that they say; InstructGPT too replays a tenth of pretraining
text in the SFT that RL starts from (appendix C.3).
"""
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from model import (IM_END, PAD, Log, add_lora, beside, check_out, collate, compiled, complete,
                   cosine_lr, duration, fail, has_tokens, keep_valid, load_language_model,
                   load_principles, load_prompts, make_optimizers, nth_of_epochs, open_tokens,
                   parallel, peak_flops, peak_memory, print0, read_rows, render_chat, resume, run,
                   save_checkpoint, setup, share_out, sum_over_ranks, to_messages, token_bytes,
                   token_logprobs, window, write_rows)

CRITIQUE = "What is wrong with your answer by this principle? {principle}"
REVISION = "Answer again, by the principle."
SAMPLE_TOKENS = 64      # longest answer that is sampled, and critique of one
HELD_OUT = 512          # conversations to validate on, at most
REPLAY_WINDOWS = 512    # of validation text, at most, for the bits per byte
SHOWN = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")    # on the console


@dataclass
class Config:
    init: str = "out/base.pt"              # checkpoint or public model to start from
    data: list[str] = field(default_factory=lambda: ["data/sft.jsonl"])  # conversation files
    out: str = "out/sft.pt"                # checkpoint to write; the log goes beside it
    resume: bool = False                   # go on from the checkpoint at --out, if there is one
    overwrite: bool = False                # start anew although --out holds steps of another run
    show_batch: bool = False               # print the first row coloured by mask; no training
    # data
    pack: bool = True                      # several conversations a row; no: one, padded
    block_size: int = 2048                 # row, tokens, at least 2; at most the model's context
    val_fraction: float = 0.04             # share of conversations held out, at least 0, at most 1
    replay: float = 0.1                    # rows of pretraining text per row of talk, at least 0
    replay_data: str = "out/tokens"        # folder of tokens for replay and bits per byte, or none
    revise: list[str] = field(default_factory=list)  # prompts whose revised answers are learned too
    constitution: str = "data/constitution.txt"  # of --revise: principles, one a line
    # optimization
    lora_rank: int = 0                     # rank of the adapters, 0: train all weights; at least 0
    epochs: float = 4.0                    # times each conversation is seen, above 0
    max_steps: int | None = None           # optimizer steps instead of epochs, at least 1
    total_batch_tokens: int | None = None  # of talk a step, at least 1; derived: 8 rows, or ranks
    device_batch_size: int = 16            # rows per forward pass and rank, at least 1
    learning_rate: float | None = None     # peak, of AdamW, above 0; derived: 1e-3 * 192 / width
    warmup: float = 0.05                   # fraction of the run, at least 0, at most 1
    grad_clip: float = 1.0                 # largest global gradient norm, above 0
    # running
    eval_every: int = 100                  # optimizer steps between validations, at least 1
    save_every: int = 100                  # optimizer steps between checkpoints, at least 1
    tensorboard: bool = False              # also write event files beside the log
    recompute: bool = False                # activations anew in the backward pass, to save memory
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products
    compile: bool = False                  # torch.compile
    seed: int = 1                          # of data order, at least 0


# ------------------------------------------------------------------------------------------------
# Data: conversations as (ids, mask), packed into rows


def load_conversations(paths, enc, block_size):
    """[(ids, mask)] of all usable conversations, cut to block_size; says what is cut or dropped."""
    def convert(row):
        ids, mask = render_chat(enc, to_messages(row))
        if not any(mask[1:block_size]):
            raise ValueError(f"nothing to learn within {block_size} tokens")
        return ids, mask

    kept = keep_valid(read_rows(paths), convert, " ".join(paths))
    if cut := sum(len(ids) > block_size for ids, _ in kept):
        print0(f"{cut} of {len(kept)} conversations are cut to the {block_size} tokens of a row; "
               f"their ends are not learned")
    return [(ids[:block_size], mask[:block_size]) for ids, mask in kept]


def pack_rows(lengths, width, seed):
    """Rows (lists of indices), each of at most `width` tokens: in shuffled order the first of
    the last 64 rows that has room."""
    rows, room = [], []
    for i in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        recent = range(max(0, len(rows) - 64), len(rows))
        n = next((n for n in recent if room[n] >= lengths[i]), len(rows))
        if n == len(rows):
            rows.append([])
            room.append(width)
        rows[n].append(i)
        room[n] -= lengths[i]
    return rows


def reply(model, talks, enc, cfg, env):
    """Let the model speak next, greedily, in each of these talks (lists of messages). Returns of
    each whether it saw the whole talk and ended by itself."""
    end, room = enc._special_tokens[IM_END], model.config.block_size - SAMPLE_TOKENS
    chats = [render_chat(enc, talk, reply=True)[0] for talk in talks]
    with env.autocast():
        found = complete(model, [chat[-room:] for chat in chats], SAMPLE_TOKENS,
                         4 * cfg.device_batch_size, temperature=0, stop_ids=[end])
    for talk, ids in zip(talks, found):
        said = enc.decode([i for i in ids if i != end])
        talk.append(dict(role="assistant", content=said))
    return [len(chat) <= room and ids[-1] == end for chat, ids in zip(chats, found)]


def revisions(model, enc, cfg, env):
    """Let the model answer, criticise its answer by a principle and answer again (Bai et al. 2022,
    arXiv 2212.08073, 3); write the last answers as demonstrations, return their file."""
    context = model.config.block_size
    prompts = load_prompts(cfg.revise, enc, min(context // 2, context - SAMPLE_TOKENS))
    principles = load_principles(cfg.constitution)

    def revise(part):
        talks = [[*prompts[n]["messages"]] for n in part]
        reply(model, talks, enc, cfg, env)
        for question in (CRITIQUE, REVISION):
            for n, talk in zip(part, talks):
                principle = principles[(n + cfg.seed) % len(principles)]
                talk.append(dict(role="user", content=question.format(principle=principle)))
            whole = reply(model, talks, enc, cfg, env)
        return list(zip(talks, whole))

    rows, changed = [], 0
    for talk, whole in share_out(revise, range(len(prompts)), env):
        *prompt, answer, _, critique, _, revised = talk
        if whole:    # else its end would be learned, which the model did not say
            rows.append(dict(messages=[*prompt, revised], answer=answer["content"],
                             critique=critique["content"]))
            changed += answer["content"] != revised["content"]
    print0(f"{changed} of {len(rows)} answers changed by revision, {len(prompts) - len(rows)} "
           f"others are too long")
    return write_rows(beside(cfg.out, ".revised.jsonl"), rows, env)


def open_replay(cfg, enc, block_size):
    """The folder of tokens to replay; None where there is none and none was asked for."""
    if not has_tokens(cfg.replay_data, Config.replay_data):
        print0(f"no tokens in {cfg.replay_data}: training without replay, without bits per byte")
        return None
    source = open_tokens(cfg.replay_data, cfg.init, enc, block_size)
    if len(source["val"]) <= block_size:
        fail(f"{cfg.replay_data} has fewer than one window of {block_size} + 1 tokens to validate; "
             f"set --replay_data none")
    return source


def show(pieces, enc):
    """Print a row with the learned tokens in green (in brackets where colour is off)."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    on, off = ("[", "]") if plain else ("\033[1;32m", "\033[0m")
    for ids, mask in pieces:
        for learned, part in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]):
            text = enc.decode([i for i, _ in part])
            print0(on + text + off if learned else text, end="")
        print0("\n---")
    learned = sum(sum(mask) for _, mask in pieces)
    total = sum(len(ids) for ids, _ in pieces)
    print0(f"{len(pieces)} conversations, {learned} of {total} tokens are learned")


@torch.no_grad()
def learned_nats(model, pieces, enc, cfg, env):
    """Sums over (ids, mask) pieces and ranks: nats, right guesses and number of learned tokens."""
    sums, local = torch.zeros(3, dtype=torch.float64), pieces[env.rank::env.world_size]
    for start in range(0, len(local), cfg.device_batch_size):
        rows = [[piece] for piece in local[start:start + cfg.device_batch_size]]
        ids, mask, _ = collate(rows, enc._special_tokens[PAD], env.device)
        with env.autocast():
            logits = model(ids)
        right = (logits[:, :-1].argmax(-1) == ids[:, 1:]) * mask[:, 1:]
        parts = (-token_logprobs(logits, ids) * mask, right, mask)
        sums += torch.stack([x.sum().cpu().double() for x in parts])
    return sum_over_ranks(sums, env).tolist()


def validate(model, held_out, replayed, enc, cfg, env):
    """Loss and share guessed right on held-out conversations, bits per byte of replayed text."""
    nats, right, n = learned_nats(model, held_out, enc, cfg, env)
    metrics = dict(val_loss=nats / n, val_accuracy=right / n)
    if replayed:
        sizes = token_bytes(enc)
        n_bytes = sum(sizes[ids[1:]].sum().item() for ids, _ in replayed)
        nats, _, _ = learned_nats(model, replayed, enc, cfg, env)
        metrics["val_bpb"] = nats / math.log(2) / n_bytes
    return metrics


def answers(model, held_out, enc, cfg, env):
    """Greedy answers to the 64 shortest held-out prompts: share that stop by themselves, mean
    length; and two of them."""
    room, end = model.config.block_size - SAMPLE_TOKENS, enc._special_tokens[IM_END]
    prompts = [ids[:np.flatnonzero(mask)[0]] for ids, mask in held_out]
    prompts = sorted((p for p in prompts if len(p) <= room), key=len)[:64]
    if not prompts:
        return {}, ""
    with env.autocast():
        found = complete(model, prompts, SAMPLE_TOKENS, 4 * cfg.device_batch_size, temperature=0,
                         stop_ids=[end])
    stopped = sum(answer[-1] == end for answer in found) / len(found)
    length = sum(map(len, found)) / len(found)
    shown = ""
    for i in (0, len(prompts) // 2):
        shown += f"\n    {enc.decode(prompts[i])!r} -> {enc.decode(found[i])!r}"
    return dict(stopped=stopped, length=length), shown


def main(cfg):
    env = setup(cfg.seed, cfg.precision)
    if not cfg.show_batch:
        check_out(cfg, "sft", ".revised.jsonl" if cfg.revise else ".jsonl")

    # model
    model, enc = load_language_model(cfg.init, "python pretrain.py", env.device)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank)
    model.recompute = cfg.recompute
    T, pad_id = min(cfg.block_size, model.config.block_size), enc._special_tokens[PAD]

    # data
    data = [*cfg.data]
    if cfg.revise and not cfg.show_batch:
        data.append(revisions(model, enc, cfg, env))
    conversations = load_conversations(data, enc, T)
    order = np.random.default_rng(cfg.seed).permutation(len(conversations)).tolist()
    n_val = max(1, round(cfg.val_fraction * len(order)))
    train = [conversations[i] for i in order[n_val:]]
    if cfg.show_batch:    # one is enough to look at
        train = train or conversations
    elif not train:
        fail(f"{' '.join(data)}: {len(order)} conversations are too few to train on and to hold "
             f"out --val_fraction {cfg.val_fraction:g}")
    held_out = [conversations[i] for i in order[:n_val:math.ceil(n_val / HELD_OUT)]]
    lengths = [len(ids) for ids, _ in train]
    rows = pack_rows(lengths, T, cfg.seed) if cfg.pack else [[i] for i in range(len(train))]
    if cfg.show_batch:
        return show([train[i] for i in rows[nth_of_epochs(len(rows), 0, cfg.seed)]], enc)
    batch_size = max(env.world_size, (cfg.total_batch_tokens or 8 * T) // T)    # rows
    n_replay, replayed = 0, []
    if source := open_replay(cfg, enc, T):
        n_replay, text = math.ceil(batch_size * cfg.replay), source["val"]
        starts = range(0, len(text) - T, max(T, len(text) // REPLAY_WINDOWS))
        is_text = (token_bytes(enc) > 0).int()
        for i in starts:
            ids = text[i:i + T].tolist()
            replayed.append((ids, is_text[ids].tolist()))
    max_steps = cfg.max_steps or max(1, int(cfg.epochs * len(rows) / batch_size))
    learning_rate = cfg.learning_rate or 1e-3 * 192 / model.config.n_embd
    learned = sum(sum(mask) for _, mask in train)
    print0(f"data: {len(train):,} conversations in {len(rows):,} rows of at most {T} tokens, "
           f"{learned:,} of {sum(lengths):,} tokens learned, {n_val} held out")
    print0(f"run: {max_steps} steps x {batch_size} rows + {n_replay} of replay")

    wrapped = parallel(compiled(model) if cfg.compile else model, env)
    optimizers = make_optimizers(model, "adamw", learning_rate)
    state = resume(cfg, model, optimizers, max_steps)
    log = Log(cfg, state["step"], max_steps)
    peak_rate = peak_flops(env) / model.flops_per_token(T)    # tokens a second

    started = time.perf_counter() - state["seconds"]
    for step in range(state["step"], max_steps + 1):
        state.update(step=step, seconds=time.perf_counter() - started)
        last = step == max_steps

        if last or step % cfg.eval_every == 0:
            metrics = validate(model, held_out, replayed, enc, cfg, env)
            said, shown = answers(model, held_out, enc, cfg, env) if env.is_master else ({}, "")
            metrics.update(said)
            log(step, metrics, shown, **metrics, seconds=state["seconds"])
        if last or step % cfg.save_every == 0:    # also at 0: what cannot be written shows here
            save_checkpoint(cfg.out, model, "sft", step, enc, cfg, state, optimizers)
        if last:
            break

        lr = cosine_lr((step + 0.5) / max_steps, cfg.warmup, learning_rate)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr

        step_started = time.perf_counter()
        batch = []
        for n in range(step * batch_size, (step + 1) * batch_size):
            batch.append([train[i] for i in rows[nth_of_epochs(len(rows), n, cfg.seed)]])
        for n in range(step * n_replay, (step + 1) * n_replay):
            ids = window(source["train"], T, n, (cfg.seed, 0))[:T]
            batch.append([(ids.tolist(), [1] * T)])
        # every rank knows the whole step, so the divisor needs no exchange
        n_learned = sum(sum(mask[1:]) for row in batch for _, mask in row)
        local = batch[env.rank::env.world_size]
        total, n_tokens = torch.zeros((), device=env.device), 0
        for start in range(0, len(local), cfg.device_batch_size):
            part = local[start:start + cfg.device_batch_size]
            ids, mask, doc = collate(part, pad_id, env.device)                      # (B, T) each
            if env.world_size > 1:    # exchange gradients once, after the last pass
                wrapped.require_backward_grad_sync = start + cfg.device_batch_size >= len(local)
            with env.autocast():
                logits = wrapped(ids, doc if cfg.pack else None)                    # (B, T, V)
            loss = -(token_logprobs(logits, ids) * mask).sum() / n_learned
            (loss * env.world_size).backward()    # because ranks average gradients
            total += loss.detach()
            n_tokens += ids.numel() * env.world_size
        loss = sum_over_ranks(total, env).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; lower --learning_rate. "
                 f"The weights of the last save are in {cfg.out}")
        for opt in optimizers:
            opt.step()
            opt.zero_grad()

        seconds = time.perf_counter() - started
        rate = n_tokens / (time.perf_counter() - step_started)
        log(step, SHOWN if step % 10 == 0 else (), loss=loss, lr=lr, grad_norm=grad_norm,
            tokens_per_second=rate, mfu=rate / peak_rate, learned_tokens=n_learned, seconds=seconds)

    print0(f"done: {cfg.out}: {max_steps:,} steps in {duration(state['seconds'])}, "
           f"at most {peak_memory(env)}")
    return metrics


if __name__ == "__main__":
    run(main, Config)
