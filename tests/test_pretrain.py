"""Tests of pretrain.py. Run: python -m pytest tests/test_pretrain.py -q (CPU, no network)."""
import dataclasses
import math
import os
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
from common import (CPU, config, error, interrupted, log_of, on_two_ranks, recorded, same_bits,
                    token_folder, weights)

import model as m
import pretrain
from model import GPT, GPTConfig, load_checkpoint
from pretrain import Config

pytestmark = pytest.mark.usefixtures("quick")

# Data


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


def test_sources_are_mixed_by_weight():
    """Each source has its share from the start on, and is read in its own order."""
    taken = [0, 0, 0]
    picks = pretrain.draw([dict(weight=w) for w in (5, 3, 2)], taken, 10)
    assert [s for s, _ in picks] == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0] and taken == [5, 3, 2]
    for s in range(3):
        assert [i for t, i in picks if t == s] == list(range(taken[s]))


def test_a_mixture_by_the_command_line(files, tmp_path):
    """--data DIR:WEIGHT: of 8 windows a step, 6 come from the folder of weight 3."""
    other = token_folder(tmp_path / "other", "The ferry is late, and nobody minds. " * 100)
    cfg = config(pretrain, files, tmp_path / "a.pt", data=[files["tokens"] + ":3", other + ":1"])
    pretrain.main(cfg)
    assert load_checkpoint(cfg.out, "")["state"]["taken"] == [18, 6]
    assert "has read 2 folders" in error(pretrain.main, replace(cfg, resume=True, data=[other]))


def test_documents_end_with_their_end_token():
    """The end-of-text token belongs to the document that it ends."""
    enc = SimpleNamespace(_special_tokens={m.ENDOFTEXT: 9})
    doc = pretrain.documents(torch.tensor([[5, 9, 6, 7, 9, 9, 5]]), enc)
    assert doc.tolist() == [[0, 0, 1, 1, 1, 2, 3]]


# Sizes and settings


@dataclasses.dataclass
class ForkGPTConfig(GPTConfig):
    n_expert: int = 0


@dataclasses.dataclass
class ForkOfBoth(Config):
    n_expert: int = 0            # as many experts
    tie_embeddings: bool = True  # another default


def test_fields_that_pretrain_and_the_model_share_are_copied_by_name(files, monkeypatch):
    """A fork's new field, and another default in the source, reach the model."""
    for module in (m, pretrain):
        monkeypatch.setattr(module, "GPTConfig", ForkGPTConfig)
    monkeypatch.setattr(pretrain, "Config", ForkOfBoth)
    sizes = pretrain.model_config(ForkOfBoth(n_expert=4, n_kv_head=1, depth=2), 260)
    assert (sizes.n_expert, sizes.n_kv_head, sizes.n_layer, sizes.n_head) == (4, 1, 2, 2)
    sizes = pretrain.model_config(ForkOfBoth(), 260)
    assert (sizes.n_expert, sizes.tie_embeddings) == (0, True)
    known = dict(model_config=dataclasses.asdict(GPTConfig()))    # from before the fork
    assert pretrain.model_config(ForkOfBoth(), 260, known).n_expert == 0
    assert "--n_expert" in error(pretrain.model_config, ForkOfBoth(n_expert=4), 260, known)


def test_the_dial():
    """--depth gives whole heads of 64 and the rest; tokens are 20 a parameter or 5 epochs."""
    sizes = pretrain.model_config(Config(depth=12), 1000)
    assert (sizes.n_layer, sizes.n_embd, sizes.n_head, sizes.block_size) == (12, 576, 9, 768)
    for train_tokens, tokens in ((10 ** 9, 2 * 10 ** 9), (10 ** 6, 5 * 10 ** 6)):
        cfg = pretrain.derive(Config(depth=12), sizes, 10 ** 8, train_tokens, CPU)
        assert cfg.total_batch_tokens == 768 * 256 and cfg.max_steps == tokens // (768 * 256)
    assert cfg.learning_rate == pytest.approx(0.014 * (192 / 576) ** 0.5)
    assert pretrain.derive(replace(cfg, max_steps=7), sizes, 1, 1, CPU).max_steps == 7


def test_plan_trains_nothing(files, tmp_path, capsys):
    """--plan says what a run costs, also where one is finished, and writes nothing."""
    cfg = config(pretrain, files, tmp_path / "a.pt", plan=True, overwrite=False)
    pretrain.main(cfg)
    shown = capsys.readouterr().out
    assert "parameters" in shown and "FSDP" in shown and not list(tmp_path.iterdir())
    pretrain.main(replace(cfg, plan=False))
    before = Path(cfg.out).read_bytes()
    pretrain.main(cfg)
    assert Path(cfg.out).read_bytes() == before


# Validation


def small_model(files, std):
    """(model, settings, folders) of which the head has this standard deviation."""
    cfg = config(pretrain, files, "")
    torch.manual_seed(0)
    model = GPT(pretrain.model_config(cfg, 260))
    torch.nn.init.normal_(model.head.weight, std=std)
    cfg = pretrain.derive(cfg, model.config, 1000, 9999, CPU)
    return model, cfg, [m.open_tokens(files["tokens"])]


def test_validation_is_the_same_for_any_batch_size_and_number_of_ranks(files, monkeypatch):
    """Batches of 1 or 5, or three ranks that read a third each: the same mean over tokens."""
    model, cfg, sources = small_model(files, 0.3)
    one, five = (pretrain.validate(model, sources, replace(cfg, device_batch_size=size), CPU)
                 for size in (1, 5))
    assert one == pytest.approx(five, abs=1e-6)
    sums = []
    monkeypatch.setattr(pretrain, "sum_over_ranks", lambda x, env: sums.append(x) or x)
    for rank in range(3):
        pretrain.validate(model, sources, cfg, replace(CPU, rank=rank, world_size=3))
    nats, tokens, _, _ = sum(sums).tolist()
    assert tokens == len(sources[0]["val"]) - 1 and nats / tokens == pytest.approx(one[0], abs=1e-6)


def test_uniform_guesses_cost_the_logarithm(files):
    """Knowing nothing of 256 bytes and 4 control tokens costs ln 260 nats, log2 260 bits."""
    model, cfg, sources = small_model(files, 0.0)
    found = pretrain.validate(model, sources, cfg, CPU)
    assert found == pytest.approx((math.log(260), math.log2(260)), abs=1e-5)


# The run


def test_it_learns(files, tmp_path):
    """From a uniform guess to next to nothing; the log has what it should, by a schedule."""
    cfg = config(pretrain, files, tmp_path / "a.pt", max_steps=120, eval_every=40)
    result = pretrain.main(cfg)
    log, steps = log_of(cfg.out), log_of(cfg.out, "loss")
    assert abs(log[0]["loss"] - math.log(260)) < 0.05 and result["val_loss"] < 0.7
    keys = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds", "skipped"}
    assert all(keys == row.keys() for row in steps) and len(steps) == 120
    assert [row["step"] for row in log_of(cfg.out, "val_bpb")] == [40, 80, 120]
    peak = 0.014    # of Muon up to a width of 192
    assert max(row["lr"] for row in steps) == pytest.approx(peak, rel=0.01)
    assert steps[-1]["lr"] < 1e-5
    again = replace(cfg, init=cfg.out, out=str(tmp_path / "b.pt"), max_steps=1, n_embd=None,
                    n_head=None)    # continued pretraining starts where the checkpoint ended
    pretrain.main(again)
    assert log_of(again.out)[0]["loss"] < result["val_loss"] + 0.5


@pytest.mark.parametrize("doc_mask", [False, True])
def test_the_gradient_is_that_of_the_mean_over_tokens(files, tmp_path, doc_mask):
    """However the step is split, by a forward over its eight windows; documents apart if asked."""
    cfg = config(pretrain, files, tmp_path / "a.pt", max_steps=1, device_batch_size=2,
                 doc_mask=doc_mask)
    (grads,), _ = recorded(pretrain.main, cfg)
    torch.manual_seed(cfg.seed)
    model, source = GPT(pretrain.model_config(cfg, 260)), m.open_tokens(files["tokens"])
    rows = torch.tensor(np.stack([m.window(source["train"], 32, i, (1, 0)) for i in range(8)]))
    x, y = rows[:, :-1], rows[:, 1:]
    doc = pretrain.documents(x, source["enc"]) if doc_mask else None
    F.cross_entropy(model(x, doc).flatten(0, 1), y.flatten()).backward()
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(grads, expected, atol=1e-6, rtol=1e-4)


def halved(cfg):
    """pretrain.main, which sees at each save that this rank holds half of every moment."""
    save = pretrain.save_checkpoint

    def watched(*args, optimizers, **kwargs):
        for state in (state for opt in optimizers for state in opt["state"].values()):
            for x in state.values():
                assert x.dim() == 0 or 2 * x.to_local().numel() == x.numel()
        save(*args, optimizers=optimizers, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "save_checkpoint", watched)
        pretrain.main(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, tie", [("muon", False), ("adamw", True)])
def test_fsdp_on_two_ranks_is_one(files, tmp_path, optimizer, tie):
    """Sharded over two ranks: gradients, log and file of one process, half of the moments each.

    The 16 windows of validation text are passes of 2: both ranks must take part in as many.
    """
    one = config(pretrain, files, tmp_path / "one.pt", optimizer=optimizer, tie_embeddings=tie,
                 doc_mask=True, device_batch_size=2, eval_every=2)
    two = replace(one, out=str(tmp_path / "two.pt"), shard="fsdp")
    grads, _ = recorded(pretrain.main, one)
    (two_grads, _), _ = on_two_ranks(halved, two, tmp_path)
    torch.testing.assert_close(two_grads[0], grads[0], atol=1e-6, rtol=1e-4)
    for key in ("loss", "grad_norm", "val_loss"):
        a, b = ([row[key] for row in log_of(cfg.out, key)] for cfg in (one, two))
        assert a == pytest.approx(b, abs=1e-4) and len(a) == (2 if key == "val_loss" else 3)
    assert weights(one.out).keys() == weights(two.out).keys()


@pytest.mark.slow
def test_resuming_on_another_number_of_ranks(files, tmp_path):
    """Two sharded ranks, interrupted, go on to the same bits; so does one, nearly; and back."""
    one = config(pretrain, files, tmp_path / "one.pt", max_steps=5, save_every=2)
    pretrain.main(one)
    losses = [row["loss"] for row in log_of(one.out, "loss")]
    stop = interrupted(pretrain.main, 3)    # a step after the save at 2
    two = replace(one, out=str(tmp_path / "two.pt"), shard="fsdp")
    on_two_ranks(pretrain.main, two, tmp_path)
    again = replace(two, out=str(tmp_path / "again.pt"))
    on_two_ranks(stop, again, tmp_path)
    fewer, more = (replace(one, out=str(tmp_path / f"{name}.pt")) for name in ("fewer", "more"))
    for suffix in (".pt", ".jsonl"):
        copy = Path(again.out).with_suffix(suffix).read_bytes()
        Path(fewer.out).with_suffix(suffix).write_bytes(copy)
    on_two_ranks(pretrain.main, replace(again, resume=True), tmp_path)
    assert same_bits(weights(again.out), weights(two.out))
    pretrain.main(replace(fewer, resume=True))
    stop(more)
    on_two_ranks(pretrain.main, replace(more, resume=True, shard="fsdp"), tmp_path)
    for cfg in (again, fewer, more):
        assert [row["loss"] for row in log_of(cfg.out, "loss")] == pytest.approx(losses, abs=1e-4)


@pytest.mark.slow
def test_torchrun(files, tmp_path):
    """The command as a user types it ends well: two processes, sharded."""
    out, script = str(tmp_path / "a.pt"), str(Path(pretrain.__file__))
    flags = "--depth 1 --total_batch_tokens 128 --max_steps 2 --shard fsdp --precision fp32".split()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    command += [*flags, "--data", files["tokens"], "--out", out]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "device: 2 x cpu" in done.stdout and load_checkpoint(out, "")["step"] == 2


def test_same_seed_same_bits(files, tmp_path):
    """A run can be repeated, another seed is another run; under bf16 too the file is float32."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain.main(config(pretrain, files, tmp_path / f"{name}.pt", seed=seed, precision="bf16"))
    a, b, c = (weights(tmp_path / f"{name}.pt") for name in "abc")
    assert same_bits(a, b) and not torch.equal(a["embed.weight"], c["embed.weight"])
    assert {w.dtype for w in a.values()} == {torch.float32}


def test_steps_that_would_ruin_the_model_are_skipped_and_named(files, tmp_path, monkeypatch):
    """Gradients far above the usual, or none: nothing moves, and five in a row end the run."""
    assert pretrain.spiking(math.nan, 1.0, 1.0, 0) and pretrain.spiking(1.0, math.inf, None, 0)
    assert pretrain.spiking(2.0, 10.1, 1.0, 21) and not pretrain.spiking(2.0, 9.9, 1.0, 21)
    assert not pretrain.spiking(2.0, 99.0, 1.0, 20) and not pretrain.spiking(2.0, 99.0, None, 21)
    monkeypatch.setattr(pretrain, "spiking", lambda *a: a[3] in (5, 9, *range(24, 40)))
    cfg = config(pretrain, files, tmp_path / "a.pt", max_steps=30)
    message = error(pretrain.main, cfg)
    assert "5 steps in a row" in message and files["tokens"] in message
    assert f"last at step 28 on windows [{28 * 8}, " in message
    rows = log_of(cfg.out, "skipped")
    assert [row["skipped"] for row in rows if row["step"] in (4, 5, 9, 27)] == [0, 1, 2, 6]
    monkeypatch.setattr(pretrain, "spiking", lambda *a: True)
    pretrain.main(replace(cfg, max_steps=4))
    torch.manual_seed(cfg.seed)
    assert same_bits(weights(cfg.out), GPT(pretrain.model_config(cfg, 260)).state_dict())


def test_importing_does_nothing():
    """A notebook can import functions of any stage without starting a run."""
    root = Path(pretrain.__file__).parent
    names = ", ".join(path.stem for path in root.glob("*.py"))
    code = f"import sys; sys.argv = ['x', '--no_such_flag']; import {names}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
