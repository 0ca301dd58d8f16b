"""Reinforcement learning from feedback: sample answers, score them, make the better ones likelier.

In:   out/sft.pt, prompts (data/prompts.jsonl) and a reward: a model (out/reward.pt), "verifier"
      (the rules of evaluate.grade on rows that say what is right), or any Python function
      FILE.py:NAME(prompts, completions) -> list of floats
Out:  out/rlhf.pt (one self-contained checkpoint) and out/rlhf.jsonl (one JSON line per rollout)

    python rlhf.py                                            # laptop: PPO, two minutes
    python rlhf.py --algo grpo --reward verifier
    torchrun --standalone --nproc_per_node=8 rlhf.py --init DIR --reward my.py:score

PPO    r_t = -kl_coef (ln pi_old - ln ref) + [last token] score
       A_t = sum over l of (gamma lambda)^l d_(t+l),  d_t = r_t + gamma V_(t+1) - V_t   (GAE)
       L = mean over tokens of -min(q A, clip(q, 1 - e, 1 + e) A) + vf_coef * value loss
GRPO   A = score - mean of its group, the same on every token; no critic; a group whose answers all
       score the same is counted and left out (--advantage std divides A by the group's std, which
       makes as much of small differences as of large ones);
       L = reduction of -min(q A, clip(q) A) + kl_coef * k3,  k3 = e^x - 1 - x, x = ln ref - ln pi
with q = pi / pi_old. The value of a GRPO loss is near 0 while its gradient is not: advantages of a
group cancel, their products with the gradient of ln pi do not.

Watch: reward (what is optimised) against gold (the rules, never trained on unless --reward
verifier): when the first rises and the second falls, the reward model is being fooled.

References: Schulman et al. 2017, arXiv 1707.06347 (PPO); 2015, 1506.02438 (GAE); Ziegler et al.
2019, 1909.08593 (adaptive KL); Huang et al. 2024, 2403.17031 (details); Shao et al. 2024,
2402.03300 (GRPO); Yu et al. 2025, 2503.14476 (DAPO); Liu et al. 2025, 2503.20783 (Dr. GRPO).
Differs from the papers in: GRPO does not divide by the std (as Dr. GRPO), so rewards should be of
the order of 1; the score sits on the end-of-turn token itself; an answer that does not end by
itself scores --unfinished; old log-probs are recomputed by the forward of the update, so that the
first ratio is 1; no top-k or top-p, so that the scored distribution is the sampled one.
"""
import copy
import importlib.util
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from evaluate import grade, rules
from model import (GPT, IM_END, PAD, Log, Reference, ScalarHead, add_lora, cosine_lr, duration,
                   fail, generate, lineage, load_adapted, load_checkpoint, load_model, load_prompts,
                   make_optimizers, pad_batch, parse_args, peak_memory, pick, print0, resume_state,
                   save_checkpoint, seed_step, setup, sum_over_ranks, token_logprobs)
from reward import load_judge, score, split_by_prompt


@dataclass
class Config:
    init: str = "out/sft.pt"               # checkpoint to start from, also the reference
    reward: str = "out/reward.pt"          # reward model, "verifier" or FILE.py:FUNCTION
    data: list[str] = field(default_factory=lambda: ["data/prompts.jsonl"])  # files of prompts
    out: str = "out/rlhf.pt"               # checkpoint to write; the log goes beside it
    resume: bool = False                   # go on from the checkpoint at --out
    overwrite: bool = False                # start anew although --out holds steps of another run
    algo: str = "ppo"                      # ppo or grpo
    val_fraction: float = 0.1              # share of the prompts held out for the monitors
    # rollouts
    max_steps: int | None = None           # rollouts; derived: 12, grpo 24 (of fewer prompts)
    batch_size: int = 96                   # answers per rollout, over all ranks
    group_size: int = 8                    # answers per prompt with grpo; ppo takes one
    max_new_tokens: int = 64               # longest answer, tokens
    temperature: float = 1.0               # of sampling and of every log-prob
    unfinished: float = -1.0               # score of an answer that does not end by itself
    format_bonus: float = 0.1              # verifier: for ending in "#### n", right or wrong
    # the objective
    kl_coef: float = 0.1                   # pull to the reference, per nat
    kl_target: float = 0.0                 # nats per answer at which to hold the KL, 0: fixed coef
    kl_horizon: float = 10_000.0           # answers over which an adaptive kl_coef reacts
    kl_limit: float = 0.1                  # stop the updates of a rollout above this approx_kl
    clip_low: float = 0.2                  # ratio is clipped below 1 - this
    clip_high: float = 0.2                 # ratio is clipped above 1 + this (DAPO: 0.28)
    gamma: float = 1.0                     # ppo: discount per token
    gae_lambda: float = 0.95               # ppo: GAE
    vf_coef: float = 0.1                   # ppo: weight of the value loss
    value_clip: float = 0.2                # ppo: largest move of a value per rollout
    whiten_rewards: bool = False           # ppo: divide rewards by their std
    advantage: str = "mean"                # grpo: mean (score minus it) or std (that over the std)
    reduction: str = "dapo"                # grpo: grpo, dapo or dr_grpo, over tokens and answers
    # model
    lora_rank: int = 0                     # rank of the adapters, 0: train all weights
    lora_alpha: float = 16.0               # their scale is alpha / rank
    lora_targets: list[str] = field(default_factory=lambda: ["all"])  # q_proj ... down_proj or all
    # optimization
    epochs: int = 2                        # passes over each rollout
    minibatches: int = 4                   # optimizer steps per pass
    device_batch_size: int = 24            # answers per forward pass and rank
    learning_rate: float | None = None     # peak, of AdamW; derived: 6e-5 * 192 / width
    value_learning_rate: float | None = None  # ppo: of the critic; derived: 3e-4 * 192 / width
    min_lr: float = 0.1                    # at the end, as a fraction of the peak
    warmup: float = 0.05                   # fraction of the run
    weight_decay: float = 0.0              # on matrices of the blocks, decoupled
    beta1: float = 0.9                     # AdamW
    beta2: float = 0.95                    # AdamW
    grad_clip: float = 1.0                 # largest global gradient norm
    # running
    eval_every: int = 5                    # rollouts between validations
    save_every: int = 20                   # rollouts between checkpoints
    log_every: int = 5                     # rollouts between console lines
    tensorboard: bool = False              # also write event files beside the log
    precision: str = "auto"                # auto, bf16 or fp32 matrix products
    seed: int = 1                          # of prompt order and sampling


# ------------------------------------------------------------------------------------------------
# The algorithm. Everything is (B, T), aligned to ids; mask is 1 on the tokens of the answer.


def gae(rewards, values, mask, gamma, lam):
    """(advantages, returns), both (B, T), 0 where mask is 0. Schulman et al. 2015, eq. 16.

    values[:, t] is the value of the state before token t; behind the last token it is 0.
    """
    rewards, values = (torch.where(mask > 0, x, 0.0) for x in (rewards, values))
    advantages, ahead = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        behind = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(ahead)
        delta = rewards[:, t] + gamma * behind - values[:, t]
        ahead = (delta + gamma * lam * ahead) * mask[:, t]
        advantages[:, t] = ahead
    return advantages, (advantages + values) * mask


def moments(x, mask, d=None):
    """(mean, biased variance) of x where mask is 1, over all ranks."""
    x = torch.where(mask > 0, x, 0.0)

    def total(y):
        y = y.double().sum().cpu()
        return (sum_over_ranks(y, d) if d else y).item()

    n = max(1.0, total(mask))
    mean = total(x) / n
    return mean, total((x - mean).square() * mask) / n


def whiten(x, mask, d=None, shift=True):
    """(x - mean) / std over all tokens of all ranks with mask 1, 0 elsewhere.

    shift=False divides by the std but keeps the mean.
    """
    mean, var = moments(x, mask, d)
    white = (torch.where(mask > 0, x, 0.0) - mean) * (var + 1e-8) ** -0.5
    return (white if shift else white + mean) * mask


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
    return -torch.minimum(ratio * advantages,
                          ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


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


def adapt_kl_coef(kl_coef, kl, target, n, horizon):
    """Ziegler et al. 2019, sec. 2.2: kl and target in nats an answer, n answers in this rollout."""
    return kl_coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


def explained_variance(values, returns, mask, d=None):
    """1 - Var(returns - values) / Var(returns) over mask: 1 perfect, 0 no better than the mean."""
    return 1 - moments(returns - values, mask, d)[1] / max(1e-8, moments(returns, mask, d)[1])


# ------------------------------------------------------------------------------------------------
# Data and rewards


def gradable(row):
    """Does the row say what is right, in a form by which the rules can judge an answer?"""
    try:
        return bool(row.keys() & {"expect", "answer"} and rules(row))
    except (ValueError, TypeError, AttributeError):    # the fields mean something else
        return False


def load_function(spec):
    """The function of FILE.py:NAME."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        fail(f"--reward {spec}: {path or spec} does not exist (a checkpoint, verifier, or "
             f"FILE.py:FUNCTION)")
    spec_ = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(spec_)
    try:
        spec_.loader.exec_module(module)
    except Exception as e:    # the user's own code
        fail(f"--reward {spec}: importing {path} raised {type(e).__name__}: {e}")
    if not callable(getattr(module, name, None)):
        fail(f"--reward {spec}: there is no function {name} in {path}")
    return getattr(module, name)


def make_reward(cfg, enc, block_size, d):
    """(function of (prompts, texts, answers) -> list of floats, reward model or None).

    prompts: dicts of load_prompts; texts: ids of prompt and answer; answers: strings.
    """
    if cfg.reward == "verifier":
        def verify(prompts, texts, answers):
            marks = [(grade(p["row"], a), "####" in str(p["row"].get("answer")))
                     for p, a in zip(prompts, answers)]
            return [m["score"] + cfg.format_bonus * m["format"] * sums for m, sums in marks]
        return verify, None
    if ".py:" in cfg.reward:
        function = load_function(cfg.reward)

        def call(prompts, texts, answers):
            try:
                scores = function([p["messages"] for p in prompts], answers)
                scores = [float(score) for score in scores]
            except (Exception, SystemExit) as e:    # the user's own code
                fail(f"--reward {cfg.reward} raised {type(e).__name__}: {e}")
            if len(scores) != len(answers):
                fail(f"--reward {cfg.reward} returned {len(scores)} numbers for {len(answers)} "
                     f"completions")
            if not all(map(math.isfinite, scores)):
                i = [math.isfinite(score) for score in scores].index(False)
                fail(f"--reward {cfg.reward} returned {scores[i]} for the completion "
                     f"{answers[i][:80]!r}")
            return scores
        return call, None
    judge = load_judge(cfg, enc, block_size, d)

    @torch.no_grad()
    def judged(prompts, texts, answers):
        n, pad_id = cfg.device_batch_size, enc._special_tokens[PAD]
        return [one for at in range(0, len(texts), n)
                for one in score(judge, texts[at:at + n], pad_id, d).tolist()]
    return judged, judge


# ------------------------------------------------------------------------------------------------
# Rollouts: the same for both algorithms


def rollout(policy, prompts, seeds, reward, enc, cfg, d, temperature):
    """Answer each prompt and score it: dict of ids, mask (B, T), scores, gold, stopped (B,), texts.

    gold is NaN where the rules cannot judge.
    """
    end, pad_id = enc._special_tokens[IM_END], enc._special_tokens[PAD]
    answers, by_length = [None] * len(prompts), sorted(range(len(prompts)),
                                                       key=lambda i: len(prompts[i]["ids"]))
    n = 4 * cfg.device_batch_size    # without gradients four times as many rows fit
    for at in range(0, len(prompts), n):
        part = by_length[at:at + n]
        ids, mask = generate(policy, [prompts[i]["ids"] for i in part], cfg.max_new_tokens,
                             temperature, stop_ids=[end], pad_id=pad_id,
                             seeds=[seeds[i] for i in part], dtype=d.dtype)
        for i, row, m in zip(part, ids, mask):
            answers[i] = row[m > 0].tolist()
    texts = [p["ids"] + answer for p, answer in zip(prompts, answers)]
    ids, real = pad_batch(texts, pad_id)
    ids, lengths = ids.to(d.device), real.sum(1).long().to(d.device)
    column = torch.arange(ids.shape[1], device=d.device)
    begins = torch.tensor([len(p["ids"]) for p in prompts], device=d.device)[:, None]
    mask = ((column >= begins) & (column < lengths[:, None])).float()               # (B, T)
    stopped = torch.tensor([answer[-1] == end for answer in answers])
    answers = [enc.decode([i for i in answer if i != end]) for answer in answers]
    scores = torch.tensor(reward(prompts, texts, answers), dtype=torch.float32)
    scores = torch.where(stopped, scores, cfg.unfinished)
    gold = torch.tensor([grade(p["row"], a)["score"] * float(s) if gradable(p["row"]) else math.nan
                         for p, a, s in zip(prompts, answers, stopped)])
    return dict(ids=ids, mask=mask, lengths=lengths, scores=scores.to(d.device), gold=gold,
                stopped=stopped.float(), texts=answers)


def trim(ids, mask):
    """Both without the columns behind the longest answer, and how many those are."""
    width = int(mask.amax(dim=0).nonzero().max()) + 1
    return ids[:, :width], mask[:, :width], ids.shape[1] - width


def answer_logprobs(model, ids, mask, cfg, d):
    """(log-probs (B, T) of the answers' tokens, logits), at the sampling temperature."""
    ids, mask, cut = trim(ids, mask)
    with d.autocast():
        logits = model(ids)                                                     # (B, T, V)
    logits = logits.float() / cfg.temperature
    return F.pad(token_logprobs(logits, ids) * mask, (0, cut)), logits


def answer_values(critic, ids, mask, d):
    """Values (B, T) of the states before the answers' tokens."""
    ids, mask, cut = trim(ids, mask)
    with d.autocast():
        return F.pad(before_token(critic(ids)) * mask, (0, cut))


def before_token(scores):
    """A critic's scores (B, T), each after its token, as values of the states before the tokens."""
    return F.pad(scores[:, :-1], (1, 0))


@torch.no_grad()
def score_rollout(policy, ref, critic, batch, cfg, d):
    """Add old_logprobs, ref_logprobs, entropy and old_values (B, T) to the rollout."""
    for name in ("old_logprobs", "ref_logprobs", "entropy", "old_values"):
        batch[name] = torch.zeros_like(batch["mask"])
    for part in batch["lengths"].argsort().split(cfg.device_batch_size):
        ids, mask = batch["ids"][part], batch["mask"][part]
        batch["old_logprobs"][part], logits = answer_logprobs(policy, ids, mask, cfg, d)
        p = logits[:, :-1].log_softmax(-1)
        width = p.shape[1] + 1
        batch["entropy"][part, 1:width] = -(p.exp() * p).sum(-1) * mask[:, 1:width]
        with ref as frozen:
            batch["ref_logprobs"][part] = answer_logprobs(frozen, ids, mask, cfg, d)[0]
        if critic:
            batch["old_values"][part] = answer_values(critic, ids, mask, d)


def spread(values, d):
    """Means of each tensor of a dict over all ranks; NaNs (nothing to judge) do not count."""
    x = torch.stack([torch.stack([v.nansum(), (~v.isnan()).sum()]).double().cpu()
                     for v in values.values()])
    return {k: a / n if n else math.nan for k, (a, n) in zip(values, sum_over_ranks(x, d).tolist())}


def validate(policy, prompts, reward, enc, cfg, d):
    """Greedy answers to held-out prompts: reward, gold, length, share that stop; some shown."""
    mine = prompts[d.rank::d.world_size]
    batch = rollout(policy, mine, [0] * len(mine), reward, enc, cfg, d, temperature=0)
    values = dict(val_reward=batch["scores"], val_gold=batch["gold"],
                  val_length=batch["mask"].sum(1), val_stopped=batch["stopped"])
    shown = "".join(f"\n    {p['messages'][-1]['content'][-80:]!r} -> {text!r} "
                    f"({score:.2f})" for p, text, score in
                    list(zip(mine, batch["texts"], batch["scores"].tolist()))[:3])
    return spread(values, d), shown


# ------------------------------------------------------------------------------------------------
# The run


def main(cfg):
    d, given = setup(cfg.seed, cfg.precision), cfg
    group_size = cfg.group_size if cfg.algo == "grpo" else 1
    if cfg.algo not in ("ppo", "grpo"):
        fail(f"--algo {cfg.algo}: choose ppo or grpo")
    if cfg.algo == "grpo" and cfg.group_size < 2:
        fail("--group_size 1: an answer alone has nothing to be better than; take 2 or more")
    if cfg.advantage not in ("std", "mean") or cfg.reduction not in ("grpo", "dapo", "dr_grpo"):
        fail("choose --advantage from std, mean and --reduction from grpo, dapo, dr_grpo")
    per_rank = cfg.batch_size // d.world_size
    if (per_rank < 1 or cfg.batch_size % d.world_size or per_rank % group_size
            or per_rank % cfg.minibatches):
        fail(f"--batch_size {cfg.batch_size} over {d.world_size} ranks is not a multiple of "
             f"{group_size} answers a prompt and of {cfg.minibatches} minibatches")
    if cfg.temperature <= 0:
        fail(f"--temperature {cfg.temperature}: exploring needs a temperature above 0")

    # models: policy, reference, reward, critic
    if Path(cfg.out).resolve() in (Path(cfg.init).resolve(), Path(cfg.reward).resolve()):
        fail(f"--out {cfg.out} would overwrite what the run reads; choose another")
    first = load_checkpoint(cfg.init, "python sft.py")
    checkpoint = load_checkpoint(cfg.out, "python rlhf.py", "rlhf") if cfg.resume else first
    raw, enc = load_model(checkpoint, d.device)
    if not isinstance(raw, GPT):
        fail(f"{cfg.init} is a reward model; give a language model")
    reward, judge = make_reward(cfg, enc, raw.config.block_size, d)
    raw_critic = None
    if cfg.algo == "ppo":
        raw_critic = copy.deepcopy(judge).requires_grad_(True) if judge else (
            ScalarHead(load_model(first, d.device)[0]).to(d.device))
    ref = Reference(raw)
    if cfg.lora_rank:
        for model in filter(None, (raw, raw_critic)):
            add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    else:
        ref.frozen = load_model(first, d.device)[0].requires_grad_(False)
    if cfg.resume:
        load_adapted(raw, checkpoint)
        if checkpoint["stage_config"]["algo"] != cfg.algo:
            fail(f"{cfg.out} was made with --algo {checkpoint['stage_config']['algo']}")
        if raw_critic:
            raw_critic.load_state_dict(checkpoint["critic"])
    for model in filter(None, (raw, raw_critic, ref.frozen)):
        model.eval()    # no dropout anywhere: the scored policy is the one that sampled

    ppo, scale = cfg.algo == "ppo", 192 / raw.config.n_embd
    if cfg.max_steps is None:
        cfg = replace(cfg, max_steps=12 if ppo else 24)
    if cfg.learning_rate is None:
        cfg = replace(cfg, learning_rate=6e-5 * scale)
    if cfg.value_learning_rate is None:
        cfg = replace(cfg, value_learning_rate=3e-4 * scale)

    # data
    prompts = load_prompts(cfg.data, enc, raw.config.block_size - cfg.max_new_tokens)
    train, held_out = split_by_prompt(prompts, cfg.val_fraction, cfg.seed)
    if not train:
        fail(f"{' '.join(cfg.data)}: {len(prompts)} prompts are too few to train and validate")
    if cfg.reward == "verifier" and (unclear := [
            p["messages"][-1]["content"] for p in prompts if not gradable(p["row"])]):
        fail(f"--reward verifier: {len(unclear)} rows of {' '.join(cfg.data)} do not say what is "
             f"right (fields expect and answer); the first asks {unclear[0][:60]!r}")

    def wrap(module):
        return DDP(module, device_ids=[d.local_rank] if d.device.type == "cuda" else None,
                   forward_sync_buffers=False) if d.world_size > 1 and module else module

    policy, critic = wrap(raw), wrap(raw_critic)
    optimizers = make_optimizers(raw, "adamw", cfg.learning_rate, cfg.weight_decay,
                                 (cfg.beta1, cfg.beta2))
    if critic:
        optimizers += make_optimizers(raw_critic, "adamw", cfg.value_learning_rate,
                                      cfg.weight_decay, (cfg.beta1, cfg.beta2))
    peaks = [opt.param_groups[0]["lr"] for opt in optimizers]
    n_params = sum(p.numel() for p in raw.parameters() if p.requires_grad)
    print0(f"model: {n_params:,} parameters trained, {cfg.init}; {cfg.algo} on {cfg.reward}")
    print0(f"data: {len(train)} prompts, {len(held_out)} held out; {cfg.max_steps} rollouts x "
           f"{cfg.batch_size // group_size} prompts x {group_size} answers, {cfg.epochs} epochs x "
           f"{cfg.minibatches} minibatches")

    state = dict(step=0, seconds=0.0, kl_coef=cfg.kl_coef, history=lineage(first))
    if cfg.resume:
        state = resume_state(checkpoint, optimizers, cfg.max_steps, cfg)
        if cfg.kl_coef != checkpoint["stage_config"]["kl_coef"]:
            state["kl_coef"] = cfg.kl_coef
    log = Log(cfg.out, state["step"] if cfg.resume else None, given)

    def save():
        if d.is_master:
            critic_weights = dict(critic=raw_critic.state_dict()) if raw_critic else {}
            save_checkpoint(cfg.out, raw, "rlhf", state["step"], enc, cfg, state=state,
                            optimizers=[opt.state_dict() for opt in optimizers], **critic_weights)

    started, spent = time.perf_counter() - state["seconds"], []    # spent: since the last line
    for step in range(state["step"], cfg.max_steps + 1):
        state.update(step=step, seconds=time.perf_counter() - started)
        last = step == cfg.max_steps

        if last or step % cfg.eval_every == 0:
            metrics, shown = validate(raw, held_out, reward, enc, cfg, d)
            log(f"step {step:6d} | val " + ", ".join(f"{k.removeprefix('val_')} {v:.4f}"
                                                     for k, v in metrics.items()) + shown,
                step=step, **metrics, seconds=state["seconds"])
        if last or step % cfg.save_every == 0:    # also at 0: what cannot be written shows here
            save()
        if last:
            break

        seed_step(cfg.seed, step)    # the deal into minibatches is the only draw below
        for opt, peak in zip(optimizers, peaks):
            for group in opt.param_groups:
                group["lr"] = cosine_lr((step + 0.5) / cfg.max_steps, cfg.warmup, peak,
                                        cfg.min_lr * peak)

        # rollout: whole groups on one rank; answer n of the run has its own seed
        step_started = time.perf_counter()
        n_groups = per_rank // group_size
        numbers = [step * cfg.batch_size // group_size + d.rank * n_groups + i
                   for i in range(n_groups)]
        chosen = [train[pick(len(train), n, cfg.seed)] for n in numbers for _ in range(group_size)]
        seeds = [cfg.seed * 1_000_003 + n * group_size + g for n in numbers
                 for g in range(group_size)]
        batch = rollout(raw, chosen, seeds, reward, enc, cfg, d, cfg.temperature)
        score_rollout(policy, ref, critic, batch, cfg, d)
        ids, mask, scores = (batch[k] for k in ("ids", "mask", "scores"))
        kl = batch["old_logprobs"] - batch["ref_logprobs"]                          # k1, (B, T)

        # advantages: the first of two places where the algorithms differ
        values, counted = {}, mask    # counted: the tokens that the update learns from
        if cfg.algo == "ppo":
            final = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))    # the last token
            rewards = (-state["kl_coef"] * kl + final * scores[:, None]) * mask
            if cfg.whiten_rewards:
                rewards = whiten(rewards, mask, d, shift=False)
            advantages, returns = gae(rewards, batch["old_values"], mask, cfg.gamma, cfg.gae_lambda)
            values["explained_variance"] = explained_variance(batch["old_values"], returns,
                                                              mask, d)
            values["advantage_std"] = moments(advantages, mask, d)[1] ** 0.5
            advantages = whiten(advantages, mask, d)
        else:
            per_answer = group_advantages(scores, group_size, cfg.advantage)
            advantages = per_answer[:, None] * mask
            least, most = scores.view(-1, group_size).aminmax(dim=1)
            values.update(spread(dict(zero_variance=(least == most).float()), d))
            counted = mask * (least < most).repeat_interleave(group_size)[:, None]

        # updates
        sums, skipped = torch.zeros(6, dtype=torch.float64), 0    # see names below
        n_updates = 0
        for _ in range(cfg.epochs):
            # of neighbouring answers each minibatch gets one: the same ones on any number of ranks
            deal = torch.rand(cfg.batch_size // cfg.minibatches, cfg.minibatches).argsort(1)
            mine = deal.view(-1)[d.rank * per_rank:(d.rank + 1) * per_rank].to(d.device)
            for number in range(cfg.minibatches):
                rows = (mine == number).nonzero()[:, 0]
                rows = rows[batch["lengths"][rows].argsort()]    # short ones with short ones
                n_tokens, n_rows = sum_over_ranks(torch.stack(
                    [counted[rows].sum(), counted[rows].any(1).sum()]).cpu(), d).tolist()
                approx_kl = 0.0
                for part in rows.split(cfg.device_batch_size):
                    sync = part[-1] == rows[-1]    # exchange gradients once, at the end
                    b = {k: batch[k][part] for k in ("ids", "mask", "old_logprobs",
                                                     "ref_logprobs", "old_values")}
                    if d.world_size > 1:
                        policy.require_backward_grad_sync = bool(sync)
                    logprobs, _ = answer_logprobs(policy, b["ids"], b["mask"], cfg, d)
                    surrogate = policy_loss(logprobs, b["old_logprobs"], advantages[part],
                                            cfg.clip_low, cfg.clip_high)
                    # the loss: the second place where the algorithms differ
                    penalty = torch.zeros_like(surrogate)
                    weights = counted[part] / max(1, n_tokens)
                    if cfg.algo == "grpo":
                        penalty = k3(logprobs, b["ref_logprobs"])
                        weights = token_weights(counted[part], cfg.reduction, max(1, n_rows),
                                                max(1, n_tokens), cfg.max_new_tokens)
                        penalty = state["kl_coef"] * penalty
                    loss = (weights * (surrogate + penalty)).sum()
                    (loss * d.world_size).backward()    # because DDP averages over ranks
                    v_loss = torch.zeros(())
                    if critic:
                        if d.world_size > 1:
                            critic.require_backward_grad_sync = bool(sync)
                        v = answer_values(critic, b["ids"], b["mask"], d)
                        v_loss = (b["mask"] / n_tokens * value_loss(
                            v, b["old_values"], returns[part], cfg.value_clip)).sum()
                        (cfg.vf_coef * v_loss * d.world_size).backward()
                    with torch.no_grad():
                        w, move = counted[part] / max(1, n_tokens), logprobs - b["old_logprobs"]
                        q = move.exp()
                        outside = (q < 1 - cfg.clip_low) | (q > 1 + cfg.clip_high)
                        part_kl = (w * 0.5 * move.square()).sum()
                        approx_kl += part_kl.item()
                        sums += torch.stack([(weights * surrogate).sum(), (weights * penalty).sum(),
                                             v_loss.to(q), part_kl, (w * outside).sum(),
                                             (w * q).sum()]).double().cpu()
                n_updates += 1
                approx_kl = sum_over_ranks(torch.tensor(approx_kl), d).item()
                norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), cfg.grad_clip).item()
                         for m in (raw, raw_critic) if m]
                if not all(map(math.isfinite, (approx_kl, *norms))):
                    fail(f"rollout {step}: gradient norm {norms[0]}, KL {approx_kl}; lower "
                         f"--learning_rate. The weights of the last save are in {cfg.out}")
                stop = approx_kl > cfg.kl_limit > 0
                for opt in optimizers:
                    if n_tokens and not stop:    # else momentum alone would move the weights
                        opt.step()
                    opt.zero_grad(set_to_none=True)
                if stop:
                    break
            else:
                continue
            skipped = 1    # the step that went too far was not taken, nor any after it
            break

        names = ("policy_loss", "kl_loss", "value_loss", "approx_kl", "clip_fraction", "ratio")
        values.update(zip(names, (sum_over_ranks(sums, d) / n_updates).tolist()))
        values.update(spread(dict(
            reward=scores, gold=batch["gold"], kl=(kl * mask).sum(1),
            k3=k3(batch["old_logprobs"], batch["ref_logprobs"])[mask > 0],
            entropy=batch["entropy"][mask > 0], length=mask.sum(1), stopped=batch["stopped"]), d))
        values["reward_std"] = moments(scores, torch.ones_like(scores), d)[1] ** 0.5
        if cfg.kl_target:
            state["kl_coef"] = adapt_kl_coef(state["kl_coef"], values["kl"], cfg.kl_target,
                                             cfg.batch_size, cfg.kl_horizon)
        spent.append(time.perf_counter() - step_started)
        line = ""
        if step % cfg.log_every == 0:
            left = (cfg.max_steps - step) * sum(spent) / len(spent)
            line = (f"step {step:6d} | reward {values['reward']:7.3f} | gold "
                    f"{values['gold']:5.3f} | kl {values['kl']:6.3f} | entropy "
                    f"{values['entropy']:5.3f} | length {values['length']:5.1f} | stopped "
                    f"{values['stopped']:5.1%} | norm {norms[0]:5.2f} | eta {duration(left)}")
            spent = []
        log(line, step=step, **values, kl_coef=state["kl_coef"], stopped_early=skipped,
            grad_norm=norms[0], lr=optimizers[0].param_groups[0]["lr"],
            seconds=time.perf_counter() - started)

    print0(f"done: {cfg.out}: {cfg.max_steps:,} rollouts in {duration(state['seconds'])}, "
           f"at most {peak_memory(d)}")
    return metrics


if __name__ == "__main__":
    main(parse_args(Config))
