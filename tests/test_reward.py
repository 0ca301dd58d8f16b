"""Tests of reward.py. Run: python -m pytest tests/test_reward.py -q (CPU, no network, seconds).

Each docstring says what would be wrong with the world if the test failed.
"""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import reward
from common import (CPU, END, ENC, PAD, assert_killed_and_resumed_is_the_same, assert_two_ranks_train_like_one,
                    demonstrations, error, judge, log_of, preferences, recorded, same_bits, save, tiny, turn, weights,
                    write)
from model import ScalarHead, at_last, load_checkpoint, load_model, pad_batch, render_reply
from reward import Config, reward_loss

SMALL = dict(max_steps=4, batch_size=6, eval_every=100, save_every=100, learning_rate=3e-3, precision="fp32")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(checkpoint, pairs, demonstrations)"""
    folder = tmp_path_factory.mktemp("reward")
    return (save(folder / "sft.pt", tiny()), preferences(folder / "pairs.jsonl"), demonstrations(folder / "sft.jsonl"))


def config(files, out, **changes):
    return Config(init=files[0], demonstrations=[files[2]], out=str(out),
                  **{"overwrite": True, "data": [files[1]], **SMALL, **changes})


# the loss


@pytest.mark.parametrize("chosen, rejected, changes, expected", [
    (0.0, 0.0, {}, 0.693147), (1.0, 0.0, {}, 0.313262), (0.0, 1.0, {}, 1.313262), (2.0, 0.0, {}, 0.126928),
    (5.0, 5.0, dict(margin=1.0), 1.313262),
    (0.0, 0.0, dict(probability=0.6), 0.693147), (math.log(1.5), 0.0, dict(probability=0.6), 0.673012),
    (3.0, 0.0, dict(probability=0.6), 1.248587),
    (1.0, 2.0, dict(eta=0.01), 1.313262 + 0.09),
])
def test_loss_of_a_pair(chosen, rejected, changes, expected):
    """Margins, soft labels or centring would be something else than in the papers."""
    loss = reward_loss(torch.tensor([chosen]), torch.tensor([rejected]), **changes)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    shifted = reward_loss(torch.tensor([chosen + 7]), torch.tensor([rejected + 7]), **{**changes, "eta": 0.0})
    assert shifted.item() == pytest.approx(expected - (0.09 if "eta" in changes else 0), abs=1e-5)


@pytest.mark.parametrize("delta, gradient", [(0.0, -0.5), (1.0, -0.268941), (-1.0, -0.731059)])
def test_gradient_of_a_pair(delta, gradient):
    """Pairs that are right already would pull as hard as those that are wrong."""
    chosen, rejected = torch.tensor([delta], requires_grad=True), torch.zeros(1, requires_grad=True)
    reward_loss(chosen, rejected).sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((gradient, -gradient), abs=1e-6)


def test_three_ranked_answers_are_three_pairs():
    """A ranking would weigh otherwise than the mean over its pairs."""
    r = torch.tensor([2.0, 1.0, 0.0])
    assert reward_loss(r[[0, 0, 1]], r[[1, 2, 2]]).mean().item() == pytest.approx(0.251150, abs=1e-6)


# where the score is read


@pytest.mark.parametrize("width, std", [(64, 0.12403), (512, 0.04415), (768, 0.03606)])
def test_the_head_starts_small(width, std):
    """First scores would be far from unit size, and the first steps wasted on shrinking them."""
    torch.manual_seed(0)
    gpt = tiny(n_embd=width, n_layer=0)
    heads = torch.cat([ScalarHead(gpt).score.weight for _ in range(20)])
    assert heads.std().item() == pytest.approx(std, rel=0.06) and (width + 1) ** -0.5 == pytest.approx(std, abs=1e-5)
    assert ScalarHead(tiny()).score.bias.item() == 0


def test_the_score_is_read_at_the_last_real_token():
    """A text would be judged before its end, or by its padding."""
    scores = torch.arange(10.0).view(2, 5)
    ids, mask = pad_batch([[5, 6, 7], [5, 6, 7, 8, 9]], 0)
    assert at_last(scores, mask.sum(1).long()).tolist() == [2.0, 9.0]


def test_a_score_does_not_depend_on_padding_or_company():
    """The same answer would be good in one batch and bad in another."""
    model, rows = judge(), [[5, 6, 7], list(range(40)), [9] * 17]
    alone = torch.cat([reward.score(model, [row], PAD, CPU) for row in rows])
    torch.testing.assert_close(reward.score(model, rows, PAD, CPU), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reward.score(model, rows, 7, CPU), alone, atol=1e-5, rtol=1e-5)
    for size in (1, 2, 8):
        cfg = replace(Config(), device_batch_size=size)
        assert reward.score_all(model, rows, PAD, cfg, CPU) == pytest.approx(alone.tolist(), abs=1e-5)
    parts = [reward.score_all(model, rows, PAD, replace(Config(), device_batch_size=1),
                              replace(CPU, rank=rank, world_size=2)) for rank in range(2)]
    assert np.sum(parts, axis=0) == pytest.approx(alone.tolist(), abs=1e-5)    # each rank scores its own, 0 elsewhere


def test_scores_are_float32_under_bf16():
    """Scores would be rounded to 8 bits: ties where there are none, and demonstrations not centred."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = judge()(torch.arange(64)[None])
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


# data


def test_pairs_are_rendered_alike_and_scored_at_their_end():
    """Chosen and rejected would differ in the prompt, or not end with the token at which they are judged."""
    prompt = [turn("user", "Say <|im_end|>")]
    ids, mask = render_reply(ENC, prompt, "<|im_end|>")
    assert ids[-1] == END and ids.count(END) == 2 and sum(mask) == len("<|im_end|>") + 1


def test_load_pairs(tmp_path, capsys):
    """Pairs that teach nothing, or nonsense, would be trained on."""
    good = dict(prompt="Hi?", chosen="Yo <|im_end|>.", rejected="Go.", margin=0.5, probability=0.9, source="x")
    bad = [dict(good, rejected=good["chosen"]), dict(good, rejected=""), dict(good, chosen="long" * 30),
           dict(good, probability=1.5), dict(good, margin="inf"), dict(good, margin="much"), dict(good, prompt=""),
           dict(chosen="\n\nHuman: a\n\nAssistant: b", rejected="\n\nHuman: c\n\nAssistant: d"),
           dict(good, prompt=[turn("robot", "Hi")])]
    pairs = reward.load_pairs([write(tmp_path / "x.jsonl", [good, *bad])], ENC, 96)
    shown = capsys.readouterr().out
    assert "9 of 10 rows dropped" in shown
    for why in ("equal answers (1)", "empty answer (1)", "longer than 96 tokens (1)", "out of range (2)",
                "empty prompt (1)", "the prompts differ (1)", "unknown role 'robot' (1)"):
        assert why in shown
    (pair,) = pairs
    assert (pair["margin"], pair["probability"], pair["source"]) == (0.5, 0.9, "x")
    n = pair["n_prompt"]
    assert pair["chosen"][:n] == pair["rejected"][:n] and ENC.decode(pair["chosen"][:n]).endswith("assistant\n")
    assert ENC.decode(pair["chosen"][n:]) == "Yo <|im_end|>.<|im_end|>" and pair["rejected"][-1] == END
    assert pair["chosen"].count(END) == 2    # of the user and of the answer: text is never one


def test_no_prompt_is_both_trained_and_held_out():
    """The accuracy would be that of remembering."""
    pairs = [dict(prompt=str(i % 10), n=i) for i in range(50)]
    train, held_out = reward.split_by_prompt(pairs, 0.2, 1)
    assert len(held_out) == 10 and not {p["prompt"] for p in train} & {p["prompt"] for p in held_out}
    assert sorted(p["n"] for p in train + held_out) == list(range(50))


# statistics of the verdict


def test_interval_of_an_accuracy():
    """A lucky 8 of 10 would look like a proof."""
    assert reward.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert reward.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3) and reward.wilson(0, 0) == (0.0, 1.0)


def test_correlation():
    """Reward that follows length would go unnoticed, or a constant end in NaN."""
    assert reward.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert reward.correlation([1, 2, 3], [3, 3, 3]) == 0.0


class Judge(torch.nn.Module):
    """Scores a text with a rule, in the form of a reward model."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.config = rule, tiny().config

    def forward(self, ids):
        out = torch.zeros(ids.shape)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                out[b, t] = self.rule(row[:t + 1])
        return out


def answer(ids):
    """The text behind the last role header."""
    return ENC.decode(ids).rsplit("assistant\n", 1)[-1]


@pytest.mark.parametrize("rule, word", [
    (lambda ids: float(len(answer(ids))), "follows the length"),
    (lambda ids: -float(len(answer(ids))), "empty answers score better"),
    (lambda ids: 0.0, "not clearly above"),
    (lambda ids: 2.0 * answer(ids).count("."), "repeated answers score better"),
    (lambda ids: float(answer(ids).count(".") == 1 and ids[-1] == END), None),
])
def test_the_verdict_names_judges_that_are_not_fit(files, tmp_path, capsys, rule, word):
    """RL would be started with a reward model that loves length, silence or repetition."""
    pairs = reward.load_pairs([files[1]], ENC, 96)
    if word is None:    # answers of one length, as length must not help
        pairs = reward.load_pairs([write(tmp_path / "x.jsonl", [dict(prompt=f"{i}", chosen="yes.", rejected="nope")
                                                                for i in range(40)])], ENC, 96)
    report = reward.verdict(Judge(rule), pairs, ENC, Config(), CPU)
    shown = capsys.readouterr().out
    assert report["fit"] == (word is None) and ("NOT FIT" in shown) == (word is not None) and (word or "") in shown
    assert sum(report["margins"]) == 40 and report["accuracy_low"] <= report["val_accuracy"] <= report["accuracy_high"]
    shorter = [(len(p["chosen"]) < len(p["rejected"])) + (len(p["chosen"]) == len(p["rejected"])) / 2 for p in pairs]
    assert report["length_only"] == pytest.approx(max(sum(shorter), 40 - sum(shorter)) / 40)


def test_ties_are_not_right(files):
    """A model that says nothing would be right half of the time, or always."""
    report = reward.validate(Judge(lambda ids: 1.0), reward.load_pairs([files[1]], ENC, 96), PAD, Config(), CPU)[0]
    assert report["val_accuracy"] == 0.0 and report["val_loss"] == pytest.approx(math.log(2), abs=1e-6)


# the run


def test_it_learns_and_demonstrations_score_zero(files, tmp_path):
    """The loop would run and not train; or the scores would have an offset that RL mistakes for praise."""
    cfg = config(files, tmp_path / "a.pt", max_steps=30, batch_size=8, eval_every=10)
    report = reward.main(cfg)
    assert report["val_accuracy"] == 1.0 and report["val_loss"] < 0.1
    log = log_of(cfg.out)
    assert {"loss", "accuracy", "margin", "score", "lr", "grad_norm", "seconds"} <= log[1].keys()
    assert log[-1]["fit"] == report["fit"] and "calibration" in log[-1]
    model, enc = load_model(load_checkpoint(cfg.out, ""), "cpu")
    rows = [render_reply(enc, r["messages"][:-1], r["messages"][-1]["content"])[0]
            for r in reward.read_rows([files[2]])]
    scores = reward.score_all(model, rows, PAD, cfg, CPU)
    assert np.mean(scores) == pytest.approx(0, abs=1e-5) and np.std(scores) > 0.01


def test_overfits_one_batch(files, tmp_path):
    """Some gradient would be missing or of the wrong sign: six pairs must be learnable by heart."""
    rows = [dict(prompt=f"{i}", chosen="ab"[i % 2], rejected="ba"[i % 2]) for i in range(6)]    # no rule but memory
    file = write(tmp_path / "x.jsonl", rows)
    reward.main(config(files, tmp_path / "a.pt", data=[file], val_data=[file], max_steps=60, batch_size=6))
    assert log_of(tmp_path / "a.pt", "val_loss")[-1]["val_loss"] < 0.05


def test_the_head_is_made_by_the_seed(files, tmp_path):
    """Nobody could repeat an experiment."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        reward.main(config(files, tmp_path / f"{name}.pt", seed=seed, max_steps=1))
    a, b, c = (weights(tmp_path / f"{name}.pt") for name in "abc")
    assert same_bits(a, b) and not torch.equal(a["score.weight"], c["score.weight"])


def test_a_step_is_the_same_however_it_is_split(files, tmp_path):
    """A smaller GPU would train another reward model."""
    runs = [recorded(reward.main, config(files, tmp_path / "a.pt", device_batch_size=size, max_steps=2,
                                         learning_rate=1e-4))[0] for size in (6, 4, 1)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_two_processes_train_like_one(files, tmp_path, lora_rank):
    """torchrun on two GPUs would train another model, or its replicas would drift apart."""
    cfg = config(files, "", max_steps=3, device_batch_size=2, learning_rate=1e-3, lora_rank=lora_rank)
    assert_two_ranks_train_like_one(reward.main, cfg, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_killed_and_resumed_ends_with_the_same_bits(files, tmp_path, lora_rank):
    """A run that was interrupted would be another experiment than one that was not."""
    cfg = config(files, "", max_steps=24, save_every=4, eval_every=10, dropout=0.1, lora_rank=lora_rank)
    assert_killed_and_resumed_is_the_same(reward.main, cfg, tmp_path)


def test_resuming_a_finished_run_changes_nothing(files, tmp_path):
    """Every --resume would shift the scores a little."""
    cfg = config(files, tmp_path / "a.pt")
    reward.main(cfg)
    before = weights(cfg.out)
    reward.main(replace(cfg, resume=True))
    assert same_bits(weights(cfg.out), before)


def test_user_errors_are_one_line(files, tmp_path):
    """A mistake would end in a traceback, and the reader would not know what to do."""
    cfg = config(files, tmp_path / "a.pt", max_steps=1)
    change = lambda **kw: error(reward.main, replace(cfg, **kw))
    assert "make it with: python sft.py" in change(init=str(tmp_path / "no.pt"))
    assert "make it with: python reward.py" in change(resume=True)
    one = write(tmp_path / "one.jsonl", [dict(prompt="a", chosen="b", rejected="c")])
    assert "there must be 2 pairs" in change(data=[one])
    assert "no row is usable" in change(data=[write(tmp_path / "none.jsonl", [dict(prompt="a", chosen="b")])])
    reward.main(cfg)
    assert "--lora_rank" in change(resume=True, lora_rank=2)
