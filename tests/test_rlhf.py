"""Tests of rlhf.py. Run: python -m pytest tests/test_rlhf.py -q (CPU, no network, seconds)."""
import json
import math
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from common import (CPU, END, ENC, config, error, judge, load, log_of, recorded, same_bits,
                    save, tiny, turn, weights, write)

import model as m
import rlhf
from model import load_checkpoint, load_judge, load_prompts, render_chat
from rlhf import (answer_logprobs, answer_values, explained_variance, gae, group_advantages, k3,
                  policy_loss, token_weights, value_loss, whiten)

def tensor(*rows):
    return torch.tensor(rows)


@pytest.mark.parametrize("gamma, lam, advantages", [
    (1.0, 0.95, [0.366912, 0.596750, 0.365000, 0.300000]), (1.0, 1.0, [0.43, 0.63, 0.38, 0.30]),
    (1.0, 0.0, [-0.2, 0.25, 0.08, 0.3]), (0.99, 0.95, [0.339626, 0.578019, 0.355150, 0.3])])
def test_gae(gamma, lam, advantages):
    """Worked values; returns are advantages plus values. The prompt before them and the padding
    behind do not leak in, not even NaN."""
    values = tensor([9.0, 0.5, 0.4, 0.6, 0.7, math.nan, math.inf])
    rewards = tensor([9, -0.1, 0.05, -0.02, 1.0, math.nan, 9])
    mask = tensor([0.0, 1, 1, 1, 1, 0, 0])
    a, r = gae(rewards, values, mask, lam, gamma)
    torch.testing.assert_close(a, tensor([0, *advantages, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(r[:, 1:5], (a + values)[:, 1:5], atol=1e-6, rtol=0)
    assert (r[mask == 0] == 0).all()


def test_whitening():
    """By the biased variance, over the tokens of the mask only."""
    a, mask = tensor([0.366912, 0.596750, 0.365, 0.3, 1e9, math.nan]), tensor([1.0, 1, 1, 1, 0, 0])
    expected = tensor([-0.35710, 1.68188, -0.37407, -0.95071, 0, 0])
    torch.testing.assert_close(whiten(a, mask, CPU), expected, atol=2e-5, rtol=0)
    values, returns = tensor([0.5, 1, math.nan, math.inf]), tensor([1.0, 2, math.inf, math.nan])
    assert explained_variance(values, returns, tensor([1.0, 1, 0, 0]), CPU) == 0.75


@pytest.mark.parametrize("scores, std, mean", [
    ([1, 0, 0, 1], [0.9998, -0.9998, -0.9998, 0.9998], [0.5, -0.5, -0.5, 0.5]),
    ([1, 0, 0, 0], [1.73165, *[-0.57722] * 3], [0.75, *[-0.25] * 3]),
    ([2, 0, 1, 1], [1.41401, -1.41401, 0, 0], [1, -1, 0, 0])])
def test_group_advantages(scores, std, mean):
    """Worked values; a second group without a difference stays at 0; a group of one is refused."""
    scores = torch.tensor([*scores, 5, 5, 5, 5], dtype=torch.float32)
    for kind, expected in (("std", std), ("mean", mean)):
        expected = torch.tensor([*expected, 0, 0, 0, 0], dtype=torch.float32)
        torch.testing.assert_close(group_advantages(scores, 4, kind), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(scores, 1)


@pytest.mark.parametrize("advantage, ratio, high, loss, learns", [
    (1, 1.5, 0.2, -1.2, False), (1, 0.5, 0.2, -0.5, True), (-1, 1.5, 0.2, 1.5, True),
    (-1, 0.5, 0.2, 0.8, False), (1, 1, 0.2, -1, True), (1, 1.27, 0.28, -1.27, True),
    (1, 1.5, 0.28, -1.28, False)])
def test_policy_loss(advantage, ratio, high, loss, learns):
    """Clipped where the policy has moved far enough, never where it moved wrongly; clip higher."""
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    advantages = torch.tensor([float(advantage)])
    got = policy_loss(logprobs, torch.zeros(1), advantages, 0.2, high)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, abs=1e-6) and (logprobs.grad.item() != 0) == learns


@pytest.mark.parametrize("value, target, loss", [(1.0, 0.6, 0.08), (1.0, 2.0, 0.845),
                                                 (0.6, 0.9, 0.045)])
def test_value_loss(value, target, loss):
    """Half the larger squared error, of the value and of that within 0.2 of the old one."""
    got = value_loss(torch.tensor([value]), torch.tensor([0.5]), torch.tensor([target]), 0.2)
    assert got.item() == pytest.approx(loss, abs=1e-6)


def test_k3():
    """Worked values; its mean is the KL, its gradient that of KL(ref || pi); never negative."""
    x, ref = torch.tensor([-1.0, -1.5, -2.0]), torch.tensor([-1.5, -1.0, -2.0])
    assert k3(x, ref).tolist() == pytest.approx([0.106531, 0.148721, 0.0], abs=1e-6)
    logits = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    logp, ref = logits.log_softmax(0), torch.tensor([0.4, 0.4, 0.2]).log()
    loss = (logp.exp().detach() * k3(logp, ref)).sum()
    assert loss.item() == pytest.approx((logp.exp() * (logp - ref)).sum().item(), abs=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([0.1, -0.1, 0.0]), atol=1e-6, rtol=0)
    x, y = torch.randn(2, 100_000) * 3
    assert k3(x, y).min() >= 0 and k3(x, x).max() == 0
    assert k3(torch.tensor([-200.0, 200.0]), torch.zeros(2)).isfinite().all()


@pytest.mark.parametrize("reduction, loss, weights", [
    ("grpo", 0.0, (1 / 4, 1 / 12)), ("dapo", 0.5, (1 / 8, 1 / 8)),
    ("dr_grpo", 0.25, (1 / 16, 1 / 16))])
def test_reductions_on_answers_of_unequal_length(reduction, loss, weights):
    """Two and six tokens, by hand; an empty row weighs 0."""
    mask = torch.zeros(2, 8)
    mask[0, :2], mask[1, :6] = 1, 1
    got = token_weights(mask, reduction, n_rows=2, n_tokens=8, max_len=8)
    assert (got[0, 0].item(), got[1, 0].item()) == pytest.approx(weights)
    assert (got[mask == 0] == 0).all()
    zeros = torch.zeros(2, 8)
    surrogate = policy_loss(zeros, zeros, tensor([1.0], [-1.0]), 0.2, 0.2)
    assert (got * surrogate).sum().item() == pytest.approx(loss, abs=1e-6)
    assert token_weights(torch.zeros(1, 8), reduction, 2, 8, 8).tolist() == [[0] * 8]


@pytest.mark.parametrize("temperature, expected", [(1.0, [-0.40761, -1.40761, -2.40761]),
                                                   (0.7, [-0.26012, -1.68869, -3.11726])])
def test_log_probs_are_those_of_the_sampling_temperature(temperature, expected):
    """Samples are scored by the distribution that they come from."""
    model = lambda ids: torch.tensor([2.0, 1.0, 0.0]).expand(*ids.shape, 3)
    part = dict(ids=tensor([0, 0, 1, 2]), mask=tensor([0.0, 1, 1, 1]))
    got, _ = answer_logprobs(model, part, temperature, CPU)
    torch.testing.assert_close(got, tensor([0, *expected]), atol=1e-5, rtol=0)


def test_the_critic_judges_the_state_before_each_token():
    """A value does not know the token that it is the baseline of."""
    critic, ids, mask = judge(), torch.randint(0, 256, (1, 10)), torch.ones(1, 10)
    other = ids.clone()
    other[0, 6] += 1
    a, b = (answer_values(critic, dict(ids=x, mask=mask), CPU) for x in (ids, other))
    assert torch.equal(a[0, :7], b[0, :7]) and not torch.equal(a[0, 7:], b[0, 7:])
    torch.testing.assert_close(a[0, 1:], critic(ids)[0, :-1])


def roll(files, reward="", gold="", n=8, **changes):
    cfg = config(rlhf, files, "", **changes)
    policy, prompts = load(files["policy"]), load_prompts(cfg.data, ENC, 80)[:n]
    judges = [m.load_function("gold", spec) if spec else None for spec in (reward, gold)]
    judges[0] = judges[0] or load_judge(files["judge"], ENC, 96, CPU)
    batch = rlhf.rollout(policy, prompts, list(range(n)), judges, ENC, cfg, CPU, 1.0)
    return batch, prompts, policy


def test_rollouts_keep_the_end_and_score_only_what_ended(files, function):
    """The end token is in the mask and has a gradient; an answer without one is --unfinished."""
    reward = function("return [5.0] * len(prompts)")
    gold = function("return [float('nan') if c[:1] == 'b' else 2 for c in completions]")
    batch, prompts, policy = roll(files, reward, gold, n=24)
    assert 0 < batch["stopped"].sum() < 24
    for i, prompt in enumerate(prompts):
        ids, mask, n = batch["ids"][i], batch["mask"][i], len(prompt["ids"])
        said, stopped = ids[mask > 0].tolist(), bool(batch["stopped"][i])
        assert ids[:n].tolist() == prompt["ids"] and mask[:n].sum() == 0
        assert (said[-1] == END) == stopped and END not in said[:-1]
        assert len(said) <= 6 and (stopped or len(said) == 6)
        assert batch["scores"][i] == (5 if stopped else -1)
        assert batch["lengths"][i] == n + len(said)
        answer = ENC.decode([i for i in said if i != END])
        assert batch["answers"][i] == answer
        gold = batch["gold"][i].item()
        assert math.isnan(gold) if answer[:1] == "b" else gold == 2 * stopped
    logits = policy(batch["ids"]).detach().requires_grad_()
    answer_logprobs(lambda ids: logits, batch, 1.0, CPU)[0].sum().backward()
    trained = logits.grad.abs().sum(-1) > 0    # column t predicts token t + 1
    assert torch.equal(trained[:, :-1], batch["mask"][:, 1:] > 0)


def test_sums_without_an_answer_are_counted(files, function, tmp_path, monkeypatch):
    """Where the right answer is a number "#### n", an answer that gives none is unanswered."""
    rows = [dict(prompt="1 plus 1?", answer="#### 2"), dict(prompt="Who?", answer="Ada")] * 2
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = iter([b"So 2.", b"Ada", b"So #### 3", b"Ada"])
    monkeypatch.setattr(rlhf, "complete", lambda *_, **__: [[*next(said), END] for _ in range(4)])
    batch, _, _ = roll(files, function("return [1.0] * 4"), data=[str(tmp_path / "sums.jsonl")])
    assert str(batch["unanswered"].tolist()) == "[1.0, nan, 0.0, nan]"


def test_the_reward_model_is_read_at_the_end(files):
    """Scores are those of each text alone."""
    model, (batch, _, _) = load(files["judge"]), roll(files)
    for ids, n, stopped, got in zip(*(batch[k] for k in ("ids", "lengths", "stopped", "scores"))):
        expected = model(ids[None, :n])[0, -1].item() if stopped else -1.0
        assert got.item() == pytest.approx(expected, abs=1e-5)


def test_what_a_reward_function_is_given(short, files, function, tmp_path):
    """Messages, answers and whole rows, in one order; gold is logged and trains nothing."""
    body = "return [float(p[-1]['content'] == r['prompt'] and c == c.strip()) " \
           "for p, c, r in zip(prompts, completions, rows)]"
    batch, _, _ = roll(files, function(body), unfinished=1.0)
    assert batch["scores"].tolist() == [1.0] * 8
    for name, gold in (("a", 0.5), ("b", 9.0)):
        cfg = short(rlhf, name, gold=function(f"return [{gold}] * len(rows)"))
        rlhf.main(cfg)
        assert log_of(cfg.out, "gold")[0]["gold"] > 0
    assert same_bits(weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt"))


def test_a_reward_file_is_a_module(tmp_path, monkeypatch):
    """It imports what lies beside it and may hold a dataclass; it may not be called random.py."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "beside_it.py").write_text("bonus: int = 2")
    for name in ("graded", "random"):
        (tmp_path / f"{name}.py").write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "import beside_it\n@dataclass\nclass Score:\n    points: float\n"
            "def score(prompts, completions, rows):\n    return [Score(beside_it.bonus).points]\n")
    score = m.load_function("reward", f"{tmp_path}/graded.py:score")
    assert score([dict(messages=[], row={})], ["Yo."]) == [2]
    assert pickle.loads(pickle.dumps(sys.modules["graded"].score))    # for pools of processes
    assert "rename the file" in error(m.load_function, "gold", f"{tmp_path}/random.py:score")


@pytest.mark.parametrize("body, word", [
    ("return 1 / 0", "ZeroDivisionError"), ("return None", "TypeError"),
    ("return [float('nan')] * len(prompts)", "returned nan for the completion"),
    ("return [1.0]", "returned 1 numbers for"), ("raise SystemExit(3)", "SystemExit")])
def test_a_bad_reward_function_ends_the_run_in_one_line(short, function, tmp_path, body, word):
    """What it raised or returned is said; nothing is written."""
    assert word in error(rlhf.main, short(rlhf, reward=function(body)))
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".pt", ".tmp")]


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_update_zero(short, monkeypatch, algo):
    """The first ratio is 1 for every token and the KL 0, exactly; the second minibatch moves."""
    ratios, loss = [], rlhf.policy_loss

    def watched(new, old, *rest):
        ratios.append((new - old).exp())
        return loss(new, old, *rest)
    monkeypatch.setattr(rlhf, "policy_loss", watched)
    cfg = short(rlhf, algo=algo, max_steps=1, device_batch_size=3, temperature=0.7)
    rlhf.main(cfg)
    row = log_of(cfg.out, "kl")[0]
    assert row["kl"] == 0 and row["k3"] == 0 and len(ratios) == 6    # two passes in three parts
    first, second = (max((r - 1).abs().max() for r in part) for part in (ratios[:3], ratios[3:]))
    assert first < 1e-6 and second > 1e-5
    rlhf.main(replace(cfg, epochs=1))
    row = log_of(cfg.out, "kl")[0]
    logged = [row[name] for name in ("clip_fraction", "approx_kl", "ratio")]
    assert logged == pytest.approx([0, 0, 1], abs=1e-6)
    if algo == "ppo":    # whitened advantages have mean 0
        assert row["policy_loss"] == pytest.approx(0, abs=1e-5)


def test_groups_without_a_difference_teach_nothing(short, files, function, tmp_path, monkeypatch):
    """Two rollouts of equal scores leave the weights of the first one, momentum or not."""
    monkeypatch.setattr(rlhf, "cosine_lr", lambda *a: 1e-3)
    body = ("score.n = getattr(score, 'n', 0) + 1; "    # the first call is the validation
            "return [float(i % 2 * (score.n == 2)) for i in range(len(rows))]")
    for steps in (1, 3):
        cfg = short(rlhf, steps, algo="grpo", unfinished=0.0,
                    kl_coef=0.5, reward=function(body), max_steps=steps)
        rlhf.main(cfg)
    rows = log_of(cfg.out, "zero_variance")
    assert [row["zero_variance"] == 1 for row in rows] == [False, True, True]
    one, three = (weights(tmp_path / f"{steps}.pt") for steps in (1, 3))
    assert same_bits(one, three) and not same_bits(one, weights(files["policy"]))


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_groups_without_a_difference_are_left_out(short, function, reduction):
    """Beside a group that all solve, the other one's step is what it is alone."""
    body = "return [float(i) if p == prompts[0] else 1.0 for i, p in enumerate(prompts)]"
    four, eight = (short(rlhf, size, algo="grpo", kl_coef=0.5, reward=function(body), max_steps=1,
                         reduction=reduction, batch_size=size, epochs=1, unfinished=1.0)
                   for size in (4, 8))
    (alone,), _ = recorded(rlhf.main, four)
    (beside,), _ = recorded(rlhf.main, eight)
    assert log_of(eight.out, "zero_variance")[0]["zero_variance"] == 0.5
    assert max(g.abs().max() for g in alone) > 1e-4
    torch.testing.assert_close(beside, alone, atol=1e-6, rtol=1e-4)


def test_grpo_settings_reach_the_update(short):
    """Reductions and --advantage give other gradients; dr_grpo is dapo times length / maximum."""
    grads = {}
    for changes in ({}, dict(reduction="dr_grpo"), dict(reduction="grpo"), dict(advantage="std")):
        cfg = short(rlhf, algo="grpo", max_steps=1, epochs=1, **changes)
        (found,), _ = recorded(rlhf.main, cfg)
        grads["".join(changes.values())] = torch.cat([g.flatten() for g in found])
    row, dapo = log_of(cfg.out, "length")[0], grads.pop("")
    assert row["zero_variance"] == 0
    torch.testing.assert_close(grads["dr_grpo"], dapo * row["length"] / 6)
    for name, other in grads.items():
        assert not torch.allclose(other, dapo, rtol=0.02), name


def test_the_kl_limit_skips_the_step(short):
    """What is said to be skipped is not taken by Adam's momentum either."""
    runs = {}
    for name, changes in (("one", dict(epochs=1)), ("limited", dict(epochs=4, kl_limit=1e-12)),
                          ("four", dict(epochs=4, kl_limit=1e9))):
        cfg = short(rlhf, name, max_steps=1, **changes)
        rlhf.main(cfg)
        runs[name] = {**weights(cfg.out), **load_checkpoint(cfg.out, "")["state"]["critic"]}
        assert log_of(cfg.out, "kl")[0]["stopped_early"] == (name == "limited")
    assert same_bits(runs["one"], runs["limited"]) and not same_bits(runs["one"], runs["four"])


@pytest.mark.parametrize("algo, expected, changes", [
    ("ppo", 0.731059, dict(value_learning_rate=1e-2, gae_lambda=1.0, learning_rate=1e-2)),
    ("grpo", 0.7025, dict(group_size=32, epochs=1, learning_rate=3e-3))])
def test_a_bandit_is_solved(short, function, tmp_path, algo, expected, changes):
    """Probability of the end-of-turn, which scores 1, after RL; it was 1/2, "a" scores 0.

    A KL penalty of 1 holds PPO at pi = ref exp(score), normalised; GRPO where the gradient of k3
    holds it: p - 1/2, against p (1 - p) less a 32nd, as the mean of a group has the answer in it.
    """
    model = tiny(n_layer=0)
    torch.nn.init.ones_(model.embed.weight)
    model.head.weight.data[:] = -30 / 32    # the final state is all ones, of 32 channels
    model.head.weight.data[[END, ord("a")]] = 0
    cfg = short(rlhf, algo=algo, init=save(tmp_path / "sft.pt", model), unfinished=0.0,
                data=[write(tmp_path / "p.jsonl", [dict(prompt=str(i)) for i in range(6)])],
                reward=function("return [1] * len(rows)"), max_new_tokens=1, kl_limit=1e9,
                kl_coef=1.0, max_steps=60, batch_size=64, **changes)
    rlhf.main(cfg)
    ids, _ = render_chat(ENC, [turn("user", "2")], reply=True)
    got = load(cfg.out)(torch.tensor([ids]))[0, -1].softmax(0)[END].item()
    assert got == pytest.approx(expected, abs=0.03)


def test_the_critic_learns_the_returns(short, function):
    """Where every answer scores 3 and the KL costs nothing, each state is worth 3."""
    cfg = short(rlhf, unfinished=3.0, kl_coef=0.0, max_steps=20,
                reward=function("return [3.0] * len(rows)"), value_learning_rate=1e-2,
                kl_limit=1e9)
    rlhf.main(cfg)
    critic = judge()
    critic.load_state_dict(load_checkpoint(cfg.out, "")["state"]["critic"])
    ids = torch.tensor([load_prompts(cfg.data, ENC, 90)[0]["ids"] + list(b"abc")])
    assert critic(ids)[0, -4:].tolist() == pytest.approx([3.0] * 4, abs=0.3)


def test_what_is_sampled_and_what_is_held_out(short, tmp_path, monkeypatch):
    """Each answer has its own seed, each rollout its own minibatches; no prompt is in both."""
    found, rollout = {0: [], 0.7: []}, rlhf.rollout

    def watched(policy, prompts, seeds, judges, enc, cfg, env, temperature):
        found[temperature] += [(prompt["prompt"], seed) for prompt, seed in zip(prompts, seeds)]
        return rollout(policy, prompts, seeds, judges, enc, cfg, env, temperature)
    monkeypatch.setattr(rlhf, "rollout", watched)
    data = [write(tmp_path / "p.jsonl", [dict(prompt=f"{i % 10}?") for i in range(40)])]
    rlhf.main(short(rlhf, algo="grpo", data=data, val_fraction=0.3, temperature=0.7))
    held, trained = ({prompt for prompt, _ in found[temperature]} for temperature in (0, 0.7))
    assert len(held) == 3 and trained and not held & trained
    assert len(found[0.7]) == len({seed for _, seed in found[0.7]}) == 3 * 8
    cfg = short(rlhf, minibatches=8)
    dealt = [torch.cat([*rlhf.minibatches(torch.arange(8), step, cfg, CPU)]) for step in (0, 1)]
    assert not torch.equal(*dealt)


def test_updates_without_anything_to_learn_do_not_dilute_the_log(short, function):
    """Where a group is all equal its minibatch has no ratio: the mean is that of the others."""
    cfg = short(rlhf, algo="grpo", group_size=2, minibatches=4, learning_rate=1e-9,
                reward=function("return [0.0] * len(rows)"))    # who ends is better
    rlhf.main(cfg)
    rows = [row for row in log_of(cfg.out, "ratio") if 0 < row["zero_variance"] < 1]
    assert rows and [row["ratio"] for row in rows] == pytest.approx([1.0] * len(rows), abs=1e-3)


def test_more_ranks_than_prompts_held_out(files, monkeypatch):
    """The ranks without one take part in the validation, and count for nothing."""
    counted = []
    monkeypatch.setattr(rlhf, "sum_over_ranks", lambda x, env: counted.append(x) or x)
    cfg, prompts = config(rlhf, files, ""), load_prompts([files["prompts"]], ENC, 90)[:1]
    for rank in range(3):
        env = replace(CPU, rank=rank, world_size=3)
        rlhf.validate(load(files["policy"]), prompts, (load(files["judge"]), None), ENC, cfg, env)
    assert [x[0, 1] for x in counted] == [1, 0, 0]


def test_one_update_needs_no_forward_before_it(short, monkeypatch):
    """Of a rollout that is updated once: gradients and log as with old log-probs of their own."""
    once, twice = (short(rlhf, name, algo="grpo", epochs=1) for name in ("once", "twice"))
    grads, _ = recorded(rlhf.main, once)
    monkeypatch.setattr(rlhf, "updated_once", lambda cfg: False)
    torch.testing.assert_close(recorded(rlhf.main, twice)[0], grads)
    for x, y in zip(log_of(once.out, "kl"), log_of(twice.out, "kl"), strict=True):
        for name in ("kl", "k3", "entropy", "ratio", "policy_loss"):
            assert x[name] == pytest.approx(y[name], abs=1e-5)
