"""Direct preference optimization: learn from pairs of answers without a reward model in between.

In:   out/sft.pt and pairs (data/preferences.jsonl: TRL, HH-RLHF or UltraFeedback style), or with
      --online the policy's own answers, ranked by out/reward.pt
Out:  out/dpo.pt (one self-contained checkpoint) and out/dpo.jsonl (one JSON line per step)

    python dpo.py                                             # laptop: the embedded data, a minute
    python dpo.py --init DIR --data pairs.jsonl --lora_rank 16
    torchrun --standalone --nproc_per_node=8 dpo.py --data pairs.jsonl

With h = [ln pi(y_w) - ln ref(y_w)] - [ln pi(y_l) - ln ref(y_l)], sums over the tokens of an answer
and its end-of-turn, and label noise e, at least 1 - "probability" of rows that have one:
    dpo     -(1 - e) ln s(beta h) - e ln s(-beta h)             Rafailov et al. 2023, 2305.18290, 7
    ipo     (h - 1 / (2 beta))^2                                Azar et al. 2023, 2310.12036, eq. 17
    simpo   -ln s(beta (ln pi(y_w)/|y_w| - ln pi(y_l)/|y_l|) - gamma)   Meng et al. 2024, 2405.14734
Only differences are trained: both log-probs may fall while the loss does, so both are logged, and
--nll adds -(2 p - 1) ln pi(y_w)/|y_w|, p the "probability" (1), against it. The reference is the
model at --init. Expect 93 % of the held-out embedded pairs in the right order.
Differs from the papers in: AdamW instead of RMSprop; an NLL term by default.
"""
import math
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from model import (IM_END, PAD, Log, adapters_off, add_lora, check_out, collate, complete,
                   cosine_lr, duration, fail, load_judge, load_language_model, load_pairs,
                   load_prompts, make_optimizers, nth_of_epochs, parallel, peak_memory, print0,
                   resume, run, save_checkpoint, score_all, setup, split_by_prompt, sum_over_ranks,
                   token_logprobs)

HELD_OUT = 1024    # pairs to validate on, at most
SHOWN = ("loss", "accuracy", "margin", "logps_chosen", "logps_rejected", "grad_norm")


@dataclass
class Config:
    init: str = "out/sft.pt"               # checkpoint to start from, also the reference
    data: list[str] = field(default_factory=lambda: ["data/preferences.jsonl"])  # files of pairs
    out: str = "out/dpo.pt"                # checkpoint to write; the log goes beside it
    resume: bool = False                   # go on from the checkpoint at --out, if there is one
    overwrite: bool = False                # start anew although --out holds steps of another run
    # data
    val_fraction: float = 0.1              # share of the prompts held out, at least 0, at most 1
    online: bool = False                   # sample both answers anew and rank them by --reward
    reward: str = "out/reward.pt"          # reward model of --online
    prompts: list[str] = field(default_factory=lambda: ["data/prompts.jsonl"])  # of --online
    max_new_tokens: int = 64               # longest sampled answer, tokens, at least 1
    # loss
    loss: Literal["dpo", "ipo", "simpo"] = "dpo"  # see above
    beta: float = 0.1                      # pull to the reference, above 0; simpo: 2 or more
    label_smoothing: float = 0.0           # e of dpo, share of wrong labels, at least 0, at most 1
    gamma: float = 0.5                     # margin of simpo
    nll: float = 1.0                       # weight of -ln pi(y_w) per token, at least 0
    # optimization
    lora_rank: int = 0                     # rank of the adapters, 0: train all weights; at least 0
    epochs: float = 1.0                    # times each pair is seen, above 0
    max_steps: int | None = None           # optimizer steps instead of epochs, at least 1
    batch_size: int = 32                   # pairs per step, over all ranks, at least 1
    device_batch_size: int = 32            # pairs per forward pass and rank, at least 1
    learning_rate: float | None = None     # peak, of AdamW, above 0; derived: 2e-4 * 192 / width
    warmup: float = 0.1                    # fraction of the run, at least 0, at most 1
    grad_clip: float = 1.0                 # largest global gradient norm, above 0
    # running
    eval_every: int = 50                   # optimizer steps between validations, at least 1
    save_every: int = 20                   # optimizer steps between checkpoints, at least 1
    tensorboard: bool = False              # also write event files beside the log
    recompute: bool = False                # activations anew in the backward pass, to save memory
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products
    seed: int = 1                          # of data order and sampling, at least 0


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
        right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
        return (1 - label_smoothing) * right + label_smoothing * wrong
    if loss == "ipo":
        return (h - 1 / (2 * beta)).square()
    if loss == "simpo":
        return -F.logsigmoid(beta * (chosen / n_chosen - rejected / n_rejected) - gamma)
    raise ValueError(f"unknown loss {loss!r}: choose dpo, ipo or simpo")


def answer_logprobs(model, pairs, pad_id, env):
    """(2, B): log-probs of the chosen and the rejected answers, sums over their tokens."""
    rows = []
    for name in ("chosen", "rejected"):
        for pair in pairs:
            n_answer = len(pair[name]) - pair["n_prompt"]
            rows.append([(pair[name], [0] * pair["n_prompt"] + [1] * n_answer)])
    ids, mask, _ = collate(rows, pad_id, env.device)
    with env.autocast():
        logits = model(ids)                                                     # (2B, T, V)
    return (token_logprobs(logits, ids) * mask).sum(1).view(2, -1)


@torch.no_grad()
def reference_logprobs(reference, pairs, pad_id, env):
    """The same (2, B) by the model at --init: a frozen copy, or the policy without its adapters."""
    with adapters_off(reference):
        return answer_logprobs(reference, pairs, pad_id, env)


NAMES = ("loss", "accuracy", "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected",
         "nll")


def losses_and_metrics(logprobs, ref_logprobs, pairs, cfg):
    """(loss (B,) of each pair, its metrics under NAMES summed over B) from log-probs (2, B)."""
    (chosen, rejected), (ref_chosen, ref_rejected) = logprobs, ref_logprobs
    device = chosen.device
    n_prompt = torch.tensor([pair["n_prompt"] for pair in pairs], device=device)
    n_chosen = torch.tensor([len(pair["chosen"]) for pair in pairs], device=device) - n_prompt
    n_rejected = torch.tensor([len(pair["rejected"]) for pair in pairs], device=device) - n_prompt
    # at least 0.5, see load_pairs; sampled pairs have none
    probability = torch.tensor([pair.get("probability", 1.0) for pair in pairs], device=device)
    noise = (1 - probability).clamp(min=cfg.label_smoothing)
    losses = preference_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected,
                             cfg.loss, cfg.beta, noise, cfg.gamma)
    reward_chosen = cfg.beta * (chosen - ref_chosen)
    reward_rejected = cfg.beta * (rejected - ref_rejected)
    nll = -chosen / n_chosen
    metrics = torch.stack([losses, reward_chosen > reward_rejected, reward_chosen, reward_rejected,
                           chosen, rejected, nll]).detach()                     # (7, B)
    return losses + cfg.nll * (2 * probability - 1) * nll, metrics.double().sum(1).cpu()


@torch.no_grad()
def validate(model, reference, pairs, pad_id, cfg, env):
    """The metrics on held-out pairs, over all ranks; the reference's part is kept in the pairs."""
    sums, local = torch.zeros(len(NAMES), dtype=torch.float64), pairs[env.rank::env.world_size]
    for start in range(0, len(local), cfg.device_batch_size):
        part = local[start:start + cfg.device_batch_size]
        if "ref_logprobs" not in part[0]:
            found = reference_logprobs(reference, part, pad_id, env)
            for pair, ref_logprobs in zip(part, found.T):
                pair["ref_logprobs"] = ref_logprobs
        ref_logprobs = torch.stack([pair["ref_logprobs"] for pair in part], dim=1)  # (2, B)
        logprobs = answer_logprobs(model, part, pad_id, env)
        sums += losses_and_metrics(logprobs, ref_logprobs, part, cfg)[1]
    means = sum_over_ranks(sums, env) / len(pairs)
    return {f"val_{name}": mean for name, mean in zip(NAMES, means.tolist())}


# ------------------------------------------------------------------------------------------------
# Online: pairs of the policy's own answers


def sample_pairs(policy, judge, prompts, numbers, enc, cfg, env):
    """(pairs of two sampled answers, the better one by the judge chosen; sum of the scores).

    Pairs of which none is better are left out. numbers: of the prompts in the run, for the seeds.
    """
    end, pad_id = enc._special_tokens[IM_END], enc._special_tokens[PAD]
    asked = [prompt["ids"] for prompt in prompts for _ in range(2)]
    seeds = [cfg.seed * 1_000_003 + 2 * n + i for n in numbers for i in range(2)]
    with env.autocast():
        found = complete(policy, asked, cfg.max_new_tokens, 4 * cfg.device_batch_size, seeds,
                         stop_ids=[end])
    texts = [prompt + answer for prompt, answer in zip(asked, found)]
    scores, pairs = score_all(judge, texts, pad_id, cfg.device_batch_size, env), []
    # an answer that does not end by itself is never the better one
    ranks = [score if text[-1] == end else -math.inf for score, text in zip(scores, texts)]
    for i, prompt in enumerate(prompts):
        best, worst = 2 * i, 2 * i + 1
        if ranks[worst] > ranks[best]:
            best, worst = worst, best
        if texts[best] != texts[worst] and ranks[best] > ranks[worst]:
            pairs.append(dict(chosen=texts[best], rejected=texts[worst],
                              n_prompt=len(prompt["ids"])))
    return pairs, sum(scores, 0.0)


def main(cfg):
    env = setup(cfg.seed, cfg.precision)
    check_out(cfg, "dpo")
    if cfg.label_smoothing and cfg.loss != "dpo":
        fail(f"--label_smoothing is of --loss dpo; leave it out with {cfg.loss}")

    # model
    model, enc = load_language_model(cfg.init, "python sft.py", env.device)
    reference = model
    if cfg.lora_rank:    # the policy without its adapters
        add_lora(model, cfg.lora_rank)
    else:
        reference, _ = load_language_model(cfg.init, "python sft.py", env.device)
    model.recompute = cfg.recompute
    T, pad_id = model.config.block_size, enc._special_tokens[PAD]

    # data
    pairs = load_pairs(cfg.data, enc, T)
    if cfg.loss != "dpo" and any(pair["probability"] < 1 for pair in pairs):
        print0(f"--loss {cfg.loss} knows no soft labels: \"probability\" weighs --nll alone")
    train, held_out = split_by_prompt(pairs, cfg.val_fraction, cfg.seed, HELD_OUT)
    if cfg.online:
        judge = load_judge(cfg.reward, enc, T, env)
        held = {pair["prompt"] for pair in held_out}
        prompts = load_prompts(cfg.prompts, enc, T - cfg.max_new_tokens)
        train = [prompt for prompt in prompts if prompt["prompt"] not in held]
        if not train:
            fail("--online: all of --prompts are of held-out pairs; lower --val_fraction")
    max_steps = cfg.max_steps or max(1, int(cfg.epochs * len(train) / cfg.batch_size))
    learning_rate = cfg.learning_rate or 2e-4 * 192 / model.config.n_embd
    print0(f"data: {len(train):,} {'prompts' if cfg.online else 'pairs'}, {len(held_out):,} pairs "
           f"held out; {max_steps} steps x {cfg.batch_size}")

    wrapped = parallel(model, env)
    optimizers = make_optimizers(model, "adamw", learning_rate)
    state = resume(cfg, model, optimizers, max_steps)
    log = Log(cfg, state["step"], max_steps)

    started = time.perf_counter() - state["seconds"]
    for step in range(state["step"], max_steps + 1):
        state.update(step=step, seconds=time.perf_counter() - started)
        last = step == max_steps

        if last or step % cfg.eval_every == 0:
            metrics = validate(model, reference, held_out, pad_id, cfg, env)
            log(step, metrics, **metrics, seconds=state["seconds"])
        if last or step % cfg.save_every == 0:    # also at 0: what cannot be written shows here
            save_checkpoint(cfg.out, model, "dpo", step, enc, cfg, state, optimizers)
        if last:
            break

        lr = cosine_lr((step + 0.5) / max_steps, cfg.warmup, learning_rate)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr

        numbers = range(step * cfg.batch_size + env.rank, (step + 1) * cfg.batch_size,
                        env.world_size)
        local = [train[nth_of_epochs(len(train), n, cfg.seed)] for n in numbers]
        row = {}
        if cfg.online:
            local, reward = sample_pairs(model, judge, local, numbers, enc, cfg, env)
            row["reward"] = sum_over_ranks(torch.tensor(reward), env).item() / cfg.batch_size / 2
        n_pairs = int(sum_over_ranks(torch.tensor(float(len(local))), env).item())
        sums = torch.zeros(len(NAMES), dtype=torch.float64)
        for start in range(0, max(1, len(local)), cfg.device_batch_size):
            part = local[start:start + cfg.device_batch_size]
            if env.world_size > 1:    # exchange gradients once, after the last pass
                wrapped.require_backward_grad_sync = start + cfg.device_batch_size >= len(local)
            if not part:    # a rank without a pair still takes part
                nothing = torch.zeros(1, 2, dtype=torch.long, device=env.device)
                (wrapped(nothing).sum() * 0).backward()
                continue
            logprobs = answer_logprobs(wrapped, part, pad_id, env)                  # (2, B)
            ref_logprobs = reference_logprobs(reference, part, pad_id, env)
            losses, found = losses_and_metrics(logprobs, ref_logprobs, part, cfg)
            loss = losses.sum() / n_pairs
            (loss * env.world_size).backward()    # because ranks average gradients
            sums += found
        means = dict(zip(NAMES, (sum_over_ranks(sums, env) / max(1, n_pairs)).tolist()))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
        if not math.isfinite(means["loss"] + grad_norm):
            fail(f"step {step}: loss {means['loss']}, gradient norm {grad_norm}; lower "
                 f"--learning_rate. The weights of the last save are in {cfg.out}")
        for opt in optimizers:
            if n_pairs:    # else momentum alone would move the weights
                opt.step()
            opt.zero_grad()

        seconds = time.perf_counter() - started
        margin = means["reward_chosen"] - means["reward_rejected"]
        log(step, SHOWN if step % 5 == 0 else (), **means, **row, margin=margin, pairs=n_pairs,
            lr=lr, grad_norm=grad_norm, seconds=seconds)

    print0(f"done: {cfg.out}: {max_steps:,} steps in {duration(state['seconds'])}, "
           f"at most {peak_memory(env)}")
    return metrics


if __name__ == "__main__":
    run(main, Config)
