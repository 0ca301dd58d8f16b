"""Reinforcement learning from feedback: sample answers, score them, make the better ones likelier.

In:   out/sft.pt, prompts (data/prompts.jsonl) and a reward: a model (out/reward.pt), or any Python
      function FILE.py:NAME(prompts, completions, rows) -> list of floats, such as
      evaluate.py:verify, the rules that grade rows which say what is right
Out:  out/rlhf.pt (one self-contained checkpoint) and out/rlhf.jsonl (one JSON line per rollout)

    python rlhf.py                                            # laptop: PPO, a minute
    python rlhf.py --algo grpo --reward evaluate.py:verify --data data/sums.jsonl
    torchrun --standalone --nproc_per_node=8 rlhf.py --init DIR --reward my.py:score

PPO    r_t = -kl_coef (ln pi_old - ln ref) + [last token] score
       A_t = sum over l of lambda^l d_(t+l),  d_t = r_t + V_(t+1) - V_t   (GAE, no discount)
       L = reduction of -min(q A, clip(q, 1 - e, 1 + e) A), and the value loss of the critic
GRPO   A = score - mean of its group, the same on every token; no critic; a group whose answers all
       score the same is counted and left out (--advantage std divides A by the group's std, which
       makes as much of small differences as of large ones);
       L = reduction of -min(q A, clip(q) A) + kl_coef * k3,  k3 = e^x - 1 - x, x = ln ref - ln pi
with q = pi / pi_old. The value of a GRPO loss is near 0 while its gradient is not: advantages of a
group cancel, their products with the gradient of ln pi do not.

Watch reward (what is optimised) against gold (--gold, never trained on): when the first rises and
the second falls, the reward model is being fooled. Expect gold to rise from 0.85 to 0.99.
On sums gold is pass@1, and unanswered the share of answers without a number.

References: Schulman et al. 2017, arXiv 1707.06347 (PPO); 2015, 1506.02438 (GAE); Huang et al. 2024,
2403.17031 (details); Shao et al. 2024, 2402.03300 (GRPO); Yu et al. 2025, 2503.14476 (DAPO); Liu et
al. 2025, 2503.20783 (Dr. GRPO).
Differs from the papers in: GRPO does not divide by the std (as Dr. GRPO), so rewards should be of
the order of 1, and averages over all tokens (as DAPO); the score sits on the end-of-turn token
itself; old log-probs are recomputed by the forward of the update, so that the first ratio is 1.
As Huang et al.: an answer that does not end by itself scores --unfinished; no top-k or top-p.
"""
import copy
import math
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from model import (IM_END, PAD, Log, ScalarHead, adapters_off, add_lora, check_out, collate,
                   complete, cosine_lr, duration, fail, load_function, load_judge,
                   load_language_model, load_prompts, load_weights, make_optimizers, nth_of_epochs,
                   parallel, peak_memory, print0, resume, run, save_checkpoint, score_all, setup,
                   split_by_prompt, sum_over_ranks, token_logprobs)

VALUE_CLIP = 0.2    # largest move of a value per rollout, as PPO2 and Huang et al.
HELD_OUT = 256     # prompts to validate on, at most
SHOWN = ("reward", "gold", "kl", "entropy", "length", "stopped", "grad_norm")    # on the console


@dataclass
class Config:
    init: str = "out/sft.pt"               # checkpoint to start from, also the reference
    reward: str = "out/reward.pt"          # reward model or FILE.py:FUNCTION
    gold: str = "evaluate.py:gold"         # FILE.py:FUNCTION to watch and never train on, or none
    data: list[str] = field(default_factory=lambda: ["data/prompts.jsonl"])  # files of prompts
    out: str = "out/rlhf.pt"               # checkpoint to write; the log goes beside it
    resume: bool = False                   # go on from the checkpoint at --out, if there is one
    overwrite: bool = False                # start anew although --out holds steps of another run
    algo: Literal["ppo", "grpo"] = "ppo"   # see above
    val_fraction: float = 0.1              # share of the prompts held out, at least 0, at most 1
    # rollouts
    max_steps: int | None = None           # rollouts, at least 1; derived: 16 of ppo, 24 of grpo
    batch_size: int = 96                   # answers per rollout, over all ranks, at least 1
    group_size: int = 8                    # answers per prompt with grpo, at least 2; ppo takes one
    max_new_tokens: int = 64               # longest answer, tokens, at least 1
    temperature: float = 1.0               # of sampling and of every log-prob, above 0
    unfinished: float = -1.0               # score of an answer that does not end by itself
    # the objective
    kl_coef: float = 0.1                   # pull to the reference, per nat, at least 0
    kl_limit: float = 0.1                  # end a rollout's updates above this approx_kl, above 0
    clip_low: float = 0.2                  # ratio is clipped below 1 - this, at least 0, at most 1
    clip_high: float = 0.2                 # and above 1 + this (DAPO: 0.28), at least 0
    gae_lambda: float = 0.95               # ppo: GAE, at least 0, at most 1
    advantage: Literal["mean", "std"] = "mean"  # grpo: score minus the mean, or that over the std
    reduction: Literal["grpo", "dapo", "dr_grpo"] = "dapo"  # see token_weights
    # optimization
    lora_rank: int = 0                     # rank of the adapters, 0: train all weights; at least 0
    epochs: int = 2                        # passes over each rollout, at least 1
    minibatches: int = 4                   # optimizer steps per pass, at least 1
    device_batch_size: int = 24            # answers per forward pass and rank, at least 1
    learning_rate: float | None = None     # peak, of AdamW, above 0; derived: 6e-5 * 192 / width
    value_learning_rate: float | None = None  # of the critic, above 0; derived: 3e-4 * 192 / width
    grad_clip: float = 1.0                 # largest global gradient norm, above 0
    # running
    eval_every: int = 5                    # rollouts between validations, at least 1
    save_every: int = 20                   # rollouts between checkpoints, at least 1
    tensorboard: bool = False              # also write event files beside the log
    recompute: bool = False                # activations anew in the backward pass, to save memory
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products
    seed: int = 1                          # of prompt order and sampling, at least 0


# ------------------------------------------------------------------------------------------------
# The algorithm. Everything is (B, T), aligned to ids; mask is 1 on the tokens of the answer.


def gae(rewards, values, mask, lam, gamma=1.0):
    """(advantages, returns), both (B, T), 0 where mask is 0. Schulman et al. 2015, eq. 16.

    values[:, t] is the value of the state before token t; behind the last token it is 0. gamma 1:
    no discount, a later token counts as much.
    """
    rewards, values = (torch.where(mask > 0, x, 0.0) for x in (rewards, values))
    advantages, ahead = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    following = F.pad(values[:, 1:], (0, 1))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following[:, t] - values[:, t]
        ahead = (delta + gamma * lam * ahead) * mask[:, t]
        advantages[:, t] = ahead
    return advantages, (advantages + values) * mask


def moments(x, mask, env):
    """(mean, biased variance) of x where mask is 1, over all ranks."""
    def total(y):
        return sum_over_ranks(y.double().sum().cpu(), env).item()

    x, n = torch.where(mask > 0, x, 0.0), max(1.0, total(mask))
    mean = total(x) / n
    return mean, total((x - mean).square() * mask) / n


def whiten(x, mask, env):
    """(x - mean) / std over all tokens of all ranks with mask 1, 0 elsewhere."""
    mean, variance = moments(x, mask, env)
    return (torch.where(mask > 0, x, 0.0) - mean) * (variance + 1e-8) ** -0.5 * mask


def explained_variance(values, returns, mask, env):
    """1 - Var(returns - values) / Var(returns) over mask: 1 perfect, 0 no better than the mean."""
    _, left = moments(returns - values, mask, env)
    return 1 - left / max(1e-8, moments(returns, mask, env)[1])


def group_advantages(scores, group_size, kind="mean", eps=1e-4):
    """Advantages (B,) of answers that come in groups of one prompt each: Shao et al. 2024, 4.1.2.

    kind: "std" divides by the population std of the group (+ eps), "mean" does not (Dr. GRPO).
    Raises ValueError for a group of one: it would never learn anything.
    """
    if group_size < 2:
        raise ValueError("groups need at least 2 answers")
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if kind == "std":
        centred = centred / (groups.std(dim=1, keepdim=True, unbiased=False) + eps)
    return centred.view(-1)


def policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """Clipped surrogate of each token (B, T): -min(q A, clip(q) A). Schulman et al. 2017, eq. 7."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def value_loss(values, old_values, returns, clip):
    """Half the larger squared error of the value and of its clipped self, each token (B, T)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def k3(logprobs, ref_logprobs):
    """Estimate of KL(pi || ref) from samples of pi, each token: never negative. Schulman 2020."""
    x = (ref_logprobs - logprobs).clamp(-40, 40)
    return torch.expm1(x) - x


def token_weights(mask, reduction, n_rows, n_tokens, max_len):
    """Weights (B, T) that turn token losses into the loss; n_rows, n_tokens: of the whole step.

    grpo: mean over the tokens of an answer, then over answers; dapo: mean over all tokens;
    dr_grpo: sum over tokens / (answers * max_len), so that no length is preferred.
    """
    if reduction == "grpo":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / n_rows
    if reduction == "dapo":
        return mask / n_tokens
    if reduction == "dr_grpo":
        return mask / (n_rows * max_len)
    raise ValueError(f"unknown reduction {reduction!r}: choose grpo, dapo or dr_grpo")


# ------------------------------------------------------------------------------------------------
# Rollouts: the same for both algorithms


def rollout(policy, prompts, seeds, judges, enc, cfg, env, temperature):
    """Answer each prompt and score it: dict of ids, mask (B, T), lengths, scores, gold, stopped,
    unanswered (B,), and answers (texts). judges: (reward, gold); gold is NaN where it cannot judge,
    unanswered (has no "#### n") where that is not the form of the right answer."""
    end, pad_id = enc._special_tokens[IM_END], enc._special_tokens[PAD]
    asked = [prompt["ids"] for prompt in prompts]
    with env.autocast():    # without gradients four times as many rows fit
        found = complete(policy, asked, cfg.max_new_tokens, 4 * cfg.device_batch_size, seeds,
                         temperature=temperature, stop_ids=[end])
    rows, texts, answers, stopped, unanswered = [], [], [], [], []
    for prompt, ids in zip(prompts, found):
        texts.append(prompt["ids"] + ids)
        rows.append([(texts[-1], [0] * len(prompt["ids"]) + [1] * len(ids))])
        answers.append(enc.decode([i for i in ids if i != end]))
        stopped.append(ids[-1] == end)
        asks_number = "####" in str(prompt["row"].get("answer"))
        unanswered.append(float("####" not in answers[-1]) if asks_number else math.nan)
    ids, mask, _ = collate(rows, pad_id, env.device)                                # (B, T)
    reward, gold = judges
    if isinstance(reward, ScalarHead):
        scores = score_all(reward, texts, pad_id, cfg.device_batch_size, env)
    else:
        scores = reward(prompts, answers)
    golds = gold(prompts, answers) if gold else [math.nan] * len(prompts)
    scores, golds, stopped, unanswered = (
        torch.tensor(x, device=env.device) for x in (scores, golds, stopped, unanswered))
    return dict(ids=ids, mask=mask, lengths=torch.tensor([len(text) for text in texts]),
                scores=scores.where(stopped, cfg.unfinished), gold=golds * stopped,
                stopped=stopped.float(), unanswered=unanswered, answers=answers)


def take(batch, rows):
    """The (B, T) tensors of these rows, without the columns behind the longest of them."""
    width = int(batch["lengths"][rows].max())
    tensors = {name: x for name, x in batch.items() if name != "answers"}
    return {name: x[rows, :width] for name, x in tensors.items() if x.dim() == 2}


def answer_logprobs(model, part, temperature, env):
    """(log-probs (B, T) of the answers' tokens at the sampling temperature, logits (B, T, V))"""
    with env.autocast():
        logits = model(part["ids"])
    return token_logprobs(logits, part["ids"], temperature) * part["mask"], logits


def entropy(logits, temperature):
    """Of each next token (B, T), float32 nats; row by row, for all logits are large."""
    logps = ((row.float() / temperature).log_softmax(-1) for row in logits)
    return torch.stack([-(logp.exp() * logp).sum(-1) for logp in logps])


def answer_values(critic, part, env):
    """Values (B, T) of the states before the answers' tokens."""
    with env.autocast():
        scores = critic(part["ids"])    # each after its token
    return F.pad(scores[:, :-1], (1, 0)) * part["mask"]


def updated_once(cfg):
    """Is the policy of each forward in the update still that of the rollout?"""
    return cfg.algo == "grpo" and cfg.epochs * cfg.minibatches == 1


@torch.no_grad()
def remember(batch, rows, logprobs, logits, cfg):
    """Write down what the policy of the rollout says: old_logprobs and entropy (B, T)."""
    width = logprobs.shape[1]
    batch["old_logprobs"][rows, :width] = logprobs
    ahead = F.pad(entropy(logits, cfg.temperature)[:, :-1], (1, 0))    # before each token
    batch["entropy"][rows, :width] = ahead * batch["mask"][rows, :width]


@torch.no_grad()
def score_rollout(policy, reference, critic, batch, cfg, env):
    """Add old_logprobs, entropy (see updated_once), ref_logprobs and old_values (B, T)."""
    for name in ("old_logprobs", "ref_logprobs", "entropy", "old_values"):
        batch[name] = torch.zeros_like(batch["mask"])
    for rows in batch["lengths"].argsort().split(cfg.device_batch_size):
        part = take(batch, rows)
        width = part["ids"].shape[1]
        if not updated_once(cfg):
            logprobs, logits = answer_logprobs(policy, part, cfg.temperature, env)
            remember(batch, rows, logprobs, logits, cfg)
        with adapters_off(reference):
            ref_logprobs, _ = answer_logprobs(reference, part, cfg.temperature, env)
        batch["ref_logprobs"][rows, :width] = ref_logprobs
        if critic:
            batch["old_values"][rows, :width] = answer_values(critic, part, env)


def means(values, env):
    """Means of each tensor of a dict over all ranks; NaNs (nothing to judge) do not count."""
    sums = [torch.stack([x.nansum(), (~x.isnan()).sum()]) for x in values.values()]
    sums = sum_over_ranks(torch.stack(sums).double().cpu(), env).tolist()
    return {name: total / n if n else math.nan for name, (total, n) in zip(values, sums)}


def validate(policy, prompts, judges, enc, cfg, env):
    """Greedy answers to held-out prompts: reward, gold, length, share that stop; some shown."""
    local = prompts[env.rank::env.world_size] or prompts[:1]    # one again, which does not count
    batch = rollout(policy, local, [0] * len(local), judges, enc, cfg, env, temperature=0)
    shown = ""
    for prompt, answer, score in list(zip(local, batch["answers"], batch["scores"].tolist()))[:3]:
        shown += f"\n    {prompt['messages'][-1]['content'][-80:]!r} -> {answer!r} ({score:.2f})"
    values = dict(val_reward=batch["scores"], val_gold=batch["gold"],
                  val_length=batch["mask"].sum(1), val_stopped=batch["stopped"],
                  val_unanswered=batch["unanswered"])
    counts = 1.0 if env.rank < len(prompts) else math.nan
    return means({name: x * counts for name, x in values.items()}, env), shown


# ------------------------------------------------------------------------------------------------
# Updates


def minibatches(lengths, step, cfg, env):
    """Rows (indices) of this rank for each optimizer step on a rollout, over all epochs.

    Of neighbouring answers each minibatch gets one: the same ones on any number of ranks.
    """
    rng = np.random.default_rng((cfg.seed, step))
    numbers = np.tile(np.arange(cfg.minibatches), (cfg.batch_size // cfg.minibatches, 1))
    for _ in range(cfg.epochs):
        minibatch_of = torch.from_numpy(rng.permuted(numbers, axis=1)).view(env.world_size, -1)
        for number in range(cfg.minibatches):
            rows = (minibatch_of[env.rank] == number).nonzero()[:, 0]
            yield rows[lengths[rows].argsort()]    # short ones with short ones


NAMES = ("policy_loss", "kl_loss", "value_loss", "approx_kl", "clip_fraction", "ratio")


def backward(policy, critic, batch, minibatch, cfg, env):
    """Gradients of one minibatch (rows), over all ranks; its sums under NAMES, over all ranks."""
    counted = batch["counted"][minibatch]
    counts = torch.stack([counted.sum(), counted.any(1).sum()]).cpu()
    n_tokens, n_rows = sum_over_ranks(counts, env).clamp(min=1).tolist()
    sums = torch.zeros(len(NAMES), dtype=torch.float64)
    for rows in minibatch.split(cfg.device_batch_size):
        if env.world_size > 1:    # exchange gradients once, after the last pass
            for module in filter(None, (policy, critic)):
                module.require_backward_grad_sync = bool(rows[-1] == minibatch[-1])
        part = take(batch, rows)
        logprobs, logits = answer_logprobs(policy, part, cfg.temperature, env)
        if updated_once(cfg):
            remember(batch, rows, logprobs, logits, cfg)
            part = take(batch, rows)
        weights = token_weights(part["counted"], cfg.reduction, n_rows, n_tokens,
                                cfg.max_new_tokens)
        share = part["counted"] / n_tokens
        surrogate = policy_loss(logprobs, part["old_logprobs"], part["advantages"], cfg.clip_low,
                                cfg.clip_high)
        # the losses: the second of two places where the algorithms differ
        penalty, errors = torch.zeros_like(surrogate), torch.zeros_like(surrogate)
        if cfg.algo == "grpo":    # of ppo it is in the rewards
            penalty = cfg.kl_coef * k3(logprobs, part["ref_logprobs"])
        else:
            values = answer_values(critic, part, env)
            errors = value_loss(values, part["old_values"], part["returns"], VALUE_CLIP)
        losses = torch.stack([(weights * surrogate).sum(), (weights * penalty).sum(),
                              (share * errors).sum()])
        loss = losses.sum()
        (loss * env.world_size).backward()    # because ranks average gradients
        with torch.no_grad():
            move = logprobs - part["old_logprobs"]
            ratio = move.exp()
            outside = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
            watched = torch.stack([0.5 * move.square(), outside, ratio])            # (3, B, T)
            sums += torch.cat([losses, (share * watched).sum((1, 2))]).double().cpu()
    return dict(zip(NAMES, sum_over_ranks(sums, env).tolist()))


def main(cfg):
    env = setup(cfg.seed, cfg.precision)
    check_out(cfg, "rlhf")
    group_size = cfg.group_size if cfg.algo == "grpo" else 1
    per_rank = cfg.batch_size // env.world_size
    unit = env.world_size * math.lcm(group_size, cfg.minibatches)
    if cfg.batch_size % unit:
        fail(f"--batch_size {cfg.batch_size} is not a multiple of {unit}, for {env.world_size} "
             f"ranks, {group_size} answers a prompt and {cfg.minibatches} minibatches")

    # models: policy, reward, critic, reference
    model, enc = load_language_model(cfg.init, "python sft.py", env.device)
    T, critic_model = model.config.block_size, None
    if cfg.reward.endswith(".py"):
        fail(f"--reward {cfg.reward}: give FILE.py:FUNCTION")
    if ".py:" in cfg.reward:
        reward = load_function("reward", cfg.reward)
    else:
        reward = load_judge(cfg.reward, enc, T, env)
    gold = None if cfg.gold == "none" else load_function("gold", cfg.gold)
    judges = reward, gold
    if cfg.algo == "ppo":
        if isinstance(reward, ScalarHead):
            critic_model = copy.deepcopy(reward).requires_grad_(True)
        else:
            gpt, _ = load_language_model(cfg.init, "python sft.py", env.device)
            critic_model = ScalarHead(gpt).to(env.device)
        critic_model.gpt.recompute = cfg.recompute
    reference = model
    if cfg.lora_rank:    # the policy without its adapters
        for module in filter(None, (model, critic_model)):
            add_lora(module, cfg.lora_rank)
    else:
        reference, _ = load_language_model(cfg.init, "python sft.py", env.device)
    model.recompute = cfg.recompute

    # data
    prompts = load_prompts(cfg.data, enc, T - cfg.max_new_tokens)
    train, held_out = split_by_prompt(prompts, cfg.val_fraction, cfg.seed, HELD_OUT)
    max_steps = cfg.max_steps or dict(ppo=16, grpo=24)[cfg.algo]
    learning_rate = cfg.learning_rate or 6e-5 * 192 / model.config.n_embd
    value_learning_rate = cfg.value_learning_rate or 3e-4 * 192 / model.config.n_embd
    print0(f"data: {len(train)} prompts, {len(held_out)} held out; {max_steps} rollouts x "
           f"{cfg.batch_size // group_size} prompts x {group_size} answers, {cfg.epochs} epochs x "
           f"{cfg.minibatches} minibatches")

    policy, critic = parallel(model, env), None
    optimizers = make_optimizers(model, "adamw", learning_rate)
    if critic_model:
        critic = parallel(critic_model, env)
        optimizers += make_optimizers(critic_model, "adamw", value_learning_rate)
    state = resume(cfg, model, optimizers, max_steps)
    if critic_weights := state.pop("critic", None):
        load_weights(critic_model, critic_weights)
    log = Log(cfg, state["step"], max_steps)

    started = time.perf_counter() - state["seconds"]
    for step in range(state["step"], max_steps + 1):
        state.update(step=step, seconds=time.perf_counter() - started)
        last = step == max_steps

        if last or step % cfg.eval_every == 0:
            metrics, shown = validate(model, held_out, judges, enc, cfg, env)
            log(step, metrics, shown, **metrics, seconds=state["seconds"])
        if last or step % cfg.save_every == 0:    # also at 0: what cannot be written shows here
            state["critic"] = critic_model.state_dict() if critic else {}
            save_checkpoint(cfg.out, model, "rlhf", step, enc, cfg, state, optimizers)
        if last:
            break

        for opt, peak in zip(optimizers, (learning_rate, value_learning_rate)):
            lr = cosine_lr((step + 0.5) / max_steps, 0.0, peak, 0.1 * peak)
            for group in opt.param_groups:
                group["lr"] = lr

        # rollout: whole groups on one rank; answer n of the run has its own seed
        first = step * cfg.batch_size + env.rank * per_rank
        numbers = range(first, first + per_rank)
        local = [train[nth_of_epochs(len(train), n // group_size, cfg.seed)] for n in numbers]
        seeds = [cfg.seed * 1_000_003 + n for n in numbers]
        batch = rollout(model, local, seeds, judges, enc, cfg, env, cfg.temperature)
        score_rollout(policy, reference, critic, batch, cfg, env)
        mask, scores = batch["mask"], batch["scores"]

        # advantages: the first of two places where the algorithms differ
        row, batch["counted"] = {}, mask    # the tokens that the update learns from
        if cfg.algo == "ppo":
            final = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))    # the last token
            kl = batch["old_logprobs"] - batch["ref_logprobs"]                      # k1, (B, T)
            rewards = (-cfg.kl_coef * kl + final * scores[:, None]) * mask
            advantages, batch["returns"] = gae(rewards, batch["old_values"], mask, cfg.gae_lambda)
            row["explained_variance"] = explained_variance(batch["old_values"], batch["returns"],
                                                           mask, env)
            row["advantage_std"] = moments(advantages, mask, env)[1] ** 0.5
            batch["advantages"] = whiten(advantages, mask, env)
        else:
            per_answer = group_advantages(scores, group_size, cfg.advantage)
            batch["advantages"] = per_answer[:, None] * mask
            least, most = scores.view(-1, group_size).aminmax(dim=1)
            row.update(means(dict(zero_variance=(least == most).float()), env))
            batch["counted"] = mask * (least < most).repeat_interleave(group_size)[:, None]

        # updates
        sums, n_updates, stopped_early = dict.fromkeys(NAMES, 0.0), 0, 0
        for rows in minibatches(batch["lengths"], step, cfg, env):    # flat, over all epochs
            found = backward(policy, critic, batch, rows, cfg, env)
            sums = {name: sums[name] + found[name] for name in NAMES}
            n_updates += found["ratio"] > 0    # others have no token to learn from
            norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.grad_clip).item()
                     for module in (model, critic_model) if module]
            if not math.isfinite(found["approx_kl"] + sum(norms)):
                fail(f"rollout {step}: KL {found['approx_kl']}, gradient norms (policy, critic) "
                     f"{norms}; lower --learning_rate or --value_learning_rate. The weights of the "
                     f"last save are in {cfg.out}")
            stopped_early = int(found["approx_kl"] > cfg.kl_limit)
            for opt in optimizers:
                if not stopped_early and found["ratio"]:    # else only momentum would move weights
                    opt.step()
                opt.zero_grad()
            if stopped_early:
                break

        row.update({name: total / max(1, n_updates) for name, total in sums.items()})
        kl = batch["old_logprobs"] - batch["ref_logprobs"]
        row.update(means(dict(
            reward=scores, gold=batch["gold"], kl=(kl * mask).sum(1),
            k3=k3(batch["old_logprobs"], batch["ref_logprobs"])[mask > 0],
            entropy=batch["entropy"][mask > 0], length=mask.sum(1), stopped=batch["stopped"],
            unanswered=batch["unanswered"]), env))
        row["reward_std"] = moments(scores, torch.ones_like(scores), env)[1] ** 0.5
        seconds = time.perf_counter() - started
        log(step, SHOWN if step % 5 == 0 else (), **row, stopped_early=stopped_early,
            grad_norm=norms[0], lr=optimizers[0].param_groups[0]["lr"], seconds=seconds)

    print0(f"done: {cfg.out}: {max_steps:,} rollouts in {duration(state['seconds'])}, "
           f"at most {peak_memory(env)}")
    return metrics


if __name__ == "__main__":
    run(main, Config)
