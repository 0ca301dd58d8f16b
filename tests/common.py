"""What the tests of the stages share: tiny models and data, settings of short runs, processes."""
import json
import multiprocessing
import os
import socket
from dataclasses import make_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp    # noqa: F401, once here instead of in every child: it is slow

import model as m
from model import GPT, Env, GPTConfig, ScalarHead, load_checkpoint, save_checkpoint

CPU = Env(0, 1, torch.device("cpu"), None, True)
SIZES = dict(block_size=96, vocab_size=260, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


def byte_encoding(shift=0):
    """Ids 0-255 are bytes, 256-259 the control tokens. shift: the same size, but other ids."""
    ranks = {bytes([(i + shift) % 256]): i for i in range(256)}
    return m.make_encoding("bytes", m.SPLIT_PATTERN, ranks)


ENC = byte_encoding()
END, PAD = ENC._special_tokens[m.IM_END], ENC._special_tokens[m.PAD]


def tiny(seed=0, **changes):
    """A small model whose every matrix matters: fresh output projections would be 0."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZES, **changes}))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


def judge(seed=1, **changes):
    torch.manual_seed(seed)
    return ScalarHead(tiny(seed, **changes))


class Rule(torch.nn.Module):
    """Scores a text by a function of (answer, has it ended?), in the form of a reward model."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.config = rule, tiny().config

    def forward(self, ids):
        scores = torch.zeros(ids.shape)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                text = ENC.decode(row[:t + 1]).rsplit("assistant\n", 1)[-1]
                scores[b, t] = self.rule(text.removesuffix("<|im_end|>"), row[t] == END)
        return scores


Settings = make_dataclass("Settings", [("seed", int, 1)])


def save(path, model, enc=ENC):
    """Write the model as a checkpoint and say where it is."""
    save_checkpoint(path, model, "test", 0, enc, Settings())
    return str(path)


def load(path):
    return m.load_model(load_checkpoint(path, ""), "cpu")[0]


def weights(path):
    return load_checkpoint(path, "")["weights"]


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turn(role, content):
    return dict(role=role, content=content)


def token_folder(folder, text, enc=ENC, n_val=500):
    """A folder of tokens as prepare.py writes it, each line a document, the last n_val to test."""
    ids, counts, eot = [], {}, enc._special_tokens[m.ENDOFTEXT]
    for line in text.split("\n"):
        ids += [*enc.encode_ordinary(line), eot]
    ids = np.array(ids, dtype=np.uint16)
    Path(folder).mkdir()
    for name, part in dict(train=ids[:len(ids) - n_val], val=ids[len(ids) - n_val:]).items():
        part.tofile(Path(folder, f"{name}.bin"))
        counts[name] = len(part)
    for name, content in dict(manifest=dict(dtype="uint16", tokens=counts),
                              encoding=m.encoding_to_dict(enc)).items():
        Path(folder, f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def make_files(folder):
    """What short runs read, by name. The policy says a, b, c or nothing more, the rest is rare."""
    policy = tiny()
    with torch.no_grad():
        policy.embed.weight[:, 0] = 8.0    # a constant, large against what the blocks add
        policy.head.weight[:, 0] = -2.0
        policy.head.weight[[END, *b"abc"], 0] = 0
    words = "one two three four five six seven eight nine ten".split()
    lines = [" ".join(words[i % 10:] + words[:i % 10]) + "." for i in range(240)]
    talks, pairs, prompts = [], [], []
    for i in range(40):
        question, right, wrong = f"{i}: {i % 7}+{i % 5}?", f"{i % 7 + i % 5}.", "?" * (1 + i % 3)
        talk = [turn("user", question), turn("assistant", right)]
        more = [turn("user", "Sure?"), turn("assistant", "Yes.")]
        talks.append(dict(messages=talk if i % 3 else talk + more))
        pairs.append(dict(prompt=question, chosen=right, rejected=wrong + "no"))
        prompts.append(dict(prompt=question, answer=right))
    return dict(
        base=save(folder / "base.pt", tiny()), judge=save(folder / "judge.pt", judge()),
        policy=save(folder / "policy.pt", policy), talks=write(folder / "talks.jsonl", talks),
        pairs=write(folder / "pairs.jsonl", pairs),
        prompts=write(folder / "prompts.jsonl", prompts[:24]),
        tokens=token_folder(folder / "tokens", "\n".join(lines)))    # 12 kB, learnable


def config(stage, files, out, **changes):
    """Settings of a short run of a stage."""
    own = dict(
        pretrain=dict(data=[files["tokens"]], depth=2, n_embd=32, n_head=2, block_size=32,
                      total_batch_tokens=256, learning_rate=None),
        sft=dict(init=files["base"], data=[files["talks"]], total_batch_tokens=6 * 96,
                 val_fraction=0.1, replay=0.0, replay_data="none"),
        reward=dict(init=files["base"], data=[files["pairs"]], batch_size=6),
        dpo=dict(init=files["policy"], data=[files["pairs"]], reward=files["judge"],
                 prompts=[files["prompts"]], batch_size=6, max_new_tokens=6, nll=0.1),
        rlhf=dict(init=files["policy"], data=[files["prompts"]], reward=files["judge"],
                  gold="none", batch_size=8, group_size=4, minibatches=1, max_new_tokens=6))
    few = dict(max_steps=3, eval_every=100, save_every=100, learning_rate=1e-3, precision="fp32",
               overwrite=True, out=str(out))
    return stage.Config(**{**few, **own[stage.__name__], **changes})


def log_of(path, key="step"):
    """Rows of the log beside a checkpoint that have this key."""
    lines = Path(path).with_suffix(".jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def error(function, *args, **kwargs):
    """The one line a user sees."""
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def recorded(main, cfg):
    """Run a stage: (gradients before clipping of each optimizer step, final parameters)."""
    grads, last, clip = [], {}, torch.nn.utils.clip_grad_norm_

    def whole(x):
        return x.full_tensor() if hasattr(x, "full_tensor") else x

    def record(parameters, *args):
        parameters = [p for p in parameters if p.requires_grad]
        grads.append([whole(p.grad).clone() for p in parameters])
        last[id(parameters[0])] = parameters
        assert args == (cfg.grad_clip,)
        return clip(parameters, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", record)
        main(cfg)
    return grads, [whole(p.detach()) for group in last.values() for p in group]


def interrupted(main, steps):
    """main as a function that is left by Ctrl-C in the optimizer step after so many."""
    def run(cfg):
        done, step = [], torch.optim.AdamW.step

        def stepped(*args):
            done.append(1)
            if len(done) > steps:
                raise KeyboardInterrupt
            return step(*args)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch.optim.AdamW, "step", stepped)
            main(cfg)
    return run


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_two_ranks(main, cfg, folder):
    """Run a stage as torchrun does, in two children of this process, which has imported all: what
    `recorded` gives of each rank."""
    def child(rank, port, file):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.save(recorded(main, cfg), file)
        if dist.is_initialized():    # prepare.py ends it itself
            dist.destroy_process_group()
    files, port = [folder / f"rank{rank}" for rank in range(2)], free_port()
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=child, args=(rank, port, file)) for rank, file in enumerate(files)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(file) for file in files]
