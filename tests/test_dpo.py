"""Tests of dpo.py and of the whole chain of stages. Run: python -m pytest tests/test_dpo.py -q"""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import (CPU, END, ENC, PAD, Rule, config, error, load, log_of, on_two_ranks, recorded,
                    same_bits, turn, weights, write)

import dpo
import prepare
import pretrain
import reward
import rlhf
import sft
from dpo import answer_logprobs, preference_loss
from model import GPT, ScalarHead, load_pairs, load_prompts, nth_of_epochs, split_by_prompt


@pytest.mark.parametrize("logps, changes, loss, slope", [
    ((-10, -3, -10, -3), {}, math.log(2), -0.05),
    ((-10, -3, -10, -3), dict(label_smoothing=0.1), math.log(2), -0.04),
    ((-10, -3, -10, -3), dict(loss="ipo"), 25.0, -10.0),
    ((-10, -12, -11, -11.5), {}, 0.620957, -0.046257),
    ((-12, -10, -11.5, -11), {}, 0.770957, -0.053743),
    ((-10, -12, -11, -11.5), dict(label_smoothing=0.1), 0.635957, -0.036257),
    ((-10, -12, -11, -11.5), dict(loss="ipo"), 12.25, -7.0)])
def test_loss_of_a_pair(logps, changes, loss, slope):
    """Worked values and slopes at beta 0.1, h = 0, 1.5 and -1.5: of sums, whatever the lengths."""
    for n_rejected in (1, 5):
        numbers = torch.tensor(logps, dtype=torch.float32, requires_grad=True)
        got = preference_loss(*numbers, 1, n_rejected, beta=0.1, **changes)
        got.backward()
        assert got.item() == pytest.approx(loss, abs=1e-5)
        assert numbers.grad[:2].tolist() == pytest.approx([slope, -slope], abs=1e-6)


@pytest.mark.parametrize("beta, gamma, expected", [(2.0, 1.0, 0.913015), (2.5, 1.375, 1.053701)])
def test_simpo(beta, gamma, expected):
    """Worked values: per token, so that lengths do not matter, without a reference."""
    for n, k in ((1, 1), (2, 5)):
        numbers = torch.tensor([-0.5 * n, -0.8 * k, 7, 9, n, k])
        got = preference_loss(*numbers, loss="simpo", beta=beta, gamma=gamma)
        assert got.item() == pytest.approx(expected, abs=1e-5)


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


def test_update_zero(short, pairs, policy):
    """At first the loss is ln 2, rewards are 0, and the gradient beta / 2 of the difference."""
    cfg = short(dpo, max_steps=1, device_batch_size=4, nll=0.0)
    (grads,), _ = recorded(dpo.main, cfg)
    row = log_of(cfg.out, "loss")[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert row["accuracy"] == 0    # equal is not right
    names = ("reward_chosen", "reward_rejected", "margin")
    assert [row[k] for k in names] == pytest.approx([0] * 3, abs=1e-5)
    train, _ = split_by_prompt(pairs, cfg.val_fraction, cfg.seed)
    batch = [train[nth_of_epochs(len(train), n, cfg.seed)] for n in range(6)]
    chosen, rejected = answer_logprobs(policy, batch, PAD, CPU)
    ((rejected - chosen).sum() * 0.05 / 6).backward()
    expected = [p.grad for p in policy.parameters()]
    torch.testing.assert_close(grads, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("probability, settings, changes, nll", [
    (1, dict(beta=0.3), dict(beta=0.3), 0), (1, dict(nll=0.3), {}, 0.3),
    (1, dict(label_smoothing=0.2), dict(label_smoothing=0.2), 0),
    (1, dict(loss="ipo"), dict(loss="ipo"), 0),
    (1, dict(loss="simpo", gamma=0.7), dict(loss="simpo", gamma=0.7), 0),
    (0.7, dict(nll=1.0, label_smoothing=0.1), dict(label_smoothing=0.3), 0.4)])
def test_settings_reach_the_loss(short, pairs, policy, probability, settings, changes, nll):
    """As by hand from log-probs; --nll adds the mean over the chosen answer's tokens; a pair that
    is right with probability p has noise 1 - p, and 2 p - 1 of the added NLL."""
    pairs = [pair | dict(probability=probability) for pair in pairs[:4]]
    logps = answer_logprobs(policy, pairs, PAD, CPU).detach()
    ref, cfg = 0.9 * logps, short(dpo, **{"nll": 0.0, **settings})
    got, _ = dpo.losses_and_metrics(logps, ref, pairs, cfg)
    n = [torch.tensor([len(pair[name]) - pair["n_prompt"] for pair in pairs])
         for name in ("chosen", "rejected")]
    expected = preference_loss(*logps, *ref, *n, **changes) - nll * logps[0] / n[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_it_learns(short, lora_rank):
    """Held-out pairs come into the right order, against the model at the start: LoRA off."""
    cfg = short(dpo, max_steps=20, learning_rate=1e-2, lora_rank=lora_rank)
    assert dpo.main(cfg)["val_accuracy"] == 1 and log_of(cfg.out)[0]["val_accuracy"] == 0
    rows = log_of(cfg.out, "accuracy")
    assert rows[-1]["margin"] > 0.3 and {"logps_chosen", "nll", "grad_norm"} <= rows[-1].keys()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_better_answer_comes_first_and_unfinished_ones_never_win(short, policy, sign):
    """Chosen is what the judge likes and what ends; each step samples answers of its own."""
    judge, cfg, lengths, seen = Rule(lambda text, _: sign * len(text)), short(dpo), [], []
    prompts = load_prompts(cfg.prompts, ENC, 90)[:6]
    for step in range(6):
        numbers = range(6 * step, 6 * step + 6)
        pairs, _ = dpo.sample_pairs(policy, judge, prompts, numbers, ENC, cfg, CPU)
        for pair in pairs:
            n, chosen, rejected = pair["n_prompt"], pair["chosen"], pair["rejected"]
            assert chosen[:n] == rejected[:n] and chosen != rejected and chosen[-1] == END
            seen += [tuple(chosen), tuple(rejected)]
            if rejected[-1] == END:
                lengths.append(len(chosen) - len(rejected))
    assert lengths and all(sign * n > 0 for n in lengths) and len(set(seen)) > 0.7 * len(seen)


@pytest.mark.slow
def test_a_rank_or_a_step_without_pairs(short, files, tmp_path, monkeypatch):
    """The second rank's answers are all equal: it takes part in the step of the other's pairs. From
    the second step on all are: then momentum does not move the weights either."""
    sample_pairs = dpo.sample_pairs

    def fewer(policy, judge, prompts, numbers, enc, cfg, env):
        if env.rank == 1 or numbers[0] >= cfg.batch_size:
            return [], 0.0
        stride = 2 // env.world_size
        return sample_pairs(policy, judge, prompts[::stride], numbers[::stride], enc, cfg, env)
    monkeypatch.setattr(dpo, "sample_pairs", fewer)
    monkeypatch.setattr(dpo, "cosine_lr", lambda *a: 1e-3)
    one, three, two = (short(dpo, name, online=True) for name in ("one", "three", "two"))
    dpo.main(replace(one, max_steps=1))
    grads, _ = recorded(dpo.main, three)
    (a_grads, a), (_, b) = on_two_ranks(dpo.main, two, tmp_path)
    assert all(map(torch.equal, a, b))
    torch.testing.assert_close(a_grads[0], grads[0], atol=1e-6, rtol=1e-4)
    for cfg in (two, three):
        assert [row["pairs"] > 0 for row in log_of(cfg.out, "pairs")] == [True, False, False]
    assert same_bits(weights(one.out), weights(three.out))
    assert not same_bits(weights(one.out), weights(files["policy"]))


def test_what_is_held_out_is_not_asked_online(short, files, tmp_path, monkeypatch, capsys):
    """A prompt of a held-out pair among --prompts; and labels that ipo cannot use are said."""
    pairs = [dict(prompt=f"{i}?", chosen="yes", rejected="no", probability=0.9) for i in range(8)]
    data, prompts = write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "p.jsonl", pairs)
    asked, sample_pairs = set(), dpo.sample_pairs
    def watched(policy, judge, prompts, *args):
        asked.update(prompt["prompt"] for prompt in prompts)
        return sample_pairs(policy, judge, prompts, *args)
    monkeypatch.setattr(dpo, "sample_pairs", watched)
    cfg = short(dpo, online=True, data=[data], prompts=[prompts], val_fraction=0.5, loss="ipo")
    dpo.main(cfg)
    assert len(asked) == 4 and "ipo knows no soft labels" in capsys.readouterr().out
    held = [row for row in pairs if str([turn("user", row["prompt"])]) not in asked]
    cfg = replace(cfg, prompts=[write(tmp_path / "held.jsonl", held)], overwrite=True)
    assert len(held) == 4 and "held-out pairs" in error(dpo.main, cfg)


@pytest.mark.slow
def test_the_whole_chain(files, tmp_path):
    """Each stage reads what the one before it wrote, from raw text to answers of its own."""
    at = lambda name: str(tmp_path / name)
    Path(at("raw.txt")).write_text("\n".join(f"{i % 7} and {i % 5}." for i in range(400)))
    Path(at("rule.py")).write_text(
        "def right(prompts, completions, rows):\n"
        "    return [float(r['answer'] in c) for c, r in zip(completions, rows)]\n")
    rule, made = at("rule.py:right"), dict(files, base=at("base.pt"), tokens=at("tokens"),
                                           policy=at("sft.pt"), judge=at("reward.pt"))
    prepare.main(prepare.Config(input=[at("raw.txt")], out=at("tokens"), tokenizer="bytes",
                                clean=False, split="tail", val_fraction=0.1))
    for stage, name, changes in (
            (pretrain, "base", dict(block_size=96, total_batch_tokens=384)),
            (sft, "sft", dict(replay=0.1, replay_data=at("tokens"))),
            (reward, "reward", dict(init=at("sft.pt"))), (rlhf, "ppo", dict(gold=rule)),
            (rlhf, "grpo", dict(algo="grpo", reward=rule)), (dpo, "dpo", {}),
            (dpo, "online", dict(init=at("ppo.pt"), online=True, lora_rank=2))):
        stage.main(config(stage, made, at(f"{name}.pt"), **changes))
        model = load(at(f"{name}.pt"))
        assert isinstance(model, ScalarHead if name == "reward" else GPT)
        assert model(torch.arange(40)[None]).isfinite().all() and log_of(at(f"{name}.pt"))
