"""What only a GPU can show. Run: python -m pytest tests/test_gpu.py -q (skipped without CUDA)."""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import free_port, interrupted, log_of, weights

import dpo
import model as m
import pretrain
import reward
import rlhf
import sft

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ROOT = Path(__file__).parent.parent
DRAWN = dict(device="cuda", dtype=torch.bfloat16)


def losses(cfg):
    pretrain.main(cfg)
    return torch.tensor([row["loss"] for row in log_of(cfg.out, "loss")])


def test_norm():
    """CUDA's autocast turns norms into float32; this one stays in bf16, gradient and all."""
    norm = m.RMSNorm(128, 1e-6).cuda()
    x, grad = torch.randn(2, 64, 128, **DRAWN)
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = norm(a)
    y.backward(grad)
    F.rms_norm(b, (128,), eps=1e-6).backward(grad.float())
    assert y.dtype == torch.bfloat16 and a.grad.dtype == torch.bfloat16
    assert (a.grad - b.grad).norm() < 0.02 * b.grad.norm()


@pytest.mark.parametrize("stage, changes", [
    (pretrain, dict(compile=False)), (pretrain, dict(compile=False, doc_mask=True)),
    (pretrain, dict(compile=False, recompute=True)), (sft, {}), (sft, dict(lora_rank=2)),
    (reward, {}), (dpo, {}), (dpo, dict(online=True)), (rlhf, dict(algo="ppo")),
    (rlhf, dict(algo="grpo"))])
def test_stages_run_and_resume(stage, changes, short):
    """Three steps in bf16, stopped in the second and gone on with: as in one go."""
    whole, part = (short(stage, name, precision="auto", save_every=1, **changes)
                   for name in ("whole", "part"))
    stage.main(whole)
    interrupted(stage.main, 1)(part)
    stage.main(replace(part, resume=True))
    a, b = weights(whole.out), weights(part.out)
    for name in a:    # a few signs of Adam's first steps may differ with the order of sums
        assert (a[name] - b[name]).abs().mean() < 1e-4


def test_compiled_is_eager(short):
    """The losses of 30 steps."""
    eager, fast = (losses(short(pretrain, compile=compile, max_steps=30, precision="auto"))
                   for compile in (False, True))
    assert len(fast) == 30 and (fast - eager).abs().max() < 0.03


@pytest.mark.parametrize("key_heads, masked", [(8, False), (2, False), (8, True), (2, True)])
def test_attention_has_a_fast_kernel(key_heads, masked, monkeypatch):
    """Flash, or with a mask the memory-efficient one: never the one of plain products."""
    chosen = []

    def spy(*args, attn_mask=None, is_causal=False, enable_gqa=False):
        chosen.append(torch._fused_sdp_choice(*args, attn_mask, 0.0, is_causal,
                                              enable_gqa=enable_gqa))
        return args[0]
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k = torch.randn(4, 8, 512, 64, **DRAWN), torch.randn(4, key_heads, 512, 64, **DRAWN)
    mask = torch.ones(512, 512, dtype=torch.bool, device="cuda").tril()[None, None]
    m.attention(q, k, k, mask if masked else None, fused=True)
    assert chosen[0] > 0    # 0 plain, 1 flash, 2 efficient, 3 cuDNN


@pytest.mark.parametrize("key_heads", [4, 2])
def test_flash_attention_by_documents(key_heads, monkeypatch):
    """Packed documents with the kernel that knows them, and with a mask."""
    model = m.GPT(m.GPTConfig(256, 64, 2, n_head=4, n_kv_head=key_heads, n_embd=256)).cuda()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    ids, doc = torch.randint(64, (4, 256), device="cuda"), torch.arange(256, device="cuda") // 50
    with torch.autocast("cuda", torch.bfloat16):
        flash = model.hidden(ids, doc.expand(4, -1))
        monkeypatch.setattr(m, "has_flash", lambda *_: False)
        masked = model.hidden(ids, doc.expand(4, -1))
    assert (flash - masked).float().norm() < 0.02 * masked.float().norm()


def test_float32_is_float32():
    """--precision fp32 multiplies in float32: TF32 would be off by 0.03."""
    m.setup(1, "fp32")
    a = torch.randn(512, 512, device="cuda")
    assert ((a @ a).double() - a.double() @ a.double()).abs().max() < 1e-3


def test_memory_of_the_loss():
    """Logits and their gradient in bf16, and little else."""
    logits = torch.randn(8, 1024, 50304, **DRAWN).requires_grad_()
    ids = torch.randint(50304, (8, 1024), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    m.token_nats(logits, ids).sum().backward()
    assert torch.cuda.max_memory_allocated() < 4 * logits.numel() + 2 ** 30


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_all_gpus_are_one(shard, short, tmp_path):
    """The losses of ten steps on all GPUs and on one."""
    n = torch.cuda.device_count()
    if n < 2 or 64 % n:
        pytest.skip("needs 2, 4 or 8 GPUs")
    cfg = short(pretrain, max_steps=10, total_batch_tokens=2048)
    one, out = losses(cfg), str(tmp_path / "all.pt")
    flags = [f"--{name}={value}" for name, value in vars(cfg).items()
             if type(value) in (int, float, str) and name not in ("out", "shard")]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
                    f"--master_port={free_port()}", "pretrain.py", *flags, "--data", *cfg.data,
                    "--out", out, "--shard", shard], cwd=ROOT, check=True)
    several = torch.tensor([row["loss"] for row in log_of(out, "loss")])
    assert len(several) == 10 and (several - one).abs().max() < 0.05
