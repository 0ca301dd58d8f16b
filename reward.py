"""Reward model: learn from pairs of answers which one people prefer, then say if it may guide RL.

In:   out/sft.pt, pairs (data/preferences.jsonl: TRL, HH-RLHF or UltraFeedback style; a row may have
      a "margin" or a "probability" that chosen is better), demonstrations for centring
Out:  out/reward.pt (a model with a scalar head) and out/reward.jsonl (steps, last line the verdict)

    python reward.py                                          # laptop: the embedded data, a minute
    python reward.py --init DIR --data pairs.jsonl --lora_rank 16
    torchrun --standalone --nproc_per_node=8 reward.py --data pairs.jsonl

Loss: -[p ln s(D - m) + (1 - p) ln s(m - D)] + eta (r_chosen + r_rejected)^2 a pair, s the logistic
function, D = r_chosen - r_rejected, margin m (0), probability p (1). The score is read at the
answer's end-of-turn token. One epoch: more overfits. Afterwards the bias is set so that
demonstrations score 0 on average. What to expect: 95 % of the held-out embedded pairs.

References: Bradley & Terry 1952; Stiennon et al. 2020, arXiv 2009.01325 (head, centring); Ouyang et
al. 2022, arXiv 2203.02155 (one epoch); Touvron et al. 2023, arXiv 2307.09288 (margin); Eisenstein
et al. 2023, arXiv 2312.09244 (eta).
Differs from the papers in: pairs are independent rows, not all pairs of one prompt in a batch.
"""
import math
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (GPT, IM_END, PAD, Log, ScalarHead, add_lora, at_last, cosine_lr, duration,
                   encoding_hash, fail, keep_valid, lineage, load_adapted, load_checkpoint,
                   load_model, make_optimizers, pad_batch, parse_args, peak_memory, pick, print0,
                   read_rows, render_reply, resume_state, save_checkpoint, seed_step, setup,
                   sum_over_ranks, to_messages, to_pair, wilson)


@dataclass
class Config:
    init: str = "out/sft.pt"               # checkpoint to start from
    data: list[str] = field(default_factory=lambda: ["data/preferences.jsonl"])  # files of pairs
    out: str = "out/reward.pt"             # checkpoint to write; the log goes beside it
    resume: bool = False                   # go on from the checkpoint at --out
    overwrite: bool = False                # start anew although --out holds steps of another run
    # data
    val_data: list[str] = field(default_factory=list)  # held-out pairs instead of a share of data
    val_fraction: float = 0.15             # share of the prompts held out
    data_fraction: float = 1.0             # share of the other pairs to train on
    demonstrations: list[str] = field(default_factory=lambda: ["data/sft.jsonl"])  # score 0; none
    # model
    dropout: float = 0.0                   # on each block's output, probability
    lora_rank: int = 0                     # rank of the adapters, 0: train all weights
    lora_alpha: float = 16.0               # their scale is alpha / rank
    lora_targets: list[str] = field(default_factory=lambda: ["all"])  # q_proj ... down_proj or all
    # optimization
    eta: float = 0.01                      # weight of (r_chosen + r_rejected)^2
    epochs: float = 1.0                    # times each pair is seen
    max_steps: int | None = None           # optimizer steps instead of epochs
    batch_size: int = 8                    # pairs per step, over all ranks
    device_batch_size: int = 8             # pairs per forward pass and rank
    learning_rate: float | None = None     # peak, of AdamW; derived: 8e-4 * 192 / width
    min_lr: float = 0.1                    # at the end, as a fraction of the peak
    warmup: float = 0.1                    # fraction of the run
    weight_decay: float = 0.0              # on matrices of the blocks, decoupled
    beta1: float = 0.9                     # AdamW
    beta2: float = 0.95                    # AdamW
    grad_clip: float = 1.0                 # largest global gradient norm
    # running
    eval_every: int = 50                   # optimizer steps between validations
    save_every: int = 50                   # optimizer steps between checkpoints
    log_every: int = 10                    # optimizer steps between console lines
    tensorboard: bool = False              # also write event files beside the log
    precision: str = "auto"                # auto, bf16 or fp32 matrix products
    seed: int = 1                          # of the head, data order and split


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


def correlation(x, y):
    """Pearson's r of two lists; 0 where one of them does not vary."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0


# ------------------------------------------------------------------------------------------------
# Data: (prompt, chosen, rejected) as ids


def load_pairs(paths, enc, block_size):
    """Usable pairs as dicts: prompt (key), chosen, rejected (ids), source, margin, probability."""
    def convert(row):
        prompt, chosen, rejected = to_pair(row)
        chosen, rejected = (render_reply(enc, prompt, reply)[0] for reply in (chosen, rejected))
        if max(len(chosen), len(rejected)) > block_size:
            raise ValueError(f"longer than {block_size} tokens")
        margin, probability = float(row.get("margin") or 0), row.get("probability")
        probability = 1.0 if probability is None else float(probability)
        if not (0 <= probability <= 1 and math.isfinite(margin)):
            raise ValueError("margin or probability out of range")
        n_prompt = len(render_reply(enc, prompt, "")[0]) - 1
        if probability < 0.5:    # then the other answer is the one that is preferred
            chosen, rejected, margin, probability = rejected, chosen, -margin, 1 - probability
        return dict(prompt=str(prompt), chosen=chosen, rejected=rejected, n_prompt=n_prompt,
                    source=str(row.get("source", "all")), margin=margin, probability=probability)

    return keep_valid(read_rows(paths), convert, " ".join(paths))


def load_demonstrations(paths, enc, block_size):
    """Up to 1,000 good answers with their prompts, as ids; only the last turn of a talk counts."""
    def convert(row):
        turns = to_messages(row)
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        ids, _ = render_reply(enc, turns[:last], turns[last]["content"])
        if len(ids) > block_size:
            raise ValueError(f"longer than {block_size} tokens")
        return ids

    return keep_valid(read_rows(paths), convert, " ".join(paths))[:1000]


def split_by_prompt(pairs, fraction, seed):
    """(train, held out): no prompt is in both."""
    prompts = sorted({pair["prompt"] for pair in pairs})
    order = np.random.default_rng(seed).permutation(len(prompts))
    held = {prompts[i] for i in order[:max(1, round(fraction * len(prompts)))]}
    return [[p for p in pairs if (p["prompt"] in held) == side] for side in (False, True)]


def score(model, rows, pad_id, d):
    """Scores (B,) of texts (lists of ids), read at the last real token of each."""
    ids, mask = pad_batch(rows, pad_id)
    with d.autocast():
        scores = model(ids.to(d.device))                                            # (B, T)
    return at_last(scores, mask.sum(1).long().to(d.device))


@torch.no_grad()
def score_all(model, rows, pad_id, cfg, d):
    """Scores of any number of texts, as a list in their order; split over ranks."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores = torch.zeros(len(rows), dtype=torch.float64)
    for start in range(d.rank * cfg.device_batch_size, len(rows),
                       d.world_size * cfg.device_batch_size):
        part = order[start:start + cfg.device_batch_size]
        scores[part] = score(model, [rows[i] for i in part], pad_id, d).double().cpu()
    model.train()
    return sum_over_ranks(scores, d).tolist()


def load_judge(cfg, enc, block_size, d):
    """The frozen reward model at cfg.reward, for texts of cfg.init: same tokenizer, same length."""
    judge, judge_enc = load_model(load_checkpoint(cfg.reward, "python reward.py"), d.device)
    if not isinstance(judge, ScalarHead):
        fail(f"{cfg.reward} is not a reward model; make one with: python reward.py")
    if encoding_hash(judge_enc) != encoding_hash(enc):
        fail(f"{cfg.reward} has another tokenizer than {cfg.init}")
    if judge.config.block_size < block_size:
        fail(f"{cfg.reward} reads {judge.config.block_size} tokens, {cfg.init} {block_size}: train "
             f"the reward model from a checkpoint with as many")
    return judge.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------
# The verdict


def validate(model, pairs, pad_id, cfg, d):
    """Loss and accuracy (strictly greater) on held-out pairs, with the scores."""
    scores = score_all(model, [p[k] for p in pairs for k in ("chosen", "rejected")], pad_id, cfg, d)
    chosen, rejected = scores[::2], scores[1::2]
    loss = reward_loss(*(torch.tensor(x) for x in (chosen, rejected)),
                       *(torch.tensor([p[k] for p in pairs]) for k in ("margin", "probability")))
    right = [a > b for a, b in zip(chosen, rejected)]
    return dict(val_loss=loss.mean().item(), val_accuracy=sum(right) / len(right),
                val_margin=float(np.mean(chosen) - np.mean(rejected))), chosen, rejected


def verdict(model, pairs, enc, cfg, d):
    """Everything to know before this model guides RL, as a dict; prints it as a table."""
    pad_id, end = enc._special_tokens[PAD], enc._special_tokens[IM_END]
    metrics, chosen, rejected = validate(model, pairs, pad_id, cfg, d)
    n, right = len(pairs), [a > b for a, b in zip(chosen, rejected)]
    low, high = wilson(sum(right), n)
    lengths = [[len(p[k]) - p["n_prompt"] for p in pairs] for k in ("chosen", "rejected")]
    # the best that a judge who looks at nothing but the length could do on these pairs
    longer, same = (sum(f(a, b) for a, b in zip(*lengths)) for f in
                    ((lambda a, b: a > b), (lambda a, b: a == b)))
    length_only = max(longer, n - longer - same) / n + same / (2 * n)
    by_length = correlation(chosen + rejected, lengths[0] + lengths[1])
    margins = np.array(chosen) - np.array(rejected)

    print0(f"\nverdict on {n} held-out pairs")
    print0(f"  accuracy             {sum(right) / n:6.1%}   "
           f"(95 % interval {low:.1%} to {high:.1%})")
    print0(f"  length-only judge    {length_only:6.1%}")
    print0(f"  score and length     {by_length:6.2f}   (correlation)")
    sources = sorted({p["source"] for p in pairs})
    by_source = {s: float(np.mean([r for r, p in zip(right, pairs) if p["source"] == s]))
                 for s in sources}
    if len(sources) > 1:
        for s in sources:
            count = sum(p["source"] == s for p in pairs)
            print0(f"    {s:<18} {by_source[s]:6.1%}   of {count}")
    print0("  margin r_chosen - r_rejected")
    edges = np.array([-np.inf, -4, -2, -1, 0, 1, 2, 4, np.inf])
    counts = np.histogram(margins, edges)[0]
    for a, b, count in zip(edges, edges[1:], counts):
        print0(f"    {a:5.0f} to {b:4.0f} {count:5d} {'#' * math.ceil(40 * count / n)}")
    print0("  calibration          said    true    pairs")
    confidence, calibration, ece = 1 / (1 + np.exp(-np.abs(margins))), [], 0.0
    for a in (0.5, 0.6, 0.7, 0.8, 0.9):
        inside = (confidence >= a) & (confidence < a + 0.1 + (a == 0.9))
        if inside.any():
            said, true = confidence[inside].mean(), (margins > 0)[inside].mean()
            calibration.append([round(float(said), 4), round(float(true), 4), int(inside.sum())])
            ece += abs(said - true) * inside.mean()
            print0(f"    {a:.0%} to {a + 0.1:4.0%}      {said:8.1%}{true:8.1%} {inside.sum():7d}")

    # texts that must not score well: nothing, half an answer, the answer three times over
    some = pairs[:200]
    prompts = [p["chosen"][:p["n_prompt"]] for p in some]
    bodies = [p["chosen"][p["n_prompt"]:-1] for p in some]
    T = model.config.block_size
    texts = dict(good=[p["chosen"] for p in some],
                 empty=[p + [end] for p in prompts],
                 truncated=[p + b[:max(1, len(b) // 2)] for p, b in zip(prompts, bodies)],
                 repeated=[(p + b + b + b)[:T - 1] + [end] for p, b in zip(prompts, bodies)])
    means = {k: float(np.mean(score_all(model, v, pad_id, cfg, d))) for k, v in texts.items()}
    print0("  mean score           " + ", ".join(f"{k} {v:.2f}" for k, v in means.items()))

    unfit = []
    if low <= max(0.5, length_only):
        unfit.append(f"its accuracy is not clearly above that of length alone ({length_only:.1%})")
    if abs(by_length) > 0.5:
        unfit.append("its score follows the length")
    unfit += [f"{k} answers score better than good ones" for k in ("empty", "truncated", "repeated")
              if means[k] >= means["good"]]
    if unfit:
        print0("  NOT FIT to guide RL: " + "; ".join(unfit))
    else:
        print0("  fit to guide RL, as far as these pairs can tell")
    return dict(metrics, accuracy_low=low, accuracy_high=high, length_only=length_only,
                length_correlation=by_length, ece=float(ece), by_source=by_source,
                calibration=calibration, margins=[int(c) for c in counts], scores=means,
                fit=not unfit)


# ------------------------------------------------------------------------------------------------
# The run


def main(cfg):
    d, given = setup(cfg.seed, cfg.precision), cfg

    # model
    checkpoint = (load_checkpoint(cfg.out, "python reward.py", "reward") if cfg.resume else
                  load_checkpoint(cfg.init, "python sft.py"))
    raw, enc = load_model(checkpoint, d.device, cfg.dropout)
    if isinstance(raw, GPT):
        torch.manual_seed(cfg.seed)
        raw = ScalarHead(raw).to(d.device)
    if cfg.lora_rank:
        add_lora(raw, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    if cfg.resume:
        load_adapted(raw, checkpoint)
    if cfg.learning_rate is None:
        cfg = replace(cfg, learning_rate=8e-4 * 192 / raw.config.n_embd)
    pad_id, T = enc._special_tokens[PAD], raw.config.block_size

    # data
    pairs = load_pairs(cfg.data, enc, T)
    if cfg.val_data:
        train, held_out = pairs, load_pairs(cfg.val_data, enc, T)
    else:
        train, held_out = split_by_prompt(pairs, cfg.val_fraction, cfg.seed)
    train = train[:math.ceil(cfg.data_fraction * len(train))] if cfg.data_fraction < 1 else train
    if len(train) < 2 or cfg.batch_size < d.world_size:
        fail(f"{len(train)} pairs to train on, {cfg.batch_size} a step, {d.world_size} ranks: "
             f"there must be 2 pairs and one a rank")
    shown = [] if cfg.demonstrations == ["none"] else load_demonstrations(
        cfg.demonstrations, enc, T)
    max_steps = cfg.max_steps or max(1, int(cfg.epochs * len(train) / cfg.batch_size))
    print0(f"data: {len(train):,} pairs, {len(held_out):,} held out; {max_steps} steps x "
           f"{cfg.batch_size} pairs")

    model = raw
    if d.world_size > 1:
        model = DDP(raw, device_ids=[d.local_rank] if d.device.type == "cuda" else None,
                    forward_sync_buffers=False, gradient_as_bucket_view=True)
    optimizers = make_optimizers(raw, "adamw", cfg.learning_rate, cfg.weight_decay,
                                 (cfg.beta1, cfg.beta2))
    n_params = sum(p.numel() for p in raw.parameters() if p.requires_grad)
    print0(f"model: {n_params:,} parameters trained, {cfg.init}")

    state = dict(step=0, seconds=0.0, history=lineage(checkpoint))
    if cfg.resume:
        state = resume_state(checkpoint, optimizers, max_steps, cfg)
    log = Log(cfg.out, state["step"] if cfg.resume else None, given)

    def save():
        if d.is_master:
            save_checkpoint(cfg.out, raw, "reward", state["step"], enc, cfg, state=state,
                            optimizers=[opt.state_dict() for opt in optimizers])

    started, spent = time.perf_counter() - state["seconds"], []    # spent: since the last line
    for step in range(state["step"], max_steps + 1):
        state.update(step=step, seconds=time.perf_counter() - started)
        last = step == max_steps

        if last or step % cfg.eval_every == 0:
            metrics, _, _ = validate(raw, held_out, pad_id, cfg, d)
            log(f"step {step:6d} | val " + ", ".join(f"{k.removeprefix('val_')} {v:.4f}"
                                                     for k, v in metrics.items()),
                step=step, **metrics, seconds=state["seconds"])
        if last:
            break
        if step % cfg.save_every == 0:    # also at 0: what cannot be written shows here
            save()

        seed_step(cfg.seed, step, d.rank)    # dropout is the only draw below
        lr = cosine_lr((step + 0.5) / max_steps, cfg.warmup, cfg.learning_rate,
                       cfg.min_lr * cfg.learning_rate)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr

        step_started = time.perf_counter()
        batch = [train[pick(len(train), step * cfg.batch_size + n, cfg.seed)]
                 for n in range(cfg.batch_size)]
        mine = batch[d.rank::d.world_size]
        sums = torch.zeros(4, device=d.device)    # loss, accuracy, margin, score
        for at in range(0, len(mine), cfg.device_batch_size):
            part = mine[at:at + cfg.device_batch_size]
            if d.world_size > 1:    # exchange gradients once, after the last micro-step
                model.require_backward_grad_sync = at + cfg.device_batch_size >= len(mine)
            # both answers in one forward: DDP allows one, and dropout treats them alike
            scores = score(model, [p[k] for k in ("chosen", "rejected") for p in part], pad_id, d)
            chosen, rejected = scores.chunk(2)                                      # (B,) each
            margin, probability = (torch.tensor([p[k] for p in part], device=d.device)
                                   for k in ("margin", "probability"))
            losses = reward_loss(chosen, rejected, margin, probability, cfg.eta)
            loss = losses.sum() / cfg.batch_size
            (loss * d.world_size).backward()    # because DDP averages over ranks
            with torch.no_grad():
                sums += torch.stack([losses.sum(), (chosen > rejected).sum(),
                                     (chosen - rejected).sum(), scores.sum() / 2]) / cfg.batch_size
        loss, accuracy, margin, mean = sum_over_ranks(sums, d).tolist()
        grad_norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip).item()
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; lower --learning_rate. "
                 f"The weights of the last save are in {cfg.out}")
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)

        spent.append(time.perf_counter() - step_started)
        line = ""
        if step % cfg.log_every == 0:
            left = (max_steps - step) * sum(spent) / len(spent)
            line = (f"step {step:6d} | loss {loss:.4f} | accuracy {accuracy:.3f} | margin "
                    f"{margin:6.3f} | lr {lr:.2e} | norm {grad_norm:6.3f} | "
                    f"eta {duration(left)}")
            spent = []
        log(line, step=step, loss=loss, accuracy=accuracy, margin=margin, score=mean, lr=lr,
            grad_norm=grad_norm, seconds=time.perf_counter() - started)

    # centre: demonstrations score 0 on average; the loss cannot see such a shift, RL can
    if shown:
        shift = float(np.mean(score_all(raw, shown, pad_id, cfg, d)))
        if abs(shift) > 1e-3:    # else it is rounding: a finished run that was resumed
            raw.score.bias.data -= shift
        print0(f"centred: {len(shown)} demonstrations score 0 on average")
    else:
        print0("not centred: --demonstrations none")
    save()
    report = verdict(raw, held_out, enc, cfg, d)
    log("", step=step, **report, seconds=time.perf_counter() - started)
    print0(f"done: {cfg.out}: {max_steps:,} steps in {duration(time.perf_counter() - started)}, "
           f"at most {peak_memory(d)}")
    return report


if __name__ == "__main__":
    main(parse_args(Config))
