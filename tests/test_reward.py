"""Tests of reward.py, of pairs and of scores. Run: python -m pytest tests/test_reward.py -q"""
import math
import re
from dataclasses import replace

import pytest
import torch
from common import (CPU, END, ENC, PAD, Rule, error, judge, load, log_of, save, tiny, turn,
                    write)

import model as m
import reward
from model import ScalarHead, load_pairs, score_all, score_texts
from reward import reward_loss


@pytest.mark.parametrize("chosen, rejected, changes, expected, slope", [
    (0.0, 0.0, {}, 0.693147, -0.5), (1.0, 0.0, {}, 0.313262, -0.268941),
    (0.0, 1.0, {}, 1.313262, -0.731059), (2.0, 0.0, {}, 0.126928, -0.119203),
    (5.0, 5.0, dict(margin=1.0), 1.313262, -0.731059),
    (0.0, 0.0, dict(probability=0.6), 0.693147, -0.1),
    (math.log(1.5), 0.0, dict(probability=0.6), 0.673012, 0.0),
    (3.0, 0.0, dict(probability=0.6), 1.248587, 0.352574),
    (1.0, 2.0, dict(eta=0.01), 1.313262 + 0.09, -0.731059 + 0.06)])
def test_loss_of_a_pair(chosen, rejected, changes, expected, slope):
    """Worked values and slopes by chosen: plain, margin, soft label, centring."""
    chosen, rejected = torch.tensor([chosen], requires_grad=True), torch.tensor([rejected])
    loss = reward_loss(chosen, rejected, **changes)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert chosen.grad.item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("width, std", [(64, 0.12403), (512, 0.04415), (768, 0.03606)])
def test_the_head_starts_small(width, std):
    """Weights ~ N(0, 1/(C + 1)), so that first scores are about 1; bias 0."""
    torch.manual_seed(0)
    gpt = tiny(n_embd=width, n_layer=0)
    heads = [ScalarHead(gpt).score for _ in range(20)]
    assert torch.cat([h.weight for h in heads]).std().item() == pytest.approx(std, rel=0.06)
    assert heads[0].bias.item() == 0


def test_a_score_is_of_the_last_token_and_does_not_depend_on_company():
    """The same alone, padded with any id, in any order and batch size."""
    model, rows = judge(), [[5, 6, 7], list(range(40)), [9] * 17]
    alone = [model(torch.tensor([row]))[0, -1].item() for row in rows]
    for pad in (PAD, 7):
        got = score_texts(model, rows, pad, CPU).tolist()
        assert got == pytest.approx(alone, abs=1e-5)
    for size in (1, 2, 8):
        assert score_all(model, rows, PAD, size, CPU) == pytest.approx(alone, abs=1e-5)


def test_scores_are_float32_under_bf16():
    """Not rounded to 8 bits, which would make ties."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = judge()(torch.arange(64)[None])
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


def test_load_pairs(tmp_path, capsys):
    """Both answers behind the same prompt, up to their end token; what teaches nothing is named."""
    good = dict(prompt="Hi?", chosen="Yo <|im_end|>.", rejected="Go.", margin=0.5, probability=0.9,
                source="x")
    bad = [dict(good, rejected=""), dict(good, chosen="long" * 30), dict(good, probability=1.5),
           dict(good, rejected="long" * 30), dict(good, margin="inf"), dict(good, margin="much")]
    pair, = load_pairs([write(tmp_path / "x.jsonl", [good, *bad])], ENC, 96)
    shown, n = capsys.readouterr().out, pair["n_prompt"]
    for why in ("6 of 7 rows dropped", "empty answer, or no chosen or rejected (1, first row 2)",
                "out of range (2, first row 4)", "96 tokens (2, first row 3)"):
        assert why in shown
    assert (pair["margin"], pair["probability"], pair["source"]) == (0.5, 0.9, "x")
    assert pair["chosen"][:n] == pair["rejected"][:n]
    assert ENC.decode(pair["chosen"][:n]).endswith("assistant\n")
    assert ENC.decode(pair["chosen"][n:]) == "Yo <|im_end|>.<|im_end|>"
    assert pair["rejected"][-1] == END and pair["chosen"].count(END) == 2    # text is never one
    other = dict(prompt="Hi?", chosen="bad", rejected="good", probability=0.25, margin=-1.0)
    pair, = load_pairs([write(tmp_path / "p.jsonl", [other])], ENC, 96)    # the other is better
    assert ENC.decode(pair["chosen"]).endswith("good<|im_end|>")
    assert (pair["probability"], pair["margin"]) == (0.75, 1.0)


def test_no_prompt_is_both_trained_and_held_out():
    """Else accuracy would be that of remembering; nothing is lost."""
    pairs = [dict(prompt=str(i % 10), n=i) for i in range(50)]
    train, held_out = m.split_by_prompt(pairs, 0.2, 1)
    assert len(held_out) == 10
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in held_out}
    assert sorted(p["n"] for p in train + held_out) == list(range(50))


@pytest.mark.parametrize("rule, word", [
    (lambda text, ended: len(text), "follows the length"),
    (lambda text, ended: -len(text), "empty answers score better"),
    (lambda text, ended: 0, "not clearly above"),
    (lambda text, ended: text.count("."), "repeated answers score better"),
    (lambda text, ended: text.count(".") == 1 and ended, None)])
def test_the_verdict_names_judges_that_are_not_fit(files, tmp_path, capsys, rule, word):
    """Judges that love length, silence or repetition are unfit; one that is right is fit."""
    pairs = load_pairs([files["pairs"]], ENC, 96)
    if word is None:    # answers of one length, as length must not help
        rows = [dict(prompt=str(i), chosen="yes.", rejected="nope") for i in range(40)]
        pairs = load_pairs([write(tmp_path / "x.jsonl", rows)], ENC, 96)
    found = reward.verdict(Rule(rule), pairs, ENC, reward.Config(), CPU)
    reward.print_verdict(found, len(pairs))
    shown = capsys.readouterr().out
    assert ("NOT FIT" in shown) == bool(found["unfit"]) == (word is not None)
    assert (word or "fit to guide RL") in shown
    assert found["accuracy_low"] <= found["val_accuracy"] <= found["accuracy_high"]
    longer = [len(pair["rejected"]) - len(pair["chosen"]) for pair in pairs]
    shorter = sum((n > 0) + (n == 0) / 2 for n in longer)
    assert found["length_only"] == pytest.approx(max(shorter, 40 - shorter) / 40)
    if word == "not clearly above":    # ties are not right
        assert found["val_accuracy"] == 0 and found["val_loss"] == pytest.approx(math.log(2))
    assert found["by_source"] == {"all": [pytest.approx(found["val_accuracy"]), 40]}


def test_it_learns(short):
    """All held-out pairs right, the verdict in the log's last line; scores do not drift off."""
    cfg = short(reward, max_steps=30, batch_size=8, eval_every=10, learning_rate=3e-3)
    found = reward.main(cfg)
    assert found["val_accuracy"] == 1 and found["val_loss"] < 0.1
    log = log_of(cfg.out)
    assert {"loss", "accuracy", "margin", "score", "lr", "grad_norm", "seconds"} <= log[1].keys()
    assert log[-1]["unfit"] == found["unfit"] and log[-1]["scores"].keys() == found["scores"].keys()


def test_the_first_loss(short, tmp_path):
    """By hand of the six pairs of the step, with margin, soft label and centring."""
    rows = [dict(prompt=str(i), chosen="a" * i, rejected="b", margin=i / 9, probability=1 - i / 20)
            for i in range(1, 9)]
    cfg = short(reward, data=[write(tmp_path / "x.jsonl", rows)], max_steps=1, eta=0.3)
    reward.main(cfg)
    gpt = load(cfg.init)
    torch.manual_seed(cfg.seed)
    model, (train, _) = ScalarHead(gpt), m.split_by_prompt(load_pairs(cfg.data, ENC, 96), 0.15, 1)
    expected = 0.0
    for i in range(6):
        pair = train[m.nth_of_epochs(len(train), i, cfg.seed)]
        chosen, rejected = score_texts(model, [pair["chosen"], pair["rejected"]], PAD, CPU)
        loss = reward_loss(chosen, rejected, pair["margin"], pair["probability"], 0.3)
        expected += loss.item() / 6
    assert log_of(cfg.out, "loss")[0]["loss"] == pytest.approx(expected, abs=1e-5)


# AI feedback


def test_the_letter_a_judge_prefers():
    """p(A) of A and B alone, by a forward of its own for each request."""
    model, texts = tiny(), ["A or B?", "x" * 40 + "?", "Which one, A or B?"]
    requests = [m.render_chat(ENC, [turn("user", text)], reply=True)[0] for text in texts]
    got = reward.prefers_a(model, requests, ENC, reward.Config(device_batch_size=2), CPU)
    for ids, p in zip(requests, got):
        logits = model(torch.tensor([ids]))[0, -1]
        assert p == pytest.approx(logits[[65, 66]].softmax(0)[0].item(), abs=1e-5)


def test_equal_texts_have_equal_scores(monkeypatch):
    """Also in bf16, where the width of a batch is felt: GRPO leaves groups of equal answers out."""
    torch.manual_seed(1)
    texts = [list(range(5, 9))] * 4 + [list(range(5, 5 + n)) for n in (60, 40, 9, 3)]
    env = replace(CPU, dtype=torch.bfloat16)
    model, batches = judge(), []
    monkeypatch.setattr(m, "score_texts", lambda model, part, *a: batches.append(part)
                        or score_texts(model, part, *a))
    scores = score_all(model, texts, PAD, 3, env)
    assert len(set(scores[:4])) == 1 and sum(map(len, batches)) == 5


def test_answers_that_do_not_end_are_not_judged(monkeypatch):
    """They would be shown, and learned, as whole ones."""
    found = [[65, END], [66, 67], [END], [68, 69, END]]
    monkeypatch.setattr(reward, "complete", lambda *_, **__: found)
    prompts = [dict(ids=[1])] * 2
    texts = reward.two_answers(None, prompts, range(2), ENC, reward.Config(), CPU)
    assert texts == [("A", ""), ("", "DE")]


@pytest.mark.parametrize("by_position", [False, True])
def test_feedback(short, files, tmp_path, monkeypatch, capsys, function, by_position):
    """Pairs carry the mean over both orders, which leaves nothing of a love for one position; such
    a judge is named, on the console and in the labels. What it cannot read whole is left out."""
    def prefers_a(judge, requests, *_):
        texts = list(map(ENC.decode, requests))
        assert all("user\nPrinciple: Be kind.\nuser: " in text for text in texts)
        sides = [re.search(r"\nA: (.*)\nB: (.*)\nWhich", text).groups() for text in texts]
        return [0.9 if by_position or a < b else 0.2 for a, b in sides]
    monkeypatch.setattr(reward, "prefers_a", prefers_a)
    (tmp_path / "law.txt").write_text("\nBe kind.\n")
    gold = function("return [-ord((c + '~')[0]) for c in completions]")
    for name, block_size in (("short", 96), ("long", 512)):
        save(tmp_path / f"{name}.pt", tiny(block_size=block_size))
    cfg = short(reward, init=files["policy"], feedback=str(tmp_path / "long.pt"), gold=gold,
                prompts=[files["prompts"]], constitution=str(tmp_path / "law.txt"))
    reward.main(cfg)
    rows, shown = m.read_rows([tmp_path / "a.feedback.jsonl"]), capsys.readouterr().out
    assert all(row["chosen"] != row["rejected"] for row in rows) and 5 < len(rows) < 24
    expected = [0.5 if by_position else 0.85 if row["chosen"] < row["rejected"] else 0.15
                for row in rows]
    assert [row["probability"] for row in rows] == pytest.approx(expected)
    assert {row["source"] for row in rows} == {"position" if by_position else "feedback"}
    assert ("USELESS" in shown) == by_position
    assert ("orders 100.0%, prefers" in shown) == ("agrees on 100.0%" in shown) == (not by_position)
    cfg = replace(cfg, feedback=str(tmp_path / "short.pt"), overwrite=True)
    assert "can compare in 96 tokens" in error(reward.main, cfg)


def test_shares_of_the_ranks_come_back_in_order(monkeypatch):
    """Of seven items on three ranks, and of one: some ranks have none."""
    ranks = [CPU.__class__(rank, 3, CPU.device, None, rank == 0) for rank in range(3)]
    for items in (list(range(7)), [5]):
        shares = [[-x for x in items[rank::3]] for rank in range(3)]
        monkeypatch.setattr(m.dist, "all_gather_object",
                            lambda every, found: every.__setitem__(slice(None), shares))
        for env in ranks:
            assert m.share_out(lambda part: [-x for x in part], items, env) == [-x for x in items]
