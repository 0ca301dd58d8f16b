"""What pretraining needs where it is large, shown without a GPU: memory, compilation, sharding.

Run: python -m pytest tests/test_scale.py -q (CPU, no network, half a minute).
"""
import math
import os
import time
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import error, on_two_ranks, recorded
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpo
import model as m
import pretrain
import reward
import rlhf
import sft


class Memory(TorchDispatchMode):
    """Bytes of all tensors made inside that are still there, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not hasattr(x.untyped_storage(), "counted"):
                storage = x.untyped_storage()
                storage.counted = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)


@pytest.fixture
def as_on_gpus(monkeypatch):
    """The attention kernel, and the size of pieces, that GPUs get."""
    attention = m.attention
    monkeypatch.setattr(m, "attention", lambda q, k, v, mask, fused, **more:
                        attention(q, k, v, mask, True, **more))
    monkeypatch.setattr(m, "pieces", lambda logits: [
        slice(i, i + 1024) for i in range(0, len(logits), 1024)])


@pytest.mark.parametrize("depth, recompute", [(6, False), (6, True), (12, False)])
def test_memory_of_a_step(as_on_gpus, depth, recompute):
    """What --plan says is within 10 % of what a step of 32,768 tokens over 50,304 ids holds."""
    cfg = pretrain.Config(depth=depth, recompute=recompute, total_batch_tokens=2 ** 16)
    sizes = pretrain.model_config(cfg, 50304)
    B, T = 2 ** 15 // sizes.block_size, sizes.block_size
    with FakeTensorMode(), Memory() as memory:
        model = m.GPT(sizes)
        model.recompute = recompute
        optimizers = m.make_optimizers(model, "muon", 1e-3, dtype=torch.bfloat16)
        ids = torch.zeros(B, T + 1, dtype=torch.long)
        for step in range(2):    # in the second one moments and gradients are there
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids[:, :-1])
            m.token_nats(logits, ids[:, 1:]).sum().backward()
            del logits
            for opt in optimizers if step == 0 else ():
                opt.step()
    assert pretrain.memory(cfg, sizes, B, 1, "none") == pytest.approx(memory.peak, rel=0.1)


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_passes_fit(shard):
    """Depth 40 on 8 GPUs of 80 GB: as many tokens a pass as fit, in whole parts of the batch."""
    cfg = pretrain.Config(depth=40, total_batch_tokens=2 ** 24)
    sizes = pretrain.model_config(cfg, 50304)
    n = pretrain.largest_pass(cfg, sizes, 8, shard, 2 ** 15, 68e9)
    assert n > 1 and 2 ** 21 // sizes.block_size % n == 0
    assert pretrain.memory(cfg, sizes, n, 8, shard) <= 68e9
    assert pretrain.memory(cfg, sizes, 2 * n, 8, shard) > 68e9 or 2 * n * sizes.block_size > 2 ** 15


def by_documents(q, k, v, begins, _, longest, __, window_size, enable_gqa):
    """What torch's varlen_attn does: q (N, H, D), k and v (N, K, D), causal in each document."""
    assert window_size == (-1, 0) and begins.dtype == torch.int32 and begins.diff().max() <= longest
    spans = [slice(*span) for span in zip(begins, begins[1:])]
    parts = [F.scaled_dot_product_attention(*(x[s].transpose(0, 1) for x in (q, k, v)),
                                            is_causal=True, enable_gqa=enable_gqa) for s in spans]
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_flash_attention_by_documents(key_heads, monkeypatch):
    """Where documents begin is worth as much as a mask, also with rows of one and of many."""
    torch.manual_seed(0)
    model = m.GPT(m.GPTConfig(32, 64, 2, n_head=4, n_kv_head=key_heads, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    doc = torch.stack([torch.zeros(32), torch.arange(32), torch.arange(32) // 7])
    ids = torch.randint(64, (3, 32))
    masked = model(ids, doc)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_documents)
    monkeypatch.setattr(m, "has_flash", lambda *_: True)
    torch.testing.assert_close(model(ids, doc), masked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("doc_mask, flash", [(False, False), (True, False), (True, True)])
def test_the_compiled_step_is_one_graph(short, monkeypatch, eager_backend, doc_mask, flash):
    """No break in the graph, and one compilation more: that of validation, without gradients.

    Flash attention knows how many documents there are: a number that changes with each batch."""
    monkeypatch.setattr(m, "has_flash", lambda *_: flash)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn",
                        lambda q, k, v, begins, *_, **__: (q + k + v) * begins[1])
    counters.clear()
    pretrain.main(short(pretrain, compile=True, doc_mask=doc_mask, max_steps=20, eval_every=10))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3    # of the trial in compiled(), and two


def watched(cfg):
    """pretrain.main, which sees that between forward and backward all weights are divided."""
    forward = m.GPT.forward

    def see(model, *args):
        seen = []
        for block in model.blocks:
            block.register_forward_hook(
                lambda block, x, y: seen.append(block.mlp.up_proj.weight.dtype), prepend=True)
        logits = forward(model, *args)
        assert seen and set(seen) == {torch.bfloat16}
        whole = [block for block in model.blocks
                 if not isinstance(block.mlp.up_proj.weight, DTensor)]
        assert len(whole) <= 1
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m.GPT, "forward", see)
        pretrain.main(cfg)


@pytest.mark.slow
def test_fsdp_gathers_bf16_and_lets_go(short, tmp_path):
    """A block's weights are there in bf16 while it is at work, of no other from forward to
    backward; gradients stay near those of one process."""
    cfg = short(pretrain, precision="bf16", max_steps=1, device_batch_size=2)
    one, _ = recorded(pretrain.main, cfg)
    (two, _), _ = on_two_ranks(watched, replace(cfg, shard="fsdp"), tmp_path)
    for a, b in zip(one[0], two[0]):
        assert (a - b).norm() <= 0.05 * a.norm()


def test_a_failed_rank_ends_at_once(monkeypatch, capfd):
    """Under NCCL nobody waits for the group at exit: the line is said, and the process gone."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr("sys.argv", ["pretrain.py"])
    if (child := os.fork()) == 0:
        m.run(lambda cfg: m.fail("no disk"), pretrain.Config)
        time.sleep(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert capfd.readouterr().err == "error: no disk\n"


@pytest.mark.parametrize("name, flops", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("Some GPU", math.nan)])
def test_peaks_of_gpus(monkeypatch, name, flops):
    """By name; of a GPU that nobody knows there is none, and no MFU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    env = m.Env(0, 2, torch.device("cuda"), torch.bfloat16, True)
    assert m.peak_flops(env) == pytest.approx(2 * flops, nan_ok=True)
    assert math.isnan(m.peak_flops(replace(env, dtype=None)))


def test_a_driver_that_is_too_old_is_named(monkeypatch):
    """A GPU is there and CUDA does not start: no run on the CPU that nobody asked for."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "driver" in error(m.setup, 1)


@pytest.mark.parametrize("stage", [pretrain, sft, reward, dpo, rlhf], ids=lambda x: x.__name__)
def test_recomputed_gradients_are_the_same(stage, short, monkeypatch):
    """--recompute reaches the model of every stage and changes no gradient."""
    calls, recomputed = [], m.recomputed
    monkeypatch.setattr(m, "recomputed", lambda *a, **k: calls.append(a) or recomputed(*a, **k))
    few = short(stage, max_steps=1)
    plain, _ = recorded(stage.main, few)
    assert not calls
    again, _ = recorded(stage.main, replace(few, recompute=True))
    assert calls
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)
