"""Tests of rlhf.py. Run: python -m pytest tests/test_rlhf.py -q (CPU, no network, seconds).

Each docstring says what would be wrong with the world if the test failed.
"""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rlhf
from common import (CPU, END, ENC, PAD, Recorder, adjust, assert_killed_and_resumed_is_the_same,
                    assert_two_ranks_train_like_one, byte_encoding, error, judge, log_of, recorded, same_bits, save,
                    sums, tiny, weights, write)
from model import Reference, ScalarHead, load_checkpoint, load_model, render_chat
from rlhf import (Config, adapt_kl_coef, answer_logprobs, before_token, explained_variance, gae, group_advantages, k3,
                  policy_loss, token_weights, value_loss, whiten)

SMALL = dict(max_steps=3, batch_size=8, group_size=4, max_new_tokens=6, minibatches=1, epochs=2, eval_every=100,
             save_every=100, learning_rate=1e-3, precision="fp32")
ROWS = torch.ones(1, 4)


def tensor(*rows):
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(policy, reward model, prompts). The policy says a, b, c or nothing more, the rest is rare."""
    folder = tmp_path_factory.mktemp("rlhf")
    policy = save(folder / "sft.pt", adjust(tiny(dropout=0.5), [END, *b"abc"], -2.0))
    prompts = write(folder / "prompts.jsonl", [dict(prompt=f"{i}: {q}") for i, (q, _, _) in enumerate(sums(24))])
    return policy, save(folder / "reward.pt", judge()), prompts


@pytest.fixture
def function(tmp_path):
    """--reward of a Python function with this body."""
    def make(body):
        (tmp_path / "mine.py").write_text(f"def score(prompts, completions):\n    {body}\n")
        return f"{tmp_path}/mine.py:score"
    return make


def config(files, out, **changes):
    return Config(init=files[0], out=str(out), **{"overwrite": True, "reward": files[1], "data": [files[2]], **SMALL, **changes})


# advantages


@pytest.mark.parametrize("gamma, lam, advantages", [
    (1.0, 0.95, [0.366912, 0.596750, 0.365000, 0.300000]),
    (1.0, 1.0, [0.43, 0.63, 0.38, 0.30]),
    (1.0, 0.0, [-0.2, 0.25, 0.08, 0.3]),
    (0.99, 0.95, [0.339626, 0.578019, 0.355150, 0.3]),
])
def test_gae(gamma, lam, advantages):
    """Credit would go to the wrong tokens."""
    values = tensor([0.5, 0.4, 0.6, 0.7])
    a, r = gae(tensor([-0.1, 0.05, -0.02, 1.0]), values, ROWS, gamma, lam)
    torch.testing.assert_close(a, tensor(advantages), atol=1e-6, rtol=0)
    torch.testing.assert_close(r, a + values, atol=1e-6, rtol=0)


def test_gae_behind_the_last_token():
    """The value of padding would leak into the advantages: score at the end-of-turn, nothing behind it."""
    mask = tensor([1.0, 1, 1, 0, 0, 0])
    kl, values = tensor([0.2, -0.1, 0.4, 9.0, 9, 9]), tensor([0.3, 0.5, 0.2, 0.8, 9, 9])
    rewards = -0.05 * kl + tensor([0.0, 0, 1, 0, 0, 0])
    a, r = gae(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(a, tensor([0.6137, 0.446, 0.78, 0, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(r, tensor([0.9137, 0.946, 0.98, 0, 0, 0]), atol=1e-6, rtol=0)
    assert (rewards * mask).sum().item() == pytest.approx(0.975)
    a, _ = gae(tensor([0.0, 0, 0, 5, 0, 0]), torch.zeros(1, 6), tensor([0.0, 1, 1, 1, 0, 0]), 1.0, 1.0)
    assert a.tolist() == [[0, 5, 5, 5, 0, 0]]    # as many advantages as tokens, each the score


def test_whitening():
    """Advantages would be scaled by padding, or by another variance than the biased one."""
    a = tensor([0.366912, 0.596750, 0.365000, 0.300000])
    torch.testing.assert_close(whiten(a, ROWS), tensor([-0.35710, 1.68188, -0.37407, -0.95071]), atol=2e-5, rtol=0)
    torch.testing.assert_close(whiten(a, ROWS, shift=False), tensor([0.05006, 2.08904, 0.03310, -0.54354]),
                               atol=2e-5, rtol=0)
    wide = whiten(torch.cat([a, tensor([1e9, math.nan])], 1), tensor([1.0, 1, 1, 1, 0, 0]))
    torch.testing.assert_close(wide, torch.nn.functional.pad(whiten(a, ROWS), (0, 2)))


def test_nothing_masked_leaks():
    """One NaN in padding would poison a step."""
    mask, nan = tensor([1.0, 1, 0, 0]), math.nan
    x, y = tensor([1.0, 2, nan, math.inf]), tensor([0.5, 1, -math.inf, nan])
    for out in (*gae(x, y, mask, 1.0, 0.95), whiten(x, mask)):
        assert out.isfinite().all() and out[:, 2:].abs().sum() == 0
    assert explained_variance(y, x, mask) == explained_variance(y[:, :2], x[:, :2], mask[:, :2]) == 0.75


@pytest.mark.parametrize("scores, std, std_eps, mean", [
    ([1, 0, 0, 1], [1, -1, -1, 1], [0.9998, -0.9998, -0.9998, 0.9998], [0.5, -0.5, -0.5, 0.5]),
    ([1, 0, 0, 0], [1.73205, *[-0.57735] * 3], [1.73165, *[-0.57722] * 3], [0.75, *[-0.25] * 3]),
    ([2, 0, 1, 1], [1.41421, -1.41421, 0, 0], [1.41401, -1.41401, 0, 0], [1, -1, 0, 0]),
    ([1, 1, 1, 1], [0] * 4, [0] * 4, [0] * 4),
])
def test_group_advantages(scores, std, std_eps, mean):
    """Answers would be compared with those to other prompts, or equal scores divided by zero."""
    scores = torch.tensor([*scores, 5, 5, 5, 5], dtype=torch.float32)    # another group, without a difference
    for kind, eps, expected in (("std", 1e-12, std), ("std", 1e-4, std_eps), ("mean", 1e-4, mean)):
        got = group_advantages(scores, 4, kind, eps)
        torch.testing.assert_close(got, torch.tensor([*expected, 0, 0, 0, 0], dtype=torch.float32), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(scores, 1)


# losses


@pytest.mark.parametrize("advantage, ratio, loss, learns", [
    (1, 1.5, -1.2, False), (1, 0.5, -0.5, True), (-1, 1.5, 1.5, True), (-1, 0.5, 0.8, False), (1, 1, -1, True)])
def test_clipping(advantage, ratio, loss, learns):
    """A policy that has moved far enough would be pushed on, or one that moved wrongly not brought back."""
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    got = policy_loss(logprobs, torch.zeros(1), torch.tensor([float(advantage)]), 0.2, 0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, abs=1e-6) and (logprobs.grad.item() != 0) == learns


def test_clip_higher():
    """DAPO's room for rare tokens would not be there."""
    loss = policy_loss(torch.log(torch.tensor([1.27, 1.5])), torch.zeros(2), torch.ones(2), 0.2, 0.28)
    assert loss.tolist() == pytest.approx([-1.27, -1.28])


@pytest.mark.parametrize("value, target, loss", [(1.0, 0.6, 0.08), (1.0, 2.0, 0.845), (0.6, 0.9, 0.045)])
def test_value_clipping(value, target, loss):
    """The critic would run away from one rollout to the next."""
    got = value_loss(torch.tensor([value]), torch.tensor([0.5]), torch.tensor([target]), 0.2)
    assert got.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("logprob, ref, expected", [(-1.0, -1.5, 0.106531), (-1.5, -1.0, 0.148721), (-2.0, -2.0, 0.0)])
def test_k3(logprob, ref, expected):
    """The logged and penalised KL would be another estimator than it is called."""
    assert k3(torch.tensor(logprob), torch.tensor(ref)).item() == pytest.approx(expected, abs=1e-6)


def test_k3_estimates_the_kl():
    """The mean of the estimator would not be the KL; or one odd token would overflow."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    logp, ref = logits.log_softmax(0), torch.tensor([0.4, 0.4, 0.2]).log()
    loss = (logp.exp().detach() * k3(logp, ref)).sum()
    assert loss.item() == pytest.approx((logp.exp() * (logp - ref)).sum().item(), abs=1e-6)
    assert loss.item() == pytest.approx(0.0252672, abs=1e-6)
    loss.backward()    # the gradient of KL(ref || pi), pi - ref: an approximation of the wanted one near ref
    torch.testing.assert_close(logits.grad, torch.tensor([0.1, -0.1, 0.0]), atol=1e-6, rtol=0)
    x, y = torch.randn(2, 1_000_000) * 3
    assert k3(x, y).min() >= 0 and k3(x, x).max() == 0
    assert k3(torch.tensor([-200.0, 200.0]), torch.zeros(2)).isfinite().all()


@pytest.mark.parametrize("reduction, loss, weights", [("grpo", 0.0, (1 / 4, 1 / 12)), ("dapo", 0.5, (1 / 8, 1 / 8)),
                                                      ("dr_grpo", 0.25, (1 / 16, 1 / 16))])
def test_reductions_on_answers_of_unequal_length(reduction, loss, weights):
    """Long wrong answers would be punished less a token where that is not asked for, or more."""
    mask = torch.zeros(2, 8)
    mask[0, :2], mask[1, :6] = 1, 1
    got = token_weights(mask, reduction, n_rows=2, n_tokens=8, max_len=8)
    assert (got[0, 0].item(), got[1, 0].item()) == pytest.approx(weights) and (got[mask == 0] == 0).all()
    surrogate = policy_loss(torch.zeros(2, 8), torch.zeros(2, 8), tensor([1.0], [-1.0]), 0.2, 0.2)
    assert (got * surrogate).sum().item() == pytest.approx(loss, abs=1e-6)
    parts = [token_weights(mask[i:i + 1], reduction, 2, 8, 8) for i in range(2)]    # micro-batches of one
    assert torch.equal(torch.cat(parts), got)
    empty = token_weights(torch.zeros(1, 8), reduction, 2, 8, 8)    # a row of nothing weighs nothing
    assert empty.isfinite().all() and empty.sum() == 0


@pytest.mark.parametrize("kl, expected", [(9.0, 0.151536), (5.7, 0.149616), (6.0, 0.15)])
def test_adaptive_kl(kl, expected):
    """The pull to the reference would grow where it should shrink, or without limit."""
    assert adapt_kl_coef(0.15, kl, 6.0, 512, 10_000) == pytest.approx(expected, abs=1e-7)


# log-probs and values


@pytest.mark.parametrize("temperature, expected", [(1.0, [-0.40761, -1.40761, -2.40761]),
                                                   (0.7, [-0.26012, -1.68869, -3.11726])])
def test_log_probs_are_those_of_the_sampling_temperature(temperature, expected):
    """Samples of one distribution would be scored by another."""
    model = lambda ids: torch.tensor([2.0, 1.0, 0.0]).expand(*ids.shape, 3)
    got, _ = answer_logprobs(model, tensor([0, 0, 1, 2]), tensor([0.0, 1, 1, 1]), replace(Config(),
                                                                                           temperature=temperature), CPU)
    torch.testing.assert_close(got, tensor([0, *expected]), atol=1e-5, rtol=0)


def test_log_probs_do_not_depend_on_padding_company_or_what_follows_the_end():
    """The ratio would start elsewhere than at 1, and padding would be trained."""
    model, cfg = tiny(), Config()
    rows = torch.randint(0, 256, (3, 12))
    mask = torch.zeros(3, 12)
    for i, (a, b) in enumerate(((3, 7), (5, 12), (8, 9))):
        mask[i, a:b] = 1
    got, _ = answer_logprobs(model, rows, mask, cfg, CPU)
    for i, end in enumerate((7, 12, 9)):
        alone, _ = answer_logprobs(model, rows[i:i + 1, :end], mask[i:i + 1, :end], cfg, CPU)
        torch.testing.assert_close(got[i:i + 1, :end], alone, atol=1e-5, rtol=1e-5)
    grads = []
    for ids in (rows, torch.where(mask.flip(1).cumsum(1).flip(1) > 0, rows, 7)):    # other ids behind the end
        model.zero_grad()
        answer_logprobs(model, ids, mask, cfg, CPU)[0].sum().backward()
        grads.append(model.head.weight.grad.clone())
    assert torch.equal(*grads)


def test_the_critic_judges_the_state_before_each_token():
    """A value would know the token it is the baseline of, and the gradient be biased."""
    assert before_token(tensor([1.0, 2, 3])).tolist() == [[0, 1, 2]]
    critic, ids = judge(), torch.randint(0, 256, (1, 10))
    other = ids.clone()
    other[0, 6] += 1
    a, b = before_token(critic(ids)), before_token(critic(other))
    assert torch.equal(a[0, :7], b[0, :7]) and not torch.equal(a[0, 7:], b[0, 7:])


# rollouts and rewards


def roll(files, reward="", n=8, temperature=1.0, **changes):
    cfg = config(files, "", reward=reward or files[1], **changes)
    policy, enc = load_model(load_checkpoint(files[0], ""), "cpu")
    prompts = rlhf.load_prompts(cfg.data, enc, 80)[:n]
    score, _ = rlhf.make_reward(cfg, enc, 64, CPU)
    return rlhf.rollout(policy, prompts, list(range(n)), score, enc, cfg, CPU, temperature), prompts, cfg, policy


def test_rollouts_keep_the_end_and_score_only_what_ended(files, function):
    """Stopping would not be trained, or endless answers would farm reward."""
    batch, prompts, cfg, policy = roll(files, function("return [5.0] * len(prompts)"), n=24)
    assert 0 < batch["stopped"].sum() < 24 and batch["gold"].isnan().all()
    for ids, mask, score, stopped, prompt, text in zip(*(batch[k] for k in ("ids", "mask", "scores", "stopped")),
                                                       prompts, batch["texts"]):
        said = ids[mask > 0].tolist()
        assert ids[:len(prompt["ids"])].tolist() == prompt["ids"] and mask[:len(prompt["ids"])].sum() == 0
        assert (said[-1] == END) == bool(stopped) and END not in said[:-1] and len(said) <= 6
        assert score == (5.0 if stopped else -1.0) and len(said) == 6 or stopped
        assert text == ENC.decode([i for i in said if i != END])
    logits = policy(batch["ids"]).detach().requires_grad_()
    answer_logprobs(lambda ids: logits, batch["ids"], batch["mask"], cfg, CPU)[0].sum().backward()
    for i in range(24):    # the gradient is on the columns that predict the answer, its end included
        trained = logits.grad[i].abs().sum(-1) > 0
        assert torch.equal(trained[:-1], batch["mask"][i, 1:] > 0)


def test_the_reward_model_is_read_at_the_end_alone_and_in_company(files):
    """Scores in RL would differ from those in training, or by who else is in the batch."""
    for size in (32, 3):
        batch, prompts, _, _ = roll(files, device_batch_size=size)
        model, _ = load_model(load_checkpoint(files[1], ""), "cpu")
        for ids, mask, score, stopped, p in zip(*(batch[k] for k in ("ids", "mask", "scores", "stopped")), prompts):
            text = ids[:len(p["ids"]) + int(mask.sum())]
            expected = model(text[None])[0, -1].item() if stopped else -1.0
            assert score.item() == pytest.approx(expected, abs=1e-5)


def test_the_verifier(files):
    """Right answers would earn nothing, or the form alone as much as being right."""
    cfg = config(files, "", reward="verifier")
    score, model = rlhf.make_reward(cfg, ENC, 8, CPU)
    row = dict(question="3 * 4?", answer="It is 3 * 4 = <<3*4=12>>12.\n#### 12")
    said = ["Well.\n#### 12", "Well.\n#### 13", "No idea"]
    assert model is None and score([dict(row=row)] * 3, [[]] * 3, said) == pytest.approx([1.1, 0.1, 0.0])
    assert "do not say what is right" in error(rlhf.main, cfg)


@pytest.mark.parametrize("body, word", [
    ("return 1 / 0", "ZeroDivisionError"),
    ("return [float('nan')] * len(prompts)", "returned nan for the completion"),
    ("return [float('inf')] * len(prompts)", "returned inf"),
    ("return [1.0]", "returned 1 numbers for"),
    ("return None", "TypeError"),
    ("return ['good'] * len(prompts)", "ValueError"),
])
def test_a_bad_reward_function_ends_the_run_in_one_line(files, function, tmp_path, body, word):
    """NaN would become the weights, or a file would be left half-written."""
    assert word in error(rlhf.main, config(files, tmp_path / "a.pt", reward=function(body)))
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".pt", ".tmp")] == []


def test_a_reward_function_that_fails_later_leaves_the_last_checkpoint_whole(files, function, tmp_path):
    """Hours of training would be lost to a bug in somebody's reward."""
    body = "score.calls = getattr(score, 'calls', 0) + 1; return [1.0 / (score.calls < 4)] * len(prompts)"
    cfg = config(files, tmp_path / "a.pt", reward=function(body), save_every=1)
    assert "ZeroDivisionError" in error(rlhf.main, cfg)
    assert load_checkpoint(cfg.out, "")["step"] == 2
    assert all(w.isfinite().all() for w in weights(cfg.out).values())


# the run


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_update_zero(files, tmp_path, monkeypatch, algo):
    """Policy and reference, or new and old log-probs, would not be of the same model: dropout, padding, shift."""
    ratios, loss = [], policy_loss
    monkeypatch.setattr(rlhf, "policy_loss", lambda new, old, *rest: (
        ratios.append((new - old).exp()), loss(new, old, *rest))[1])
    cfg = config(files, tmp_path / "a.pt", algo=algo, max_steps=1, epochs=2, device_batch_size=3, temperature=0.7)
    rlhf.main(cfg)
    row = log_of(cfg.out, "kl")[0]
    assert row["kl"] == 0.0 and row["k3"] == 0.0    # exactly
    first, second = torch.cat([(r - 1).abs().flatten() for r in ratios[:3]]), ratios[3:]
    assert first.max() < 1e-6 and max((r - 1).abs().max() for r in second) > 1e-5    # and then it moves
    rlhf.main(replace(cfg, epochs=1, learning_rate=1e-2))
    row = log_of(cfg.out, "kl")[0]
    assert row["clip_fraction"] == 0 and row["approx_kl"] == pytest.approx(0, abs=1e-9)
    assert row["ratio"] == pytest.approx(1, abs=1e-6)
    if algo == "ppo":    # whitened advantages have mean 0
        assert row["policy_loss"] == pytest.approx(0, abs=1e-5)


CASES = [dict(algo="ppo"), *(dict(algo="grpo", reduction=r) for r in ("grpo", "dapo", "dr_grpo"))]


@pytest.mark.parametrize("changes", CASES)
def test_a_step_is_the_same_however_it_is_split(files, tmp_path, changes):
    """A smaller GPU would train another policy."""
    runs = [recorded(rlhf.main, config(files, tmp_path / "a.pt", device_batch_size=size, max_steps=1, epochs=1,
                                       **changes))[0] for size in (8, 3, 1)]
    assert len(runs[0]) == (2 if changes["algo"] == "ppo" else 1) and max(g.abs().max() for g in runs[0][0]) > 1e-3
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(algo="ppo", whiten_rewards=True, minibatches=2),
                                     dict(algo="ppo", lora_rank=2), dict(algo="grpo", group_size=2, minibatches=2),
                                     dict(algo="grpo", reduction="grpo", lora_rank=2)])
def test_two_processes_train_like_one(files, tmp_path, changes):
    """torchrun on two GPUs would train another policy, or its replicas would drift apart."""
    cfg = config(files, "", max_steps=2, device_batch_size=2, learning_rate=1e-4, value_learning_rate=1e-4, **changes)
    assert_two_ranks_train_like_one(rlhf.main, cfg, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(algo="ppo", kl_target=0.1), dict(algo="ppo", lora_rank=2),
                                     dict(algo="grpo", minibatches=2)])
def test_killed_and_resumed_ends_with_the_same_bits(files, tmp_path, changes):
    """A run that was interrupted would be another experiment than one that was not, its critic included."""
    cfg = config(files, "", max_steps=16, save_every=3, eval_every=6, **changes)
    assert_killed_and_resumed_is_the_same(rlhf.main, cfg, tmp_path, kills=(4, 9))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_reference_and_reward_model_are_frozen(files, tmp_path, monkeypatch, lora_rank):
    """The yardsticks would move with what they measure."""
    loaded = []
    for where in ("rlhf.load_model", "reward.load_model"):    # the judge is loaded in reward.py
        monkeypatch.setattr(where, lambda *a: (loaded.append(load_model(*a)), loaded[-1])[1])
    before = {path: Path(path).read_bytes() for path in files}
    rlhf.main(config(files, tmp_path / "a.pt", lora_rank=lora_rank, weight_decay=0.1, learning_rate=1e-2))
    frozen = [model for model, _ in loaded if not any(p.requires_grad for p in model.parameters())]
    assert [isinstance(model, ScalarHead) for model in frozen] == ([True] if lora_rank else [True, False])
    for model in frozen:
        assert same_bits(model.state_dict(), weights(files[1] if isinstance(model, ScalarHead) else files[0]))
    assert before == {path: Path(path).read_bytes() for path in files}
    after, start = weights(tmp_path / "a.pt"), weights(files[0])
    moved = {k for k in start if not torch.equal(after[k], start[k])}
    assert moved and (not lora_rank or all(k.endswith("_proj.weight") for k in moved))
    critic = load_checkpoint(tmp_path / "a.pt", "")["critic"]
    assert not torch.equal(critic["score.weight"], weights(files[1])["score.weight"])    # the critic does learn


def test_lora_reference_is_the_base_during_the_run(files, tmp_path):
    """With LoRA the KL would stay 0 for ever, or be measured to a reference with adapters."""
    cfg = config(files, tmp_path / "a.pt", lora_rank=4, max_steps=4, learning_rate=3e-2, kl_limit=0.0)
    rlhf.main(cfg)
    rows = log_of(cfg.out, "k3")
    assert rows[0]["k3"] == 0 and rows[-1]["k3"] > 1e-3
    merged, _ = load_model(load_checkpoint(cfg.out, ""), "cpu")
    base, _ = load_model(load_checkpoint(files[0], ""), "cpu")
    with Reference(merged, base) as ref:
        assert ref is base and not torch.allclose(merged(torch.arange(9)[None]), base(torch.arange(9)[None]))


def test_groups_without_a_difference_teach_nothing(files, function, tmp_path):
    """Noise would be divided by zero and trained on."""
    cfg = config(files, tmp_path / "a.pt", algo="grpo", reward=function("return [1.0] * len(prompts)"),
                 unfinished=1.0, kl_coef=0.5)
    grads, _ = recorded(rlhf.main, cfg)
    assert all(g.abs().max() == 0 for step in grads for g in step) and same_bits(weights(cfg.out), weights(files[0]))
    assert [row["zero_variance"] for row in log_of(cfg.out, "zero_variance")] == [1.0] * 3


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_groups_without_a_difference_are_left_out(files, function, tmp_path, reduction):
    """Solved prompts would thin out what the others teach: with one group of two, a step is that of the other alone."""
    reward = function("return [float(i) if p == prompts[0] else 1.0 for i, p in enumerate(prompts)]")
    steps = []
    for batch_size in (8, 4):
        cfg = config(files, tmp_path / f"{batch_size}.pt", algo="grpo", reward=reward, reduction=reduction, kl_coef=0.5,
                     batch_size=batch_size, max_steps=1, epochs=1, unfinished=1.0)
        grads, _ = recorded(rlhf.main, cfg)
        steps.append(grads[0])
    assert log_of(tmp_path / "8.pt", "zero_variance")[0]["zero_variance"] == 0.5
    assert max(g.abs().max() for g in steps[0]) > 1e-4
    for a, b in zip(*steps):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_kl_limit_skips_the_step(files, tmp_path):
    """A step that is said to be skipped would be taken by Adam's momentum."""
    runs = {}
    for name, changes in (("one", dict(epochs=1)), ("limited", dict(epochs=4, kl_limit=1e-12)),
                          ("four", dict(epochs=4, kl_limit=0.0))):
        cfg = config(files, tmp_path / f"{name}.pt", max_steps=1, warmup=0.0, **changes)
        rlhf.main(cfg)
        runs[name] = {**weights(cfg.out), **load_checkpoint(cfg.out, "")["critic"]}
        assert log_of(cfg.out, "kl")[0]["stopped_early"] == (name == "limited")
    assert same_bits(runs["one"], runs["limited"]) and not same_bits(runs["one"], runs["four"])


def test_the_kl_coefficient_follows_its_target(files, tmp_path):
    """--kl_target would do nothing."""
    cfg = config(files, tmp_path / "a.pt", kl_coef=0.05, kl_target=1e-9, kl_horizon=100.0, learning_rate=1e-2, kl_limit=0.0)
    rlhf.main(cfg)
    coefs = [row["kl_coef"] for row in log_of(cfg.out, "kl_coef")]
    assert coefs[0] == pytest.approx(0.05 * (1 - 0.2 * 8 / 100), abs=1e-6)    # KL 0 at first
    assert [abs(b / a - 1) for a, b in zip(coefs, coefs[1:])] == pytest.approx([0.016] * 2, abs=1e-4)


def bandit(folder, algo, **changes):
    """One token an answer, uniform over two: the end-of-turn scores 1, "a" 0. Probability of the former after RL."""
    model = tiny(n_layer=1)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(p)
    torch.nn.init.ones_(model.embed.weight)
    model.head.weight.data[:] = -30 / 32    # the final state is all ones, of 32 channels: logit -30
    model.head.weight.data[[END, ord("a")]] = 0
    (folder / "one.py").write_text("def score(prompts, completions): return [1.0] * len(prompts)")
    prompts = write(folder / "p.jsonl", [dict(prompt=str(i)) for i in range(6)])
    cfg = Config(init=save(folder / "sft.pt", model), reward=f"{folder}/one.py:score", data=[prompts],
                 out=str(folder / "a.pt"), algo=algo, **{**SMALL, "batch_size": 32, "max_new_tokens": 1,
                                                         "unfinished": 0.0, "kl_limit": 0.0, **changes})
    rlhf.main(cfg)
    model, enc = load_model(load_checkpoint(cfg.out, ""), "cpu")
    ids, _ = render_chat(enc, [dict(role="user", content="2")], reply=True)
    return model(torch.tensor([ids]))[0, -1].softmax(0)[END].item()


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_a_bandit_is_solved(tmp_path, algo):
    """Rewards would not reach the policy, or with the wrong sign."""
    assert bandit(tmp_path, algo, kl_coef=0.0, max_steps=25, learning_rate=1e-2) > 0.95


def test_ppo_with_kl_settles_at_the_boltzmann_distribution(tmp_path):
    """The KL penalty would pull to something else: pi = ref exp(score / kl_coef), normalised, is the optimum."""
    got = bandit(tmp_path, "ppo", kl_coef=1.0, max_steps=60, learning_rate=1e-3, min_lr=0.02, batch_size=64,
                 value_learning_rate=1e-2, vf_coef=1.0, gae_lambda=1.0)
    assert got == pytest.approx(0.731059, abs=0.03)


def test_rollouts_of_a_run_are_all_different(files, tmp_path, monkeypatch):
    """Every epoch would sample the same answers again: groups of copies teach nothing."""
    seen, roll_ = [], rlhf.rollout
    monkeypatch.setattr(rlhf, "rollout", lambda policy, prompts, seeds, *a, **k: (
        seen.extend(seeds if k.get("temperature", a[-1]) else []), roll_(policy, prompts, seeds, *a, **k))[1])
    rlhf.main(config(files, tmp_path / "a.pt", algo="grpo"))
    assert len(seen) == len(set(seen)) == 3 * 8


def test_validation_weighs_answers_not_ranks(monkeypatch):
    """Held-out rewards would depend on the number of GPUs."""
    values = dict(x=torch.tensor([1.0, math.nan, 3.0]), y=torch.tensor([math.nan]))
    got = rlhf.spread(values, CPU)
    assert got["x"] == 2.0 and math.isnan(got["y"])
    monkeypatch.setattr(rlhf, "sum_over_ranks", lambda x, d: x + torch.tensor([[10.0, 1], [0, 0]]))    # a rank of one
    assert rlhf.spread(values, CPU)["x"] == pytest.approx(14 / 3)


def test_user_errors_are_one_line(files, function, tmp_path):
    """A mistake would end in a traceback, and the reader would not know what to do."""
    cfg = config(files, tmp_path / "a.pt", max_steps=1)
    change = lambda **kw: error(rlhf.main, replace(cfg, **kw))
    assert "nothing to be better than" in change(algo="grpo", group_size=1)
    assert "choose ppo or grpo" in change(algo="dpo")
    assert "--reduction" in change(reduction="mean")
    assert "not a multiple" in change(algo="grpo", batch_size=6)
    assert "above 0" in change(temperature=0.0)
    assert "make it with: python sft.py" in change(init=str(tmp_path / "no.pt"))
    assert "make it with: python reward.py" in change(reward=str(tmp_path / "no.pt"))
    assert "make it with: python rlhf.py" in change(resume=True)
    assert "is a reward model" in change(init=files[1])
    assert "is not a reward model" in change(reward=files[0])
    other = save(tmp_path / "other.pt", judge(), byte_encoding(shift=1))
    assert "another tokenizer" in change(reward=other)
    assert "reads 32 tokens" in change(reward=save(tmp_path / "short.pt", judge(block_size=32)))
    assert "no function rate" in change(reward=function("return 1").replace(":score", ":rate"))
    assert "does not exist" in change(reward="nowhere.py:score")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    assert "ModuleNotFoundError" in change(reward=f"{tmp_path}/broken.py:score")
    assert "too few" in change(data=[write(tmp_path / "one.jsonl", [dict(prompt="a")])])
    assert "no row is usable" in change(data=[write(tmp_path / "long.jsonl", [dict(prompt="a" * 200)])])
    rlhf.main(cfg)
    assert "--algo ppo" in change(resume=True, algo="grpo")
    assert "--lora_rank" in change(resume=True, lora_rank=2)


def test_dropout_is_off(files):
    """The scored policy would not be the one that sampled (the checkpoint asks for dropout 0.5)."""
    assert load_checkpoint(files[0], "")["model_config"]["dropout"] == 0.5
    with Recorder():
        model, _ = load_model(load_checkpoint(files[0], ""), "cpu")
    ids = torch.arange(20)[None]
    assert torch.equal(model.train()(ids), model.eval()(ids)) and PAD != END
