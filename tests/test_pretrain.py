"""Tests of pretrain.py. Run: python -m pytest tests/test_pretrain.py -q (CPU, no network, about a minute).

Each docstring says what would be wrong with the world if the test failed.
"""
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from common import error

import prepare
import pretrain
from model import Dist, load_checkpoint
from pretrain import Config

ROOT = Path(pretrain.__file__).parent
SMALL = dict(n_layer=2, n_embd=32, n_head=2, block_size=32, total_batch_tokens=256, max_steps=6, eval_every=100,
             save_every=100, sample_tokens=0, precision="fp32")
CPU = Dist(0, 0, 1, torch.device("cpu"), None, True)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A folder of byte tokens: counting in words, 12 kB, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "one two three four five six seven eight nine ten".split()
    lines = [" ".join(words[i % 10:] + words[:i % 10]) + "." for i in range(240)]
    (folder / "count.txt").write_text("\n".join(lines))
    prepare.main(prepare.Config(input=[str(folder / "count.txt")], out=str(folder / "tokens"), tokenizer="bytes",
                                clean=False, split="tail", val_fraction=0.1))
    return str(folder / "tokens")


def config(tokens, out, **changes):
    return Config(data=[tokens], out=str(out), **{"overwrite": True, **SMALL, **changes})


def weights(path):
    return load_checkpoint(path, "")["weights"]


def log_of(path):
    return [json.loads(line) for line in Path(path).with_suffix(".jsonl").read_text().splitlines()]


def command(cfg):
    """The command line of a Config: only what differs from the defaults."""
    args = []
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if value != getattr(Config(), f.name):
            args += [f"--{f.name}"] + ([] if value is True else value if isinstance(value, list) else [str(value)])
    return args


def launch(cfg, ranks=1):
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                 f"--nproc_per_node={ranks}"]
    return subprocess.Popen([*start, str(ROOT / "pretrain.py"), *command(cfg)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


# data


def test_an_epoch_visits_every_window_once_and_the_next_one_others():
    """Some text would be trained twice an epoch and some never; or every epoch would cut at the same places."""
    tokens = np.arange(1003, dtype=np.uint16)
    starts = [[int(pretrain.window(tokens, 10, e * 100 + i, (1, 0))[0]) for i in range(100)] for e in range(3)]
    for epoch in starts:
        covered = Counter((s + k) % 1003 for s in epoch for k in range(10))
        assert len(covered) == 1000 and set(covered.values()) == {1}
    assert starts[0] != sorted(starts[0]) and {s % 10 for s in starts[0][:3]} != {s % 10 for s in starts[1][:3]}
    for i in range(100):
        row = pretrain.window(tokens, 10, i, (1, 0))
        assert len(row) == 11 and (np.diff(row) % 1003 == 1).all()    # a ring: the last window goes on at the start
    assert pretrain.window(tokens, 10, 7, (1, 0))[0] != pretrain.window(tokens, 10, 7, (2, 0))[0]


def test_sources_are_mixed_by_weight():
    """A source of weight 0.2 would get another share, or all of it at the end."""
    for weights, expected in (((0.5, 0.3, 0.2), [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]), ((7, 3), None)):
        taken = [0] * len(weights)
        picks = pretrain.draw([dict(weight=w) for w in weights], taken, 10)
        if expected:
            assert [s for s, _ in picks] == expected
        assert taken == [round(10 * w / sum(weights)) for w in weights]
        for s in range(len(weights)):
            assert [i for t, i in picks if t == s] == list(range(taken[s]))


def test_validation_is_the_same_for_any_batch_size_and_number_of_ranks(tokens, tmp_path):
    """The score of a model would depend on the machine it was measured on."""
    sources = [pretrain.open_tokens(tokens)]
    torch.manual_seed(0)
    gpt, cfg = pretrain.derive(config(tokens, tmp_path / "a.pt"), CPU, 260, 9999)
    model = pretrain.GPT(gpt)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    one = pretrain.evaluate(model, sources, dataclasses.replace(cfg, device_batch_size=1), CPU)
    five = pretrain.evaluate(model, sources, dataclasses.replace(cfg, device_batch_size=5), CPU)
    assert one == pytest.approx(five, abs=1e-6)
    tokens_seen = len(sources[0]["val"]) - 1
    total = 0.0
    for rank in range(3):    # without a process group the sums stay apart: add them here
        part = pretrain.evaluate(model, sources, cfg, dataclasses.replace(CPU, rank=rank, world_size=3))
        windows = len(range(0, tokens_seen, 32)[rank::3])
        last = rank == (len(range(0, tokens_seen, 32)) - 1) % 3
        total += part[0] * (windows * 32 - (-tokens_seen % 32 if last else 0))
    assert total / tokens_seen == pytest.approx(one[0], abs=1e-6)


def test_uniform_bytes_are_eight_bits(tokens, tmp_path):
    """Bits per byte would not be bits, or not per byte: no number could be compared with anybody's."""
    sources = [pretrain.open_tokens(tokens)]
    gpt, cfg = pretrain.derive(config(tokens, tmp_path / "a.pt"), CPU, 256, 9999)
    model = pretrain.GPT(gpt)
    torch.nn.init.zeros_(model.head.weight)
    sources[0]["val"] = sources[0]["val"][:-1]    # without the end-of-text id: plain bytes
    nats, bpb = pretrain.evaluate(model, sources, cfg, CPU)
    assert (nats, bpb) == pytest.approx((math.log(256), 8.0), abs=1e-5)


# the run


def test_it_learns(tokens, tmp_path):
    """The training loop would run and log and not train."""
    result = pretrain.main(config(tokens, tmp_path / "a.pt", max_steps=150, eval_every=50, sample_tokens=8))
    log = log_of(tmp_path / "a.pt")
    assert abs(log[0]["loss"] - math.log(260)) < 0.05 and result["val_loss"] < 0.5
    keys = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds"}
    assert all(keys <= set(row) for row in log if "loss" in row)
    assert [row["step"] for row in log if "val_loss" in row] == [50, 100, 150] and "val_bpb" in log[-1]
    assert max(row["lr"] for row in log if "lr" in row) == pytest.approx(pretrain.derive(
        config(tokens, ""), CPU, 260, 9999)[1].learning_rate, rel=0.01) and log[-2]["lr"] < 1e-5


@pytest.mark.parametrize("optimizer, tolerance", [("adamw", 1e-5), ("muon", 1e-4)])
def test_losses_do_not_depend_on_how_a_step_is_split(tokens, tmp_path, optimizer, tolerance):
    """A smaller GPU, more of them or gradient accumulation would train another model."""
    losses = {}
    for size in (8, 4, 1):
        pretrain.main(config(tokens, tmp_path / "a.pt", device_batch_size=size, optimizer=optimizer))
        losses[size] = [row["loss"] for row in log_of(tmp_path / "a.pt") if "loss" in row]
    assert losses[4] == pytest.approx(losses[8], abs=tolerance)
    assert losses[1] == pytest.approx(losses[8], abs=tolerance)


def test_the_gradient_of_a_step_is_that_of_the_whole_batch(tokens):
    """Tokens of one micro-batch would weigh more than those of another."""
    gpt, cfg = pretrain.derive(config(tokens, ""), CPU, 260, 9999)
    sources, grads = [pretrain.open_tokens(tokens)], []
    picks = pretrain.draw(sources, [0], 8)
    for size in (8, 2):
        torch.manual_seed(0)
        model = pretrain.GPT(gpt)
        for start in range(0, 8, size):
            x, y = pretrain.get_batch(sources, picks[start:start + size], 32, 1, CPU.device)
            loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
            (loss / cfg.total_batch_tokens).backward()
        grads.append(model.blocks[0].attn.o_proj.weight.grad)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


# What each of two processes runs: every way to split the model in turn, a sharded run interrupted and resumed as well.
RANKS = """
import dataclasses, os, sys
sys.path.insert(0, {root!r})
import torch
import pretrain

torch.set_num_threads(1)
seed_step, make_optimizers, made = pretrain.seed_step, pretrain.make_optimizers, []
pretrain.make_optimizers = lambda *a, **kw: made.append(make_optimizers(*a, **kw)) or made[-1]

def interrupt(seed, step, rank):
    if step == 3:    # one after a checkpoint
        raise InterruptedError
    seed_step(seed, step, rank)

for shard in ("none", "zero1", "fsdp"):
    cfg = pretrain.Config(**{settings!r}, shard=shard, out={folder!r} + "/" + shard + ".pt")
    pretrain.main(cfg)
    part = sum(getattr(m, "_local_tensor", m).numel() for opt in made[-1] for moments in
               getattr(opt, "optim", opt).state.values() for m in moments.values())
    os.write(1, f"moments {{shard}} {{part}}\\n".encode())    # in one piece: two ranks write here
    if shard == "none":
        continue
    cfg.out = {folder!r} + "/" + shard + "-resumed.pt"
    pretrain.seed_step = interrupt
    try:
        pretrain.main(cfg)
    except InterruptedError:
        pretrain.seed_step = seed_step
    torch.distributed.barrier()    # until the file is written
    pretrain.main(dataclasses.replace(cfg, resume=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_train_like_one_however_the_model_is_split(tokens, tmp_path, optimizer):
    """torchrun on two GPUs would see other data, its replicas or shards would drift apart, or nothing be sharded.

    The 13 windows of validation text are 4 passes for one rank and 3 for the other, which must not wait for ever.
    """
    settings = {**SMALL, "data": [tokens], "optimizer": optimizer, "doc_mask": True, "max_steps": 5, "save_every": 2,
                "sample_tokens": 4, "eval_tokens": 500, "device_batch_size": 2, "tie_embeddings": optimizer == "adamw"}
    one = Config(**settings, out=str(tmp_path / "one.pt"))
    pretrain.main(one)
    (tmp_path / "ranks.py").write_text(RANKS.format(root=str(ROOT), settings=settings, folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(tmp_path / "ranks.py")], capture_output=True, text=True, timeout=500,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {}
    for shard, n in re.findall(r"moments (\w+) (\d+)", done.stdout):    # the ranks may share a line
        parts.setdefault(shard, []).append(int(n))
    whole = parts["none"][0]
    assert sum(parts["none"]) == 2 * whole
    for shard in ("zero1", "fsdp"):
        assert sum(parts[shard]) == pytest.approx(whole, rel=0.01) and max(parts[shard]) < 0.6 * whole
    for shard in ("none", "zero1", "fsdp"):
        out, resumed = tmp_path / f"{shard}.pt", tmp_path / f"{shard}{'-resumed' * (shard != 'none')}.pt"
        for key in ("loss", "grad_norm", "val_loss"):
            a, b, c = ([row[key] for row in log_of(path) if key in row] for path in (one.out, out, resumed))
            assert a == pytest.approx(b, abs=1e-4) and len(a) == (1 if key == "val_loss" else 5)
            assert b == c
        a, b, c = (load_checkpoint(path, "") for path in (one.out, out, resumed))
        assert all(torch.equal(w, c["weights"][name]) for name, w in b["weights"].items())
        # the file knows no ranks: the same tensors, and one process goes on where two stopped
        shapes = lambda x: [[tuple(m.shape) for m in s.values()] for opt in x["optimizers"] for s in opt["state"].values()]
        assert shapes(a) == shapes(b) and a["weights"].keys() == b["weights"].keys()
        before = log_of(out)[-1]["val_loss"]
        pretrain.main(Config(**{**settings, "max_steps": 7}, out=str(out), resume=True))
        assert log_of(out)[-1]["step"] == 7 and log_of(out)[-1]["val_loss"] < before


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_bits(tokens, tmp_path):
    """A run that was interrupted would be another experiment than one that was not."""
    whole = config(tokens, tmp_path / "whole.pt", max_steps=60, save_every=7, eval_every=20, dropout=0.1)
    process = launch(whole)
    assert process.wait(120) == 0
    killed = dataclasses.replace(whole, out=str(tmp_path / "killed.pt"))
    for lines in (11, 34):    # killed twice, at no particular moment
        process = launch(dataclasses.replace(killed, resume=Path(killed.out).exists()))
        while process.poll() is None and (not Path(killed.out).with_suffix(".jsonl").exists()
                                          or len(log_of_partial(killed.out)) < lines):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = launch(dataclasses.replace(killed, resume=True))
    assert process.wait(120) == 0
    a, b = weights(whole.out), weights(killed.out)
    assert all(torch.equal(a[k], b[k]) for k in a)
    for key in ("loss", "val_loss", "grad_norm"):
        assert [r[key] for r in log_of(whole.out) if key in r] == [r[key] for r in log_of(killed.out) if key in r]


def log_of_partial(out):
    return Path(out).with_suffix(".jsonl").read_text().split("\n")[:-1]


def test_same_seed_same_bits(tokens, tmp_path):
    """Nobody could repeat an experiment."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain.main(config(tokens, tmp_path / f"{name}.pt", seed=seed))
    a, b, c = (weights(tmp_path / f"{name}.pt") for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["embed.weight"], c["embed.weight"])


def test_minutes_instead_of_steps(tokens, tmp_path):
    """A run with a time limit would stop in the middle of its schedule, or not stop."""
    started = time.time()
    pretrain.main(config(tokens, tmp_path / "a.pt", max_steps=None, max_minutes=0.05))
    rows = [row for row in log_of(tmp_path / "a.pt") if "lr" in row]
    assert 2.5 < time.time() - started < 20 and rows[-1]["lr"] < 0.05 * max(row["lr"] for row in rows)


def test_continued_pretraining_starts_where_the_checkpoint_ended(tokens, tmp_path):
    """--init would be ignored, and nobody would notice."""
    first = pretrain.main(config(tokens, tmp_path / "a.pt", max_steps=120))
    pretrain.main(config(tokens, tmp_path / "b.pt", init=str(tmp_path / "a.pt"), n_layer=None, n_embd=None,
                         n_head=None))
    assert log_of(tmp_path / "b.pt")[0]["loss"] < first["val_loss"] + 0.5 < 3


def test_the_checkpoint_is_float32_and_complete(tokens, tmp_path):
    """Later stages would have to guess the tokenizer or the sizes, or start from rounded weights."""
    pretrain.main(config(tokens, tmp_path / "a.pt", precision="bf16"))
    checkpoint = load_checkpoint(tmp_path / "a.pt", "")
    assert {w.dtype for w in checkpoint["weights"].values()} == {torch.float32}
    assert checkpoint["stage"] == "pretrain" and checkpoint["step"] == 6
    assert checkpoint["stage_config"]["block_size"] == 32 and checkpoint["encoding"]["special_tokens"]


# what users do


def test_steps_that_would_ruin_the_model_are_skipped_and_named(tokens, tmp_path, capsys):
    """One bad batch would turn the weights into NaN, and hours later somebody would look at the log."""
    pretrain.main(config(tokens, tmp_path / "a.pt", max_steps=3))
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    checkpoint["weights"]["head.weight"][7, 3] = math.nan
    torch.save(checkpoint, tmp_path / "nan.pt")
    message = error(pretrain.main, config(tokens, tmp_path / "b.pt", init=str(tmp_path / "nan.pt"), max_skips=3))
    assert "3 steps in a row" in message and tokens in message and "windows [16, 17" in message
    assert capsys.readouterr().out.count("skipped, loss nan") == 3
    message = error(pretrain.main, config(tokens, tmp_path / "c.pt", max_steps=40, spike=1e-6, max_skips=2))
    assert "the last at step 22" in message
    saved = load_checkpoint(tmp_path / "c.pt", "")
    assert saved["state"]["skipped"] == 2 and all(w.isfinite().all() for w in saved["weights"].values())


def test_user_errors_are_one_line(tokens, tmp_path):
    """A mistake would end in a traceback, and the reader would not know what to do."""
    cfg = config(tokens, tmp_path / "a.pt")
    change = lambda **kw: error(pretrain.main, dataclasses.replace(cfg, **kw))
    assert "python prepare.py" in change(data=[str(tmp_path / "nowhere")])
    assert "above 0" in change(data=[f"{tokens}:0"])
    assert "fewer than one window of 40000 + 1" in change(block_size=40_000, total_batch_tokens=40_000)
    assert "not a multiple of 1 ranks x --block_size 32" in change(total_batch_tokens=100)
    assert "--device_batch_size 3" in change(device_batch_size=3)
    assert "not both" in change(max_minutes=1.0)
    assert "start with torchrun" in change(shard="fsdp") and "start with torchrun" in change(shard="zero1")
    assert "choose muon or adamw" in change(optimizer="sgd")
    assert "not a multiple of n_head 3" in change(n_head=3)
    assert "make it with: python pretrain.py" in change(init=str(tmp_path / "no.pt"))
    assert "make it with: python pretrain.py" in change(resume=True)
    assert "choose auto, bf16 or fp32" in change(precision="fp8")
    pretrain.main(cfg)
    other = str(tmp_path / "chars")
    (tmp_path / "t.txt").write_text("hello world. " * 300)
    prepare.main(prepare.Config(input=[str(tmp_path / "t.txt")], out=other, tokenizer="chars", clean=False))
    assert "another tokenizer" in change(init=cfg.out, data=[other])
    assert "different tokenizers" in change(data=[tokens, other])
    prepare.main(prepare.Config(input=[str(tmp_path / "t.txt")], out=other, tokenizer="bytes", clean=False,
                                val_fraction=0.0))
    assert "no validation text" in change(data=[other])
    (Path(other) / "train.bin").write_bytes(b"1")
    assert "run prepare.py again" in change(data=[other])


def test_plan_trains_nothing(tokens, tmp_path, capsys):
    """Asking what a run costs would start it."""
    pretrain.main(config(tokens, tmp_path / "a.pt", plan=True))
    shown = capsys.readouterr().out
    assert "parameters" in shown and "ZeRO-1" in shown and not list(tmp_path.iterdir())


def test_importing_a_stage_does_nothing():
    """A notebook or a test that imports a function would start a training run."""
    for name in ("model", "prepare", "pretrain"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/tmp")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
