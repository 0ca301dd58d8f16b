"""Tests of dpo.py, and of the whole chain of stages. Run: python -m pytest tests/test_dpo.py -q (CPU, no network).

Each docstring says what would be wrong with the world if the test failed.
"""
import math
from dataclasses import replace

import pytest
import torch

import dpo
import prepare
import pretrain
import reward
import rlhf
import sft
from common import (CPU, END, ENC, PAD, adjust, assert_killed_and_resumed_is_the_same, assert_two_ranks_train_like_one,
                    byte_encoding, demonstrations, error, judge, log_of, preferences, recorded, same_bits, save, sums,
                    tiny, weights, write)
from dpo import Config, answer_logprobs, preference_loss
from model import GPT, Reference, ScalarHead, load_checkpoint, load_model

SMALL = dict(max_steps=3, batch_size=6, eval_every=100, save_every=100, learning_rate=1e-3, precision="fp32", nll=0.0,
             max_new_tokens=6)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(policy, pairs, reward model, prompts). The policy says a, b, c or nothing more, the rest is rare."""
    folder = tmp_path_factory.mktemp("dpo")
    prompts = write(folder / "prompts.jsonl", [dict(prompt=f"{i}: {q}") for i, (q, _, _) in enumerate(sums(24))])
    return (save(folder / "sft.pt", adjust(tiny(), [END, *b"abc"], -2.0)), preferences(folder / "pairs.jsonl"),
            save(folder / "reward.pt", judge()), prompts)


def config(files, out, **changes):
    return Config(init=files[0], reward=files[2], prompts=[files[3]], out=str(out),
                  **{"overwrite": True, "data": [files[1]], **SMALL, **changes})


# the losses


def loss_of(chosen, rejected, ref_chosen=0.0, ref_rejected=0.0, n_chosen=1, n_rejected=1, **changes):
    numbers = (torch.tensor([float(x)]) for x in (chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected))
    return preference_loss(*numbers, **changes).item()


@pytest.mark.parametrize("changes, expected", [
    (dict(), 0.620957), (dict(loss="cdpo", label_smoothing=0.1), 0.635957), (dict(loss="ipo"), 12.25)])
def test_loss_of_a_pair(changes, expected):
    """A loss would be called by the name of another."""
    assert loss_of(-10, -12, -11, -11.5, beta=0.1, **changes) == pytest.approx(expected, abs=1e-5)
    assert loss_of(-10, -12, -11, -11.5, 1, 5, beta=0.1, **changes) == pytest.approx(expected, abs=1e-5)    # sums


def test_without_a_reference():
    """The reference-free loss is that of a reference which finds everything equally likely."""
    assert loss_of(-10, -12, beta=0.1) == pytest.approx(0.598139, abs=1e-5)


@pytest.mark.parametrize("beta, gamma, expected", [(2.0, 1.0, 0.913015), (2.5, 1.375, 1.053701)])
def test_simpo(beta, gamma, expected):
    """SimPO would not be per token, and length would be rewarded."""
    for n, k in ((1, 1), (2, 5)):
        got = loss_of(-0.5 * n, -0.8 * k, 7, 9, n, k, loss="simpo", beta=beta, gamma=gamma)
        assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss, at_zero, slope", [
    ("dpo", math.log(2), -0.05), ("cdpo", math.log(2), -0.04), ("ipo", 25.0, -10.0)])
def test_where_policy_and_reference_agree(loss, at_zero, slope):
    """Training would not start at ln 2 with a pull of half of beta up and down."""
    logps = torch.tensor([[-10.0], [-3.0]], requires_grad=True)
    got = preference_loss(*logps, torch.tensor([-10.0]), torch.tensor([-3.0]), 4, 2, loss=loss, beta=0.1,
                          label_smoothing=0.1)
    got.sum().backward()
    assert got.item() == pytest.approx(at_zero, abs=1e-5)
    assert logps.grad.flatten().tolist() == pytest.approx([slope, -slope], abs=1e-6)


def test_gradient_and_symmetry():
    """Pairs that are right already would pull as hard as those that are wrong; or the sign would be lost."""
    chosen = torch.tensor([-10.0], requires_grad=True)
    preference_loss(chosen, *torch.tensor([[-12.0], [-11.0], [-11.5]]), 1, 1, beta=0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.046257, abs=1e-6)
    assert loss_of(-12, -10, -11.5, -11, beta=0.1) == pytest.approx(0.620957 + 0.15, abs=1e-5)    # swapped: h -> -h
    with pytest.raises(ValueError, match="unknown loss"):
        loss_of(0, 0, loss="ppo")


# log-probs of answers


def load(files):
    return reward.load_pairs([files[1]], ENC, 96), load_model(load_checkpoint(files[0], ""), "cpu")[0]


def test_log_probs_are_sums_over_the_answer_and_its_end(files):
    """Prompts would be trained, the end not, or answers be averaged, which is another method."""
    pairs, model = load(files)
    got = answer_logprobs(model, pairs[:5], PAD, CPU)
    for i, pair in enumerate(pairs[:5]):
        for k, name in enumerate(("chosen", "rejected")):
            ids, n = pair[name], pair["n_prompt"]
            nats = model(torch.tensor([ids]))[0].log_softmax(-1)
            expected = sum(nats[t - 1, ids[t]].item() for t in range(n, len(ids)))
            assert ids[-1] == END and got[k, i].item() == pytest.approx(expected, abs=1e-4)


def test_log_probs_do_not_depend_on_padding_or_company(files):
    """The loss would depend on what a pair is batched with."""
    pairs, model = load(files)
    got = answer_logprobs(model, pairs[:5], PAD, CPU)
    alone = torch.cat([answer_logprobs(model, [pair], PAD, CPU) for pair in pairs[:5]], 1)
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, answer_logprobs(model, pairs[:5], 7, CPU), atol=1e-5, rtol=1e-5)
    longer = dict(pairs[5], chosen=pairs[5]["chosen"] + [END] * 30)
    torch.testing.assert_close(got, answer_logprobs(model, [*pairs[:5], longer], PAD, CPU)[:, :5], atol=1e-5, rtol=1e-5)


# the run


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_update_zero(files, tmp_path, lora_rank):
    """Policy and reference would not be the same model at the start: dropout, precision, padding, cached too late."""
    cfg = config(files, tmp_path / "a.pt", max_steps=1, device_batch_size=4, lora_rank=lora_rank)
    (grads,), _ = recorded(dpo.main, cfg)
    row = log_of(cfg.out, "loss")[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [row[k] for k in ("reward_chosen", "reward_rejected", "margin")] == pytest.approx([0] * 3, abs=1e-5)
    if not lora_rank:    # the gradient is beta / 2 times that of the difference of log-probs
        pairs, model = load(files)
        train, _ = reward.split_by_prompt(pairs, cfg.val_fraction, cfg.seed)
        batch = [train[dpo.pick(len(train), n, cfg.seed)] for n in range(6)]
        chosen, rejected = answer_logprobs(model, batch, PAD, CPU)
        ((rejected - chosen).sum() * 0.05 / 6).backward()
        torch.testing.assert_close(grads, [p.grad for p in model.parameters()], atol=1e-5, rtol=1e-4)


def test_equal_is_not_right(files, tmp_path):
    """Accuracy would start at a half, or at 1, before anything is learned."""
    pairs, model = load(files)
    logps = answer_logprobs(model, pairs[:4], PAD, CPU).detach()
    for pair, (chosen, rejected) in zip(pairs, logps.T.tolist()):
        pair.update(ref_chosen=chosen, ref_rejected=rejected)
    losses, metrics = dpo.losses_and_metrics(logps, pairs[:4], config(files, ""))
    values = dict(zip(dpo.NAMES, (metrics / 4).tolist()))
    assert values["accuracy"] == 0 and losses.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
    assert values["logps_chosen"] == pytest.approx(logps[0].mean().item()) and values["nll"] > 0    # raw log-probs


def test_the_nll_term_is_per_token_of_the_chosen_answer(files):
    """It would weigh long answers more, or pull the rejected ones up."""
    pairs, model = load(files)
    for pair in pairs:
        pair.update(ref_chosen=0.0, ref_rejected=0.0)
    logps = answer_logprobs(model, pairs[:4], PAD, CPU).detach()
    without, with_ = (dpo.losses_and_metrics(logps, pairs[:4], config(files, "", nll=nll))[0] for nll in (0.0, 0.3))
    n = torch.tensor([len(p["chosen"]) - p["n_prompt"] for p in pairs[:4]])
    torch.testing.assert_close(with_ - without, -0.3 * logps[0] / n, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss, beta", [("dpo", 0.5), ("cdpo", 0.5), ("ipo", 0.5), ("simpo", 2.0)])
def test_overfits_one_batch(files, tmp_path, loss, beta):
    """Some gradient would be missing or of the wrong sign: six pairs must be learnable by heart."""
    rows = [dict(prompt=f"{i}", chosen="ab"[i % 2], rejected="ba"[i % 2]) for i in range(7)]    # no rule but memory
    cfg = config(files, tmp_path / "a.pt", data=[write(tmp_path / "x.jsonl", rows)], loss=loss, beta=beta,
                 max_steps=50, learning_rate=2e-2)
    dpo.main(cfg)
    rows = log_of(cfg.out, "accuracy")
    assert rows[-1]["accuracy"] == 1.0 and rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[-1]["margin"] > 0.3 and {"logps_chosen", "logps_rejected", "nll", "grad_norm"} <= rows[-1].keys()


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_a_step_is_the_same_however_it_is_split(files, tmp_path, loss):
    """A smaller GPU would train another policy."""
    runs = [recorded(dpo.main, config(files, tmp_path / "a.pt", device_batch_size=size, max_steps=2, nll=0.1, loss=loss,
                                      learning_rate=1e-4))[0] for size in (6, 4, 1)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(), dict(lora_rank=2), dict(online=True)])
def test_two_processes_train_like_one(files, tmp_path, changes):
    """torchrun on two GPUs would train another policy, or its replicas would drift apart."""
    cfg = config(files, "", device_batch_size=2, learning_rate=1e-4, nll=0.1, **changes)
    assert_two_ranks_train_like_one(dpo.main, cfg, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(dropout=0.1), dict(lora_rank=2), dict(online=True)])
def test_killed_and_resumed_ends_with_the_same_bits(files, tmp_path, changes):
    """A run that was interrupted would be another experiment than one that was not."""
    cfg = config(files, "", max_steps=20, save_every=4, eval_every=8, **changes)
    assert_killed_and_resumed_is_the_same(dpo.main, cfg, tmp_path, kills=(5, 11))


@pytest.mark.parametrize("changes", [dict(), dict(lora_rank=2), dict(online=True)])
def test_reference_and_judge_are_frozen(files, tmp_path, monkeypatch, changes):
    """The yardstick would move with what it measures."""
    loaded = []
    for where in ("dpo.load_model", "reward.load_model"):    # the judge is loaded in reward.py
        monkeypatch.setattr(where, lambda *a: (loaded.append(load_model(*a)), loaded[-1])[1])
    dpo.main(config(files, tmp_path / "a.pt", weight_decay=0.1, **changes))
    frozen = [model for model, _ in loaded if not any(p.requires_grad for p in model.parameters())]
    assert len(frozen) == ("lora_rank" not in changes) + ("online" in changes)
    for model in frozen:
        assert same_bits(model.state_dict(), weights(files[2] if isinstance(model, ScalarHead) else files[0]))
    after, start = weights(tmp_path / "a.pt"), weights(files[0])
    moved = {k for k in start if not torch.equal(after[k], start[k])}
    assert moved and (not changes.get("lora_rank") or all(k.endswith("_proj.weight") for k in moved))


# online


def sampled(files, policy, judge_, step=0, **changes):
    cfg = config(files, "", **changes)
    prompts = dpo.load_prompts(cfg.prompts, ENC, 90)[:6]
    return dpo.sample_pairs(policy, judge_, prompts, ENC, cfg, CPU, step), prompts


class Judge(ScalarHead):
    """Scores a text by its length, with the sign of `score`."""

    def __init__(self, sign):
        super().__init__(tiny())
        self.sign = sign

    def forward(self, ids):
        return self.sign * torch.arange(ids.shape[1]).float().expand(ids.shape)


def test_the_better_answer_comes_first_and_unfinished_ones_never_win(files):
    """The policy would be trained towards what the judge dislikes, or towards never stopping."""
    policy = load(files)[1]
    for sign in (1, -1):
        lengths = []
        for step in range(6):
            (pairs, _), prompts = sampled(files, policy, Judge(sign), step)
            for pair in pairs:
                n = pair["n_prompt"]
                assert pair["chosen"][:n] == pair["rejected"][:n] and pair["chosen"] != pair["rejected"]
                assert pair["chosen"][-1] == END
                lengths += [len(pair["chosen"]) - len(pair["rejected"])] if pair["rejected"][-1] == END else []
        assert lengths and all(sign * n > 0 for n in lengths)


def test_online_answers_are_new_each_step(files):
    """The same samples would be ranked again and again."""
    policy, seen = load(files)[1], []
    for step in range(3):
        (pairs, _), _ = sampled(files, policy, judge(), step)
        seen += [tuple(pair[k]) for pair in pairs for k in ("chosen", "rejected")]
    (again, _), _ = sampled(files, policy, judge(), 2)
    assert [tuple(p[k]) for p in again for k in ("chosen", "rejected")] == seen[-2 * len(again):]
    assert len(set(seen)) > 0.7 * len(seen) > 5


def test_a_step_without_pairs_changes_nothing(files, tmp_path):
    """Where all sampled answers are equal, weight decay and momentum would still move the weights."""
    mute = save(tmp_path / "mute.pt", adjust(tiny(), [END], -50.0))    # says nothing and stops, always
    cfg = config((mute, *files[1:]), tmp_path / "a.pt", online=True, weight_decay=0.1)
    dpo.main(cfg)
    assert [row["pairs"] for row in log_of(cfg.out, "pairs")] == [0, 0, 0]
    assert same_bits(weights(cfg.out), weights(mute))


# what users do


def test_user_errors_are_one_line(files, tmp_path):
    """A mistake would end in a traceback, and the reader would not know what to do."""
    cfg = config(files, tmp_path / "a.pt", max_steps=1)
    change = lambda **kw: error(dpo.main, replace(cfg, **kw))
    assert "choose dpo, cdpo, ipo or simpo" in change(loss="ppo")
    assert "make it with: python sft.py" in change(init=str(tmp_path / "no.pt"))
    assert "make it with: python dpo.py" in change(resume=True)
    assert "is a reward model" in change(init=files[2])
    assert "is not a reward model" in change(online=True, reward=files[0])
    other = save(tmp_path / "other.pt", judge(), byte_encoding(shift=1))
    assert "another tokenizer" in change(online=True, reward=other)
    one = write(tmp_path / "one.jsonl", [dict(prompt="a", chosen="b", rejected="c")])
    assert "too few" in change(data=[one])
    assert "no row is usable" in change(data=[write(tmp_path / "none.jsonl", [dict(prompt="a", chosen="b",
                                                                                    rejected="b")])])
    dpo.main(cfg)
    assert "--lora_rank" in change(resume=True, lora_rank=2)


# the whole chain


@pytest.mark.slow
def test_the_whole_chain(tmp_path, monkeypatch):
    """Some stage would not read what the one before it wrote."""
    monkeypatch.setattr(sft, "peak_flops", lambda d: (1e12, "as good as any"))
    monkeypatch.setattr(pretrain, "peak_flops", lambda d: (1e12, "as good as any"))
    at = lambda name: str(tmp_path / name)
    (tmp_path / "raw.txt").write_text("\n".join(f"What is {q} It is {a}" for q, a, _ in sums(200)))
    pairs, shown = preferences(tmp_path / "pairs.jsonl"), demonstrations(tmp_path / "shown.jsonl")
    asked = write(tmp_path / "prompts.jsonl", [dict(prompt=q, answer=[a], expect="answer") for q, a, _ in sums(24)])
    few = dict(max_steps=2, precision="fp32", eval_every=100, save_every=100)
    prepare.main(prepare.Config(input=[at("raw.txt")], out=at("tokens"), tokenizer="bytes", clean=False, split="tail",
                                val_fraction=0.1))
    pretrain.main(pretrain.Config(data=[at("tokens")], out=at("base.pt"), n_layer=1, n_embd=32, n_head=2,
                                  block_size=96, total_batch_tokens=384, sample_tokens=0, **few))
    sft.main(sft.Config(init=at("base.pt"), data=[shown], out=at("sft.pt"), replay_data=at("tokens"), sample_tokens=8,
                        **few))
    reward.main(reward.Config(init=at("sft.pt"), data=[pairs], demonstrations=[shown], out=at("reward.pt"), **few))
    rl = dict(init=at("sft.pt"), data=[asked], batch_size=8, group_size=4, max_new_tokens=8, minibatches=2,
              **few)
    rlhf.main(rlhf.Config(reward=at("reward.pt"), out=at("ppo.pt"), **rl))
    rlhf.main(rlhf.Config(reward="verifier", algo="grpo", out=at("grpo.pt"), **rl))
    dpo.main(dpo.Config(init=at("sft.pt"), data=[pairs], out=at("dpo.pt"), **few))
    dpo.main(dpo.Config(init=at("ppo.pt"), data=[pairs], reward=at("reward.pt"), prompts=[asked], online=True,
                        batch_size=4, max_new_tokens=8, lora_rank=2, out=at("online.pt"), **few))
    ids = torch.arange(40)[None]
    for name in ("base", "sft", "reward", "ppo", "grpo", "dpo", "online"):
        model, enc = load_model(load_checkpoint(at(f"{name}.pt"), ""), "cpu")
        assert isinstance(model, ScalarHead if name == "reward" else GPT) and enc.n_vocab == 260
        assert model(ids).isfinite().all() and log_of(at(f"{name}.pt"), "seconds")
    with Reference(model) as plain:
        assert plain is model
