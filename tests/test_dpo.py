"""Tests of dpo.py, and of the whole chain of stages.

Run: python -m pytest tests/test_dpo.py -q (CPU, no network, seconds).
"""
import math

import pytest
import torch
from common import (CPU, END, ENC, PAD, config, demonstrations, load, log_of, preferences,
                    questions, recorded, same_bits, tiny, weights, write)

import dpo
import prepare
import pretrain
import reward
import rlhf
import sft
from dpo import answer_logprobs, preference_loss
from model import GPT, ScalarHead, load_pairs, load_prompts, nth_of_epochs, split_by_prompt

# The losses


def loss_of(*numbers, n_chosen=1, n_rejected=1, **changes):
    """Of log-probs: chosen, rejected, and of the reference."""
    numbers = (torch.tensor([float(x)]) for x in (*numbers, n_chosen, n_rejected))
    return preference_loss(*numbers, **changes).item()


@pytest.mark.parametrize("changes, expected", [
    ({}, 0.620957), (dict(label_smoothing=0.1), 0.635957), (dict(loss="ipo"), 12.25)])
def test_loss_of_a_pair(changes, expected):
    """Worked values, h = 1.5 and beta 0.1: of sums, so that lengths do not matter."""
    for n_rejected in (1, 5):
        got = loss_of(-10, -12, -11, -11.5, n_rejected=n_rejected, **changes)
        assert got == pytest.approx(expected, abs=1e-5)
    assert loss_of(-12, -10, -11.5, -11) == pytest.approx(0.770957, abs=1e-5)    # -h
    assert loss_of(-10, -12, 0, 0) == pytest.approx(0.598139, abs=1e-5)    # no reference


@pytest.mark.parametrize("beta, gamma, expected", [(2.0, 1.0, 0.913015), (2.5, 1.375, 1.053701)])
def test_simpo(beta, gamma, expected):
    """Worked values: per token, so that lengths do not matter, without a reference."""
    for n, k in ((1, 1), (2, 5)):
        got = loss_of(-0.5 * n, -0.8 * k, 7, 9, n_chosen=n, n_rejected=k, loss="simpo", beta=beta,
                      gamma=gamma)
        assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("start, changes, loss, slope", [
    ((-10.0, -3.0), {}, math.log(2), -0.05),
    ((-10.0, -3.0), dict(label_smoothing=0.1), math.log(2), -0.04),
    ((-10.0, -3.0), dict(loss="ipo"), 25.0, -10.0), ((-9.0, -3.5), {}, 0.620957, -0.046257)])
def test_gradients(start, changes, loss, slope):
    """Where policy and reference agree half of beta up and down, less where a pair is right."""
    logps = torch.tensor([[start[0]], [start[1]]], requires_grad=True)
    reference = torch.tensor([[-10.0], [-3.0]])
    got = preference_loss(*logps, *reference, 4, 2, beta=0.1, **changes)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, abs=1e-5)
    assert logps.grad.flatten().tolist() == pytest.approx([slope, -slope], abs=1e-6)
    with pytest.raises(ValueError, match="unknown loss"):
        loss_of(0, 0, 0, 0, loss="ppo")


# Log-probs of answers


@pytest.fixture
def pairs(files):
    return load_pairs([files["pairs"]], ENC, 96)


@pytest.fixture
def policy(files):
    return load(files["policy"])


def test_log_probs_are_sums_over_the_answer_and_its_end(pairs, policy):
    """By a loop over tokens: none of the prompt, the end-of-turn too, not a mean."""
    got = answer_logprobs(policy, pairs[:5], PAD, CPU)
    for i, pair in enumerate(pairs[:5]):
        for k, name in enumerate(("chosen", "rejected")):
            ids, n = pair[name], pair["n_prompt"]
            nats = policy(torch.tensor([ids]))[0].log_softmax(-1)
            expected = sum(nats[t - 1, ids[t]].item() for t in range(n, len(ids)))
            assert ids[-1] == END and got[k, i].item() == pytest.approx(expected, abs=1e-4)


# The run


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_update_zero(files, pairs, policy, tmp_path, lora_rank):
    """At first the loss is ln 2, rewards are 0, and the gradient beta / 2 of the difference."""
    cfg = config(dpo, files, tmp_path / "a.pt", max_steps=1, device_batch_size=4, nll=0.0,
                 lora_rank=lora_rank)
    (grads,), _ = recorded(dpo.main, cfg)
    row = log_of(cfg.out, "loss")[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert row["accuracy"] == 0    # equal is not right
    names = ("reward_chosen", "reward_rejected", "margin")
    assert [row[k] for k in names] == pytest.approx([0] * 3, abs=1e-5)
    if not lora_rank:
        train, _ = split_by_prompt(pairs, cfg.val_fraction, cfg.seed)
        batch = [train[nth_of_epochs(len(train), n, cfg.seed)] for n in range(6)]
        chosen, rejected = answer_logprobs(policy, batch, PAD, CPU)
        ((rejected - chosen).sum() * 0.05 / 6).backward()
        expected = [p.grad for p in policy.parameters()]
        torch.testing.assert_close(grads, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [
    dict(beta=0.3), dict(label_smoothing=0.2), dict(loss="ipo"), dict(nll=0.3),
    dict(loss="simpo", beta=2.0, gamma=0.7)], ids=str)
def test_settings_reach_the_loss(files, pairs, policy, changes):
    """As by hand from log-probs; --nll adds the mean over the chosen answer's tokens."""
    logps = answer_logprobs(policy, pairs[:4], PAD, CPU).detach()
    ref = 0.9 * logps
    cfg = config(dpo, files, "", **{"nll": 0.0, **changes})
    got, _ = dpo.losses_and_metrics(logps, ref, pairs[:4], cfg)
    n = [torch.tensor([len(pair[name]) - pair["n_prompt"] for pair in pairs[:4]])
         for name in ("chosen", "rejected")]
    nll = changes.pop("nll", 0)
    expected = preference_loss(*logps, *ref, *n, **changes) - nll * logps[0] / n[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_it_learns(files, tmp_path, lora_rank):
    """Held-out pairs come into the right order, against the model at the start: LoRA off."""
    cfg = config(dpo, files, tmp_path / "a.pt", max_steps=20, learning_rate=1e-2,
                 lora_rank=lora_rank)
    assert dpo.main(cfg)["val_accuracy"] == 1 and log_of(cfg.out)[0]["val_accuracy"] == 0
    rows = log_of(cfg.out, "accuracy")
    assert rows[-1]["margin"] > 0.3 and {"logps_chosen", "nll", "grad_norm"} <= rows[-1].keys()


# Online


def sampled(files, policy, judge, step):
    cfg = config(dpo, files, "")
    prompts = load_prompts(cfg.prompts, ENC, 90)[:6]
    numbers = range(6 * step, 6 * step + 6)
    return dpo.sample_pairs(policy, judge, prompts, numbers, ENC, cfg, CPU)[0]


class ByLength(ScalarHead):
    """Scores a text by its length, or by how short it is."""

    def __init__(self, sign):
        super().__init__(tiny())
        self.sign = sign

    def forward(self, ids):
        return self.sign * torch.arange(ids.shape[1]).float().expand(ids.shape)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_better_answer_comes_first_and_unfinished_ones_never_win(files, policy, sign):
    """Chosen is what the judge likes and what ends; each step samples answers of its own."""
    lengths, seen = [], []
    for step in range(6):
        for pair in sampled(files, policy, ByLength(sign), step):
            n, chosen, rejected = pair["n_prompt"], pair["chosen"], pair["rejected"]
            assert chosen[:n] == rejected[:n] and chosen != rejected and chosen[-1] == END
            seen += [tuple(chosen), tuple(rejected)]
            if rejected[-1] == END:
                lengths.append(len(chosen) - len(rejected))
    assert lengths and all(sign * n > 0 for n in lengths) and len(set(seen)) > 0.7 * len(seen)


def test_steps_without_pairs_change_nothing(files, tmp_path, monkeypatch):
    """Where all sampled answers are equal, momentum does not move the weights either."""
    calls, sample_pairs = [], dpo.sample_pairs

    def once(*args):
        pairs, score = sample_pairs(*args)
        calls.append(1)
        return pairs if len(calls) == 1 else [], score
    monkeypatch.setattr(dpo, "sample_pairs", once)
    monkeypatch.setattr(dpo, "cosine_lr", lambda *a: 1e-3)
    for steps in (1, 3):
        calls.clear()
        cfg = config(dpo, files, tmp_path / f"{steps}.pt", online=True, max_steps=steps)
        dpo.main(cfg)
    assert [row["pairs"] > 0 for row in log_of(cfg.out, "pairs")] == [True, False, False]
    one, three = (weights(tmp_path / f"{steps}.pt") for steps in (1, 3))
    assert same_bits(one, three) and not same_bits(one, weights(files["policy"]))


# The whole chain


@pytest.mark.slow
def test_the_whole_chain(tmp_path, quick):
    """Each stage reads what the one before it wrote, from raw text to answers of its own."""
    at = lambda name: str(tmp_path / name)
    (tmp_path / "raw.txt").write_text("\n".join(f"What is {q} It is {a}"
                                                for q, a, _ in questions(200)))
    pairs, shown = preferences(at("pairs.jsonl")), demonstrations(at("shown.jsonl"))
    asked = write(at("prompts.jsonl"), [dict(prompt=q, answer=a) for q, a, _ in questions(24)])
    (tmp_path / "rule.py").write_text(
        "def right(prompts, completions, rows):\n"
        "    return [float(r['answer'] in c) for c, r in zip(completions, rows)]\n")
    few = dict(max_steps=2, precision="fp32", eval_every=100, save_every=100)
    rule = at("rule.py:right")
    prepare.main(prepare.Config(input=[at("raw.txt")], out=at("tokens"), tokenizer="bytes",
                                clean=False, split="tail", val_fraction=0.1))
    pretrain.main(pretrain.Config(data=[at("tokens")], out=at("base.pt"), depth=1, n_embd=32,
                                  n_head=2, block_size=96, total_batch_tokens=384, **few))
    sft.main(sft.Config(init=at("base.pt"), data=[shown], out=at("sft.pt"),
                        replay_data=at("tokens"), **few))
    reward.main(reward.Config(init=at("sft.pt"), data=[pairs], out=at("reward.pt"), **few))
    rl = dict(init=at("sft.pt"), data=[asked], batch_size=8, group_size=4, max_new_tokens=8,
              minibatches=2, gold=rule, **few)
    rlhf.main(rlhf.Config(reward=at("reward.pt"), out=at("ppo.pt"), **rl))
    rlhf.main(rlhf.Config(reward=rule, algo="grpo", out=at("grpo.pt"), **rl))
    dpo.main(dpo.Config(init=at("sft.pt"), data=[pairs], out=at("dpo.pt"), **few))
    dpo.main(dpo.Config(init=at("ppo.pt"), data=[pairs], reward=at("reward.pt"), prompts=[asked],
                        online=True, batch_size=4, max_new_tokens=8, lora_rank=2,
                        out=at("online.pt"), **few))
    for name in ("base", "sft", "reward", "ppo", "grpo", "dpo", "online"):
        model = load(at(f"{name}.pt"))
        assert isinstance(model, ScalarHead if name == "reward" else GPT)
        assert model(torch.arange(40)[None]).isfinite().all() and log_of(at(f"{name}.pt"))
