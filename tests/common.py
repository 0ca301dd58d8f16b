"""What the tests of sft, reward, rlhf and dpo share: tiny models and data, and runs in processes of their own."""
import json
import multiprocessing
import os
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import model as m
from model import GPT, Dist, GPTConfig, ScalarHead, load_checkpoint, save_checkpoint

CPU = Dist(0, 0, 1, torch.device("cpu"), None, True)
CLOCK = {"seconds", "tokens_per_second", "mfu"}    # what two equal runs may differ in
SIZES = dict(block_size=96, vocab_size=260, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


def byte_encoding(name="bytes", shift=0):
    """Ids 0-255 are bytes, 256-259 the control tokens. shift: the same size, but other ids."""
    return m.make_encoding(name, m.GPT4_SPLIT, {bytes([(i + shift) % 256]): i for i in range(256)})


ENC = byte_encoding()
END, PAD = ENC._special_tokens[m.IM_END], ENC._special_tokens[m.PAD]


def tiny(seed=0, **changes):
    """A small model whose every matrix matters (the real initialisation silences the output projections)."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZES, **changes}))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model.eval()


@dataclass
class Settings:
    seed: int = 1


def save(path, model, enc=ENC):
    """Write the model as a checkpoint and say where it is."""
    save_checkpoint(path, model, "test", 0, enc, Settings())
    return str(path)


def judge(seed=1, **changes):
    torch.manual_seed(seed)
    return ScalarHead(tiny(seed, **changes)).eval()


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(n):
    """n questions with their answers: (question, right answer, wrong answer)."""
    return [(f"{i % 7}+{i % 5}?", f"{i % 7 + i % 5}.", "?" * (1 + i % 3) + "no") for i in range(n)]


def turn(role, content):
    return dict(role=role, content=content)


def demonstrations(path, n=40):
    """Conversations of one turn and, every third, of two."""
    rows = []
    for i, (q, a, _) in enumerate(sums(n)):
        more = [turn("user", "Sure?"), turn("assistant", "Yes.")] if i % 3 == 0 else []
        rows.append(dict(messages=[turn("user", q), turn("assistant", a), *more]))
    return write(path, rows)


def preferences(path, n=40):
    """Pairs of unequal length, each with a prompt of its own."""
    return write(path, [dict(prompt=f"{i}: {q}", chosen=a, rejected=b) for i, (q, a, b) in enumerate(sums(n))])


def weights(path):
    return load_checkpoint(path, "")["weights"]


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(path, key="step"):
    """Rows of the log beside a checkpoint that have this key; a row cut short by a kill does not count."""
    lines = Path(path).with_suffix(".jsonl").read_text().split("\n")[:-1]
    return [row for row in map(json.loads, lines) if key in row]


def error(function, *args, **kwargs):
    """The one line a user sees."""
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


class Recorder:
    """Inside `with`: the gradients of every optimizer step before clipping, and the parameters trained last."""

    def __enter__(self):
        self.grads, self.parameters, self.clip = [], {}, torch.nn.utils.clip_grad_norm_

        def record(parameters, *args):
            parameters = [p for p in parameters if p.requires_grad]
            self.grads.append([p.grad.clone() for p in parameters])
            self.parameters[id(parameters[0])] = parameters
            return self.clip(parameters, *args)
        torch.nn.utils.clip_grad_norm_ = record
        return self

    def __exit__(self, *exception):
        torch.nn.utils.clip_grad_norm_ = self.clip


def recorded(main, cfg):
    """Run a stage: (gradients of each optimizer step, final parameters)."""
    with Recorder() as r:
        main(cfg)
    return r.grads, [p.detach() for group in r.parameters.values() for p in group]


def start(main, cfg, rank=0, world_size=1, port=0, save_to=None):
    """main(cfg) in a child of this process, which has imported everything already: no second to wait."""
    def child():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        result = recorded(main, cfg)
        if save_to:
            torch.save(result, save_to)
        if dist.is_initialized():
            dist.destroy_process_group()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def on_two_ranks(main, cfg, folder):
    """Run a stage as torchrun would in two processes: [(gradients, final parameters) of each rank]."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [start(main, cfg, rank, 2, port, Path(folder) / f"rank{rank}") for rank in range(2)]
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(Path(folder) / f"rank{rank}") for rank in range(2)]


def assert_two_ranks_train_like_one(main, cfg, folder):
    """Equal replicas to the bit; the gradients of every step and the losses as in one process."""
    grads, params = recorded(main, replace(cfg, out=str(Path(folder) / "one.pt")))
    cfg = replace(cfg, out=str(Path(folder) / "two.pt"))
    (a_grads, a_params), (b_grads, b_params) = on_two_ranks(main, cfg, folder)
    assert all(map(torch.equal, a_params, b_params)) and len(a_params) == len(params)
    assert len(grads) == len(a_grads)
    torch.testing.assert_close(a_grads[0], grads[0], atol=1e-6, rtol=1e-5)
    for x, y in ((a_grads, b_grads), (a_params, params)):    # Adam magnifies the last bits of small gradients
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
    one, two = (log_of(Path(folder) / f"{name}.pt") for name in ("one", "two"))
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for x, y in zip(one, two):
        for key in x.keys() - CLOCK:
            assert y[key] == pytest.approx(x[key], abs=2e-3, nan_ok=True), (key, x["step"])


def assert_killed_and_resumed_is_the_same(main, cfg, folder, kills=(5, 13)):
    """kill -9 at no particular moment, twice, then --resume: the same bits as a run that was let alone."""
    whole, killed = (replace(cfg, out=str(Path(folder) / f"{name}.pt")) for name in ("whole", "killed"))
    main(whole)
    for lines in kills:
        process = start(main, replace(killed, resume=Path(killed.out).exists()))
        log = Path(killed.out).with_suffix(".jsonl")
        while process.is_alive() and not (log.exists() and len(log_of(killed.out)) >= lines):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    main(replace(killed, resume=True))
    a, b = (load_checkpoint(c.out, "") for c in (whole, killed))
    for part in ("weights", "adapted", "critic"):
        assert same_bits(a.get(part) or {}, b.get(part) or {}), part
    a, b = ([json.dumps({k: v for k, v in row.items() if k not in CLOCK}) for row in log_of(c.out)]
            for c in (whole, killed))
    assert a == b
