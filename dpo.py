"""Direct preference optimization: learn from pairs of answers without a reward model in between.

In:   out/sft.pt and pairs (data/preferences.jsonl: TRL, HH-RLHF or UltraFeedback style), or with
      --online the policy's own answers, ranked by out/reward.pt
Out:  out/dpo.pt (one self-contained checkpoint) and out/dpo.jsonl (one JSON line per step)

    python dpo.py                                             # laptop: the embedded data, a minute
    python dpo.py --init DIR --data pairs.jsonl --lora_rank 16
    torchrun --standalone --nproc_per_node=8 dpo.py --data pairs.jsonl

With h = [ln pi(y_w) - ln ref(y_w)] - [ln pi(y_l) - ln ref(y_l)], sums over the tokens of an answer
and its end-of-turn:
    dpo     -ln s(beta h)                                       Rafailov et al. 2023, 2305.18290, 7
    cdpo    -(1 - e) ln s(beta h) - e ln s(-beta h)             Mitchell 2023, label noise e
    ipo     (h - 1 / (2 beta))^2                                Azar et al. 2023, 2310.12036, eq. 17
    simpo   -ln s(beta (ln pi(y_w)/|y_w| - ln pi(y_l)/|y_l|) - gamma)   Meng et al. 2024, 2405.14734
Only differences are trained: both log-probs may fall while the loss does, so both are logged, and
--nll adds -ln pi(y_w)/|y_w| against it. The reference is the model at --init; its log-probs are
computed once.
Differs from the papers in: AdamW instead of RMSprop; an NLL term by default.
"""
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (GPT, IM_END, PAD, Log, Reference, add_lora, cosine_lr, duration, fail, generate,
                   lineage, load_adapted, load_checkpoint, load_model, load_prompts,
                   make_optimizers, parse_args, peak_memory, pick, print0, resume_state,
                   save_checkpoint, seed_step, setup, sum_over_ranks, token_logprobs)
from reward import load_judge, load_pairs, score_all, split_by_prompt
from sft import collate


@dataclass
class Config:
    init: str = "out/sft.pt"               # checkpoint to start from, also the reference
    data: list[str] = field(default_factory=lambda: ["data/preferences.jsonl"])  # files of pairs
    out: str = "out/dpo.pt"                # checkpoint to write; the log goes beside it
    resume: bool = False                   # go on from the checkpoint at --out
    overwrite: bool = False                # start anew although --out holds steps of another run
    # data
    val_fraction: float = 0.1              # share of the prompts held out
    online: bool = False                   # sample both answers anew and rank them by --reward
    reward: str = "out/reward.pt"          # reward model of --online
    prompts: list[str] = field(default_factory=lambda: ["data/prompts.jsonl"])  # of --online
    max_new_tokens: int = 64               # longest sampled answer, tokens
    # loss
    loss: str = "dpo"                      # dpo, cdpo, ipo or simpo
    beta: float = 0.1                      # strength of the pull to the reference; simpo: 2 or more
    label_smoothing: float = 0.1           # e of cdpo
    gamma: float = 0.5                     # margin of simpo
    nll: float = 1.0                       # weight of -ln pi(y_w) per token, 0: none
    # model
    dropout: float = 0.0                   # on each block's output, probability
    lora_rank: int = 0                     # rank of the adapters, 0: train all weights
    lora_alpha: float = 16.0               # their scale is alpha / rank
    lora_targets: list[str] = field(default_factory=lambda: ["all"])  # q_proj ... down_proj or all
    # optimization
    epochs: float = 1.0                    # times each pair is seen
    max_steps: int | None = None           # optimizer steps instead of epochs
    batch_size: int = 32                   # pairs per step, over all ranks
    device_batch_size: int = 32            # pairs per forward pass and rank
    learning_rate: float | None = None     # peak, of AdamW; derived: 1.5e-4 * 192 / width
    min_lr: float = 0.0                    # at the end, as a fraction of the peak
    warmup: float = 0.1                    # fraction of the run
    weight_decay: float = 0.0              # on matrices of the blocks, decoupled
    beta1: float = 0.9                     # AdamW
    beta2: float = 0.95                    # AdamW
    grad_clip: float = 1.0                 # largest global gradient norm
    # running
    eval_every: int = 25                   # optimizer steps between validations
    save_every: int = 20                   # optimizer steps between checkpoints
    log_every: int = 5                     # optimizer steps between console lines
    tensorboard: bool = False              # also write event files beside the log
    precision: str = "auto"                # auto, bf16 or fp32 matrix products
    seed: int = 1                          # of data order and sampling


# ------------------------------------------------------------------------------------------------
# The algorithm


def preference_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, loss="dpo",
                    beta=0.1, label_smoothing=0.0, gamma=0.0):
    """Loss of each pair (B,), nats. Equations in the docstring of this file.

    chosen, rejected, ref_chosen, ref_rejected: log-probs (B,) of whole answers, sums over tokens,
    of the policy and the reference; n_chosen, n_rejected: tokens (B,). Strong preference drives
    the dpo loss to 0 as h grows; ipo stops at h = 1 / (2 beta).
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    if loss == "dpo":
        return -F.logsigmoid(beta * h)
    if loss == "cdpo":
        return (-(1 - label_smoothing) * F.logsigmoid(beta * h)
                - label_smoothing * F.logsigmoid(-beta * h))
    if loss == "ipo":
        return (h - 1 / (2 * beta)).square()
    if loss == "simpo":
        return -F.logsigmoid(beta * (chosen / n_chosen - rejected / n_rejected) - gamma)
    raise ValueError(f"unknown loss {loss!r}: choose dpo, cdpo, ipo or simpo")


def answer_logprobs(model, pairs, pad_id, d):
    """(2, B): log-probs of the chosen and the rejected answers, sums over their tokens."""
    texts = [[(p[k], [0] * p["n_prompt"] + [1] * (len(p[k]) - p["n_prompt"]))]
             for k in ("chosen", "rejected") for p in pairs]
    ids, mask, _ = collate(texts, pad_id, d.device)
    with d.autocast():
        logits = model(ids)                                                     # (2B, T, V)
    return (token_logprobs(logits, ids) * mask).sum(1).view(2, -1)


@torch.no_grad()
def reference_logprobs(ref, pairs, pad_id, cfg, d):
    """Cache ref_chosen and ref_rejected in each pair, with the forward pass that training uses."""
    values = torch.zeros(2, len(pairs), dtype=torch.float64)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["chosen"]))
    for start in range(d.rank * cfg.device_batch_size, len(pairs),
                       d.world_size * cfg.device_batch_size):
        part = order[start:start + cfg.device_batch_size]
        with ref as model:
            both = answer_logprobs(model, [pairs[i] for i in part], pad_id, d)
        values[:, part] = both.double().cpu()
    values = sum_over_ranks(values, d).tolist()
    for pair, chosen, rejected in zip(pairs, *values):
        pair.update(ref_chosen=chosen, ref_rejected=rejected)


def losses_and_metrics(logprobs, pairs, cfg):
    """(loss (B,) of each pair, metrics (7,) summed over them) from logprobs (2, B)."""
    def column(name):
        return torch.tensor([float(p[name]) for p in pairs], device=logprobs.device)

    chosen, rejected = logprobs
    ref_chosen, ref_rejected = column("ref_chosen"), column("ref_rejected")
    n_chosen, n_rejected = (torch.tensor([len(p[k]) - p["n_prompt"] for p in pairs],
                                         device=logprobs.device) for k in ("chosen", "rejected"))
    losses = preference_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected,
                             cfg.loss, cfg.beta, cfg.label_smoothing, cfg.gamma)
    with torch.no_grad():
        rewards = cfg.beta * (chosen - ref_chosen), cfg.beta * (rejected - ref_rejected)
        metrics = torch.stack([losses.sum(), (rewards[0] > rewards[1]).sum(), rewards[0].sum(),
                               rewards[1].sum(), chosen.sum(), rejected.sum(),
                               -(chosen / n_chosen).sum()]).double().cpu()
    return losses - cfg.nll * chosen / n_chosen, metrics


NAMES = ("loss", "accuracy", "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected",
         "nll")


@torch.no_grad()
def validate(model, pairs, pad_id, cfg, d):
    """The metrics on held-out pairs, over all ranks."""
    model.eval()
    sums, mine = torch.zeros(len(NAMES), dtype=torch.float64), pairs[d.rank::d.world_size]
    for at in range(0, len(mine), cfg.device_batch_size):
        part = mine[at:at + cfg.device_batch_size]
        sums += losses_and_metrics(answer_logprobs(model, part, pad_id, d), part, cfg)[1]
    model.train()
    values = sum_over_ranks(sums, d) / len(pairs)
    return {f"val_{name}": value for name, value in zip(NAMES, values.tolist())}


# ------------------------------------------------------------------------------------------------
# Online: pairs of the policy's own answers


def sample_pairs(policy, judge, prompts, enc, cfg, d, step):
    """Two sampled answers a prompt, the better one by the judge first; equal ones are left out."""
    end, pad_id = enc._special_tokens[IM_END], enc._special_tokens[PAD]
    twice = [p["ids"] for p in prompts for _ in range(2)]
    first = 2 * step * cfg.batch_size    # answer n of the run has its own seed, on any rank
    seeds = [cfg.seed * 1_000_003 + first + 2 * (d.rank + i // 2 * d.world_size) + i % 2
             for i in range(len(twice))]
    ids, mask = generate(policy, twice, cfg.max_new_tokens, stop_ids=[end], pad_id=pad_id,
                         seeds=seeds, dtype=d.dtype)
    texts = [row[:len(p) + int(m.sum())] for row, m, p in zip(ids.tolist(), mask, twice)]
    scores = score_all(judge, texts, pad_id, cfg, replace(d, rank=0, world_size=1))    # its own
    judge.eval()
    # an answer that does not end by itself is never the better one
    ranks = [s if text[-1] == end else -math.inf for s, text in zip(scores, texts)]
    pairs = []
    for i, prompt in enumerate(prompts):
        (a, ra), (b, rb) = sorted(zip(texts[2 * i:2 * i + 2], ranks[2 * i:2 * i + 2]),
                                  key=lambda pair: -pair[1])
        if a != b and ra > rb:
            pairs.append(dict(chosen=a, rejected=b, n_prompt=len(prompt["ids"])))
    return pairs, sum(scores) / len(scores)


# ------------------------------------------------------------------------------------------------
# The run


def main(cfg):
    d, given = setup(cfg.seed, cfg.precision), cfg
    if cfg.loss not in ("dpo", "cdpo", "ipo", "simpo"):
        fail(f"--loss {cfg.loss}: choose dpo, cdpo, ipo or simpo")

    # model
    if Path(cfg.out).resolve() in (Path(cfg.init).resolve(), Path(cfg.reward).resolve()):
        fail(f"--out {cfg.out} would overwrite what the run reads; choose another")
    first = load_checkpoint(cfg.init, "python sft.py")
    checkpoint = load_checkpoint(cfg.out, "python dpo.py", "dpo") if cfg.resume else first
    raw, enc = load_model(checkpoint, d.device, cfg.dropout)
    if not isinstance(raw, GPT):
        fail(f"{cfg.init} is a reward model; give a language model")
    if cfg.lora_rank:
        add_lora(raw, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    if cfg.resume:
        load_adapted(raw, checkpoint)
    ref = Reference(raw, None if cfg.lora_rank else
                    load_model(first, d.device)[0].requires_grad_(False))
    if cfg.learning_rate is None:
        cfg = replace(cfg, learning_rate=1.5e-4 * 192 / raw.config.n_embd)
    pad_id, T = enc._special_tokens[PAD], raw.config.block_size

    # data
    train, held_out = split_by_prompt(load_pairs(cfg.data, enc, T), cfg.val_fraction, cfg.seed)
    if cfg.online:
        judge = load_judge(cfg, enc, T, d)
        train = load_prompts(cfg.prompts, enc, T - cfg.max_new_tokens)
    else:
        reference_logprobs(ref, train, pad_id, cfg, d)
    reference_logprobs(ref, held_out, pad_id, cfg, d)
    if not train:
        fail(f"{' '.join(cfg.data)}: too few prompts to train and validate")
    if cfg.batch_size % d.world_size:
        fail(f"--batch_size {cfg.batch_size} is not a multiple of {d.world_size} ranks")
    max_steps = cfg.max_steps or max(1, int(cfg.epochs * len(train) / cfg.batch_size))
    print0(f"data: {len(train):,} {'prompts' if cfg.online else 'pairs'}, {len(held_out):,} pairs "
           f"held out; {max_steps} steps x {cfg.batch_size}")

    model = raw
    if d.world_size > 1:
        model = DDP(raw, device_ids=[d.local_rank] if d.device.type == "cuda" else None,
                    forward_sync_buffers=False, gradient_as_bucket_view=True)
    optimizers = make_optimizers(raw, "adamw", cfg.learning_rate, cfg.weight_decay,
                                 (cfg.beta1, cfg.beta2))
    n_params = sum(p.numel() for p in raw.parameters() if p.requires_grad)
    print0(f"model: {n_params:,} parameters trained, {cfg.init}; loss {cfg.loss}, beta {cfg.beta}")

    state = dict(step=0, seconds=0.0, history=lineage(first))
    if cfg.resume:
        state = resume_state(checkpoint, optimizers, max_steps, cfg)
    log = Log(cfg.out, state["step"] if cfg.resume else None, given)

    def save():
        if d.is_master:
            save_checkpoint(cfg.out, raw, "dpo", state["step"], enc, cfg, state=state,
                            optimizers=[opt.state_dict() for opt in optimizers])

    started, spent = time.perf_counter() - state["seconds"], []    # spent: since the last line
    for step in range(state["step"], max_steps + 1):
        state.update(step=step, seconds=time.perf_counter() - started)
        last = step == max_steps

        if last or step % cfg.eval_every == 0:
            metrics = validate(raw, held_out, pad_id, cfg, d)
            log(f"step {step:6d} | val " + ", ".join(f"{k.removeprefix('val_')} {v:.4f}"
                                                     for k, v in metrics.items()),
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
        mine = [train[pick(len(train), step * cfg.batch_size + n, cfg.seed)]
                for n in range(d.rank, cfg.batch_size, d.world_size)]
        extra = {}
        if cfg.online:
            mine, reward = sample_pairs(raw, judge, mine, enc, cfg, d, step)
            reference_logprobs(ref, mine, pad_id, cfg, replace(d, rank=0, world_size=1))
            extra["reward"] = sum_over_ranks(torch.tensor(reward), d).item() / d.world_size
        n_pairs = int(sum_over_ranks(torch.tensor(float(len(mine))), d).item())
        sums = torch.zeros(len(NAMES), dtype=torch.float64)
        for at in range(0, max(1, len(mine)), cfg.device_batch_size):
            part = mine[at:at + cfg.device_batch_size]
            if d.world_size > 1:    # exchange gradients once, after the last micro-step
                model.require_backward_grad_sync = at + cfg.device_batch_size >= len(mine)
            if not part:    # a rank whose sampled answers were all equal still takes part
                (model(torch.zeros(1, 2, dtype=torch.long, device=d.device)).sum() * 0).backward()
                continue
            losses, parts = losses_and_metrics(answer_logprobs(model, part, pad_id, d), part, cfg)
            (losses.sum() / n_pairs * d.world_size).backward()    # because DDP averages over ranks
            sums += parts
        values = dict(zip(NAMES, (sum_over_ranks(sums, d) / max(1, n_pairs)).tolist()))
        grad_norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip).item()
        if not math.isfinite(values["loss"] + grad_norm):
            fail(f"step {step}: loss {values['loss']}, gradient norm {grad_norm}; lower "
                 f"--learning_rate. The weights of the last save are in {cfg.out}")
        for opt in optimizers:
            if n_pairs:    # else momentum alone would move the weights
                opt.step()
            opt.zero_grad(set_to_none=True)

        spent.append(time.perf_counter() - step_started)
        values["margin"] = values["reward_chosen"] - values["reward_rejected"]
        line = ""
        if step % cfg.log_every == 0:
            left = (max_steps - step) * sum(spent) / len(spent)
            line = (f"step {step:6d} | loss {values['loss']:.4f} | accuracy "
                    f"{values['accuracy']:.3f} | margin {values['margin']:6.3f} | logps chosen "
                    f"{values['logps_chosen']:7.2f} rejected {values['logps_rejected']:7.2f} | "
                    f"norm {grad_norm:6.3f} | eta {duration(left)}")
            spent = []
        log(line, step=step, **values, **extra, pairs=n_pairs, lr=lr, grad_norm=grad_norm,
            seconds=time.perf_counter() - started)

    print0(f"done: {cfg.out}: {max_steps:,} steps in {duration(state['seconds'])}, "
           f"at most {peak_memory(d)}")
    return metrics


if __name__ == "__main__":
    main(parse_args(Config))
