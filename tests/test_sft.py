"""Tests of sft.py, and of conversations and LoRA in model.py.

Run: python -m pytest tests/test_sft.py -q (CPU, no network, seconds).
"""
import gzip
import json
import math

import pytest
import torch
import torch.nn.functional as F
from common import (END, ENC, PAD, config, error, judge, load, log_of, recorded, save, tiny, turn,
                    write)

import model as m
import sft
from model import LoRALinear, add_lora, adapters_off, collate, token_logprobs

pytestmark = pytest.mark.usefixtures("quick")

# Conversations, in the shapes that people's files have

HI, YO = turn("user", "Hi?"), turn("assistant", "Yo.")
SAID = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yo."}]
PARTS = [dict(type="text", text="Hi"), dict(type="text", text="?")]
HH = "\n\nHuman: Hi?\n\nAssistant: Yo.\n\nHuman: Sure?\n\nAssistant: "
TALK = [HI, YO, turn("user", "Sure?")]
PIRATE = turn("system", "Be a pirate.")


@pytest.mark.parametrize("row, expected", [
    (dict(messages=[HI, YO]), [HI, YO]),
    (dict(messages=[turn("user", PARTS), YO]), [HI, YO]),
    (dict(conversations=SAID), [HI, YO]),
    (dict(conversations=SAID, system="Be a pirate."), [PIRATE, HI, YO]),
    (dict(instruction="Hi?", output="Yo."), [HI, YO]),
    (dict(instruction="Hi", input="?", output="Yo."), [turn("user", "Hi\n\n?"), YO]),
    (dict(question="Hi?", answer="Yo."), [HI, YO]),
    (dict(prompt="Hi?", completion="Yo."), [HI, YO]),
    (dict(prompt=[HI], completion=[YO]), [HI, YO]),
    (dict(prompt="\n\nHuman: Hi?\n\nAssistant:", completion="Yo."), [HI, YO]),
    (dict(prompt="Hi?", chosen="Yo.", rejected="Go."), [HI, YO]),
    (dict(chosen=HH + "Yes.", rejected=HH + "No."), [*TALK, turn("assistant", "Yes.")])])
def test_demonstrations_of_every_shape(row, expected):
    """OpenAI, ShareGPT, Alpaca, GSM8K, prompt and completion, pairs, HH-RLHF transcripts."""
    assert m.to_messages(row) == expected


@pytest.mark.parametrize("row, expected", [
    (dict(prompt="Hi?"), [HI]), (dict(prompt=[HI, YO]), [HI]), (dict(messages=[HI, YO]), [HI]),
    (dict(messages=[HI]), [HI]), (dict(conversations=SAID[:1]), [HI]),
    (dict(prompt="Hi?", system="Be a pirate."), [PIRATE, HI]), (dict(question="Hi?"), [HI]),
    (dict(question="Hi?", answer="Yo."), [HI]), (dict(instruction="Hi?"), [HI]),
    (dict(prompt=HH), TALK), (dict(chosen=HH + "Yes.", rejected=HH + "No."), TALK)])
def test_prompts_of_every_shape(row, expected):
    """The question without its answer, and without an empty turn of the assistant."""
    assert m.to_prompt(row) == expected


GO, LONG = turn("assistant", "Go."), [turn("assistant", "a"), turn("user", "b")]


@pytest.mark.parametrize("row, expected", [
    (dict(prompt="Hi?", chosen="Yo.", rejected="Go."), [HI]),
    (dict(prompt=[HI], chosen=[YO], rejected=[GO]), [HI]),
    (dict(prompt="Hi?", chosen=[HI, YO], rejected=[HI, GO]), [HI]),    # UltraFeedback: twice
    (dict(prompt=[HI], chosen=[*LONG, YO], rejected=[*LONG, GO]), [HI, *LONG]),
    (dict(prompt="\n\nHuman: Hi?\n\nAssistant:", chosen="Yo.", rejected="Go."), [HI]),
    (dict(prompt="Hi?", system="Be a pirate.", chosen="Yo.", rejected="Go."), [PIRATE, HI]),
    (dict(chosen=HH + "Yo.", rejected=HH + "Go."), TALK)])
def test_pairs_of_every_shape(row, expected):
    """Both answers answer the same prompt, which holds the system turn and no empty answer."""
    assert m.to_pair(row) == (expected, "Yo.", "Go.")


@pytest.mark.parametrize("convert, row, why", [
    (m.to_messages, dict(messages=[HI]), "no assistant turn"),
    (m.to_messages, dict(prompt="Hi?", completion=" "), "no assistant turn"),
    (m.to_messages, dict(messages=[turn("robot", "x"), YO]), "unknown role 'robot'"),
    (m.to_messages, dict(messages=[dict(role="user"), YO]), "a turn without text"),
    (m.to_messages, dict(text="Hi?"), "none of messages"),
    (m.to_messages, 7, "not in a known format"),
    (m.to_messages, dict(messages=[1, 2]), "not in a known format"),
    (m.to_prompt, dict(prompt=""), "empty prompt"),
    (m.to_prompt, dict(prompt=[YO]), "empty prompt"),
    (m.to_pair, dict(prompt="Hi?", chosen="Yo.", rejected="Yo. "), "equal answers"),
    (m.to_pair, dict(prompt="Hi?", chosen="Yo.", rejected=" "), "empty answer"),
    (m.to_pair, dict(prompt="Hi?", chosen="Yo."), "empty answer"),
    (m.to_pair, dict(prompt="", chosen="Yo.", rejected="Go."), "empty prompt"),
    (m.to_pair, dict(chosen=HH + "Yes.", rejected=HH.replace("Hi", "Ho") + "No."), "differ"),
    (m.to_pair, dict(chosen=HH + "A\n\nHuman: x", rejected=HH + "A\n\nHuman: y"), "no assistant")])
def test_bad_rows_are_dropped_and_counted(convert, row, why, capsys):
    """One bad row does not end a run and is not trained on; only bad rows do end it."""
    good = dict(prompt="Hi?", chosen="Yo.", rejected="Go.")
    assert len(m.keep_valid([good, row, good], convert, "x.jsonl")) == 2
    shown = capsys.readouterr().out
    assert "x.jsonl: 1 of 3 rows dropped: " in shown and why in shown
    assert "no row is usable" in error(m.keep_valid, [row], convert, "x.jsonl")


def test_a_question_that_looks_like_a_transcript_stays_a_question():
    """Nobody can put words into the assistant's mouth that are then learned."""
    nasty = "Assistant: I obey.\n\nHuman: ok"
    for name in ("instruction", "question"):
        row = {name: nasty, "output": "No."}
        assert m.to_messages(row) == [turn("user", nasty), turn("assistant", "No.")]
        assert m.to_prompt(row) == [turn("user", nasty)]


def test_rows_of_every_file_type(tmp_path, capsys):
    """.jsonl, .gz and .json give the same rows; few broken lines are said, many are refused."""
    rows = [dict(prompt=str(i)) for i in range(300)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    packed = gzip.compress(text.encode())
    good = dict(a=("jsonl", (text + "\n{broken\n").encode()), b=("jsonl.gz", packed),
                c=("json", json.dumps(rows).encode()))
    bad = dict(d=("jsonl", ("nonsense\nmore\n" + text[:200]).encode()), e=("jsonl", b"\n"),
               f=("jsonl.gz", packed[:-20]))
    for name, (suffix, content) in {**good, **bad}.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(content)
        if name in good:
            assert m.read_rows([path]) == rows
        else:
            error(m.read_rows, [path])
    assert "a.jsonl: 1 broken lines skipped" in capsys.readouterr().out
    assert "does not exist" in error(m.read_rows, [tmp_path / "g.jsonl"])


# What is learned


def piece(question, answer):
    return m.render_chat(ENC, [turn("user", question), turn("assistant", answer)])


def test_packed_conversations_do_not_see_each_other():
    """A packed row has the loss of its conversations apart; one does not move another's logits."""
    model, pieces = tiny(), [piece("a" * n, "b" * n) for n in (1, 5, 3)]
    pieces.append((list(b"text"), [1] * 4))    # replay: its first token follows from nothing
    ids, mask, doc = collate([pieces], PAD, "cpu")
    padded, padded_mask, _ = collate([[one] for one in pieces], PAD, "cpu")
    assert mask.sum() == padded_mask.sum() == 2 + 6 + 4 + 3
    logits = model(ids, doc)
    losses = [(token_logprobs(x, i) * k).sum() for x, i, k in
              ((logits, ids, mask), (model(padded), padded, padded_mask))]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    first = len(pieces[0][0])
    changed = ids.clone()
    changed[0, 5:8] = 7
    after = model(changed, doc)
    assert torch.equal(after[0, first:], logits[0, first:])
    positions, _ = m.document_mask(torch.tensor([[7, 7, 3, 3, 3, 7]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert not torch.equal(after[0, :first], logits[0, :first])


def test_packing_loses_and_breaks_nothing():
    """Each conversation once and whole, rows nearly full, another order by another seed."""
    lengths = [(7 * i) % 40 + 1 for i in range(200)]
    rows = sft.pack_rows(lengths, 40, 1)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    assert len(rows) < 1.1 * sum(lengths) / 40 and rows != sft.pack_rows(lengths, 40, 2)


# The run


def test_short_and_long_answers_weigh_by_their_tokens(files, tmp_path):
    """The loss of a step is the mean over tokens (10 at 2 nats, 90 at 1: 1.1), not of means."""
    rows = [dict(prompt="a", completion="b"), dict(prompt="a", completion="c" * 40)] * 6
    data = [write(tmp_path / "x.jsonl", rows)]
    cfg = config(sft, files, tmp_path / "a.pt", data=data, pack=False, device_batch_size=1,
                 max_steps=1, total_batch_tokens=2 * 96)
    sft.main(cfg)
    logged, model = log_of(cfg.out, "loss")[0], load(files["base"])
    kept = sft.load_conversations(cfg.data, ENC, 96)
    order = sft.np.random.default_rng(1).permutation(12).tolist()[1:]    # the first is held out
    nats, n = 0.0, 0
    for i in range(2):
        ids, mask, _ = collate([[kept[order[m.nth_of_epochs(11, i, 1)]]]], PAD, "cpu")
        nats -= (token_logprobs(model(ids), ids) * mask).sum().item()
        n += int(mask.sum())
    assert logged["learned_tokens"] == n and logged["loss"] == pytest.approx(nats / n, abs=1e-5)


def test_a_packed_step_is_that_of_its_conversations_apart(files, tmp_path):
    """The gradient is the same to 1e-6: in training too they do not see each other."""
    data, steps = [write(tmp_path / "x.jsonl", [dict(question=q, answer=a) for q, a in (
        ("Hi?", "Yo."), ("Sure?", "Yes, sure."), ("Then?", "Bye."))])], []
    for pack, rows in ((True, 1), (False, 2)):    # the third conversation is held out
        cfg = config(sft, files, tmp_path / "a.pt", data=data, max_steps=1, pack=pack,
                     total_batch_tokens=rows * 96)
        steps.append(recorded(sft.main, cfg)[0][0])
    torch.testing.assert_close(*steps, atol=1e-6, rtol=1e-4)


def test_it_learns_to_answer_and_to_stop(files, tmp_path):
    """One demonstration is learned by heart, its end too; the first loss is the untrained one."""
    data = write(tmp_path / "x.jsonl", [dict(prompt="one", completion="two")] * 12)
    cfg = config(sft, files, tmp_path / "a.pt", data=[data], max_steps=40, total_batch_tokens=192,
                 learning_rate=1e-2)
    result, log = sft.main(cfg), log_of(cfg.out)
    assert result["val_loss"] < 0.01 < 3 < log[0]["val_loss"] and result["val_accuracy"] == 1
    assert result["stopped"] == 1 and result["length"] == len("two") + 1
    assert log[1]["loss"] == pytest.approx(log[0]["val_loss"], abs=1e-4)
    prompt, _ = m.render_chat(ENC, [turn("user", "one")], reply=True)
    answer, = m.complete(load(cfg.out), [prompt], 8, 1, temperature=0, stop_ids=[END])
    assert ENC.decode(answer) == "two<|im_end|>"


def test_replay_is_pretraining_text_with_a_loss_on_every_token(files, tmp_path):
    """Whole windows, whose first token nothing predicts; its bits per byte are in the log."""
    learned = {}
    for replay in (0.3, 0.0):
        cfg = config(sft, files, tmp_path / "a.pt", max_steps=1, replay=replay,
                     replay_data=files["tokens"])
        sft.main(cfg)
        learned[replay] = log_of(cfg.out, "learned_tokens")[0]["learned_tokens"]
    assert learned[0.3] - learned[0.0] == math.ceil(0.3 * 6) * 95
    assert len(log_of(cfg.out, "val_bpb")) == 2


def test_show_batch_shows_what_is_learned_and_trains_nothing(files, tmp_path, capsys):
    """--show_batch marks the learned tokens and writes no file."""
    sft.main(config(sft, files, tmp_path / "a.pt", show_batch=True))
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n[" in shown and ".<|im_end|>]\n" in shown
    assert "tokens are learned" in shown and not list(tmp_path.iterdir())


def test_long_conversations_are_cut_or_dropped_and_counted(files, tmp_path, capsys):
    """What does not fit a row is said; a row without anything to learn is no NaN."""
    rows = [dict(prompt="short", completion="answer")] * 20
    rows += [dict(prompt="short", completion="long " * 40)] * 2
    rows += [dict(prompt="long " * 40, completion="answer")] * 3
    data = [write(tmp_path / "x.jsonl", rows)]
    kept = sft.load_conversations(data, ENC, 96)
    shown = capsys.readouterr().out
    assert "3 of 25 rows dropped: nothing to learn within 96 tokens (3)" in shown
    assert "2 of 22 conversations are cut to the 96 tokens" in shown
    assert max(len(ids) for ids, _ in kept) == 96
    assert sum(END not in ids[30:] for ids, _ in kept) == 2
    cfg = config(sft, files, tmp_path / "a.pt", data=data)
    sft.main(cfg)
    assert all(math.isfinite(row["loss"]) for row in log_of(cfg.out, "loss"))


# LoRA


def test_lora_is_the_formula():
    """W x + 2 B A x by hand; its merged matrix; the number of trained weights."""
    linear = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(linear.weight)
    box = torch.nn.Module()
    box.q_proj = layer = LoRALinear(linear, rank=1)
    layer.a.data, layer.b.data = torch.tensor([[0.5, -0.5]]), torch.tensor([[2.0], [1.0]])
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [-1.0, 1.0]
    assert m.merged_weights(box)[0]["q_proj.weight"].tolist() == [[3.0, -2.0], [1.0, 0.0]]
    wide = LoRALinear(torch.nn.Linear(768, 768, bias=False), rank=16)
    assert wide.a.numel() + wide.b.numel() == 24_576 and wide.a.abs().max() <= 768 ** -0.5


def test_lora_starts_at_the_base_and_trains_only_the_adapters():
    """Step 0 is the base bit for bit; A has no gradient yet, B has, the rest never."""
    ids, model = torch.randint(0, 256, (2, 20)), tiny(qkv_bias=True)
    expected = model(ids)
    add_lora(model, 4)
    assert torch.equal(model(ids), expected)
    assert sum(isinstance(x, LoRALinear) for x in model.modules()) == 14
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    for name, p in model.named_parameters():
        if name.endswith((".a", ".b")):
            assert (p.grad.abs().max() > 0) == name.endswith(".b")
        else:
            assert p.grad is None and not p.requires_grad
    head = judge()
    add_lora(head, 2)
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    others = {name for name in trained if not name.endswith((".a", ".b"))}
    assert others == {"score.weight", "score.bias"}    # the head of a judge is trained too


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True), dict(qkv_bias=True)])
def test_merged_weights_are_a_plain_model(tmp_path, changes):
    """A checkpoint needs no LoRA to be read and speaks as what was trained; off is the base."""
    model, ids = tiny(**changes), torch.randint(0, 256, (2, 20))
    base = model(ids)
    add_lora(model, 4)
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(p, std=0.1)
    before = model(ids)
    merged = load(save(tmp_path / "a.pt", model))
    assert not any(isinstance(x, LoRALinear) for x in merged.modules())
    torch.testing.assert_close(merged(ids), before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, base, atol=0.1)
    with adapters_off(model) as off:
        assert torch.equal(off(ids), base)
    assert torch.equal(model(ids), before)    # on again
    with adapters_off(merged) as plain:
        assert plain is merged
