"""Tests of pretrain.py. Run: python -m pytest tests/test_pretrain.py -q (CPU, no network)."""
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (CPU, ENC, config, error, interrupted, log_of, on_two_ranks, recorded, same_bits,
                    token_folder, weights)

import model as m
import prepare
import pretrain
from model import GPT, GPTConfig, load_checkpoint
from pretrain import Config


def test_an_epoch_visits_every_window_once_and_the_next_one_others():
    """Windows of an epoch cover the ring of tokens once; each epoch cuts it elsewhere."""
    tokens = np.arange(1003, dtype=np.uint16)
    starts = [[int(m.window(tokens, 10, e * 100 + i, (1, 0))[0]) for i in range(100)]
              for e in range(3)]
    for epoch in starts:
        covered = Counter((s + k) % 1003 for s in epoch for k in range(10))
        assert len(covered) == 1000 and set(covered.values()) == {1} and epoch != sorted(epoch)
    assert {s % 10 for s in starts[0][:3]} != {s % 10 for s in starts[1][:3]}
    for i in range(100):
        row = m.window(tokens, 10, i, (1, 0))
        assert len(row) == 11 and (np.diff(row) % 1003 == 1).all()    # past the end: the start
    assert m.window(tokens, 10, 7, (1, 0))[0] != m.window(tokens, 10, 7, (2, 0))[0]


def test_sources_are_mixed_by_weight(short, files, tmp_path):
    """Each has its share from the start on, in its own order; --data DIR:WEIGHT of 8 windows a step
    takes 6 of the folder of weight 3. Resuming with other folders is refused, with other weights
    they hold for what comes: nothing of the past is made up for."""
    state = dict(taken=[0, 0, 0], behind=[0.0] * 3)
    picks = pretrain.draw([dict(weight=w) for w in (5, 3, 2)], state, 10)
    assert [s for s, _ in picks[:4]] == [0, 1, 2, 0] and state["taken"] == [5, 3, 2]
    for s in range(3):
        assert [i for t, i in picks if t == s] == list(range(state["taken"][s]))
    picks = pretrain.draw([dict(weight=w) for w in (1, 1, 2)], state, 8)
    assert Counter(s for s, _ in picks) == {0: 2, 1: 2, 2: 4}
    other = token_folder(tmp_path / "other", "The ferry is late, and nobody minds. " * 100)
    cfg = short(pretrain, data=[files["tokens"] + ":3", other + ":1"])
    pretrain.main(cfg)
    assert load_checkpoint(cfg.out, "")["state"]["taken"] == [18, 6]
    assert "has read 2 folders" in error(pretrain.main, replace(cfg, resume=True, data=[other]))


def test_a_first_run_prepares_the_data(files, tmp_path, monkeypatch):
    """With nothing in out/tokens prepare.py is run, not as one of torchrun's, and training goes on;
    if it fails, that is one line. Here it fails at first, and then copies tokens."""
    codes = [1, 0]

    def run(command, env):
        assert command == [sys.executable, Path(prepare.__file__)]
        assert not {"RANK", "WORLD_SIZE"} & env.keys()
        done = SimpleNamespace(returncode=codes.pop(0))
        if done.returncode == 0:
            shutil.copytree(files["tokens"], prepare.Config().out)
        return done
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    cfg = config(pretrain, files, "out/base.pt", data=Config().data)
    assert "prepare.py failed" in error(pretrain.main, cfg)
    pretrain.main(cfg)
    assert load_checkpoint(cfg.out, "")["step"] == 3


def test_documents_end_with_their_end_token():
    """The end-of-text token belongs to the document that it ends."""
    doc = pretrain.documents(torch.tensor([[5, 256, 6, 7, 256, 256, 5]]), ENC)
    assert doc.tolist() == [[0, 0, 1, 1, 1, 2, 3]]


def test_fields_that_pretrain_and_the_model_share_are_copied_by_name(monkeypatch):
    """A fork's new field, and another default in the source, reach the model."""
    size = ("n_expert", int, 0)
    fork = dataclasses.make_dataclass("Fork", [size], bases=(GPTConfig,))
    both = dataclasses.make_dataclass("Both", [size, ("tie_embeddings", bool, True)],
                                      bases=(Config,))
    for module in (m, pretrain):
        monkeypatch.setattr(module, "GPTConfig", fork)
    monkeypatch.setattr(pretrain, "Config", both)
    sizes = pretrain.model_config(both(n_expert=4, n_kv_head=1, depth=2), 260)
    assert (sizes.n_expert, sizes.n_kv_head, sizes.n_layer, sizes.n_head) == (4, 1, 2, 2)
    sizes = pretrain.model_config(both(), 260)
    assert (sizes.n_expert, sizes.tie_embeddings) == (0, True)
    known = dict(model_config=dataclasses.asdict(GPTConfig()))    # from before the fork
    assert pretrain.model_config(both(), 260, known).n_expert == 0
    assert "--n_expert" in error(pretrain.model_config, both(n_expert=4), 260, known)


def test_the_dial():
    """--depth gives whole heads of 64 and the rest; tokens are 20 a parameter or 4 epochs. Batches
    are smaller where there is little text, and multiples of any number of ranks."""
    sizes = pretrain.model_config(Config(depth=12), 1000)
    assert (sizes.n_layer, sizes.n_embd, sizes.n_head, sizes.block_size) == (12, 576, 9, 768)
    for ranks, train_tokens, rows, tokens in (
            (1, 10 ** 6, 64, 4 * 10 ** 6), (3, 10 ** 9, 255, 2 * 10 ** 9), (6, 10 ** 6, 66, 4e6),
            (12, 1000, 12, 12 * 768), (1, 10 ** 9, 256, 2 * 10 ** 9)):
        env = replace(CPU, world_size=ranks)
        cfg = pretrain.derive(Config(depth=12), sizes, 10 ** 8, train_tokens, env)
        assert cfg.total_batch_tokens == 768 * rows and cfg.max_steps == tokens // (768 * rows)
    assert cfg.learning_rate == pytest.approx(0.014 * (192 / 576) ** 0.5)
    assert pretrain.derive(replace(cfg, max_steps=7), sizes, 1, 1, CPU).max_steps == 7


def test_a_checkpoint_is_continued_as_what_it_is(short, files, tmp_path, capsys):
    """Its sizes and its context stay, the rate is one for a model that has learned; windows may be
    shorter, or longer than the context. A run too short to learn says so, a folder may end as
    weights do."""
    data = [shutil.copytree(files["tokens"], tmp_path / "tokens:2")]
    cfg = short(pretrain, init=files["base"], n_embd=None, n_head=None, data=list(map(str, data)))
    for block_size, context in ((16, 96), (None, 96), (128, 128)):
        pretrain.main(replace(cfg, block_size=block_size, total_batch_tokens=None))
        shown = capsys.readouterr().out
        assert load_checkpoint(cfg.out, "")["model_config"]["block_size"] == context
        assert "learning rate 0.018," in shown and "warning: 3 steps" in shown
        assert f"context {context} (windows of {block_size or 96})" in shown
    source = m.open_tokens(cfg.data[0] + ":3")
    assert source["weight"] == 3
    mixed = [cfg.data[0] + ":3", str(files["tokens"])]    # three quarters are of the new text
    pretrain.main(replace(cfg, data=mixed, max_steps=None, total_batch_tokens=128, plan=True))
    tokens = int(re.search(r"= ([\d,]+) tokens", capsys.readouterr().out)[1].replace(",", ""))
    assert tokens == pytest.approx(pretrain.EPOCHS * len(source["train"]) * 4 / 3, rel=0.05)
    monster = GPTConfig(block_size=2048, n_layer=28, n_embd=1024, n_head=16, n_kv_head=16)
    cfg = pretrain.derive(Config(init="Qwen3"), monster, 6 * 10 ** 8, 138_000, CPU)
    assert cfg.max_steps > 50 and cfg.learning_rate == pytest.approx(5.6e-4, rel=0.02)


def test_a_law_is_found_again():
    """Hoffmann et al.'s law from nine losses that follow it, and nearly from noisy ones with an
    outlier; what no law fits is refused."""
    sizes, tokens = (x.ravel() for x in np.meshgrid([3e5, 1e6, 3e6], [1e6, 3e6, 1e7]))
    law = 1.69, 406.4, 410.7, 0.34, 0.28
    losses = pretrain.predicted(law, sizes, tokens)
    np.testing.assert_allclose(pretrain.fit_loss(sizes, tokens, losses), law, rtol=1e-3)
    noisy = losses * np.exp(np.random.default_rng(0).normal(0, 0.003, 9))
    noisy[3] *= 1.05
    found = pretrain.fit_loss(sizes, tokens, noisy)
    assert abs(pretrain.predicted(found, 6e6, 2e7) / pretrain.predicted(law, 6e6, 2e7) - 1) < 0.02
    with pytest.raises(ValueError):
        pretrain.fit_loss(sizes, tokens, losses.max() - losses + 1)


def test_logs_predict_a_planned_run(short, tmp_path, capsys):
    """--fit reads the sizes, tokens and last losses that runs have logged; too few, unfinished and
    other logs are named."""
    cfg = short(pretrain, max_steps=2, eval_every=2)
    pretrain.main(cfg)
    row = log_of(cfg.out, "val_loss")[-1]
    assert row["tokens"] == 2 * cfg.total_batch_tokens and row["parameters"] > 1000
    files = []
    for n, tokens in itertools.product((1e5, 1e6, 1e7), (1e6, 1e7)):
        files.append(str(tmp_path / f"{n}-{tokens}.jsonl"))
        loss = 1.7 + 406 * n ** -0.34 + 411 * tokens ** -0.28
        Path(files[-1]).write_text(json.dumps({**row, "parameters": n, "tokens": tokens,
                                               "val_loss": loss}))
    plan = replace(cfg, plan=True, fit=files, out=str(tmp_path / "next.pt"))
    pretrain.main(plan)
    assert "N^-0.340" in capsys.readouterr().out
    assert "6 or more" in error(pretrain.main, replace(plan, fit=files[:5]))
    Path(files[0]).write_text(json.dumps({**row, "max_steps": 3}))
    assert "not the log of a finished" in error(pretrain.main, plan)


def test_plan_trains_nothing(short, tmp_path, capsys):
    """--plan says what a run costs, also where one is finished or where no machine would hold the
    model, and writes nothing."""
    cfg = short(pretrain, plan=True, overwrite=False)
    pretrain.main(replace(cfg, depth=400, n_head=None, n_embd=None))
    pretrain.main(cfg)
    shown = capsys.readouterr().out
    assert "parameters" in shown and "FSDP" in shown and not list(tmp_path.iterdir())
    pretrain.main(replace(cfg, plan=False))
    before = Path(cfg.out).read_bytes()
    pretrain.main(cfg)
    assert Path(cfg.out).read_bytes() == before


def test_a_sample_is_cut_between_letters(monkeypatch):
    """Neither the prompt nor the text of a sample shows half a letter."""
    text = "日本語。".encode()
    monkeypatch.setattr(pretrain, "complete", lambda *_, **__: [list(text[8:10])])
    source = dict(enc=ENC, val=np.frombuffer(text, np.uint8))
    shown = pretrain.sample_text(None, [source], Config(block_size=96), CPU)
    assert shown.strip() == "'日本' -> '語'"


def test_validation_is_a_mean_over_tokens(files, monkeypatch):
    """In batches of 1 or 5, or by three ranks that read a third each; of two folders each has the
    numbers that it has alone.

    Knowing nothing of 256 bytes and 4 control tokens costs ln 260 nats, log2 260 bits.
    """
    cfg, sources = config(pretrain, files, ""), [m.open_tokens(files["tokens"]) for _ in range(2)]
    sources[1].update(path="half", val=sources[1]["val"][:250])
    model = GPT(pretrain.model_config(cfg, 260))
    cfg = pretrain.derive(cfg, model.config, 1000, 9999, CPU)
    torch.nn.init.zeros_(model.head.weight)
    found = pretrain.validate(model, sources[:1], cfg, CPU)
    assert [*found.values()] == pytest.approx([math.log(260), math.log2(260)], abs=1e-5)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    ones, fives = (pretrain.validate(model, sources, replace(cfg, device_batch_size=size), CPU)
                   for size in (1, 5))
    assert ones == pytest.approx(fives, abs=1e-6)
    for source in sources:
        alone = pretrain.validate(model, [source], cfg, CPU)
        for name in ("val_loss", "val_bpb"):
            assert ones[f"{name} {source['path']}"] == pytest.approx(alone[name], abs=1e-6)
    empty = dict(sources[0], path="empty", val=sources[0]["val"][:0])    # says nothing of a loss
    assert pretrain.validate(model, [sources[0], empty], cfg, CPU).keys() == {
        "val_loss", "val_bpb", f"val_loss {files['tokens']}", f"val_bpb {files['tokens']}"}
    sums = []
    monkeypatch.setattr(pretrain, "sum_over_ranks", lambda x, env: sums.append(x) or x)
    for rank in range(3):
        pretrain.validate(model, sources, cfg, replace(CPU, rank=rank, world_size=3))
    nats, tokens, _, _ = sum(sums).sum(0).tolist()
    assert tokens == sum(len(source["val"]) - 1 for source in sources)
    assert nats / tokens == pytest.approx(ones["val_loss"], abs=1e-6)


def test_it_learns(short, tmp_path):
    """From a uniform guess to next to nothing; the log has what it should, by a schedule."""
    cfg = short(pretrain, max_steps=120, eval_every=40)
    result = pretrain.main(cfg)
    log, steps = log_of(cfg.out), log_of(cfg.out, "loss")
    assert abs(log[0]["loss"] - math.log(260)) < 0.05 and result["val_loss"] < 0.7
    assert {"grad_norm", "tokens_per_second", "mfu", "skipped"} < steps[119].keys()
    assert [row["step"] for row in log_of(cfg.out, "val_bpb")] == [40, 80, 120]
    rates = [row["lr"] for row in steps]    # 0.014: of Muon at a width of 192
    assert max(rates) == pytest.approx(0.014 * (192 / 32) ** 0.5, rel=0.02) and rates[-1] < 1e-5
    again = replace(cfg, init=cfg.out, out=str(tmp_path / "b.pt"), max_steps=1, n_embd=None,
                    n_head=None)    # continued pretraining starts where the checkpoint ended
    pretrain.main(again)
    assert log_of(again.out)[0]["loss"] < result["val_loss"] + 0.5


@pytest.mark.parametrize("doc_mask", [False, True])
def test_the_gradient_is_that_of_the_mean_over_tokens(short, files, doc_mask):
    """However the step is split, by a forward over its eight windows; documents apart if asked."""
    cfg = short(pretrain, max_steps=1, device_batch_size=2, doc_mask=doc_mask)
    (grads,), _ = recorded(pretrain.main, cfg)
    torch.manual_seed(cfg.seed)
    model, source = GPT(pretrain.model_config(cfg, 260)), m.open_tokens(files["tokens"])
    rows = torch.tensor(np.stack([m.window(source["train"], 32, i, (1, 0)) for i in range(8)]))
    x, y = rows[:, :-1], rows[:, 1:]
    doc = pretrain.documents(x, source["enc"]) if doc_mask else None
    F.cross_entropy(model(x, doc).flatten(0, 1), y.flatten()).backward()
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(grads, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("compile, changes", [
    (False, dict(doc_mask=True)), (True, dict(optimizer="adamw", tie_embeddings=True, depth=1))])
def test_fsdp_on_two_ranks_is_one(short, tmp_path, monkeypatch, eager_backend, compile, changes):
    """Sharded over two ranks: gradients, log and file of one process, half of the moments each.

    The 16 windows of validation text are passes of 2: both ranks must take part in as many.
    """
    one = short(pretrain, "one", device_batch_size=2, eval_every=2, **changes)
    two = replace(one, out=str(tmp_path / "two.pt"), shard="fsdp", compile=compile)
    grads, _ = recorded(pretrain.main, one)
    save = pretrain.save_checkpoint

    def watched(*args):
        moments = [state for opt in args[-1] for state in opt.state.values()]
        for x in (x for state in moments for x in state.values() if x.dim()):
            assert 2 * x.to_local().numel() == x.numel()
        save(*args)
    monkeypatch.setattr(pretrain, "save_checkpoint", watched)
    (two_grads, _), _ = on_two_ranks(pretrain.main, two, tmp_path)
    torch.testing.assert_close(two_grads[0], grads[0], atol=1e-6, rtol=1e-4)
    for key in ("loss", "grad_norm", "val_loss"):
        a, b = ([row[key] for row in log_of(cfg.out, key)] for cfg in (one, two))
        assert a == pytest.approx(b, abs=1e-4) and len(a) == (2 if key == "val_loss" else 3)
    assert weights(one.out).keys() == weights(two.out).keys()


@pytest.mark.slow
def test_resuming_on_another_number_of_ranks(short, tmp_path):
    """Two sharded ranks, interrupted, go on to the same bits; so does one, nearly; and back."""
    one, two, again, fewer, more = (short(pretrain, name, max_steps=4, save_every=2, depth=1)
                                    for name in ("one", "two", "again", "fewer", "more"))
    pretrain.main(one)
    losses = [row["loss"] for row in log_of(one.out, "loss")]
    stop = interrupted(pretrain.main, 3)    # a step after the save at 2
    on_two_ranks(pretrain.main, replace(two, shard="fsdp"), tmp_path)
    on_two_ranks(stop, replace(again, shard="fsdp"), tmp_path)
    for suffix in (".pt", ".jsonl"):
        shutil.copy(Path(again.out).with_suffix(suffix), Path(fewer.out).with_suffix(suffix))
    on_two_ranks(pretrain.main, replace(again, shard="fsdp", resume=True), tmp_path)
    assert same_bits(weights(again.out), weights(two.out))
    pretrain.main(replace(fewer, resume=True))
    stop(more)
    on_two_ranks(pretrain.main, replace(more, resume=True, shard="fsdp"), tmp_path)
    for cfg in (again, fewer, more):
        assert [row["loss"] for row in log_of(cfg.out, "loss")] == pytest.approx(losses, abs=1e-4)


@pytest.mark.slow
def test_torchrun(files, tmp_path):
    """The command as a user types it ends well: two processes, sharded."""
    out = str(tmp_path / "a.pt")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               pretrain.__file__, *"--depth 1 --total_batch_tokens 128 --max_steps 2".split(),
               "--shard", "fsdp", "--precision", "fp32", "--data", files["tokens"], "--out", out]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "device: 2 x cpu" in done.stdout and load_checkpoint(out, "")["step"] == 2


def test_same_seed_same_bits(short, tmp_path):
    """A run can be repeated, another seed is another run; what is kept is float32."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain.main(short(pretrain, name, seed=seed, precision="bf16"))
    a, b, c = (weights(tmp_path / f"{name}.pt") for name in "abc")
    assert same_bits(a, b) and not torch.equal(a["embed.weight"], c["embed.weight"])
    optimizers = load_checkpoint(tmp_path / "a.pt", "")["optimizers"]
    moments = [x for opt in optimizers for state in opt["state"].values() for x in state.values()]
    assert {x.dtype for x in [*a.values(), *moments]} == {torch.float32}


def test_steps_that_would_ruin_the_model_are_skipped_and_named(short, files, monkeypatch):
    """Gradients far above the usual, or none: nothing moves, and five in a row end the run."""
    assert pretrain.spiking(math.nan, 1.0, 1.0, 0) and pretrain.spiking(1.0, math.inf, None, 0)
    assert pretrain.spiking(2.0, 10.1, 1.0, 21) and not pretrain.spiking(2.0, 9.9, 1.0, 21)
    assert not pretrain.spiking(2.0, 99.0, 1.0, 20) and not pretrain.spiking(2.0, 99.0, None, 21)
    monkeypatch.setattr(pretrain, "spiking", lambda *a: a[3] in (5, 9, *range(24, 40)))
    cfg = short(pretrain, max_steps=30)
    message = error(pretrain.main, cfg)
    assert "5 steps in a row" in message
    assert f"last at step 28 on windows ['{files['tokens']} {28 * 8}', " in message
    rows = log_of(cfg.out, "skipped")
    assert [row["skipped"] for row in rows if row["step"] in (4, 5, 9, 27)] == [0, 1, 2, 6]
    monkeypatch.setattr(pretrain, "spiking", lambda *a: True)
    pretrain.main(replace(cfg, max_steps=4))
    torch.manual_seed(cfg.seed)
    assert same_bits(weights(cfg.out), GPT(pretrain.model_config(cfg, 260)).state_dict())
