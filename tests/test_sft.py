"""Tests of sft.py, of rows and of LoRA. Run: python -m pytest tests/test_sft.py -q (no network)."""
import gzip
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import (END, ENC, PAD, error, judge, load, log_of, recorded, save, tiny, turn,
                    write)

import model as m
import sft
from model import LoRALinear, add_lora, adapters_off, collate, token_logprobs


HI, YO = turn("user", "Hi?"), turn("assistant", "Yo.")
SAID = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yo."}]
PARTS = [dict(type="text", text="Hi"), dict(type="text", text="?")]
HH = "\n\nHuman: Hi?\n\nAssistant: Yo.\n\nHuman: Sure?\n\nAssistant: "
TALK = [HI, YO, turn("user", "Sure?")]
PIRATE = turn("system", "Be a pirate.")


GO, LONG = turn("assistant", "Go."), [turn("assistant", "a"), turn("user", "b")]
OLD, READ = [turn("user", "One?"), turn("assistant", "1.")], turn("user", "It is.\n\nHi?")
UNLEARNED = dict(YO, weight=0)
SHAPES = {m.to_messages: [
    (dict(messages=[turn("user", PARTS), YO]), [HI, YO]),
    (dict(conversations=SAID, system="Be a pirate."), [PIRATE, HI, YO]),
    (dict(instruction="Hi", input="?", output="Yo."), [turn("user", "Hi\n\n?"), YO]),
    (dict(question=HH, answer="Yo."), [turn("user", HH), YO]),    # no words in others' mouths
    (dict(instruction="Hi?", output=HH + "Yo."), [HI, turn("assistant", HH + "Yo.")]),
    (dict(prompt=[HI], completion=[YO]), [HI, YO]),
    (dict(prompt="\n\nHuman: Hi?\n\nAssistant:", completion="Yo."), [HI, YO]),
    (dict(prompt="Hi?", chosen="Yo.", rejected="Go."), [HI, YO]),
    (dict(chosen=HH + "Yes.", rejected=HH + "No."), [*TALK, turn("assistant", "Yes.")]),
    # what stands beside the question: a passage, an earlier talk, a weight, a label, nothing
    (dict(context="It is.", question="Hi?", answers=dict(text=["Yo.", "a"], answer_start=[0, 1])),
     [READ, YO]),
    (dict(prompt="Hi?", context="It is.", completion="Yo."), [READ, YO]),
    (dict(instruction="Hi?", passage="It is.", response="Yo."), [READ, YO]),
    (dict(instruction="", input="Hi?", output="Yo."), [HI, YO]),
    (dict(question="Hi?", passage="It is.", answer=False), [READ, turn("assistant", "False")]),
    (dict(instruction="Hi?", output="Yo.", history=[["One?", "1."]]), [*OLD, HI, YO]),
    (dict(question="Hi?", answer="Yo.", history=OLD, system_prompt="Be a pirate."),
     [PIRATE, *OLD, HI, YO]),
    (dict(messages=[HI, UNLEARNED, HI, dict(YO, weight=1)]), [HI, UNLEARNED, HI, YO]),
    (dict(prompt="Hi?", completion="Yo.", label=True), [HI, YO]),
    (dict(messages=[HI, YO], answer="Go."), [HI, YO]),
    (dict(messages=[dict(PIRATE, role="developer"), HI, YO]), [PIRATE, HI, YO]),
    (dict(messages=None, chosen=None, prompt="Hi?", completion="Yo.", tools=[], images=None),
     [HI, YO])
], m.to_prompt: [
    (dict(context="It is.", question="Hi?", answer="Yo."), [READ]),
    (dict(messages=None, prompt=[dict(PIRATE, role="developer"), HI]), [PIRATE, HI]),
    (dict(prompt=[HI, YO]), [HI]), (dict(messages=[HI, YO]), [HI]),
    (dict(conversations=SAID[:1]), [HI]), (dict(prompt="Hi?", system="Be a pirate."), [PIRATE, HI]),
    (dict(instruction=HH), [turn("user", HH)]), (dict(prompt=HH), TALK),
    (dict(instruction="Sum.", input="1, 2", prompt="Below is: Sum. 1, 2 Answer: 3"),
     [turn("user", "Sum.\n\n1, 2")]),
    (dict(chosen=HH + "Yes.", rejected=HH + "No."), TALK)
], m.to_pair: [
    (dict(prompt=[HI], chosen=[YO], rejected=[GO]), ([HI], "Yo.", "Go.")),
    (dict(prompt="Hi?", chosen=[HI, YO], rejected=[HI, GO]), ([HI], "Yo.", "Go.")),    # twice
    (dict(prompt=[HI], chosen=[*LONG, YO], rejected=[*LONG, GO]), ([HI, *LONG], "Yo.", "Go.")),
    (dict(prompt="Hi?", system="Be a pirate.", chosen="Yo.", rejected="Go."),
     ([PIRATE, HI], "Yo.", "Go.")),
    (dict(chosen=HH + "Yo.", rejected=HH + "Go."), (TALK, "Yo.", "Go.")),
    (dict(system="", question="Hi?", chosen="Yo.", rejected="Go."), ([HI], "Yo.", "Go.")),
    (dict(conversations=SAID[:1], chosen=SAID[1], rejected=GO), ([HI], "Yo.", "Go.")),
    (dict(system="Be a pirate.", chosen=[HI, YO], rejected=[HI, GO]), ([PIRATE, HI], "Yo.", "Go.")),
    (dict(instruction="Hi?", history=[["One?", "1."]], chosen="Yo.", rejected="Go."),
     ([*OLD, HI], "Yo.", "Go."))]}


@pytest.mark.parametrize("convert, row, expected", [
    (convert, *case) for convert, cases in SHAPES.items() for case in cases])
def test_rows_of_every_shape(convert, row, expected):
    """Conversations, prompts without an answer, pairs: OpenAI's, ShareGPT's, Alpaca's, GSM8K's,
    HH-RLHF's and UltraFeedback's; a question that looks like a transcript stays a question."""
    assert convert(row) == expected


@pytest.mark.parametrize("convert, row, why", [
    (m.to_messages, dict(messages=[HI]), "no assistant turn"),
    (m.to_messages, dict(prompt="Hi?", completion=" "), "no assistant turn"),
    (m.to_messages, dict(messages=[turn("robot", "x"), YO]), "unknown role 'robot'"),
    (m.to_messages, dict(messages=[dict(role="user"), YO]), "a turn without text"),
    (m.to_messages, dict(text="Hi?"), "none of messages"),
    (m.to_messages, dict(messages=[1, 2]), "not in a known format"),
    (m.to_messages, dict(messages=[HI, dict(turn("assistant", ""), tool_calls=[{}]), YO]),
     "tool_calls beside the text"),
    (m.to_messages, dict(messages=[HI, dict(role="assistant", function_call={"name": "f"}), YO]),
     "function_call beside the text"),
    (m.to_messages, dict(messages=[HI, YO], tools=[dict(name="f")]), "tools beside the text"),
    (m.to_messages, dict(prompt="Hi?", image="a.png", completion="Yo."), "image beside the text"),
    (m.to_messages, dict(messages=[turn("user", [dict(type="image_url", text="")]), YO]),
     "a turn with a part of type image_url"),
    (m.to_messages, dict(messages=[HI, turn("assistant", ""), HI, YO]), "an empty turn"),
    (m.to_messages, dict(messages=[HI, dict(YO, weight=0.5)]), "weight 0.5"),
    (m.to_messages, dict(prompt="Hi?", completion="Yo.", label=False), "label false"),
    (m.to_messages, dict(messages=[HI, YO], weight=0), "a weight of the row"),
    (m.to_messages, dict(question="Hi?", context=dict(a=["b"]), answer="Yo."), "not in a known"),
    (m.to_messages, dict(question="Hi?", history="One?", answer="Yo."), "not in a known"),
    (m.to_pair, dict(prompt="Hi?", completion="Yo.", label=True), "no pair; sft.py learns from"),
    (m.to_prompt, dict(prompt=""), "empty prompt"),
    (m.to_prompt, dict(prompt=[YO]), "empty prompt"),
    (m.to_pair, dict(prompt="Hi?", chosen="Yo.", rejected="Yo. "), "equal answers"),
    (m.to_pair, dict(prompt="Hi?", chosen="Yo.", rejected=" "), "empty answer"),
    (m.to_pair, dict(prompt="Hi?", chosen="Yo."), "empty answer"),
    (m.to_messages, dict(prompt="Hi?", completion="Yo.", label=0), "label false"),
    (m.to_pair, dict(prompt="", chosen="Yo.", rejected="Go."), "empty prompt"),
    (m.to_messages, dict(question="2+2?", choices=["3", "4"], answer=1), "choices beside the"),
    (m.to_pair, dict(chosen=HH + "Yes.", rejected=HH.replace("Hi", "Ho") + "No."), "differ"),
    (m.to_pair, dict(chosen=HH + "A\n\nHuman: x", rejected=HH + "A\n\nHuman: y"), "no assistant")])
def test_bad_rows_are_dropped_and_counted(convert, row, why, capsys):
    """One bad row does not end a run and is not trained on; only bad rows do end it."""
    good = dict(prompt="Hi?", chosen="Yo.", rejected="Go.")
    assert len(m.keep_valid([good, row, good], convert, "x.jsonl")) == 2
    shown = capsys.readouterr().out
    assert "x.jsonl: 1 of 3 rows dropped: " in shown and why in shown
    assert "no row is usable" in error(m.keep_valid, [row], convert, "x.jsonl")


def test_rows_of_every_file_type(tmp_path, capsys):
    """Lines, a list or {"data": [...]}, whatever the name's case and the marks before the text,
    give the same rows, alone or in a folder; few broken lines are said, many are refused."""
    rows = [dict(prompt=str(i)) for i in range(300)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    packed = gzip.compress(text.encode())
    (tmp_path / "all").mkdir()
    good = dict(a=("jsonl", (text + "\n{broken\n").encode()), b=("JSONL.GZ", packed),
                c=("json", json.dumps(rows).encode()), g=("json", text.encode()),
                h=("JSON", json.dumps(dict(version=1, data=rows), indent=1).encode()),
                i=("Jsonl", text.encode("utf-8-sig")), j=("jsonl", text.encode("utf-16")))
    row = dict(HI, data=["a", "b"])    # a column of a row, not where the rows are
    (tmp_path / "column.jsonl").write_text(json.dumps(row))
    assert m.read_rows([tmp_path / "column.jsonl"]) == [row]
    bad = dict(d=("jsonl", ("nonsense\nmore\n" + text[:200]).encode()), e=("jsonl", b"\n"),
               f=("jsonl.gz", packed[:-20]))
    for name, (suffix, content) in {**good, **bad}.items():
        path = tmp_path / ("all" if name in good else "") / f"{name}.{suffix}"
        path.write_bytes(content)
        if name in good:
            assert m.read_rows([path]) == rows
        else:
            error(m.read_rows, [path])
    assert "a.jsonl: 1 broken rows skipped, the first is row 301" in capsys.readouterr().out
    (tmp_path / "all/k.jsonl").mkdir()    # a folder of parts with the name of a file, as Spark's
    (tmp_path / "all/k.jsonl/part.jsonl").write_text(text)
    assert m.read_rows([tmp_path / "all"]) == (len(good) + 1) * rows
    assert "does not exist" in error(m.read_rows, [tmp_path / "g.jsonl"])


def test_rows_of_parquet(tmp_path):
    """Nested turns are lists of dicts, as in the other files."""
    pyarrow = pytest.importorskip("pyarrow")
    rows = [dict(messages=[HI, YO])] * 3
    table = pyarrow.Table.from_pylist([dict(row, prompt=None, tools=None) for row in rows])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    assert m.read_rows([tmp_path / "a.parquet"]) == rows
    (tmp_path / "B.PARQUET").write_bytes((tmp_path / "a.parquet").read_bytes())
    packed = pyarrow.compress(json.dumps(rows).encode(), "zstd", asbytes=True)
    (tmp_path / "c.json.zst").write_bytes(packed)
    assert m.read_rows([tmp_path]) == 3 * rows
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    assert "d.parquet" in error(m.read_rows, [tmp_path])


def test_files_on_the_hub(tmp_path, monkeypatch):
    """hf://datasets/OWNER/NAME/FILE comes by way of huggingface_hub; its failure is one line."""
    kept = {("me/talks", "sub/a.jsonl"): write(tmp_path / "a.jsonl", [dict(prompt="Hi?")])}

    def download(repository, file, repo_type):
        assert repo_type == "dataset"
        return kept[repository, file]    # a KeyError, of which the hub has many kinds
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    assert m.read_rows(["hf://datasets/me/talks/sub/a.jsonl"]) == [dict(prompt="Hi?")]
    assert "me/talks/b.jsonl" in error(m.read_rows, ["hf://datasets/me/talks/b.jsonl"])


def test_packed_conversations_do_not_see_each_other():
    """A packed row has the loss of its conversations apart; positions begin anew in each."""
    model, pieces = tiny(), []
    for n in (1, 5, 3):
        pieces.append(m.render_chat(ENC, [turn("user", "a" * n), turn("assistant", "b" * n)]))
    pieces.append((list(b"text"), [1] * 4))    # replay: its first token follows from nothing
    ids, mask, doc = collate([pieces], PAD, "cpu")
    padded, padded_mask, _ = collate([[one] for one in pieces], PAD, "cpu")
    assert mask.sum() == padded_mask.sum() == 2 + 6 + 4 + 3
    packed_loss = (token_logprobs(model(ids, doc), ids) * mask).sum()
    loss = (token_logprobs(model(padded), padded) * padded_mask).sum()
    torch.testing.assert_close(packed_loss, loss, atol=1e-5, rtol=1e-5)
    positions, _ = m.document_mask(torch.tensor([[7, 7, 3, 3, 3, 7]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]


def test_packing_loses_and_breaks_nothing():
    """Each conversation once and whole, rows nearly full, another order by another seed."""
    lengths = [(7 * i) % 40 + 1 for i in range(200)]
    rows = sft.pack_rows(lengths, 40, 1)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    assert len(rows) < 1.1 * sum(lengths) / 40 and rows != sft.pack_rows(lengths, 40, 2)


def test_a_step_is_the_mean_over_tokens_packed_or_not(short, tmp_path, capsys):
    """Two answers of unlike length in one row, or each in a pass of its own: the same gradient."""
    rows = [dict(prompt="a", completion="b" * n) for n in (2, 10, 40)]    # the third is held out
    data, steps = [write(tmp_path / "x.jsonl", rows)], []
    for pack, n_rows in ((True, 1), (False, 2)):
        cfg = short(sft, data=data, max_steps=1, pack=pack,
                    total_batch_tokens=n_rows * 96, device_batch_size=1)
        steps.append(recorded(sft.main, cfg)[0][0])
        assert "data: 2 conversations in" in capsys.readouterr().out
    torch.testing.assert_close(*steps, atol=1e-6, rtol=1e-4)


def test_it_learns_to_answer_and_to_stop(short, tmp_path):
    """One demonstration is learned by heart, its end too; the first loss is the untrained one."""
    data = write(tmp_path / "x.jsonl", [dict(prompt="one", completion="two")] * 12)
    cfg = short(sft, data=[data], max_steps=40, total_batch_tokens=192, learning_rate=1e-2)
    result, log = sft.main(cfg), log_of(cfg.out)
    assert result["val_loss"] < 0.01 < 3 < log[0]["val_loss"] and result["val_accuracy"] == 1
    assert result["stopped"] == 1 and result["length"] == len("two") + 1
    assert log[1]["loss"] == pytest.approx(log[0]["val_loss"], abs=1e-4)


def test_replay_is_pretraining_text_with_a_loss_on_every_token(short, files):
    """Whole windows, whose first token nothing predicts; its bits per byte are in the log."""
    learned = {}
    for replay in (0.3, 0.0):
        cfg = short(sft, max_steps=1, replay=replay, replay_data=files["tokens"])
        sft.main(cfg)
        learned[replay] = log_of(cfg.out, "learned_tokens")[0]["learned_tokens"]
    assert learned[0.3] - learned[0.0] == math.ceil(0.3 * 6) * 95
    assert len(log_of(cfg.out, "val_bpb")) == 2


def test_show_batch_shows_what_is_learned_and_trains_nothing(short, tmp_path, capsys):
    """--show_batch marks the learned tokens and writes no file."""
    sft.main(short(sft, show_batch=True))
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n[" in shown and ".<|im_end|>]\n" in shown
    assert "tokens are learned" in shown and not list(tmp_path.iterdir())
    one = [write(tmp_path / "one.jsonl", [dict(messages=[HI, YO])])]    # too few to train on
    sft.main(short(sft, show_batch=True, data=one))
    assert "1 conversations, 4 of " in capsys.readouterr().out
    talk = dict(messages=[turn("user", "你好？"), turn("assistant", "很好。" * 20)])    # is cut
    data = [write(tmp_path / "x.jsonl", [talk] * 2)]
    sft.main(short(sft, show_batch=True, data=data, pack=False))
    shown = capsys.readouterr().out
    assert "你好？<|im_end|>" in shown and "[很好。很好" in shown and "\ufffd" not in shown


def test_long_conversations_are_cut_or_dropped_and_counted(files, tmp_path, capsys):
    """What does not fit a row is said; a row without anything to learn would be NaN."""
    rows = [dict(prompt="short", completion="answer")] * 20
    rows += [dict(prompt="short", completion="long " * 40)] * 2
    rows += [dict(prompt="long " * 40, completion="answer")] * 3
    data = [write(tmp_path / "x.jsonl", rows)]
    kept = sft.load_conversations(data, ENC, 96)
    shown = capsys.readouterr().out
    assert "3 of 25 rows dropped: nothing to learn within 96 tokens (3, first row " in shown
    assert "2 of 22 conversations are cut to the 96 tokens" in shown
    assert max(len(ids) for ids, _ in kept) == 96
    assert sum(END not in ids[30:] for ids, _ in kept) == 2


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


def test_lora_trains_only_the_adapters():
    """Those of seven matrices in each of two blocks; of a judge the head is trained too."""
    for model, head in ((tiny(qkv_bias=True), set()), (judge(), {"score.weight", "score.bias"})):
        add_lora(model, 4)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        adapters = {name for name in trained if name.endswith((".a", ".b"))}
        assert len(adapters) == 2 * 14 and trained - adapters == head


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True), dict(qkv_bias=True)])
def test_merged_weights_are_a_plain_model(tmp_path, changes):
    """A checkpoint needs no LoRA to be read and speaks as what was trained; off is the base."""
    model, ids = tiny(**changes), torch.randint(0, 256, (2, 20))
    base = model(ids)
    add_lora(model, 4)
    assert torch.equal(model(ids), base)    # at first
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


def test_revised_answers_are_learned(short, files, tmp_path, monkeypatch):
    """The model is asked what is wrong with its answer and to answer again; the last answer becomes
    a demonstration of the first question, beside the others, unless it does not end by itself or
    its talk is longer than the context. Nobody's file is overwritten."""
    asked, loaded, complete, read = [], [], sft.complete, sft.load_conversations
    def said(*args, **changes):    # another letter in each round
        asked.append(args[1])
        found = complete(*args, **changes)
        said = [[b"xyz"[(len(asked) - 1) % 3], END] for _ in found]
        said[-1] = said[-1][:1]    # goes on
        return said if len(found) == 24 else found
    monkeypatch.setattr(sft, "complete", said)
    monkeypatch.setattr(sft, "load_conversations", lambda paths, *args: loaded.append(paths)
                        or read(paths, *args))
    monkeypatch.setattr(sft, "SAMPLE_TOKENS", 6)
    (tmp_path / "law.txt").write_bytes("\ufeffBe kind.\n\n".encode())
    assert m.load_principles(tmp_path / "law.txt") == ["Be kind."]
    (tmp_path / "latin").write_bytes(b"Be kind\xe9.")
    assert m.load_principles(tmp_path / "latin") == ["Be kind\ufffd."]
    long = save(tmp_path / "long.pt", tiny(block_size=512))
    cfg = short(sft, init=long, revise=[files["prompts"]], epochs=1, max_steps=1,
                constitution=str(tmp_path / "law.txt"))
    sft.main(cfg)
    file = str(tmp_path / "a.revised.jsonl")
    assert loaded == [[*cfg.data, file]]
    rows, ends = m.read_rows([file]), [ENC.decode(chats[0]) for chats in asked[:3]]
    assert len(rows) == 23 and "0+0?" in ends[0]
    assert "Be kind." in ends[1] and "Answer again" in ends[2]
    assert [row["messages"][0]["content"] for row in rows][:2] == ["0: 0+0?", "1: 1+1?"]
    assert all((row["answer"], row["critique"], row["messages"][-1]["content"]) == ("x", "y", "z")
               for row in rows)
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
    again = replace(cfg, data=[file], overwrite=True)
    assert "would overwrite" in error(sft.main, again) and m.read_rows([file]) == rows
    beheaded = replace(cfg, init=files["policy"], overwrite=True)    # talks of 130 tokens, room 90
    sft.main(beheaded)
    assert not Path(file).read_text() and loaded[-1] == [*cfg.data, file]
