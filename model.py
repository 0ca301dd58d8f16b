"""What every stage shares: the model, its tokenizer and sampling, and the formats of files.

Only arithmetic and formats that must be bit-identical in several stages live here; the training
loop stands in each stage, because reading it is the point. Importing this does nothing. As a
script it exports: python model.py export out/sft.pt exported    # a folder that transformers loads

Shapes: B batch, T time, S cached time, C channels, H heads, K key heads, D head size, V vocabulary.
Conventions: padding is on the right; masks are 1 where a token counts; log-probs are float32 nats.
"""
import argparse
import base64
import codecs
import contextlib
import ctypes
import functools
import gzip
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import timeit
import traceback
import typing
import unicodedata
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.distributed.nn    # imported later, its default arguments would keep the group alive
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recomputed

# ------------------------------------------------------------------------------------------------
# The model: pre-norm decoder of the Llama / Qwen family


@dataclass
class GPTConfig:
    block_size: int = 256             # longest sequence, tokens
    vocab_size: int = 1024
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4                # fewer than n_head: grouped-query attention
    n_embd: int = 256
    n_hidden: int | None = None       # SwiGLU width; None: 8/3 of n_embd, rounded up to 64s
    head_size: int | None = None      # None: n_embd / n_head
    qk_norm: bool = True              # RMSNorm on queries and keys (Qwen3)
    qkv_bias: bool = False            # Qwen2
    tie_embeddings: bool = False      # one matrix for input and output embedding
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    rope_scaling: dict | None = None  # Llama 3's, as config.json has it

    def __post_init__(self):
        if self.n_embd % self.n_head and not self.head_size:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head "
                             f"{self.n_kv_head}")
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.head_size % 2:
            raise ValueError(f"heads of {self.head_size} channels cannot be rotated in pairs: "
                             f"choose another n_embd or n_head")
        self.n_hidden = self.n_hidden or math.ceil(self.n_embd * 8 / 3 / 64) * 64


class Normalise(torch.autograd.Function):
    """x / rms(x) * weight, x (.., C). Autograd's own backward reads and writes twice as much."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)    # faster than x.square().mean()
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        x = x * scale
        inner = grad * x
        along = (inner @ weight).unsqueeze(-1) / x.shape[-1]
        grad_x = (grad * weight).addcmul_(x, along, value=-1).mul_(scale)
        return grad_x, inner.flatten(0, -2).sum(dim=0), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight. Zhang & Sennrich 2019, arXiv 1910.07467."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):    # CUDA's would turn half of it float32
            return Normalise.apply(x, self.weight.to(x.dtype), self.eps)


def rope_tables(config):
    """cos and signed sin (T, D) of the rotary angles, half-split. Su et al., arXiv 2104.09864."""
    size = config.head_size
    freq = config.rope_base ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    if scaling := config.rope_scaling:    # Llama 3: slow down the low frequencies
        old = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        blend = ((old * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = freq * (blend + (1 - blend) / scaling["factor"])
    angles = torch.arange(config.block_size, dtype=torch.float32)[:, None] * freq
    return torch.cat([angles, angles], 1).cos(), torch.cat([-angles, angles], 1).sin()


class Rotate(torch.autograd.Function):
    """Rotate each pair (x[i], x[i + D/2]) by its angle. x (B, H, T, D); cos, sin (.., T, D)."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)

    @staticmethod
    def backward(ctx, grad):    # turn back; attention leaves the gradient of keys transposed
        cos, sin = ctx.saved_tensors
        return Rotate.apply(grad.contiguous(), cos, -sin), None, None


def attention(q, k, v, mask=None, fused=False):
    """softmax(q k' / sqrt(D)) v. q (B, H, T, D); k, v (B, K, S, D); -> (B, H, T, D).

    mask: bool (B or 1, 1, T, S), True where a query may look; None: causal, T == S;
    int (N + 1,): causal in each of N documents, which begin there in the B T tokens of all rows.
    fused: the same as one kernel, which is faster on GPUs and for long rows.
    """
    (B, H, T, D), K = q.shape, k.shape[1]
    if mask is not None and mask.dim() == 1:
        from torch.nn.attention.varlen import varlen_attn    # slow to import
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))          # (B T, H, D)
        y = varlen_attn(q, k, v, mask, mask, T, T, window_size=(-1, 0), enable_gqa=H > K)
        return y.view(B, T, H, D).transpose(1, 2)
    if fused:
        if mask is not None and H > K:    # no fast kernel does both
            k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                              enable_gqa=mask is None and H > K)
    if mask is None:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device).tril()
    if H > K:    # grouped queries: the heads that share a key head are rows of one product
        q, mask = q.reshape(B, K, -1, D), mask.repeat(1, 1, H // K, 1)          # (B, K, T H/K, D)
    # added, because masked_fill of all scores is slower
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    scores = (q * D ** -0.5) @ k.mT                                             # (B, H, T, S)
    with torch.autocast(q.device.type, enabled=False):    # bf16 in and out, summed in float32
        weights = (scores + bias).softmax(dim=-1)
    return (weights @ v).view(B, H, T, D)


class CausalSelfAttention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_size, self.qk_norm = layer, config.head_size, config.qk_norm
        q_size, kv_size = config.n_head * config.head_size, config.n_kv_head * config.head_size
        self.q_proj = nn.Linear(config.n_embd, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.n_embd, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.norm_eps)
            self.k_norm = RMSNorm(config.head_size, config.norm_eps)

    def forward(self, x, cos, sin, mask, cache, positions):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_size).transpose(1, 2).contiguous()
                   for proj in (self.q_proj, self.k_proj, self.v_proj))    # (B, H or K, T, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)               # (B, K, S, D)
        y = attention(q, k, v, mask, fused=q.is_cuda or T > 1024)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))            # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache, positions):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache, positions)
        return x + self.mlp(self.mlp_norm(x))


def has_flash(x, config):
    """Do packed documents x (B, T, C) need no mask (B, 1, T, T)? Flash attention 2 knows them."""
    return (x.is_cuda and x.dtype == torch.bfloat16
            and config.head_size % 8 == 0 and config.head_size <= 256
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_properties(x.device).major >= 8)


def document_mask(doc, flash=False):
    """Positions (B, T) that restart with each document, and mask (B, 1, T, T), of packed rows.

    doc (B, T): number of the document each token is in; a token sees its own document only.
    flash: instead of the mask where the documents begin (N + 1,), see attention.
    """
    t = torch.arange(doc.shape[1], device=doc.device)
    starts = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True)
    positions = t - torch.where(starts, t, 0).cummax(dim=1).values
    if flash:
        begins = starts.flatten().nonzero()[:, 0]
        return positions, F.pad(begins, (0, 1), value=doc.numel()).int()
    mask = (doc[:, :, None] == doc[:, None, :]) & (t[:, None] >= t)
    return positions, mask[:, None]


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() >= 2:    # keep the variance; what writes to the residual stream starts at 0
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.0 if writes else p.shape[-1] ** -0.5)
        nn.init.normal_(self.embed.weight, std=0.02 if config.tie_embeddings else 1.0)
        nn.init.normal_(self.head.weight, std=0.02 * config.n_embd ** -0.5)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def hidden(self, ids, doc=None, cache=None, positions=None):
        """Final-norm states (B, T, C).

        doc (B, T): see document_mask. cache: KVCache, with positions (B, T) of the tokens.
        """
        x, mask = self.embed(ids), None                                          # (B, T, C)
        if torch.is_autocast_enabled(ids.device.type):    # activations bf16, weights float32
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        if doc is not None:
            positions, mask = document_mask(doc, has_flash(x, self.config))
        if cache is not None:
            mask = cache.mask(positions)
        at = slice(ids.shape[1]) if positions is None else positions[:, None]    # (B, 1, T)
        cos, sin = self.cos[at].to(x.dtype), self.sin[at].to(x.dtype)            # (.., T, D)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():    # in backward, from x alone
                block = functools.partial(recomputed, block, use_reentrant=False)
            x = block(x, cos, sin, mask, cache, positions)
        return self.norm(x)

    def forward(self, ids, doc=None):
        """Logits (B, T, V) at every position, always."""
        return self.head(self.hidden(ids, doc))

    def flops_per_token(self, block_size=None):
        """Forward and backward, as PaLM (arXiv 2204.02311, app. B): 6 a weight + attention;
        4 a frozen weight, which gets no gradient of its own."""
        c = self.config
        weights = [self.head.weight, *(p for p in self.blocks.parameters() if p.dim() >= 2)]
        flops = sum(p.numel() * (6 if p.requires_grad else 4) for p in weights)
        return flops + 12 * c.n_layer * c.n_head * c.head_size * (block_size or c.block_size)


class ScalarHead(nn.Module):
    """One number a position: a reward model, read at a text's last token, or a critic.

    Weights of the head ~ N(0, 1/(C + 1)), bias 0: Stiennon et al. 2020, arXiv 2009.01325.
    """

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.config = gpt, gpt.config
        gpt.head = None    # of no use here, and DDP would wait for its gradient
        self.score = nn.Linear(gpt.config.n_embd, 1)
        nn.init.normal_(self.score.weight, std=(gpt.config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.score.bias)

    def forward(self, ids):
        """Scores (B, T), float32."""
        states = self.gpt.hidden(ids).float()
        with torch.autocast(ids.device.type, enabled=False):    # bf16 would round the scores
            return self.score(states).squeeze(-1)


# ------------------------------------------------------------------------------------------------
# Cache, sampling, generation


class KVCache:
    """Keys and values of all layers. Slot t of a row holds its token t; rows differ in length."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (config.n_layer, batch_size, config.n_kv_head, 0, config.head_size)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def make_room(self, end):
        """Have slots for `end` tokens, 16 at a time: products of slices would copy them first."""
        slots = self.k.shape[3]
        if end > slots:
            shape = (*self.k.shape[:3], math.ceil(end / 16) * 16 - slots, self.k.shape[4])
            more = self.k.new_zeros(shape)
            self.k, self.v = torch.cat([self.k, more], 3), torch.cat([self.v, more], 3)

    def mask(self, positions):
        """(B, 1, T, S): a token at `positions` (B, T) sees the slots up to its own."""
        slots = torch.arange(self.k.shape[3], device=positions.device)
        return (slots <= positions[:, :, None])[:, None]

    def update(self, layer, k, v, positions):
        """Write k, v (B, K, T, D) at positions (B, T); return all slots (B, K, S, D)."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.k[layer][rows, :, positions] = k.transpose(1, 2)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)
        return self.k[layer], self.v[layer]

    def select(self, rows):
        """Make these rows the batch, some of them more than once."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


def sample(logits, temperature, top_p, uniform):
    """Next ids (B,) from logits (B, V) by inverting the cumulative distribution at uniform (B,).

    One uniform number a row: what a row samples does not depend on its neighbours in the batch.
    temperature 0 is greedy. top_p keeps the smallest set of tokens whose mass reaches top_p.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    if top_p < 1:    # sorting takes longer than all the rest
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        probs = probs * (probs.cumsum(-1) - probs < top_p * probs.sum(-1, keepdim=True))
    cdf = probs.cumsum(dim=-1)
    index = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)    # (B, 1)
    index = index.minimum((cdf < cdf[:, -1:]).sum(-1, keepdim=True))    # rounding stays inside
    if top_p < 1:
        index = order.gather(1, index)
    return index.squeeze(1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(), seeds=None):
    """Continue prompts (lists of ids) together; yields (rows, tokens) for each new position.

    rows: the numbers of the prompts that still run, tokens: what each of them got. A row ends after
    one of stop_ids and leaves the batch. Row i draws its numbers from seeds[i] (default i): it
    samples the same alone and in any batch. Runs under the caller's autocast.
    Raises ValueError for an empty prompt or when a row would outgrow the model's block_size.
    """
    config, device = model.config, model.embed.weight.device
    if not all(prompts):
        raise ValueError("generate: a prompt is empty")
    different = list(dict.fromkeys(map(tuple, prompts)))    # equal prompts are read once
    same = [different.index(tuple(prompt)) for prompt in prompts]
    ids, _ = pad_batch(different, 0)                                           # (B', P)
    B, P = len(prompts), ids.shape[1]
    if P + max_new_tokens > config.block_size:
        raise ValueError(f"generate: {P} prompt + {max_new_tokens} new tokens exceed block_size "
                         f"{config.block_size}")
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    seeds = range(B) if seeds is None else seeds
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed))
                           for seed in seeds]).to(device)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    cast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if cast else model.embed.weight.dtype
    cache = KVCache(config, len(ids), device, dtype)
    cache.make_room(P)
    positions = torch.arange(P, device=device).expand(len(ids), P)
    states = model.hidden(ids.to(device), cache=cache, positions=positions)    # (B', P, C)
    cache.select(same)
    states, rows = states[same, lengths - 1], torch.arange(B, device=device)   # (B, C)
    for t in range(max_new_tokens):
        tokens = sample(model.head(states), temperature, top_p, uniform[rows, t])
        yield rows, tokens
        alive = ~torch.isin(tokens, stops)
        if t + 1 == max_new_tokens or not alive.any():
            return
        if not alive.all():
            rows, tokens = rows[alive], tokens[alive]
            cache.select(alive)
        cache.make_room(P + t + 1)
        positions = (lengths[rows] + t)[:, None]
        states = model.hidden(tokens[:, None], cache=cache, positions=positions)[:, 0]


def complete(model, prompts, max_new_tokens, batch_size=None, seeds=None, **sampling):
    """The answers of generate to any number of prompts: lists of ids, the stop token included.

    batch_size: prompts at a time [all], those of like length together. seeds: one a prompt [its
    number]. sampling: as of generate.
    """
    answers = [[] for _ in prompts]
    seeds = range(len(prompts)) if seeds is None else seeds
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batch_size = batch_size or max(1, len(prompts))
    for start in range(0, len(order), batch_size):
        part = order[start:start + batch_size]
        steps = generate(model, [prompts[i] for i in part], max_new_tokens,
                         seeds=[seeds[i] for i in part], **sampling)
        for rows, tokens in steps:
            for row, token in zip(rows.tolist(), tokens.tolist()):
                answers[part[row]].append(token)
    return answers


# ------------------------------------------------------------------------------------------------
# Tokenizer and chat format

ENDOFTEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
# Pre-tokenizer of GPT-4 (cl100k_base, openai/tiktoken), but every digit stands alone, as in Llama 2
# and DeepSeek: sums are learned digit by digit. Merges never cross these pieces.
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}"
                 r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
PIECE = 1 << 17    # characters that are encoded at once: tiktoken's stack has no room for 1 << 20


def cut_text(text, size):
    """Pieces of at most `size` characters, cut before the blank or line end between two words: no
    split pattern joins there. Only a piece without such a place near its end is cut elsewhere."""
    while len(text) > size:
        low = max(1, size - 5000)
        places = [m.start() for m in re.finditer(r"(?<=[^\W_])[ \n](?=[^\W\d_])", text[low:size])]
        end = low + places[-1] if places else size
        yield text[:end]
        text = text[end:]
    yield text


class Encoding(tiktoken.Encoding):
    bos = ()    # ids that every text begins with

    def encode_ordinary(self, text):
        """The ids of plain text: a control token spelled out in it stays text."""
        if self.name == "chars":    # a character without an id would be a panic in tiktoken
            unknown = {c for c in set(text) if c.encode() not in self._mergeable_ranks}
            if unknown:
                fail(f"the tokenizer of single characters has no {min(unknown)!r}, which is in "
                     f"{text[:60]!r}; use texts of its letters, or another --tokenizer")
        parts = map(super().encode_ordinary, cut_text(text, PIECE))
        return [*itertools.chain.from_iterable(parts)]

    def decode(self, ids):
        """The text of ids, without the half of a letter at the end of what was cut or goes on."""
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self.decode_bytes(ids))


class PublicEncoding:
    """A public model's tokenizer.json, byte-level, by the package that transformers uses.

    Control tokens of ours that it lacks get the ids behind its own. eos: the id of what ends its
    texts, if it has no <|endoftext|>. n_vocab: rows of the model's embeddings, of which some are
    spare. bos: what it puts before every text (Llama 3). Added tokens that are text, as Qwen3's
    <think>, are one id wherever they stand. Raises ValueError for a tokenizer of another kind.
    """
    name = "public"

    def __init__(self, text, n_vocab, eos=None):
        self.inner = need("tokenizers").Tokenizer.from_str(text)
        if '"ByteLevel"' not in json.dumps(json.loads(text)["decoder"]):
            raise ValueError("its tokenizer is not byte-level")
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.encode_special_tokens = True    # as text
        self.eos = None if ENDOFTEXT in self.inner.get_vocab() else eos
        last = ENDOFTEXT if self.eos is None else self.inner.id_to_token(eos)
        self.inner.add_special_tokens([last, IM_START, IM_END, PAD])
        vocab = self.inner.get_vocab()
        self._special_tokens = {token: vocab[token] for token in (IM_START, IM_END, PAD)}
        self._special_tokens[ENDOFTEXT] = vocab[last]
        self.n_vocab = max(n_vocab, max(vocab.values()) + 1)
        letter = self.inner.encode("a", add_special_tokens=False).ids[0]
        whole = self.inner.encode("a").ids
        self.bos = whole[:whole.index(letter)]
        # for token_bytes: a letter of a token stands for a byte, but an added token is what it says
        # and a control token no text
        self._mergeable_ranks = vocab
        for i, token in self.inner.get_added_tokens_decoder().items():
            del vocab[token.content]
            if not token.special:
                vocab[token.content.encode()] = i

    def encode_ordinary(self, text):
        """The ids of plain text: a control token spelled out in it stays text."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode(list(ids), skip_special_tokens=False).rstrip("\ufffd")


def make_encoding(name, pattern, ranks, special_tokens=None):
    """An Encoding with our four control tokens added after the last id unless there already.

    ranks: {bytes: id}. Large vocabularies get reserved ids up to a multiple of 64: matrix products
    of odd width are slow, and this way tokenizer and model have the same number of ids.
    """
    special_tokens = dict(special_tokens or {})
    free = max([*ranks.values(), *special_tokens.values()]) + 1
    for token in (ENDOFTEXT, IM_START, IM_END, PAD):
        if token not in special_tokens:
            special_tokens[token], free = free, free + 1
    while free > 1024 and free % 64:
        special_tokens[f"<|reserved_{free}|>"], free = free, free + 1
    return Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def encoding_to_dict(enc):
    """Plain strings and ints, safe for JSON and torch.load; ranks as in .tiktoken files."""
    if isinstance(enc, PublicEncoding):
        return dict(name=enc.name, json=enc.inner.to_str(), n_vocab=enc.n_vocab, eos=enc.eos)
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(token).decode()} {i}" for token, i in ranks]
    return dict(name=enc.name, pattern=enc._pat_str, special_tokens=dict(enc._special_tokens),
                ranks="\n".join(lines))


def encoding_from_dict(saved):
    if "json" in saved:
        return PublicEncoding(saved["json"], saved["n_vocab"], saved["eos"])
    pairs = [line.split() for line in saved["ranks"].splitlines()]
    ranks = {base64.b64decode(token): int(i) for token, i in pairs}
    return make_encoding(saved["name"], saved["pattern"], ranks, saved["special_tokens"])


def encoding_hash(enc):
    """Identity of a tokenizer: the same hash means the same ids for the same text."""
    identity = {k: v for k, v in encoding_to_dict(enc).items() if k != "name"}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def token_bytes(enc):
    """(V,) int64: how many bytes of text each id stands for, 0 for control tokens."""
    sizes = np.zeros(enc.n_vocab, dtype=np.int64)
    for token, i in enc._mergeable_ranks.items():
        sizes[i] = len(token)
    return torch.from_numpy(sizes)


def render_chat(enc, messages, reply=False):
    """ChatML as (ids, mask): mask is 1 on what the assistant says and on its end-of-turn token.

    messages: [{"role", "content"}]. With reply=True the ids end where the assistant would speak.
    Built segment by segment: text that looks like a control token stays text.
    Raises ValueError for an unknown role. Layout: <|im_start|>role\\ncontent<|im_end|>\\n.
    """
    start, end = enc._special_tokens[IM_START], enc._special_tokens[IM_END]
    newline = enc.encode_ordinary("\n")
    ids, mask = [*enc.bos], [0] * len(enc.bos)
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}")
        if role == "assistant":    # tokenized as it is sampled: apart from what stands before it
            head, body = enc.encode_ordinary(role + "\n"), enc.encode_ordinary(content)
        else:
            head, body = enc.encode_ordinary(role + "\n" + content), []
        learned = int(role == "assistant" and message.get("weight") != 0)
        ids += [start, *head, *body, end, *newline]
        mask += [0] * (1 + len(head)) + [learned] * (len(body) + 1) + [0] * len(newline)
    if reply:
        head = [start, *enc.encode_ordinary("assistant\n")]
        ids, mask = ids + head, mask + [0] * len(head)
    return ids, mask


def render_reply(enc, prompt, reply):
    """(ids, mask) of a prompt (messages) and one reply (text): mask 1 on the reply and its end."""
    head, _ = render_chat(enc, prompt, reply=True)
    body = [*enc.encode_ordinary(reply), enc._special_tokens[IM_END]]
    return head + body, [0] * len(head) + [1] * len(body)


# ------------------------------------------------------------------------------------------------
# Arithmetic that several stages need bit for bit


class TokenNats(torch.autograd.Function):
    """-ln softmax(logits / temperature)[ids]: logits (N, V) of any dtype, ids (N,) -> float32 (N,).

    Done in pieces, so that no float32 copy of all logits is ever there: with their log-softmax and
    its gradient it would take 14 bytes a logit, not 4.
    """

    @staticmethod
    def forward(ctx, logits, ids, temperature):
        nats = torch.empty(len(ids), device=logits.device)
        work = compiled(nats_of_piece) if logits.is_cuda else nats_of_piece
        for at in pieces(logits):
            nats[at] = work(logits[at], ids[at], temperature)
        ctx.save_for_backward(logits, ids, nats)
        ctx.temperature = temperature
        return nats

    @staticmethod
    def backward(ctx, grad):
        logits, ids, nats = ctx.saved_tensors
        grad, grad_logits = grad / ctx.temperature, torch.empty_like(logits)
        work = compiled(gradient_of_piece) if logits.is_cuda else gradient_of_piece
        for at in pieces(logits):
            grad_logits[at] = work(logits[at], grad[at], ctx.temperature)
        right = ((-nats).exp() - 1) * grad
        grad_logits[torch.arange(len(ids), device=ids.device), ids] = right.to(logits.dtype)
        return grad_logits, None, None


def pieces(logits):
    """Slices of rows: small ones that stay in a CPU's cache, large ones that keep a GPU busy."""
    n = max(1, (2 ** 26 if logits.is_cuda else 2 ** 19) // logits.shape[1])
    return [slice(start, start + n) for start in range(0, len(logits), n)]


def nats_of_piece(logits, ids, temperature):
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return F.cross_entropy(logits, ids, reduction="none")


def gradient_of_piece(logits, grad, temperature):
    """All but what the right ids get on top."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return logits.softmax(-1).mul_(grad[:, None])


def token_nats(logits, ids, temperature=1.0):
    """-ln p(ids) at each position, float32: logits (B, T, V), ids (B, T) -> (B, T)."""
    return TokenNats.apply(logits.flatten(0, 1), ids.flatten(), temperature).view(ids.shape)


def token_logprobs(logits, ids, temperature=1.0):
    """log p(ids[t] | ids[<t]) as (B, T) float32 nats, aligned to `ids`; entry 0 is 0.

    logits (B, T, V): logits[:, t] predicts ids[:, t + 1].
    """
    nats = token_nats(logits, F.pad(ids[:, 1:], (0, 1)), temperature)    # of nothing at the end
    return F.pad(-nats[:, :-1], (1, 0))


def pad_batch(rows, pad_id):
    """Right-pad lists of ids: (ids (B, T) int64, mask (B, T) float32, 1 on real tokens)."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    return ids, mask


def collate(rows, pad_id, device):
    """Rows (lists of (ids, mask)) -> ids (B, T), mask (B, T), doc (B, T): a number for each piece.

    Padding is a piece of its own. The first token of a piece has mask 0, so that no piece is
    predicted from the one before it.
    """
    ids, mask, doc = [], [], []
    for row in rows:
        ids.append(torch.tensor([i for piece, _ in row for i in piece]))
        mask.append(torch.tensor([on for _, learned in row for on in (0, *learned[1:])]))
        doc.append(torch.tensor([n for n, (piece, _) in enumerate(row) for _ in piece]))
    ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    mask = pad_sequence(mask, batch_first=True).float()
    doc = pad_sequence(doc, batch_first=True, padding_value=-1)
    return ids.to(device), mask.to(device), doc.to(device)


def wilson(k, n, z=1.959964):
    """(low, high), 95 % interval of a share k / n. Wilson 1927."""
    if not n:
        return 0.0, 1.0
    p, zz = k / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return (p + zz / 2 - half) / (1 + zz), (p + zz / 2 + half) / (1 + zz)


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n).tolist()


def nth_of_epochs(n, index, seed):
    """Which of n rows the index-th draw of a run is: each once an epoch, in ever new order."""
    epoch, i = divmod(index, n)
    return epoch_order(seed, epoch, n)[i]


def cosine_lr(progress, warmup, learning_rate, min_lr=0.0):
    """Linear warm-up from 0, then half a cosine to min_lr; progress, warmup: shares of the run."""
    if progress < warmup:
        return learning_rate * progress / warmup
    x = min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * x))


# ------------------------------------------------------------------------------------------------
# LoRA


class LoRALinear(nn.Module):
    """W x + 2 B (A x), W frozen, B = 0 at first: alpha is twice the rank. Hu et al., 2106.09685."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear, self.scale, self.on = linear, 2.0, True
        weight = linear.weight
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.uniform_(self.a, -weight.shape[1] ** -0.5, weight.shape[1] ** -0.5)

    def forward(self, x):
        y = self.linear(x)
        return y + self.scale * F.linear(F.linear(x, self.a), self.b) if self.on else y


def add_lora(model, rank):
    """Freeze a model and adapt the linear layers of its blocks; a scalar head is still trained."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("score."))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            if rank > (largest := min(module.weight.shape)):
                fail(f"--lora_rank {rank}: {name} has no more than rank {largest} itself")
            model.set_submodule(name, LoRALinear(module, rank))


@contextlib.contextmanager
def adapters_off(model):
    """Inside `with`: the model as it was before LoRA. A model without adapters is left alone."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        layer.on = False
    yield model
    for layer in layers:
        layer.on = True


def merged_weights(model):
    """(state_dict with adapters merged in, state_dict of what LoRA trains, {} without adapters)."""
    weights, trained = model.state_dict(), {}
    for name, m in model.named_modules():
        if isinstance(m, LoRALinear):
            a, b = (weights.pop(f"{name}.{k}") for k in "ab")
            trained |= {f"{name}.a": a, f"{name}.b": b}
            weights[f"{name}.weight"] = weights.pop(f"{name}.linear.weight") + m.scale * b @ a
            if m.linear.bias is not None:
                weights[f"{name}.bias"] = weights.pop(f"{name}.linear.bias")
    if trained:
        trained |= {name: p for name, p in weights.items() if name.startswith("score.")}
    return weights, trained


# ------------------------------------------------------------------------------------------------
# Optimizers


def orthogonalise(x):
    """Push the singular values of a matrix x towards 1, by Newton-Schulz steps (Jordan et al.).

    Each step applies 3.4445 s - 4.775 s^3 + 2.0315 s^5 to every singular value s. Three steps, not
    the published five: the optimizers take a sixth of a training step on a CPU as it is.
    """
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(3):
        gram = x @ x.mT
        gram = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of matrices. Jordan et al. 2024.

    The update has the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so one rate serves both.
    torch.optim has it too, but always in bf16. dtype: of the products.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.9, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state, lr = self.state[p], group["lr"]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"]).to(self.dtype)    # Nesterov
                tall = p.shape[0] > p.shape[1]
                update = orthogonalise(update.mT).mT if tall else orthogonalise(update)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def make_optimizers(model, optimizer, learning_rate, weight_decay=0.0, dtype=None):
    """[AdamW], or [Muon for the blocks' matrices, AdamW for the rest]; decay on these matrices.

    dtype: of Muon's products, None for float32. Betas 0.9 and 0.95, as GPT-3's and Llama's.
    """
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in params if p.dim() == 2 and "blocks." in name]
    others = [p for name, p in params if p.dim() != 2 or "blocks." not in name]
    adamw = functools.partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.95),
                              weight_decay=0.0, fused=True)
    if optimizer == "muon":
        muon = Muon(matrices, learning_rate, weight_decay, dtype=dtype or torch.float32)
        return [muon, adamw(others)]
    return [adamw([dict(params=matrices, weight_decay=weight_decay), dict(params=others)])]


# ------------------------------------------------------------------------------------------------
# People's files: rows as conversations, pairs and prompts


def find_file(path):
    """The Path of a file; hf://datasets/OWNER/NAME/FILE is fetched from the hub, once."""
    if not str(path).startswith("hf://datasets/"):
        return Path(path) if Path(path).exists() else fail(f"{path} does not exist")
    hub, parts = need("huggingface_hub"), str(path).removeprefix("hf://datasets/").split("/", 2)
    if len(parts) < 3:
        fail(f"{path}: give hf://datasets/OWNER/NAME/FILE")
    try:
        owner, name, file = parts
        return Path(hub.hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as e:    # whatever the hub or the network answers
        fail(f"{path} cannot be fetched: {type(e).__name__}: {' '.join(str(e).split())[:200]}")


def need(package):
    """An optional package, imported where it is used."""
    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f"this needs a package: pip install {package.split('.')[0]}")


UTF16 = (b"\xff\xfe", b"\xfe\xff")    # its byte order marks


def open_file(path):
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        stream = need("pyarrow").input_stream(str(path), compression="zstd")
        return io.BufferedReader(stream)
    return open(path, "rb")


def parse_json(text):
    """What a JSON text says, None for a broken one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def json_rows(text):
    """The rows of a JSON list, of {"data": [...]} or of JSON lines; None for a broken one."""
    found = parse_json(text)
    if found is None:
        return [parse_json(line) for line in text.split("\n") if line.strip()]
    for name in ("data", "train"):
        inside = found.get(name) if isinstance(found, dict) else None
        if isinstance(inside, list) and all(isinstance(row, dict) for row in inside):
            return inside
    return found if isinstance(found, list) else [found]


def row_files(path):
    """The files of rows in a folder, in order; a file itself, whatever its name."""
    if not path.is_dir():
        return [path]
    form = re.compile(r"[^.].*\.(jsonl?(\.gz|\.zst)?|parquet)$", re.I)
    return [f for f in sorted(path.rglob("*")) if form.match(f.name) and f.is_file()]


def read_rows(paths):
    """The rows (dicts) of files and folders of .jsonl, .json (.gz, .zst) and .parquet; over 1 %
    broken lines: an error."""
    rows = []
    for file in [file for path in paths for file in row_files(find_file(path))]:
        try:
            if file.suffix.lower() == ".parquet":
                found = need("pyarrow.parquet").read_table(file).to_pylist()
            else:
                with open_file(file) as f:
                    data = f.read()
                codec = "utf-16" if data[:2] in UTF16 else "utf-8-sig"
                found = json_rows(data.decode(codec, errors="replace"))
        except (OSError, EOFError, ArithmeticError, ValueError, zlib.error) as e:
            fail(f"cannot read {file}: {' '.join(str(e).split())}")
        kept = [row for row in found if isinstance(row, dict)]
        numbers = [n for n, row in enumerate(found, 1) if not isinstance(row, dict)]
        if len(numbers) > 0.01 * len(found):
            fail(f"{file}: {len(numbers)} of {len(found)} rows are no JSON objects, the first is "
                 f"row {numbers[0]}")
        if numbers:
            print0(f"{file}: {len(numbers)} broken rows skipped, the first is row {numbers[0]}")
        for row in kept:    # in .parquet what a row lacks is None
            rows.append({name: value for name, value in row.items() if value is not None})
    return rows or fail(f"no rows in {' '.join(map(str, paths))}")


SPEAKERS = dict(human="user", prompter="user", gpt="assistant", bot="assistant",
                chatbot="assistant", model="assistant", developer="system")
TALKS = ("messages", "conversations", "conversation")
REPLIES = ("chosen", "output", "answer", "completion", "response", "answers")
# Beside these the text of a row or turn would mean something else.
NOT_TEXT = ("tools", "tool_calls", "functions", "function_call", "image", "images", "video",
            "videos", "audio", "audios", "documents", "passages")


def to_turns(value, role):
    """Messages of a text (one turn, or an HH-RLHF transcript), of a turn or of a list of them."""
    if isinstance(value, str):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", value)
        if parts[0].strip() or len(parts) == 1:
            return [dict(role=role, content=value)]
        value = [dict(role=who, content=text.strip())
                 for who, text in zip(parts[1::2], parts[2::2])]
        if len(value) > 1 and not value[-1]["content"]:
            value.pop()    # the open end, "Assistant:", is where a reply goes
    turns = []
    for turn in [value] if isinstance(value, dict) else value:
        if more := next((name for name in NOT_TEXT if turn.get(name)), None):
            raise ValueError(f"{more} beside the text")
        who = str(turn.get("role") or turn.get("from")).lower()
        who = SPEAKERS.get(who, who)
        said = [turn.get(name) for name in ("content", "value", "text")]
        content = next((text for text in said if text is not None), None)
        if isinstance(content, list):    # OpenAI's list of parts
            kinds = {part.get("type", "text") for part in content}
            if odd := kinds - {"text", "input_text", "output_text"}:
                raise ValueError(f"a turn with a part of type {min(odd)}")
            content = "".join(part["text"] for part in content)
        if who not in ROLES:
            raise ValueError(f"unknown role {who!r}")
        if not isinstance(content, str):
            raise ValueError("a turn without text")
        if turn.get("weight") not in (None, 0, 1):
            raise ValueError(f"weight {turn['weight']} is neither 0 nor 1")
        turns.append(dict(role=who, content=content))
        if turn.get("weight") == 0:    # OpenAI's: this turn is not learned
            turns[-1]["weight"] = 0
    return turns


def question_of(row):
    """The messages of a prompt (TRL), an instruction (Alpaca) or a question (GSM8K, SQuAD), with
    the passage and the input that stand beside it, and the history before it."""
    turns = []
    for said in row.get("history") or []:
        if not isinstance(said, dict):    # LlamaFactory's [question, answer]
            said = [dict(role="user", content=said[0]), dict(role="assistant", content=said[1])]
        turns += to_turns(said, "user")
    # an instruction or a question is no transcript, whatever it looks like
    asked = dict(role="user", content=row.get("instruction") or row.get("question") or "")
    prompt, told = row.get("prompt"), row.get("instruction")
    if told and isinstance(prompt, str) and told in prompt:    # Alpaca, filled in beside it
        prompt = None
    turns += to_turns(prompt, "user") if prompt else [asked]
    parts = [row.get("context"), row.get("passage"), turns[-1]["content"], row.get("input")]
    if turns[-1]["role"] == "user":
        turns[-1]["content"] = "\n\n".join(filter(None, parts))
    return turns if any(parts) else []


def conversation(row, *replies):
    """The messages of a row, with the reply under the first of these fields that it has.

    OpenAI messages, ShareGPT conversations, or see question_of. A reply that begins with another's
    turn is the whole conversation (HH-RLHF, UltraFeedback).
    Raises ValueError with the reason for what cannot be told as messages, or another error.
    """
    if more := next((name for name in NOT_TEXT if row.get(name)), None):
        raise ValueError(f"{more} beside the text")
    talk = next((row[name] for name in TALKS if row.get(name)), None)
    options = next((name for name in ("choices", "options") if row.get(name)), "")
    if options and not talk and not row.get("prompt"):
        raise ValueError(f"{options} beside the question")
    turns = to_turns(talk, "user") if talk else question_of(row)
    name = next((name for name in replies if row.get(name) not in (None, "", [])), "")
    reply = row.get(name, [])
    if isinstance(reply, dict) and isinstance(reply.get("text"), list):    # SQuAD's answers
        reply = "".join(reply["text"][:1])
    reply = str(reply) if isinstance(reply, (int, float)) else reply
    if isinstance(reply, str) and name not in ("chosen", "rejected"):    # else it is no transcript
        reply = dict(role="assistant", content=reply)
    reply = to_turns(reply, "assistant")
    if reply and reply[0]["role"] != "assistant":
        turns = reply
    elif turns and not (talk and turns[-1]["role"] == "assistant"):
        turns += reply
    system = row.get("system") or row.get("system_prompt")
    if turns and system and turns[0]["role"] != "system":
        turns = [dict(role="system", content=system), *turns]
    return turns


def to_messages(row):
    """A demonstration as messages. Raises ValueError with the reason where a row is none."""
    if row.get("label") is False or row.get("label") == 0 and "completion" in row:    # KTO's
        raise ValueError("label false: an answer that is not to be learned")
    if row.get("weight") not in (None, 1):
        raise ValueError("a weight of the row: it belongs to a turn")
    turns = conversation(row, *REPLIES)
    if not turns:
        raise ValueError("none of messages, conversations, instruction, question, prompt in it")
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise ValueError("no assistant turn")
    if not all(turn["content"].strip() for turn in turns if turn["role"] in ("user", "assistant")):
        raise ValueError("an empty turn")
    return turns


def to_prompt(row):
    """The messages an assistant should answer next. Raises ValueError."""
    turns = conversation(row, "chosen")
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not any(turn["content"].strip() for turn in turns if turn["role"] != "system"):
        raise ValueError("empty prompt, or no prompt, question or messages")
    return turns


def to_pair(row):
    """(prompt messages, chosen text, rejected text): TRL, HH-RLHF, UltraFeedback. ValueError."""
    if not row.get("chosen") or not row.get("rejected"):
        kto = "no pair; sft.py learns from KTO's rows with label true"
        raise ValueError(kto if "label" in row else "empty answer, or no chosen or rejected")
    chosen, rejected = conversation(row, "chosen"), conversation(row, "rejected")
    prompt = chosen[:-1]
    if prompt != rejected[:-1]:
        raise ValueError("the prompts differ")
    if not any(turn["content"].strip() for turn in prompt):
        raise ValueError("empty prompt")
    if {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise ValueError("no assistant turn")
    chosen, rejected = chosen[-1]["content"], rejected[-1]["content"]
    if not chosen.strip() or not rejected.strip():
        raise ValueError("empty answer")
    if chosen.strip() == rejected.strip():
        raise ValueError("equal answers")
    return prompt, chosen, rejected


def keep_valid(rows, convert, what):
    """[convert(row)] where that raises no ValueError; the other rows counted by reason."""
    kept, numbers = [], {}    # of the rows dropped, by reason
    for number, row in enumerate(rows, 1):
        try:
            kept.append(convert(row))
        except ValueError as e:
            numbers.setdefault(str(e), []).append(number)
        except (TypeError, AttributeError, LookupError):
            numbers.setdefault("not in a known format", []).append(number)
    if numbers:
        print0(f"{what}: {sum(map(len, numbers.values()))} of {len(rows)} rows dropped: "
               + ", ".join(f"{why} ({len(some)}, first row {some[0]})"
                           for why, some in numbers.items()))
    return kept or fail(f"{what}: no row is usable")


def load_prompts(paths, enc, room):
    """Rows as dicts: ids (ready for an answer, `room` at most), messages, and the row itself."""
    if room < 1:
        fail("the context has no room for a prompt beside its answer: give a model with a longer "
             "context, or a smaller --max_new_tokens to a stage that has it")

    def convert(row):
        messages = to_prompt(row)
        ids, _ = render_chat(enc, messages, reply=True)
        if len(ids) > room:
            raise ValueError(f"longer than {room} tokens")
        return dict(ids=ids, messages=messages, row=row, prompt=str(messages))

    return keep_valid(read_rows(paths), convert, " ".join(paths))


def load_pairs(paths, enc, block_size):
    """Usable pairs as dicts: prompt (key), chosen, rejected (ids), n_prompt, source, margin, and
    the probability that chosen is better (a soft label; 1 where the row says none)."""
    def convert(row):
        prompt, chosen, rejected = to_pair(row)
        chosen, rejected = (render_reply(enc, prompt, reply)[0] for reply in (chosen, rejected))
        if max(len(chosen), len(rejected)) > block_size:
            raise ValueError(f"longer than {block_size} tokens")
        margin, probability = float(row.get("margin", 0)), float(row.get("probability", 1))
        if not (0 <= probability <= 1 and math.isfinite(margin)):
            raise ValueError("margin or probability out of range")
        if probability < 0.5:    # then the other answer is the one that is preferred
            chosen, rejected, margin, probability = rejected, chosen, -margin, 1 - probability
        return dict(prompt=str(prompt), chosen=chosen, rejected=rejected, margin=margin,
                    n_prompt=len(render_chat(enc, prompt, reply=True)[0]),
                    source=str(row.get("source", "all")), probability=probability)

    return keep_valid(read_rows(paths), convert, " ".join(paths))


def load_principles(path):
    """The lines of a constitution, one principle each."""
    lines = find_file(path).read_text("utf-8-sig", "replace").splitlines()
    return [line.strip() for line in lines if line.strip()] or fail(f"{path}: no principle in it")


def split_by_prompt(rows, fraction, seed, most=math.inf):
    """(train, held out, at most so many rows of it): no prompt is in both, and both have one."""
    prompts = sorted({row["prompt"] for row in rows})
    order = np.random.default_rng(seed).permutation(len(prompts))
    held = {prompts[i] for i in order[:max(1, round(fraction * len(prompts)))]}
    train = [row for row in rows if row["prompt"] not in held]
    if not train:
        fail(f"{len(prompts)} prompts are too few to train on and to hold out --val_fraction "
             f"{fraction:g}")
    held_out = [row for row in rows if row["prompt"] in held]
    return train, held_out[::max(1, math.ceil(len(held_out) / most))]


# ------------------------------------------------------------------------------------------------
# The reading of a judge


def score_texts(model, texts, pad_id, env):
    """Scores (B,) of texts (lists of ids) by a ScalarHead, read at the last token of each."""
    ids, mask = pad_batch(texts, pad_id)
    with env.autocast():
        scores = model(ids.to(env.device))                                          # (B, T)
    last = mask.sum(1).long().to(env.device) - 1
    return scores.gather(1, last[:, None]).squeeze(1)


@torch.no_grad()
def score_all(model, texts, pad_id, batch_size, env):
    """Scores of any number of texts, as a list in their order; equal texts have equal scores."""
    different = sorted(dict.fromkeys(map(tuple, texts)), key=lambda text: -len(text))
    scores = {}
    for start in range(0, len(different), batch_size):
        part = different[start:start + batch_size]
        scores.update(zip(part, score_texts(model, part, pad_id, env).tolist()))
    return [scores[tuple(text)] for text in texts]


def load_judge(path, enc, block_size, env):
    """The frozen reward model at path, for texts of this tokenizer and length."""
    judge, judge_enc = load_model(load_checkpoint(path, "python reward.py"), env.device)
    if not isinstance(judge, ScalarHead):
        fail(f"{path} is not a reward model; make one with: python reward.py")
    if encoding_hash(judge_enc) != encoding_hash(enc):
        fail(f"{path} has another tokenizer than the model that it should judge")
    if judge.config.block_size < block_size:
        fail(f"{path} reads {judge.config.block_size} tokens, the model that it should judge "
             f"writes {block_size}: train the reward model from a checkpoint with as many")
    return judge.requires_grad_(False)


def load_function(flag, spec):
    """A function of (prompts, answers) from FILE.py:NAME(prompts, completions, rows).

    FILE.py may also be one beside this script. prompts: dicts of load_prompts; answers: strings.
    """
    path, _, name = spec.rpartition(":")
    files = [file for file in (Path(path), Path(__file__).parent / path) if file.is_file()]
    if not files:
        fail(f"--{flag} {spec}: {path or spec} does not exist")
    file = files[0].resolve()
    sys.path.insert(0, str(file.parent))    # it may import what lies beside it
    try:
        module = importlib.import_module(file.stem)
    except (Exception, SystemExit) as e:    # the user's own code
        fail(f"--{flag} {spec}: importing {file} raised {type(e).__name__}: {e}")
    if getattr(module, "__file__", "") != str(file):
        fail(f"--{flag} {spec}: Python has another module {file.stem}; rename the file")
    if not callable(getattr(module, name, None)):
        fail(f"--{flag} {spec}: there is no function {name} in {file}")

    def call(prompts, answers):
        messages, rows = [p["messages"] for p in prompts], [p["row"] for p in prompts]
        try:
            scores = [float(score) for score in getattr(module, name)(messages, answers, rows)]
        except (Exception, SystemExit) as e:    # the user's own code
            fail(f"--{flag} {spec} raised {type(e).__name__}: {e}")
        if len(scores) != len(answers):
            fail(f"--{flag} {spec} returned {len(scores)} numbers for {len(answers)} completions")
        for score, answer in zip(scores, answers):
            if flag == "reward" and not math.isfinite(score):
                fail(f"--reward {spec} returned {score} for the completion {answer[:80]!r}")
        return scores

    return call


# ------------------------------------------------------------------------------------------------
# Folders of tokens that prepare.py writes


def read_encoding(folder):
    """The tokenizer in a folder of tokens."""
    try:
        return encoding_from_dict(read_json(Path(folder, "encoding.json")))
    except (KeyError, TypeError, ValueError) as e:
        fail(f"{folder}: encoding.json is damaged: {type(e).__name__} {e}; run prepare.py again")


def has_tokens(path, default):
    """Is there a folder of tokens to open? "none" and an absent default are no; what else is given
    has to be there."""
    return path not in ("none", default) or Path(path, "manifest.json").exists()


def open_tokens(spec, reader="", its_enc=None, block_size=0):
    """DIR or DIR:WEIGHT -> dict(path, weight, train, val, enc); the arrays are memory-mapped.
    reader: what it must suit, which has the tokenizer its_enc and reads block_size tokens."""
    path, weight = re.fullmatch(r"(.*?)(?::(-?\d*\.?\d+))?", spec).groups(default="1")
    if Path(spec).is_dir():    # whose name ends like a weight
        path, weight = spec, "1"
    if float(weight) <= 0:
        fail(f"{spec}: a weight has to be above 0")
    if not Path(path, "manifest.json").exists():
        fail(f"{path} holds no tokens; make them with: "
             f"python prepare.py --input FILES --out {path}")
    manifest = read_json(Path(path, "manifest.json"))
    enc = read_encoding(path)
    try:
        dtype = np.dtype(manifest["dtype"])
        counts = {part: int(manifest["tokens"][part]) for part in ("train", "val")}
    except (KeyError, TypeError, ValueError) as e:
        fail(f"{path}: manifest.json is damaged: {type(e).__name__} {e}; run prepare.py again")
    source = dict(path=path, weight=float(weight), enc=enc)
    for part, n in counts.items():
        file = Path(path, f"{part}.bin")
        if not file.exists() or file.stat().st_size != n * dtype.itemsize:
            fail(f"{file} is missing or not as long as its manifest says; run prepare.py again")
        source[part] = np.memmap(file, dtype, mode="r") if n else np.zeros(0, dtype)
        if n and int(source[part][:: max(1, n // 2 ** 12)].max()) >= enc.n_vocab:
            fail(f"{file} holds ids past its vocabulary of {enc.n_vocab}; run prepare.py again")
    if its_enc and encoding_hash(enc) != encoding_hash(its_enc):
        fail(f"{path} was made with another tokenizer than {reader}: prepare the text again with "
             f"--tokenizer {reader}, or leave it out (sft.py: --replay_data FOLDER or none)")
    if len(source["train"]) <= block_size:
        fail(f"{path} has {len(source['train'])} training tokens, fewer than one window of "
             f"{block_size} + 1; prepare more text or lower --block_size")
    return source


@functools.lru_cache(maxsize=16)
def epoch_grid(seed, epoch, n_tokens, block_size):
    """(shift, order of windows) of one epoch: a grid at a random shift over the ring of tokens."""
    rng = np.random.default_rng((*seed, epoch))
    return int(rng.integers(n_tokens)), rng.permutation((n_tokens - 1) // block_size)


def window(tokens, block_size, index, seed):
    """The index-th window, block_size + 1 ids. An epoch visits each window of its grid once."""
    epoch, i = divmod(index, (len(tokens) - 1) // block_size)
    shift, order = epoch_grid(seed, epoch, len(tokens), block_size)
    start = (shift + int(order[i]) * block_size) % len(tokens)
    head = tokens[start:start + block_size + 1]
    return np.concatenate([head, tokens[:block_size + 1 - len(head)]]).astype(np.int64)


# ------------------------------------------------------------------------------------------------
# Matching of text: copies, and evaluation items in the corpus

INSULTS = set("""arsehole ass asshole assholes bastard bastards bitch bitches brainless bullshit
cretin cunt cunts dickhead dimwit dirtbag disgusting dumb dumbass dummy faggot faggots filth filthy
fool fools fuck fucked fucker fucking garbage hag hate hideous idiot idiotic idiots imbecile jackass
jerk lazy liar liars loser losers lowlife maggot miserable moron moronic morons motherfucker nigger
niggers pathetic pig prick psycho pussy retard retarded retards revolting scum scumbag shit shitty
slut sluts stinking stupid subhuman suck sucks thug thugs trash twat ugly useless vermin vile wanker
whore whores worm worthless""".split())
# Of an evaluation item the text under the first of these (or the last turn of a prompt) must not
# stand in the training text.
SEARCHED = ("passage", "context", "ctx_a", "goal", "sentence", "query", "question", "sent_more",
            "text")
# Words of it that stand in more documents than this are a phrase (Brown et al. 2020, appendix C).
PHRASE_DOCUMENTS = 10


@functools.lru_cache(1 << 18)
def word_hash(word):
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def match_words(text):
    """Hashes (N,) uint64 of a text's words: lower case, no accents or punctuation, numbers 0."""
    text = re.sub(r"\d+(?:[.,]\d+)?", "0", text.lower())
    text = regex.sub(r"\p{Mn}+", "", unicodedata.normalize("NFD", text))
    # a Japanese or Chinese character is a word of its own
    words = re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u4e00-\u9fff]+", text)
    return np.fromiter(map(word_hash, words), np.uint64, len(words))


def ngram_hashes(words, n):
    """Hashes of all runs of n words, from the hashes (N,) of the words: polynomials mod 2^64."""
    grams = words[:max(0, len(words) - n + 1)]
    for i in range(1, n):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + words[i:len(words) - n + 1 + i]
    return grams


def item_text(row):
    """(asked, right answer or "") of an evaluation item: what training text must not hold."""
    name = next((name for name in SEARCHED if row.get(name)), None)
    if name == "ctx_a":    # HellaSwag
        asked = f"{row['ctx_a']} {row.get('ctx_b', '')}"
    elif name:
        asked = row[name]
    elif isinstance(row.get("prompt"), dict):    # RealToxicityPrompts
        asked = row["prompt"]["text"]
    else:
        asked = to_prompt(row)[-1]["content"]
    answer = row.get("answer", "")
    if isinstance(row.get("choices"), list) and isinstance(row.get("gold"), int):
        answer = row["choices"][row["gold"]]
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    return str(asked), str(answer).removeprefix("#### ")


def item_ngrams(row):
    """(n, hashes) of the runs of n words that give an evaluation item away (Brown et al. 2020, C).

    They begin in the question, for an answer alone is knowledge; a short item is one run, and under
    8 words (6 with its answer) none."""
    asked, answer = map(match_words, item_text(row))
    words = np.concatenate([asked, answer])
    n = min(13, len(words))
    long = n >= (6 if len(answer) else 8)
    return n, ngram_hashes(words, n)[:len(asked)].tolist() if long else []


# ------------------------------------------------------------------------------------------------
# One process or many, CPU or GPU


@dataclass
class Env:
    """Where this process runs. `dtype`: of matrix products under autocast, None for float32."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype | None
    is_master: bool

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def setup(seed, precision="auto"):
    """Join torchrun's processes if there are any, pick device and precision, seed, say so."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")    # TF32
        torch.backends.cuda.enable_cudnn_sdp(False)    # it plans each new shape, for up to a second
        name, backend = torch.cuda.get_device_name(device), "nccl"
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.cuda.device_count():    # which asks the driver, not CUDA
        fail(f"there is a GPU, but its driver is too old for this torch (CUDA {torch.version.cuda})"
             f": update it, or hide the GPU with CUDA_VISIBLE_DEVICES=''")
    else:
        device = torch.device("cpu")
        name, backend = f"cpu, {torch.get_num_threads()} threads", "gloo"
        flags = torch.cpu.get_capabilities()
        has_bf16 = any(flags.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16"))
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    torch.manual_seed(seed)
    dtype, why = None, "float32 (no bf16 matrix products here)"
    if precision == "fp32":
        why = "float32 as asked"
    elif has_bf16 or precision == "bf16":
        dtype, why = torch.bfloat16, "bf16 autocast" + ("" if has_bf16 else " (emulated: slow)")
    print0(f"device: {world_size} x {name}, {why}")
    return Env(rank, world_size, device, dtype, rank == 0)


def keep_freed_memory():
    """Let glibc keep freed blocks, which the next step asks for again: up to twice as fast."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD, bytes


@functools.cache
def compiled(model):
    """torch.compile of a model or a function; itself, and one line, where that does not work."""
    torch._dynamo.config.optimize_ddp = False    # it would cut the model at each bucket
    torch._dynamo.config.capture_dynamic_output_shape_ops = True    # where documents begin
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return torch.compile(model)
    except Exception as e:    # whatever the compiler stack raises, the answer is the same
        print0(f"torch.compile does not work here, running without it ({type(e).__name__})")
        return model


def parallel(model, env):
    """The model in DistributedDataParallel; itself in one process."""
    if env.world_size == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[env.device.index] if env.device.type == "cuda" else None,
        forward_sync_buffers=False, gradient_as_bucket_view=True)


def share_out(work, items, env):
    """work(share of the items) as a list in their order, each rank its share."""
    found = work(items[env.rank::env.world_size])
    if env.world_size == 1:
        return found
    every = [None] * env.world_size
    dist.all_gather_object(every, found)
    return [every[i % env.world_size][i // env.world_size] for i in range(len(items))]


def write_rows(path, rows, env):
    """A .jsonl file, which the first rank writes and all wait for."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if env.is_master:
        write_atomic(path, lambda f: f.write(text.encode("utf-8", "replace")))
    if env.world_size > 1:
        dist.barrier()
    return str(path)


def sum_over_ranks(x, env):
    """Sum of a tensor over all ranks; itself in one process."""
    if env.world_size == 1:
        return x
    total = x.to(env.device)
    dist.all_reduce(total)
    return total


def peak_memory(env):
    """Most memory this process held so far, as text."""
    if env.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(env.device) / 1e9:.2f} GB of GPU memory"
    try:
        import resource
    except ImportError:    # on Windows
        return "an unknown amount of memory"
    unit = 1 if sys.platform == "darwin" else 1024    # macOS counts bytes, Linux kilobytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory"


PEAK_FLOPS = {    # dense bf16, vendors' data sheets; the first name that fits
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12, "H200 NVL": 835e12,
    "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(env):
    """FLOP/s that all ranks could reach at env.dtype: of a GPU by its name (NaN: not known, and no
    MFU rather than a flattered one), of a CPU as measured."""
    if env.device.type == "cuda":
        name = torch.cuda.get_device_name(env.device)
        found = [flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)]
        return found[0] * env.world_size if found and env.dtype else math.nan
    a = torch.randn(1024, 1024, dtype=env.dtype or torch.float32)
    seconds = min(timeit.repeat(lambda: a @ a, number=1, repeat=12))
    return 2 * 1024 ** 3 / seconds * env.world_size


# ------------------------------------------------------------------------------------------------
# Messages and command line


def fail(message):
    """End the program because of something the user can mend: one line on stderr, exit code 1."""
    raise SystemExit(f"error: {message}")


def print0(*args, **kwargs):
    """Print on the first rank only, at once (a log that lags behind is no log)."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


def duration(seconds):
    """65 -> '1m05s'"""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


def run(main, Config):
    """A stage as a program: main on the settings of the command line, alone or as one of many.

    A rank that fails ends the job at once: torchrun stops the others, NCCL would wait for them.
    """
    try:
        main(parse_args(Config))
    except BaseException as e:
        if isinstance(e, OSError):    # too many open files, no permission, ...
            e = SystemExit(f"error: {e}")
        if dist.is_initialized() and dist.get_backend() == "nccl":
            message = e if isinstance(e, SystemExit) else traceback.format_exc()
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        raise e
    finally:
        if dist.is_initialized():
            time.sleep(0.1)    # a thread of gloo that frees its last tensor later aborts Python
            dist.destroy_process_group()


def parse_args(Config, argv=None):
    """Turn a dataclass into a command line: `--field value`, booleans `--field` / `--no-field`.

    The trailing comment of each field is its help, so that code and --help cannot disagree, and
    the bounds it ends with (", above 0", "; at least 1") are checked. --resume takes the settings
    of the run at --out; flags win over them.
    """
    for stream in (sys.stdin, sys.stdout):    # a console that lacks a letter shows its number
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(sys.modules[Config.__module__]), allow_abbrev=False,
        usage="%(prog)s [--setting value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see --help)")
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    types = typing.get_type_hints(Config)
    for name, default in asdict(Config()).items():
        parts = typing.get_args(types[name])    # (int, None) of int | None, (str,) of list[str]
        kind = parts[0] if parts else types[name]
        flag = dict(type=kind, metavar=name.upper())
        if kind is bool:
            flag = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(types[name]) is typing.Literal:
            flag = dict(choices=parts)
        elif typing.get_origin(types[name]) is list:
            flag["nargs"] = "+"
        shown = "derived" if default is None else default
        parser.add_argument(f"--{name}", default=default, **flag,
                            help=f"{help_of[name]} [{shown}]".replace("%", "%%"))
    given = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    if twice := [flag for flag in flags if flags.count(flag) > 1]:
        fail(f"{twice[0]} is given twice; give all its values after one")
    if getattr(given, "resume", False) and Path(given.out).is_file():
        settings = load_checkpoint(given.out, "", mmap=True)["stage_config"]
        settings["out"] = given.out    # it may have another name by now
        parser.set_defaults(**{k: v for k, v in settings.items() if k in types})
        given = parser.parse_args(argv)
    for name, value in vars(given).items():
        check_bounds(name, value, help_of[name])
    return Config(**vars(given))


def check_bounds(name, value, help_text):
    """Refuse a number outside the bounds that a field's help states, or larger than any use."""
    if not isinstance(value, (int, float)):
        return
    bounds = re.findall(r"[,;] (above|at least|at most) (-?\d+(?:\.\d+)?)", help_text)
    for word, limit in [*bounds, ("at most", 1e12)]:    # and NaN is within no bound
        limit = float(limit)
        holds = {"above": value > limit, "at least": value >= limit, "at most": value <= limit}
        if not holds[word]:
            fail(f"--{name} {value}: has to be {word} {limit:g}")


# ------------------------------------------------------------------------------------------------
# Files: JSON, log, checkpoints


def read_json(path):
    """The object in a JSON file, or one line that says what is wrong with it."""
    try:
        data = json.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        fail(f"{path} cannot be read as JSON: {e}")
    return data if isinstance(data, dict) else fail(f"{path} is not a JSON object")


def beside(out, suffix):
    """The file that goes beside a checkpoint: out/base.pt, .jsonl -> out/base.jsonl"""
    return Path(str(out).removesuffix(".pt") + suffix)


def write_atomic(path, write):
    """Call write(file) on a temporary file beside path, flush to disk, rename: all or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        # torch.save reports a full disk as a RuntimeError about positions; the cause comes with it
        fail(f"cannot write {path}: {e.__context__ or e}".splitlines()[0])
    finally:    # Ctrl-C leaves nothing behind either
        if temporary.is_file():
            temporary.unlink()


def files_of(cfg):
    """Paths of all that is there and named in the settings, --out aside; also as DIR:WEIGHT."""
    lists = [x if isinstance(x, list) else [x] for name, x in vars(cfg).items() if name != "out"]
    texts = set(map(str, itertools.chain(*lists)))
    names = texts | {text.rpartition(":")[0] for text in texts}
    return [Path(name) for name in sorted(names - {""}) if os.path.exists(name)]


def fingerprints(cfg):
    """{name: hash} of the contents of files_of; of a file their length and first 64 MB."""
    found = {}
    for path in files_of(cfg):
        digest = hashlib.blake2b(digest_size=8)
        for file in sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]:
            digest.update(b"%d" % file.stat().st_size + file.open("rb").read(1 << 26))
        found[f"content of {path}"] = digest.hexdigest()
    return found


def check_out(cfg, stage, also=".jsonl"):
    """Refuse an --out whose files are somebody's, or hold steps that a forgotten --resume loses.

    also: the ending of another file that this run writes beside it.
    """
    out, log = Path(cfg.out), beside(cfg.out, ".jsonl")
    written = {path.resolve() for path in (out, log, beside(cfg.out, also))}
    if not out.name or out.is_dir() or cfg.out.endswith("/"):
        fail(f"--out {cfg.out}: give the name of a file, such as out/model.pt")
    for file in written.intersection(map(Path.resolve, files_of(cfg))):
        fail(f"--out {cfg.out} would overwrite {file}, which this run reads; choose another")
    if log.exists() and log.stat().st_size and log.open("rb").read(9) != b'{"step": ':
        fail(f"{log}, where the log goes, is something else; choose another --out")
    if not out.exists():
        return
    checkpoint = load_checkpoint(cfg.out, "", mmap=True)
    if cfg.resume and checkpoint["stage"] != stage:
        fail(f"--resume: {cfg.out} was made by {checkpoint['stage']}, not by {stage}")
    if checkpoint["step"] > 0 and not cfg.resume and not cfg.overwrite:
        fail(f"--out {cfg.out} holds {checkpoint['step']:,} steps of an earlier run: go on with "
             f"--resume, start anew with --overwrite, or choose another --out")


class Log:
    """A JSON line for each call, in `out` with .jsonl instead of .pt, and a line on the console.

    With cfg.tensorboard every number goes into event files as well. step: where the run goes on;
    what an earlier one logged from there on is done again.
    """

    def __init__(self, cfg, step, max_steps):
        self.path, self.max_steps, self.board = beside(cfg.out, ".jsonl"), max_steps, None
        if int(os.environ.get("RANK", 0)) > 0:
            return
        if 0 < max_steps * getattr(cfg, "warmup", 0) < 1:
            print0(f"warning: {max_steps} steps teach little: more data or smaller batches help")
        old = self.path.read_text("utf-8", "replace") if step and self.path.exists() else ""
        lines = [line for line in old.splitlines(True) if line.endswith("\n")]
        lines = [line for line in lines if (parse_json(line) or {}).get("step", step) < step]
        write_atomic(self.path, lambda f: f.write("".join(lines).encode()))
        if cfg.tensorboard:
            need("tensorboard")
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(beside(cfg.out, ".tensorboard"), purge_step=step)

    def __call__(self, step, show=(), more="", **metrics):
        """show: names of metrics for the console; more: text that goes behind them."""
        if int(os.environ.get("RANK", 0)) > 0:
            return
        row = {}
        for name, x in metrics.items():
            if isinstance(x, float):
                x = float(f"{x:.6g}") if math.isfinite(x) else None    # JSON has no NaN or infinity
            row[name] = x
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(dict(step=step) | row) + "\n")
        except OSError as e:
            fail(f"cannot write {self.path}: {e.strerror}; the last checkpoint is kept")
        for name, x in row.items():
            if self.board and isinstance(x, (int, float)):
                self.board.add_scalar(name, x, step)
        if show:
            columns = [f"{name} {number(metrics[name])}" for name in show]
            if step:    # the first one says little of the others
                eta = metrics["seconds"] / (step + 1) * (self.max_steps - step - 1)
                columns.append(f"eta {duration(max(0, eta))}")
            print0(f"step {step:6d}", *columns, sep=" | ", end=more + "\n")


def number(x):
    """Seven columns: 1.2e-04, -0.0123, 12.34, 12,345"""
    if 0 < abs(x) < 1:
        return f"{x:<7.4f}" if abs(x) >= 0.001 else f"{x:<7.1e}"
    return f"{x:<7,.0f}" if abs(x) >= 1000 else f"{x:<7.4g}"


def save_checkpoint(path, model, stage, step, enc, cfg, state=None, optimizers=()):
    """One self-contained file: float32 weights, sizes, tokenizer, settings, what resuming needs.

    The first rank writes it; all ranks call this, because the model may be sharded.
    """
    weights, adapters = map(gather, merged_weights(model))
    if model.config.tie_embeddings:
        weights.pop("head.weight", None)
    settings = asdict(cfg) | dict(resume=False, overwrite=False)
    checkpoint = dict(stage=stage, step=step, weights=weights, adapters=adapters,
                      model_config=asdict(model.config), encoding=encoding_to_dict(enc),
                      stage_config=settings, state=gather(state),
                      optimizers=[gather(opt.state_dict()) for opt in optimizers])
    if int(os.environ.get("RANK", 0)) == 0:
        write_atomic(path, lambda f: torch.save(checkpoint, f))


def gather(x):
    """x with its tensors whole and on the CPU of the first rank; None for each on other ranks."""
    if isinstance(x, dict):
        return {k: gather(v) for k, v in x.items()}
    if isinstance(x, list):
        return [gather(v) for v in x]
    if not isinstance(x, torch.Tensor):
        return x
    x = x.full_tensor() if hasattr(x, "full_tensor") else x    # a DTensor's parts, from all ranks
    return x.detach().cpu() if int(os.environ.get("RANK", 0)) == 0 else None


def scatter(x, like):
    """This rank's part of a whole tensor, if `like` is sharded; the tensor itself if not."""
    if not hasattr(like, "device_mesh") or not x.dim():
        return x
    from torch.distributed.tensor import distribute_tensor    # slow to import
    return distribute_tensor(x, like.device_mesh, like.placements)


def load_checkpoint(path, made_by, mmap=False):
    """What save_checkpoint wrote, or a public model (a folder, OWNER/NAME) in the same form.

    Code is never unpickled. made_by: the command that makes the file, for the message.
    """
    path, name = Path(path), str(path)
    for file in [path, *path.glob("*")]:
        if file.is_file() and file.open("rb").read(19) == b"version https://git":
            fail(f"{file} is git-lfs's pointer to a file, not the file; get it with: git lfs pull")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.pt)", name) and not path.parent.exists()
    if path.is_dir() or on_hub:
        return import_model(name)
    if not path.exists():
        fail(f"{path} does not exist; make it with: {made_by}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        checkpoint["model_config"], checkpoint["weights"], checkpoint["encoding"]
    except Exception as e:    # whatever is wrong with it, it is none of ours
        fail(f"{path} is not a checkpoint of this project, or is damaged ({type(e).__name__})")
    return checkpoint


def load_weights(model, weights):
    """Copy weights into the model; every one must be there and fit."""
    weights = dict(weights)
    if model.config.tie_embeddings and "embed.weight" in weights:
        weights["head.weight"] = weights["embed.weight"]
    ours = model.state_dict()
    try:
        weights = {name: scatter(w, ours.get(name)) for name, w in weights.items()}
        model.load_state_dict(weights, strict=True)
    except RuntimeError as e:
        fail("weights do not fit the model, which has other sizes or another head: "
             + " ".join(str(e).split())[:200])
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            fail(f"the weights to start from are damaged: {name} holds what is no number")


def config_of(checkpoint):
    """The GPTConfig of a loaded checkpoint, which a fork may have made."""
    unknown = checkpoint["model_config"].keys() - {f.name for f in fields(GPTConfig)}
    if unknown:
        fail(f"the model has a setting {min(unknown)!r} that this model.py does not know; read it "
             f"with the code that made it")
    try:
        return GPTConfig(**checkpoint["model_config"])
    except (TypeError, ValueError, ZeroDivisionError) as e:
        fail(f"the checkpoint's model_config is none: {e}")


def load_model(checkpoint, device):
    """(model, tokenizer) of a loaded checkpoint; a ScalarHead if that is what was saved."""
    model = GPT(config_of(checkpoint))
    if "score.weight" in checkpoint["weights"]:
        model = ScalarHead(model)
    load_weights(model, checkpoint["weights"])
    return model.to(device), encoding_from_dict(checkpoint["encoding"])


def load_language_model(path, made_by, device):
    """(model, tokenizer) of the checkpoint at path, which must not be a reward model."""
    model, enc = load_model(load_checkpoint(path, made_by), device)
    if isinstance(model, ScalarHead):
        fail(f"{path} is a reward model; give a language model")
    return model, enc


def resume(cfg, model, optimizers, max_steps, **fresh):
    """The state that a run begins with: step, seconds, files (see fingerprints) and fresh.

    With --resume that of the run at --out, whose weights and moments go into model and optimizers;
    the model is as it was when that run began, adapters included.
    """
    fresh.update(step=0, seconds=0.0, files=fingerprints(cfg))
    if not cfg.resume or not Path(cfg.out).exists():
        n_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print0(f"a new run at {cfg.out}: {n_params:,} parameters trained")
        return fresh
    checkpoint = load_checkpoint(cfg.out, "")
    state, before, adapters = (checkpoint[k] for k in ("state", "stage_config", "adapters"))
    if state["step"] > max_steps:
        fail(f"--resume: {cfg.out} has {state['step']} steps already, more than {max_steps}")
    ours = merged_weights(model)[1]
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in adapters.items()}:
        fail("--resume: this run was started with another --lora_rank")
    if adapters:
        model.load_state_dict(adapters, strict=False)
    else:
        load_weights(model, checkpoint["weights"])
    try:
        for opt, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            params = [p for group in opt.param_groups for p in group["params"]]
            for i, moments in saved["state"].items():
                saved["state"][i] = {k: scatter(x, params[i]) for k, x in moments.items()}
            opt.load_state_dict(saved)
    except (ValueError, IndexError):
        name = "algo" if hasattr(cfg, "algo") else "optimizer"
        fail(f"--resume: {cfg.out} was trained with another --{name}, or by another version")
    before |= state.get("files", {})
    now = vars(cfg) | fresh["files"] | dict(out=before["out"], resume=False, overwrite=False)
    changed = [f"{k} {v} -> {now[k]}"[:200] for k, v in before.items() if now.get(k, v) != v]
    print0(f"resuming {cfg.out} at step {state['step']}", *changed, sep="; changed: ")
    return {**fresh, **state, "files": fresh["files"]}


# ------------------------------------------------------------------------------------------------
# Public models, in and out: folders as transformers, vLLM and lm-evaluation-harness have them.
# What cannot be said in the other form is refused by name, never guessed.

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
PUBLIC_SIZES = dict(    # a fork that adds to GPTConfig says here or in public_model what it is
    block_size="max_position_embeddings", vocab_size="vocab_size", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size",
    n_hidden="intermediate_size", head_size="head_dim", norm_eps="rms_norm_eps",
    tie_embeddings="tie_word_embeddings")
PUBLIC_NAMES = dict(    # of the parts of a weight's name
    blocks="model.layers", attn_norm="input_layernorm", attn="self_attn", head="lm_head",
    mlp_norm="post_attention_layernorm", norm="model.norm", embed="model.embed_tokens")
# The ids of render_chat, unless a text spells a control token or a reply begins with a line end;
# its mask is 1 between the marks of generation.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% set parts = m.content or '' %}"
    "{% set said = parts if parts is string else parts | map(attribute='text') | join %}"
    "{% if m.tool_calls or parts is not string and parts | rejectattr('text', 'string') | list %}"
    "{{ raise_exception('only text can be said in this format') }}{% endif %}"
    "<|im_start|>{{ 'system' if m.role == 'developer' else m.role }}\n"
    "{% if m.role == 'assistant' and m.weight != 0 %}"
    "{% generation %}{{ said }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ said }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def public_name(name):
    """blocks.0.attn.q_proj.weight -> model.layers.0.self_attn.q_proj.weight"""
    return ".".join(PUBLIC_NAMES.get(part, part) for part in name.split("."))


def import_model(name):
    """What load_checkpoint returns, of a public model's folder or name on the hub. Weights stay on
    disk (memory-mapped), except the embeddings: ids that are new get the mean row."""
    transformers, load_file = need("transformers"), need("safetensors.torch").load_file
    folder, theirs = Path(name), {}
    try:
        if not folder.is_dir():
            folder = Path(need("huggingface_hub").snapshot_download(
                name, allow_patterns=["*.json", "model*.safetensors"]))
        c = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = import_config(c)
        text, eos = (folder / "tokenizer.json").read_text("utf-8"), c.eos_token_id
        eos = eos[0] if isinstance(eos, list) else eos
        known = max(need("tokenizers").Tokenizer.from_str(text).get_vocab().values()) + 1
        enc = PublicEncoding(text, c.vocab_size, eos)
        for file in sorted(folder.glob("model*.safetensors")) or [folder / "model.safetensors"]:
            theirs |= load_file(file)
        embed = theirs["model.embed_tokens.weight"]
        if c.tie_word_embeddings and not torch.equal(theirs.get("lm_head.weight", embed), embed):
            raise ValueError("lm_head.weight is not tied, though tie_word_embeddings is true")
    except Exception as e:    # of the network, of files, of transformers, of ours
        why = " ".join(f"{type(e).__name__}: {e}".split())
        hint = "" if folder.is_dir() else f"; get a folder by: hf download {name} --local-dir DIR"
        fail(f"{name}: no public model that can be read: {why[:200]}{hint}")
    with torch.device("meta"):
        ours = {public_name(name): name for name in GPT(config).state_dict()}
    weights = {ours.get(name, name): t for name, t in theirs.items()}    # load_weights checks them
    for name in {"embed.weight", "head.weight"} & weights.keys():
        rows = weights[name][:known]    # public models have spare rows, which have learned nothing
        mean = rows.mean(0, keepdim=True, dtype=torch.float32).to(rows.dtype)
        weights[name] = torch.cat([rows, mean.expand(enc.n_vocab - len(rows), -1)])
    config.vocab_size = enc.n_vocab
    return dict(stage="imported", step=0, weights=weights, encoding=encoding_to_dict(enc),
                model_config=asdict(config), stage_config=dict(folder=str(folder)))


def import_config(c):
    """GPTConfig of a config of transformers; ValueError names what ours cannot say."""
    rope = getattr(c, "rope_parameters", None) or {}
    kind = c.model_type, getattr(c, "hidden_act", None), rope.get("rope_type")
    if kind not in itertools.product(MODEL_TYPES, ["silu"], ["default", "llama3"]):
        raise ValueError(f"{kind} is none of {MODEL_TYPES} with silu and default or llama3 rope")
    sizes = {ours: getattr(c, theirs, None) for ours, theirs in PUBLIC_SIZES.items()}
    context = getattr(c, "sliding_window", None) or c.max_position_embeddings
    if context < c.max_position_embeddings:    # up to there it is no window at all
        print0(f"context {context}, the sliding window, not {c.max_position_embeddings}")
        sizes["block_size"] = context
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    return GPTConfig(
        **sizes, qk_norm=c.model_type == "qwen3", qkv_bias=c.model_type == "qwen2",
        rope_base=rope["rope_theta"], rope_scaling=scaling if "factor" in scaling else None)


@torch.no_grad()
def public_model(model, bos, eos, pad):
    """The model in transformers, its weights not copied; fails if it is not the same model."""
    transformers, c = need("transformers"), model.config
    known = {*PUBLIC_SIZES, "qk_norm", "qkv_bias", "rope_base", "rope_scaling"}
    used = {f.name for f in fields(c) if getattr(c, f.name) != f.default}    # of a fork
    if unknown := used - known:
        fail(f"export does not know {min(unknown)} of GPTConfig; say in PUBLIC_SIZES what it is")
    kind = "qwen2" if c.qkv_bias else "llama"
    kind = "qwen3" if c.qk_norm else kind
    rope = dict(rope_theta=c.rope_base, **(c.rope_scaling or dict(rope_type="default")))
    config = transformers.AutoConfig.for_model(
        kind, eos_token_id=eos, pad_token_id=pad, bos_token_id=bos, rope_parameters=rope,
        **{theirs: getattr(c, ours) for ours, theirs in PUBLIC_SIZES.items()})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    weights = {public_name(name): t for name, t in model.state_dict().items()}
    if odd := weights.keys() ^ theirs.state_dict().keys():
        fail(f"export does not know the weight {max(odd)}, which only this model or {kind} has")
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)    # computed, not loaded
    ids = torch.arange(min(2048, c.block_size))[None] % c.vocab_size    # (1, T)
    here, there = model.eval()(ids), theirs.eval()(ids).logits
    if not (here - there).abs().max() <= 1e-3 * here.abs().max():
        fail(f"as {kind} the model gives other logits: its code does what export cannot say")
    return theirs


def public_tokenizer(enc):
    """A tokenizer of the package `tokenizers`: whole tokens first, then merges by rank."""
    if isinstance(enc, PublicEncoding):
        return enc.inner
    special = sorted(enc._special_tokens, key=enc._special_tokens.get)
    converter = need("transformers.convert_slow_tokenizer").TikTokenConverter(
        None, enc._pat_str, extra_special_tokens=special)
    converter.load_tiktoken_bpe = lambda _: enc._mergeable_ranks    # no file to read them from
    return converter.converted()


def export_model(path, folder, dtype="float32"):
    """Write a checkpoint (or a public model that was read) as a folder that transformers loads."""
    folder = Path(folder)
    if folder.exists():
        fail(f"{folder} exists already; give a new folder")
    checkpoint = load_checkpoint(path, "python pretrain.py")
    model, enc = load_model(checkpoint, "cpu")
    if isinstance(model, ScalarHead):
        fail(f"{path} is a reward model; give a language model")
    eot, end, pad = (enc._special_tokens[t] for t in (ENDOFTEXT, IM_END, PAD))
    bos = enc.bos[0] if enc.bos else None
    theirs = public_model(model, bos, [eot, end], pad).to(getattr(torch, dtype))
    talks, inner = checkpoint["stage"] not in ("pretrain", "imported"), public_tokenizer(enc)
    first = [inner.id_to_token(i) for i in enc.bos]
    tokenizer = need("transformers").PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template="".join(first) + CHAT_TEMPLATE,
        bos_token=first[0] if first else None, pad_token=inner.id_to_token(pad),
        eos_token=inner.id_to_token(end if talks else eot))
    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")    # half a folder is none
    try:
        theirs.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    except Exception as e:    # OSError, and that of safetensors
        shutil.rmtree(part, ignore_errors=True)
        fail(f"cannot write {folder}: {e}")
    print0(f"wrote {folder}: {type(theirs).__name__} in {dtype}, {enc.n_vocab:,} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a model as a folder for transformers.")
    parser.error = fail
    parser.add_argument("command", choices=["export"])
    parser.add_argument("checkpoint", help="a language model: a .pt file or a public folder")
    parser.add_argument("folder", help="a new folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    try:
        export_model(args.checkpoint, args.folder, args.dtype)
    except OSError as e:    # no permission, a name that is too long
        fail(e)
