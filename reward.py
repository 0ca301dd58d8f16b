"""Reward model: learn from pairs of answers which one people prefer, then say if it may guide RL.

In:   out/sft.pt and pairs (data/preferences.jsonl: TRL, HH-RLHF or UltraFeedback style; a row may
      have a "margin" or a "probability" that chosen is better)
Out:  out/reward.pt (a model with a scalar head) and out/reward.jsonl (steps, last line the verdict)

    python reward.py                                          # laptop: the embedded data, a minute
    python reward.py --init DIR --data pairs.jsonl --lora_rank 16
    python reward.py --feedback out/sft.pt --out out/ai.pt    # pairs that a language model judges
    torchrun --standalone --nproc_per_node=8 reward.py --data pairs.jsonl

Loss: -[p ln s(D - m) + (1 - p) ln s(m - D)] + eta (r_chosen + r_rejected)^2 a pair, s the logistic
function, D = r_chosen - r_rejected, margin m (0), probability p (1). The score is read at the
answer's end-of-turn token. eta keeps scores around 0, where RL wants them. One epoch: more
overfits. Expect 93 % of the held-out embedded pairs, and "fit to guide RL".

AI feedback (--feedback JUDGE, any language model): --init answers each of --prompts twice, and the
judge is asked in a chat which answer follows a principle of the constitution better, A or B, in
both orders; the pair's probability is the mean of p(A) and 1 - p(A). The pairs go to a file beside
--out, which dpo.py reads too, and are trained on instead of --data.

References: Bradley & Terry 1952; Stiennon et al. 2020, arXiv 2009.01325 (head); Ouyang et al. 2022,
arXiv 2203.02155 (one epoch); Touvron et al. 2023, arXiv 2307.09288 (margin); Eisenstein et al.
2023, arXiv 2312.09244 (eta); Bai et al. 2022, 2212.08073; Lee et al. 2023, 2309.00267 (feedback).
Differs from the papers in: pairs are independent rows, not all pairs of one prompt in a batch.
"""
import math
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from model import (IM_END, PAD, Log, ScalarHead, add_lora, beside, check_out, complete, cosine_lr,
                   duration, fail, load_function, load_language_model, load_pairs, load_principles,
                   load_prompts, make_optimizers, nth_of_epochs, pad_batch, parallel, peak_memory,
                   print0, render_chat, resume, run, save_checkpoint, score_all, score_texts, setup,
                   share_out, split_by_prompt, sum_over_ranks, wilson, write_rows)

JUDGED = """Principle: {principle}
{conversation}
A: {a}
B: {b}
Which answer follows the principle better, A or B?"""
ONE_SIDED = 0.8    # a judge who prefers one position more often than this is of no use
ANSWER_TOKENS = 64    # longest answer that is judged
HELD_OUT = 512    # pairs to validate on while it trains, at most; the verdict is on all
SHOWN = ("loss", "accuracy", "margin", "score", "lr", "grad_norm")    # on the console


@dataclass
class Config:
    init: str = "out/sft.pt"               # checkpoint or public model to start from
    data: list[str] = field(default_factory=lambda: ["data/preferences.jsonl"])  # files of pairs
    out: str = "out/reward.pt"             # checkpoint to write; the log goes beside it
    resume: bool = False                   # go on from the checkpoint at --out, if there is one
    overwrite: bool = False                # start anew although --out holds steps of another run
    # data
    val_data: list[str] = field(default_factory=list)  # held-out pairs instead of a share of data
    val_fraction: float = 0.15             # share of the prompts held out, at least 0, at most 1
    feedback: str = ""                     # language model that judges sampled answers
    prompts: list[str] = field(default_factory=lambda: ["data/prompts.jsonl"])  # of --feedback
    constitution: str = "data/constitution.txt"  # of --feedback: principles, one a line
    gold: str = "evaluate.py:gold"         # FILE.py:FUNCTION to hold --feedback against, or none
    # optimization
    eta: float = 0.01                      # weight of (r_chosen + r_rejected)^2, at least 0
    lora_rank: int = 0                     # rank of the adapters, 0: train all weights; at least 0
    epochs: float = 1.0                    # times each pair is seen, above 0
    max_steps: int | None = None           # optimizer steps instead of epochs, at least 1
    batch_size: int = 8                    # pairs per step, over all ranks, at least 1
    device_batch_size: int = 8             # pairs per forward pass and rank, at least 1
    learning_rate: float | None = None     # peak, of AdamW, above 0; derived: 8e-4 * 192 / width
    warmup: float = 0.1                    # fraction of the run, at least 0, at most 1
    grad_clip: float = 1.0                 # largest global gradient norm, above 0
    # running
    eval_every: int = 100                  # optimizer steps between validations, at least 1
    save_every: int = 50                   # optimizer steps between checkpoints, at least 1
    tensorboard: bool = False              # also write event files beside the log
    recompute: bool = False                # activations anew in the backward pass, to save memory
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products
    seed: int = 1                          # of the head, data order and split, at least 0


# ------------------------------------------------------------------------------------------------
# The algorithm


def reward_loss(chosen, rejected, margin=0.0, probability=1.0, eta=0.0):
    """Bradley-Terry loss of each pair (B,), nats. chosen, rejected: scores (B,).

    margin: how much better chosen must score (Llama 2, eq. 2). probability: that chosen is better
    (soft label). eta: pulls r_chosen + r_rejected to 0, a shift the rest does not see.
    """
    delta = chosen - rejected - margin
    loss = -probability * F.logsigmoid(delta) - (1 - probability) * F.logsigmoid(-delta)
    return loss + eta * (chosen + rejected).square()


# ------------------------------------------------------------------------------------------------
# AI feedback


def two_answers(policy, prompts, numbers, enc, cfg, env):
    """[(text, text)]: two sampled answers to each of the prompts with these numbers; "" for one
    that does not end by itself."""
    end = enc._special_tokens[IM_END]
    asked = [prompts[n]["ids"] for n in numbers for _ in range(2)]
    seeds = [cfg.seed * 1_000_003 + 2 * n + i for n in numbers for i in range(2)]
    with env.autocast():
        found = complete(policy, asked, ANSWER_TOKENS, 4 * cfg.device_batch_size, seeds,
                         stop_ids=[end])
    whole = [ids[:-1] if ids[-1] == end else [] for ids in found]
    texts = [enc.decode(ids).strip() for ids in whole]
    return list(zip(texts[::2], texts[1::2]))


@torch.no_grad()
def prefers_a(judge, requests, enc, cfg, env):
    """p(A), of A and B, as the judge's first token of its reply to each request (ids)."""
    found, (a, b) = [], (enc.encode_ordinary(letter)[0] for letter in "AB")
    for start in range(0, len(requests), cfg.device_batch_size):
        part = requests[start:start + cfg.device_batch_size]
        ids, mask = pad_batch(part, enc._special_tokens[PAD])
        with env.autocast():
            states = judge.hidden(ids.to(env.device))                               # (B, T, C)
            logits = judge.head(states[range(len(part)), mask.sum(1).long() - 1])   # (B, V)
        found += (logits[:, a].float() - logits[:, b].float()).sigmoid().tolist()
    return found


def feedback(policy, enc, cfg, env):
    """Have answers judged, say what the judge is worth, write the pairs; returns their file."""
    prompts = load_prompts(cfg.prompts, enc, policy.config.block_size - ANSWER_TOKENS)
    judge, judge_enc = load_language_model(cfg.feedback, "python sft.py", env.device)
    gold = None if cfg.gold == "none" else load_function("gold", cfg.gold)
    principles = load_principles(cfg.constitution)

    answers = share_out(lambda numbers: two_answers(policy, prompts, numbers, enc, cfg, env),
                        range(len(prompts)), env)
    asked, rows, requests = [], [], []    # a request for each order of the two answers
    for n, (first, second) in enumerate(answers):
        messages, principle = prompts[n]["messages"], principles[(n + cfg.seed) % len(principles)]
        said = "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
        both = []
        for a, b in ((first, second), (second, first)):
            text = JUDGED.format(principle=principle, conversation=said, a=a, b=b)
            ids, _ = render_chat(judge_enc, [dict(role="user", content=text)], reply=True)
            both.append(ids)
        fits = max(map(len, both)) <= judge.config.block_size
        if first and second and first != second and fits:
            requests += both
            asked.append(prompts[n])
            rows.append(dict(prompt=messages, chosen=first, rejected=second, principle=principle))
    if not rows:
        fail(f"--feedback: no prompt has two different answers that end within {ANSWER_TOKENS} "
             f"tokens and that {cfg.feedback} can compare in {judge.config.block_size} tokens")

    found = share_out(lambda part: prefers_a(judge, part, judge_enc, cfg, env), requests, env)
    p = torch.tensor(found).view(-1, 2)    # p(A): with the first answer as A, and with the second
    first_is_better = torch.stack([p[:, 0], 1 - p[:, 1]], 1)
    votes, letter_a = first_is_better > 0.5, (p > 0.5).float().mean().item()
    consistent = (votes[:, 0] == votes[:, 1]).float().mean().item()
    print0(f"{cfg.feedback} judged {len(rows)} pairs of answers to {len(prompts)} prompts: the "
           f"same in both orders {consistent:.1%}, prefers A in {letter_a:.1%}")
    one_sided = max(letter_a, 1 - letter_a) > ONE_SIDED
    if one_sided:
        print0("USELESS: it goes by the position, and the labels say little")
    probability = first_is_better.mean(1)
    if gold:
        gold_first = torch.tensor(gold(asked, [row["chosen"] for row in rows]))
        ahead = gold_first - torch.tensor(gold(asked, [row["rejected"] for row in rows]))
        told = (ahead > 0) | (ahead < 0)    # the others are equally good, or NaN: not graded
        right = ((probability > 0.5) == (ahead > 0))[told].float().mean().item()
        consistent = (votes[:, 0] == votes[:, 1])[told].float().mean().item()
        if told.any():
            print0(f"of {int(told.sum())} pairs that {cfg.gold} tells apart it agrees on "
                   f"{right:.1%}, the same in both orders {consistent:.1%}")
    source = "position" if one_sided else "feedback"
    for row, better in zip(rows, probability.tolist()):
        row.update(source=source, probability=better)
    return write_rows(beside(cfg.out, ".feedback.jsonl"), rows, env)


# ------------------------------------------------------------------------------------------------
# The verdict


def score_over_ranks(model, texts, pad_id, cfg, env):
    """Scores (N,) of texts, each rank its share."""
    return torch.tensor(share_out(
        lambda part: score_all(model, part, pad_id, cfg.device_batch_size, env), texts, env))


def validate(model, pairs, pad_id, cfg, env):
    """(loss and accuracy (strictly greater) on held-out pairs, scores of chosen, of rejected)"""
    texts = [pair[name] for name in ("chosen", "rejected") for pair in pairs]
    chosen, rejected = score_over_ranks(model, texts, pad_id, cfg, env).chunk(2)    # (N,) each
    margins = torch.tensor([pair["margin"] for pair in pairs])
    probabilities = torch.tensor([pair["probability"] for pair in pairs])
    metrics = dict(val_loss=reward_loss(chosen, rejected, margins, probabilities),
                   val_accuracy=(chosen > rejected).float(), val_margin=chosen - rejected)
    return {name: x.mean().item() for name, x in metrics.items()}, chosen, rejected


def spoiled(pairs, end, block_size):
    """Texts by what was done to good answers: nothing, all cut away, half of it, three in a row."""
    texts = dict(good=[], empty=[], truncated=[], repeated=[])
    for pair in pairs:
        prompt, body = pair["chosen"][:pair["n_prompt"]], pair["chosen"][pair["n_prompt"]:-1]
        texts["good"].append(pair["chosen"])
        texts["empty"].append(prompt + [end])
        texts["truncated"].append(prompt + body[:max(1, len(body) // 2)])
        texts["repeated"].append((prompt + 3 * body)[:block_size - 1] + [end])
    return texts


def verdict(model, pairs, enc, cfg, env):
    """Everything to know before this model guides RL, as a dict."""
    pad_id, end = enc._special_tokens[PAD], enc._special_tokens[IM_END]
    metrics, chosen, rejected = validate(model, pairs, pad_id, cfg, env)
    right = chosen > rejected
    low, high = wilson(right.sum().item(), len(pairs))
    by_source = {}
    for source in sorted({pair["source"] for pair in pairs}):
        of_it = [i for i, pair in enumerate(pairs) if pair["source"] == source]
        by_source[source] = [right[of_it].float().mean().item(), len(of_it)]

    n_prompt = torch.tensor([float(pair["n_prompt"]) for pair in pairs])
    n_chosen = torch.tensor([len(pair["chosen"]) for pair in pairs]) - n_prompt
    n_rejected = torch.tensor([len(pair["rejected"]) for pair in pairs]) - n_prompt
    longer = (n_chosen > n_rejected).float().mean().item()
    shorter = (n_chosen < n_rejected).float().mean().item()
    by_length = max(longer, shorter) + (1 - longer - shorter) / 2    # the best by length alone
    both = torch.stack([torch.cat([chosen, rejected]), torch.cat([n_chosen, n_rejected])])
    follows = torch.corrcoef(both)[0, 1].nan_to_num(0.0).item()    # 0 where one does not vary

    scores = {}
    for name, texts in spoiled(pairs[:200], end, model.config.block_size).items():
        scores[name] = score_over_ranks(model, texts, pad_id, cfg, env).mean().item()
    unfit = [f"{name} answers score better than good ones" for name, score in scores.items()
             if name != "good" and score >= scores["good"]]
    if low <= by_length:
        unfit.append(f"its accuracy is not clearly above that of length alone ({by_length:.1%})")
    if abs(follows) > 0.5:
        unfit.append("its score follows the length")
    return dict(metrics, accuracy_low=low, accuracy_high=high, length_only=by_length,
                length_correlation=follows, by_source=by_source, scores=scores, unfit=unfit)


def print_verdict(found, n):
    print0(f"\nverdict on {n} held-out pairs")
    print0(f"  accuracy             {found['val_accuracy']:6.1%}   (95 % interval "
           f"{found['accuracy_low']:.1%} to {found['accuracy_high']:.1%})")
    print0(f"  length-only judge    {found['length_only']:6.1%}")
    print0(f"  score and length     {found['length_correlation']:6.2f}   (correlation)")
    for source, (accuracy, count) in found["by_source"].items():
        print0(f"    {source:<18} {accuracy:6.1%}   of {count}")
    print0("  mean score           "
           + ", ".join(f"{name} {score:.2f}" for name, score in found["scores"].items()))
    if found["unfit"]:
        print0("  NOT FIT to guide RL: " + "; ".join(found["unfit"]))
    else:
        print0("  fit to guide RL, as far as these pairs can tell")


def main(cfg):
    env = setup(cfg.seed, cfg.precision)
    check_out(cfg, "reward", ".feedback.jsonl" if cfg.feedback else ".jsonl")

    # model, which may answer before it learns to score
    gpt, enc = load_language_model(cfg.init, "python sft.py", env.device)
    data = [feedback(gpt, enc, cfg, env)] if cfg.feedback else cfg.data
    torch.manual_seed(cfg.seed)    # the head does not depend on what came before
    gpt.recompute = cfg.recompute
    model = ScalarHead(gpt).to(env.device)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank)
    T, pad_id = model.config.block_size, enc._special_tokens[PAD]

    # data
    pairs = load_pairs(data, enc, T)
    train, held_out = pairs, cfg.val_data and load_pairs(cfg.val_data, enc, T)
    if not held_out:
        train, held_out = split_by_prompt(pairs, cfg.val_fraction, cfg.seed)
    if cfg.batch_size < env.world_size:
        fail(f"--batch_size {cfg.batch_size}: {env.world_size} ranks need as many pairs")
    max_steps = cfg.max_steps or max(1, int(cfg.epochs * len(train) / cfg.batch_size))
    learning_rate = cfg.learning_rate or 8e-4 * 192 / model.config.n_embd
    print0(f"data: {len(train):,} pairs, {len(held_out):,} held out; {max_steps} steps x "
           f"{cfg.batch_size} pairs")

    wrapped = parallel(model, env)
    optimizers = make_optimizers(model, "adamw", learning_rate)
    state = resume(cfg, model, optimizers, max_steps)
    log = Log(cfg, state["step"], max_steps)

    started = time.perf_counter() - state["seconds"]
    for step in range(state["step"], max_steps + 1):
        state.update(step=step, seconds=time.perf_counter() - started)
        last = step == max_steps

        if last or step % cfg.eval_every == 0:
            some = held_out[::math.ceil(len(held_out) / HELD_OUT)]
            metrics, _, _ = validate(model, some, pad_id, cfg, env)
            log(step, metrics, **metrics, seconds=state["seconds"])
        if last or step % cfg.save_every == 0:    # also at 0: what cannot be written shows here
            save_checkpoint(cfg.out, model, "reward", step, enc, cfg, state, optimizers)
        if last:
            break

        lr = cosine_lr((step + 0.5) / max_steps, cfg.warmup, learning_rate, 0.1 * learning_rate)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr

        numbers = range(step * cfg.batch_size + env.rank, (step + 1) * cfg.batch_size,
                        env.world_size)
        local = [train[nth_of_epochs(len(train), n, cfg.seed)] for n in numbers]
        sums = torch.zeros(4, device=env.device)    # loss, accuracy, margin, score
        for start in range(0, len(local), cfg.device_batch_size):
            part = local[start:start + cfg.device_batch_size]
            if env.world_size > 1:    # exchange gradients once, after the last pass
                wrapped.require_backward_grad_sync = start + cfg.device_batch_size >= len(local)
            # both answers in one forward: DDP allows one
            texts = [pair[name] for name in ("chosen", "rejected") for pair in part]
            scores = score_texts(wrapped, texts, pad_id, env)
            chosen, rejected = scores.chunk(2)                                      # (B,) each
            margins = torch.tensor([pair["margin"] for pair in part], device=env.device)
            probabilities = torch.tensor([pair["probability"] for pair in part], device=env.device)
            losses = reward_loss(chosen, rejected, margins, probabilities, cfg.eta)
            loss = losses.sum() / cfg.batch_size
            (loss * env.world_size).backward()    # because ranks average gradients
            with torch.no_grad():
                sums += torch.stack([losses.sum(), (chosen > rejected).sum(),
                                     (chosen - rejected).sum(), scores.sum() / 2]) / cfg.batch_size
        loss, accuracy, margin, score = sum_over_ranks(sums, env).tolist()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; lower --learning_rate. "
                 f"The weights of the last save are in {cfg.out}")
        for opt in optimizers:
            opt.step()
            opt.zero_grad()

        seconds = time.perf_counter() - started
        log(step, SHOWN if step % 10 == 0 else (), loss=loss, accuracy=accuracy, margin=margin,
            score=score, lr=lr, grad_norm=grad_norm, seconds=seconds)

    found = verdict(model, held_out, enc, cfg, env)
    print_verdict(found, len(held_out))
    log(step, **found, seconds=time.perf_counter() - started)
    print0(f"done: {cfg.out}: {max_steps:,} steps in {duration(time.perf_counter() - started)}, "
           f"at most {peak_memory(env)}")
    return found


if __name__ == "__main__":
    run(main, Config)
