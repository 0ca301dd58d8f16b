"""Tests of rlhf.py. Run: python -m pytest tests/test_rlhf.py -q (CPU, no network, seconds)."""
import math
from dataclasses import replace

import pytest
import torch
from common import (CPU, END, ENC, config, error, judge, load, log_of, recorded, same_bits,
                    save, tiny, weights, write)

import rlhf
from model import load_checkpoint, load_judge, load_prompts, render_chat
from rlhf import (answer_logprobs, answer_values, explained_variance, gae, group_advantages, k3,
                  policy_loss, token_weights, value_loss, whiten)

ONES = torch.ones(1, 4)


def tensor(*rows):
    return torch.tensor(rows)


@pytest.fixture
def function(tmp_path):
    """--reward of a Python function with this body."""
    def make(body, name="mine"):
        text = f"def score(prompts, completions, rows):\n    {body}\n"
        (tmp_path / f"{name}.py").write_text(text)
        return f"{tmp_path}/{name}.py:score"
    return make


# Advantages


@pytest.mark.parametrize("gamma, lam, advantages", [
    (1.0, 0.95, [0.366912, 0.596750, 0.365000, 0.300000]), (1.0, 1.0, [0.43, 0.63, 0.38, 0.30]),
    (1.0, 0.0, [-0.2, 0.25, 0.08, 0.3]), (0.99, 0.95, [0.339626, 0.578019, 0.355150, 0.3])])
def test_gae(gamma, lam, advantages):
    """Worked values; returns are advantages plus values."""
    values = tensor([0.5, 0.4, 0.6, 0.7])
    a, r = gae(tensor([-0.1, 0.05, -0.02, 1.0]), values, ONES, lam, gamma)
    torch.testing.assert_close(a, tensor(advantages), atol=1e-6, rtol=0)
    torch.testing.assert_close(r, a + values, atol=1e-6, rtol=0)


def test_gae_behind_the_last_token():
    """The score sits on the end-of-turn; padding behind it does not leak in, not even NaN."""
    mask, nan = tensor([1.0, 1, 1, 0, 0, 0]), math.nan
    kl, values = tensor([0.2, -0.1, 0.4, nan, 9, 9]), tensor([0.3, 0.5, 0.2, 0.8, nan, math.inf])
    rewards = -0.05 * kl + tensor([0.0, 0, 1, 0, 0, 0])
    a, r = gae(rewards, values, mask, 0.95)
    torch.testing.assert_close(a, tensor([0.6137, 0.446, 0.78, 0, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(r, tensor([0.9137, 0.946, 0.98, 0, 0, 0]), atol=1e-6, rtol=0)
    mask = tensor([0.0, 1, 1, 1, 0, 0])
    a, _ = gae(tensor([0.0, 0, 0, 5, 0, 0]), torch.zeros(1, 6), mask, 1.0)
    assert a.tolist() == [[0, 5, 5, 5, 0, 0]]    # as many advantages as tokens, each the score


def test_whitening():
    """By the biased variance, over the tokens of the mask only."""
    a = tensor([0.366912, 0.596750, 0.365000, 0.300000])
    expected = tensor([-0.35710, 1.68188, -0.37407, -0.95071])
    torch.testing.assert_close(whiten(a, ONES, CPU), expected, atol=2e-5, rtol=0)
    wide, mask = torch.cat([a, tensor([1e9, math.nan])], 1), tensor([1.0, 1, 1, 1, 0, 0])
    got = whiten(wide, mask, CPU)
    torch.testing.assert_close(got[:, :4], expected, atol=2e-5, rtol=0)
    assert got[:, 4:].tolist() == [[0, 0]]
    values, returns = tensor([0.5, 1, math.nan, math.inf]), tensor([1.0, 2, math.inf, math.nan])
    assert explained_variance(values, returns, tensor([1.0, 1, 0, 0]), CPU) == 0.75


@pytest.mark.parametrize("scores, std, std_eps, mean", [
    ([1, 0, 0, 1], [1, -1, -1, 1], [0.9998, -0.9998, -0.9998, 0.9998], [0.5, -0.5, -0.5, 0.5]),
    ([1, 0, 0, 0], [1.73205, *[-0.57735] * 3], [1.73165, *[-0.57722] * 3], [0.75, *[-0.25] * 3]),
    ([2, 0, 1, 1], [1.41421, -1.41421, 0, 0], [1.41401, -1.41401, 0, 0], [1, -1, 0, 0]),
    ([1, 1, 1, 1], [0] * 4, [0] * 4, [0] * 4)])
def test_group_advantages(scores, std, std_eps, mean):
    """Worked values; a second group without a difference stays at 0; a group of one is refused."""
    scores = torch.tensor([*scores, 5, 5, 5, 5], dtype=torch.float32)
    for kind, eps, expected in (("std", 1e-12, std), ("std", 1e-4, std_eps), ("mean", 1e-4, mean)):
        expected = torch.tensor([*expected, 0, 0, 0, 0], dtype=torch.float32)
        got = group_advantages(scores, 4, kind, eps)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(scores, 1)


# Losses


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
    assert loss.item() == pytest.approx(0.0252672, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([0.1, -0.1, 0.0]), atol=1e-6, rtol=0)
    x, y = torch.randn(2, 100_000) * 3
    assert k3(x, y).min() >= 0 and k3(x, x).max() == 0
    assert k3(torch.tensor([-200.0, 200.0]), torch.zeros(2)).isfinite().all()


@pytest.mark.parametrize("reduction, loss, weights", [
    ("grpo", 0.0, (1 / 4, 1 / 12)), ("dapo", 0.5, (1 / 8, 1 / 8)),
    ("dr_grpo", 0.25, (1 / 16, 1 / 16))])
def test_reductions_on_answers_of_unequal_length(reduction, loss, weights):
    """Two and six tokens, by hand; the same in micro-batches of one; an empty row weighs 0."""
    mask = torch.zeros(2, 8)
    mask[0, :2], mask[1, :6] = 1, 1
    got = token_weights(mask, reduction, n_rows=2, n_tokens=8, max_len=8)
    assert (got[0, 0].item(), got[1, 0].item()) == pytest.approx(weights)
    assert (got[mask == 0] == 0).all()
    zeros = torch.zeros(2, 8)
    surrogate = policy_loss(zeros, zeros, tensor([1.0], [-1.0]), 0.2, 0.2)
    assert (got * surrogate).sum().item() == pytest.approx(loss, abs=1e-6)
    parts = [token_weights(mask[i:i + 1], reduction, 2, 8, 8) for i in range(2)]
    assert torch.equal(torch.cat(parts), got)
    assert token_weights(torch.zeros(1, 8), reduction, 2, 8, 8).tolist() == [[0] * 8]


# Log-probs and values


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
    assert a[0, 0] == 0


# Rollouts and rewards


def roll(files, reward="", gold="none", n=8, **changes):
    cfg = config(rlhf, files, "", **changes)
    policy, prompts = load(files["policy"]), load_prompts(cfg.data, ENC, 80)[:n]
    judges = load_judge(files["judge"], ENC, 96, CPU)
    judges = rlhf.load_function("reward", reward) if reward else judges
    gold = None if gold == "none" else rlhf.load_function("gold", gold)
    batch = rlhf.rollout(policy, prompts, list(range(n)), (judges, gold), ENC, cfg, CPU, 1.0)
    return batch, prompts, policy


def test_rollouts_keep_the_end_and_score_only_what_ended(files, function):
    """The end token is in the mask and has a gradient; an answer without one is --unfinished."""
    reward = function("return [5.0] * len(prompts)")
    gold = function("return [float('nan') if c[:1] == 'b' else 2 for c in completions]", "gold")
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


def test_the_reward_model_is_read_at_the_end_alone_and_in_company(files):
    """Scores are those of each text alone, whatever the batch size."""
    model = load(files["judge"])
    for size in (32, 3):
        batch, _, _ = roll(files, device_batch_size=size)
        for i, n in enumerate(batch["lengths"].tolist()):
            expected = model(batch["ids"][i:i + 1, :n])[0, -1].item()
            expected = expected if batch["stopped"][i] else -1.0
            assert batch["scores"][i].item() == pytest.approx(expected, abs=1e-5)


def test_what_a_reward_function_is_given(files, function, tmp_path):
    """Messages, answers and whole rows, in one order; gold is logged and trains nothing."""
    body = "return [float(p[-1]['content'] == r['prompt'] and c == c.strip()) " \
           "for p, c, r in zip(prompts, completions, rows)]"
    batch, _, _ = roll(files, function(body), unfinished=1.0)
    assert batch["scores"].tolist() == [1.0] * 8
    for name, gold in (("a", "return [0.5] * len(rows)"), ("b", "return [9.0] * len(rows)")):
        cfg = config(rlhf, files, tmp_path / f"{name}.pt", gold=function(gold, f"gold_{name}"))
        rlhf.main(cfg)
        assert log_of(cfg.out, "gold")[0]["gold"] > 0
    assert same_bits(weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt"))


@pytest.mark.parametrize("body, word", [
    ("return 1 / 0", "ZeroDivisionError"), ("return None", "TypeError"),
    ("return [float('nan')] * len(prompts)", "returned nan for the completion"),
    ("return [float('inf')] * len(prompts)", "returned inf"),
    ("return [1.0]", "returned 1 numbers for"), ("return ['good'] * len(prompts)", "ValueError"),
    ("raise SystemExit(3)", "SystemExit")])
def test_a_bad_reward_function_ends_the_run_in_one_line(files, function, tmp_path, body, word):
    """What it raised or returned is said; nothing is written."""
    cfg = config(rlhf, files, tmp_path / "a.pt", reward=function(body))
    assert word in error(rlhf.main, cfg)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".pt", ".tmp")]


# The run


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_update_zero(files, tmp_path, monkeypatch, algo):
    """The first ratio is 1 for every token and the KL 0, exactly; the second minibatch moves."""
    ratios, loss = [], rlhf.policy_loss

    def watched(new, old, *rest):
        ratios.append((new - old).exp())
        return loss(new, old, *rest)
    monkeypatch.setattr(rlhf, "policy_loss", watched)
    cfg = config(rlhf, files, tmp_path / "a.pt", algo=algo, max_steps=1, device_batch_size=3,
                 temperature=0.7)
    rlhf.main(cfg)
    row = log_of(cfg.out, "kl")[0]
    assert row["kl"] == 0 and row["k3"] == 0 and len(ratios) == 6    # two passes in three parts
    first, second = (max((r - 1).abs().max() for r in part) for part in (ratios[:3], ratios[3:]))
    assert first < 1e-6 and second > 1e-5
    rlhf.main(replace(cfg, epochs=1))
    row = log_of(cfg.out, "kl")[0]
    assert row["clip_fraction"] == 0 and row["approx_kl"] == pytest.approx(0, abs=1e-9)
    assert row["ratio"] == pytest.approx(1, abs=1e-6)
    if algo == "ppo":    # whitened advantages have mean 0
        assert row["policy_loss"] == pytest.approx(0, abs=1e-5)


def test_lora_reference_is_the_base_during_the_run(files, tmp_path):
    """With LoRA the KL to the base grows from 0: the reference has its adapters off."""
    cfg = config(rlhf, files, tmp_path / "a.pt", lora_rank=4, max_steps=4, learning_rate=3e-2,
                 kl_limit=1e9)
    rlhf.main(cfg)
    rows = log_of(cfg.out, "k3")
    assert rows[0]["k3"] == 0 and rows[-1]["k3"] > 1e-3


def test_groups_without_a_difference_teach_nothing(files, function, tmp_path, monkeypatch):
    """Two rollouts of equal scores leave the weights of the first one, momentum or not."""
    monkeypatch.setattr(rlhf, "cosine_lr", lambda *a: 1e-3)
    body = ("score.n = getattr(score, 'n', 0) + 1; "    # the first call is the validation
            "return [float(i % 2 * (score.n == 2)) for i in range(len(rows))]")
    for steps in (1, 3):
        cfg = config(rlhf, files, tmp_path / f"{steps}.pt", algo="grpo", unfinished=0.0,
                     kl_coef=0.5, reward=function(body), max_steps=steps)
        rlhf.main(cfg)
    rows = log_of(cfg.out, "zero_variance")
    assert [row["zero_variance"] == 1 for row in rows] == [False, True, True]
    one, three = (weights(tmp_path / f"{steps}.pt") for steps in (1, 3))
    assert same_bits(one, three) and not same_bits(one, weights(files["policy"]))


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_groups_without_a_difference_are_left_out(files, function, tmp_path, reduction):
    """Beside a group that all solve, the other one's step is what it is alone."""
    body = "return [float(i) if p == prompts[0] else 1.0 for i, p in enumerate(prompts)]"
    steps = []
    for batch_size in (8, 4):
        cfg = config(rlhf, files, tmp_path / f"{batch_size}.pt", algo="grpo", kl_coef=0.5,
                     reward=function(body), reduction=reduction, batch_size=batch_size, max_steps=1,
                     epochs=1, unfinished=1.0)
        steps.append(recorded(rlhf.main, cfg)[0][0])
    assert log_of(tmp_path / "8.pt", "zero_variance")[0]["zero_variance"] == 0.5
    assert max(g.abs().max() for g in steps[0]) > 1e-4
    torch.testing.assert_close(*steps, atol=1e-6, rtol=1e-4)


def test_grpo_settings_reach_the_update(files, tmp_path):
    """Reductions and --advantage give other gradients; dr_grpo is dapo times length / maximum."""
    settings = dict(dapo={}, dr_grpo=dict(reduction="dr_grpo"), grpo=dict(reduction="grpo"),
                    std=dict(advantage="std"))
    grads = {}
    for name, changes in settings.items():
        cfg = config(rlhf, files, tmp_path / "a.pt", algo="grpo", max_steps=1, epochs=1, **changes)
        grads[name] = torch.cat([g.flatten() for g in recorded(rlhf.main, cfg)[0][0]])
    row = log_of(cfg.out, "length")[0]
    assert row["zero_variance"] == 0
    torch.testing.assert_close(grads["dr_grpo"], grads["dapo"] * row["length"] / 6)
    for name in ("dr_grpo", "grpo", "std"):
        assert not torch.allclose(grads[name], grads["dapo"], rtol=0.02), name


def test_the_kl_limit_skips_the_step(files, tmp_path):
    """What is said to be skipped is not taken by Adam's momentum either."""
    runs = {}
    for name, changes in (("one", dict(epochs=1)), ("limited", dict(epochs=4, kl_limit=1e-12)),
                          ("four", dict(epochs=4, kl_limit=1e9))):
        cfg = config(rlhf, files, tmp_path / f"{name}.pt", max_steps=1, **changes)
        rlhf.main(cfg)
        runs[name] = {**weights(cfg.out), **load_checkpoint(cfg.out, "")["state"]["critic"]}
        assert log_of(cfg.out, "kl")[0]["stopped_early"] == (name == "limited")
    assert same_bits(runs["one"], runs["limited"]) and not same_bits(runs["one"], runs["four"])


def bandit(folder, algo, **changes):
    """Probability of the end-of-turn, which scores 1, after RL; it was 1/2, "a" scores 0."""
    model = tiny(n_layer=1)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(p)
    torch.nn.init.ones_(model.embed.weight)
    model.head.weight.data[:] = -30 / 32    # the final state is all ones, of 32 channels
    model.head.weight.data[[END, ord("a")]] = 0
    (folder / "one.py").write_text("def score(prompts, completions, rows): return [1] * len(rows)")
    files = dict(policy=save(folder / "sft.pt", model), judge=f"{folder}/one.py:score", tokens="",
                 prompts=write(folder / "p.jsonl", [dict(prompt=str(i)) for i in range(6)]),
                 base="", talks="", pairs="")
    cfg = config(rlhf, files, folder / "a.pt", algo=algo, max_new_tokens=1, unfinished=0.0,
                 kl_limit=1e9, **{"batch_size": 32, **changes})
    rlhf.main(cfg)
    ids, _ = render_chat(ENC, [dict(role="user", content="2")], reply=True)
    return load(cfg.out)(torch.tensor([ids]))[0, -1].softmax(0)[END].item()


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_a_bandit_is_solved(tmp_path, algo):
    """Rewards reach the policy, with the right sign."""
    assert bandit(tmp_path, algo, kl_coef=0.0, max_steps=25, learning_rate=1e-2) > 0.95


@pytest.mark.parametrize("algo, expected, changes", [
    ("ppo", 0.731059, dict(value_learning_rate=1e-2, gae_lambda=1.0)),
    ("grpo", 0.7025, dict(group_size=32, epochs=1, learning_rate=3e-3))])
def test_where_the_kl_penalty_holds_the_bandit(tmp_path, algo, expected, changes):
    """PPO at pi = ref exp(score / kl_coef), normalised; GRPO where the gradient of k3 holds it.

    That is p - 1/2, against p (1 - p) less a 32nd, as the mean of a group has the answer in it.
    """
    got = bandit(tmp_path, algo, **{"kl_coef": 1.0, "max_steps": 60, "batch_size": 64, **changes})
    assert got == pytest.approx(expected, abs=0.03)


def test_the_critic_learns_the_returns(files, function, tmp_path):
    """Where every answer scores 3 and the KL costs nothing, each state is worth 3."""
    cfg = config(rlhf, files, tmp_path / "a.pt", unfinished=3.0, kl_coef=0.0, max_steps=20,
                 reward=function("return [3.0] * len(rows)"), value_learning_rate=1e-2,
                 kl_limit=1e9)
    rlhf.main(cfg)
    critic = judge()
    critic.load_state_dict(load_checkpoint(cfg.out, "")["state"]["critic"])
    ids = torch.tensor([load_prompts(cfg.data, ENC, 90)[0]["ids"] + list(b"abc")])
    assert critic(ids)[0, -4:].tolist() == pytest.approx([3.0] * 4, abs=0.3)


def test_what_is_sampled_and_what_is_held_out(files, tmp_path, monkeypatch):
    """Every answer of a run has its own seed; no prompt is both trained on and held out."""
    found, rollout = {0: [], 0.7: []}, rlhf.rollout

    def watched(policy, prompts, seeds, judges, enc, cfg, env, temperature):
        found[temperature] += [(prompt["prompt"], seed) for prompt, seed in zip(prompts, seeds)]
        return rollout(policy, prompts, seeds, judges, enc, cfg, env, temperature)
    monkeypatch.setattr(rlhf, "rollout", watched)
    data = [write(tmp_path / "p.jsonl", [dict(prompt=f"{i % 10}?") for i in range(40)])]
    rlhf.main(config(rlhf, files, tmp_path / "a.pt", algo="grpo", data=data, val_fraction=0.3,
                     temperature=0.7))
    held, trained = ({prompt for prompt, _ in found[temperature]} for temperature in (0, 0.7))
    assert len(held) == 3 and trained and not held & trained
    assert len(found[0.7]) == len({seed for _, seed in found[0.7]}) == 3 * 8
