"""What holds of every stage. Run: python -m pytest tests/test_resume.py -q."""
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import (byte_encoding, config, error, interrupted, judge, load, log_of, on_two_ranks,
                    recorded, same_bits, save, tiny, token_folder, weights, write)

import dpo
import model as m
import pretrain
import reward
import rlhf
import sft
from model import load_checkpoint

CLOCK = {"seconds", "tokens_per_second", "mfu"}    # what two equal runs may differ in
STAGES = [pretrain, sft, reward, dpo, rlhf]
name_of = lambda x: getattr(x, "__name__", None) or str(x)


def cases(*rows):
    """Parameters (stage, changes) with readable names."""
    return pytest.mark.parametrize("stage, changes", rows, ids=name_of)


@cases((reward, dict(eta=0.1)), (rlhf, dict(algo="ppo")),
       *((rlhf, dict(algo="grpo", reduction=r)) for r in ("grpo", "dapo", "dr_grpo")))
def test_a_step_is_the_same_however_it_is_split(short, stage, changes):
    """Gradients agree in one micro-batch and in unequal ones. The other stages' tests compare
    those of a split step with a calculation by hand."""
    runs = []
    for size in (8, 3):
        cfg = short(stage, max_steps=1, device_batch_size=size, **changes)
        runs.append(recorded(stage.main, cfg)[0])
    assert max(g.abs().max() for g in runs[0][0]) > 1e-4
    torch.testing.assert_close(*runs, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@cases((pretrain, dict(doc_mask=True, compile=True)), (sft, dict(pack=False)), (reward, {}),
       (dpo, dict(lora_rank=2, batch_size=5)), (dpo, dict(online=True, batch_size=5)),
       (rlhf, dict(minibatches=2)), (rlhf, dict(lora_rank=2)),
       (rlhf, dict(algo="grpo", group_size=2, reduction="grpo")))
def test_two_processes_train_like_one(short, stage, changes, files, tmp_path, eager_backend):
    """Under DistributedDataParallel: replicas equal to the bit, gradients and log as of one."""
    if stage is sft:
        changes = dict(changes, replay=0.1, replay_data=files["tokens"])
    if stage is rlhf:
        changes = dict(changes, value_learning_rate=1e-4, max_steps=2)
    changes = {"learning_rate": 1e-4, "device_batch_size": 2, **changes}
    one, two = (short(stage, name, **changes) for name in ("one", "two"))
    grads, params = recorded(stage.main, one)
    (a_grads, a_params), (b_grads, b_params) = on_two_ranks(stage.main, two, tmp_path)
    assert all(map(torch.equal, a_params, b_params)) and len(a_params) == len(params)
    torch.testing.assert_close(a_grads[0], grads[0], atol=1e-6, rtol=1e-5)
    for x, y in ((a_grads, grads), (a_grads, b_grads), (a_params, params)):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)    # Adam magnifies the last bits
    one, two = log_of(one.out), log_of(two.out)
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for x, y in zip(one, two):
        for key in [k for k in x.keys() - CLOCK if isinstance(x[k], (int, float))]:
            assert y[key] == pytest.approx(x[key], abs=2e-3), (key, x["step"])


@cases((pretrain, {}), (sft, {}), (reward, dict(lora_rank=2)),
       (dpo, dict(lora_rank=2, online=True)), (dpo, {}), (rlhf, dict(algo="ppo")),
       (rlhf, dict(algo="ppo", lora_rank=2)), (rlhf, dict(algo="grpo", minibatches=2)))
def test_stopped_and_resumed_ends_with_the_same_bits(short, stage, changes):
    """Weights, adapters, critic and log are those of a run that nothing stopped.

    It starts over the file of an earlier run and first stops before a save of its own progress.
    """
    changes = dict(changes, save_every=2, eval_every=3, max_steps=6)
    whole, stopped = (short(stage, name, **changes) for name in ("whole", "stopped"))
    stage.main(whole)
    stage.main(replace(stopped, seed=2, max_steps=1))
    for steps, resume in ((1, False), (3, True), (3, True)):    # a rollout has four steps
        steps *= 4 if stage is rlhf else 1
        interrupted(stage.main, steps)(replace(stopped, resume=resume))
    assert load_checkpoint(stopped.out, "")["step"] == 4
    stage.main(replace(stopped, resume=True))
    one, other = (load_checkpoint(cfg.out, "") for cfg in (whole, stopped))
    assert same_bits(one["weights"], other["weights"])
    assert same_bits(one["adapters"], other["adapters"])
    assert same_bits(one["state"].get("critic", {}), other["state"].get("critic", {}))
    one, other = (log_of(cfg.out) for cfg in (whole, stopped))
    for row in one + other:
        for key in CLOCK:
            row.pop(key, None)
    assert one == other


@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_the_same_command_twice(short, stage):
    """A finished model is not overwritten by a forgotten --resume, nor anything that is no model.

    --resume of what is finished changes nothing, of more steps than are asked for is refused, and
    of what is not there starts.
    """
    cfg = short(stage, overwrite=False)
    stage.main(replace(cfg, resume=True))
    out, log = Path(cfg.out), Path(cfg.out).with_suffix(".jsonl")
    before, lines = weights(out), log.read_text()
    last = load_checkpoint(out, "")["optimizers"][0]["param_groups"][0]["lr"]
    rates = [row["lr"] for row in log_of(out, "lr")]
    assert last == pytest.approx(rates[-1], abs=1e-6) and last < max(rates) / 2    # the schedule
    assert "--resume" in error(stage.main, cfg)
    assert "3 steps" in error(stage.main, replace(cfg, resume=True, max_steps=2))
    assert same_bits(weights(out), before) and log.read_text() == lines
    stage.main(replace(cfg, resume=True))
    assert same_bits(weights(out), before)
    out.write_text("somebody's text")
    for changes in ({}, dict(resume=True), dict(overwrite=True)):
        assert "is not a checkpoint" in error(stage.main, replace(cfg, **changes))
    assert out.read_text() == "somebody's text"


def test_resume_takes_the_settings_of_the_run(files, tmp_path, capsys, monkeypatch):
    """--resume --out FILE goes on as that run, of any number of files; what flags change is said.

    Nothing else is: a checkpoint's own depth, given by a flag, changes nothing.
    """
    out, one = str(tmp_path / "a.pt"), write(tmp_path / "b.jsonl", [dict(
        prompt="Hi?", chosen="Yo.", rejected="Go.")])
    dpo.main(config(dpo, files, out, loss="simpo", beta=2.0, data=[files["pairs"], *3000 * [one]]))
    cfg = m.parse_args(dpo.Config, ["--resume", "--out", out, "--max_steps", "4"])
    assert (cfg.loss, cfg.beta, cfg.learning_rate, cfg.max_steps) == ("simpo", 2.0, 1e-3, 4)
    capsys.readouterr()
    dpo.main(cfg)
    assert "changed: max_steps 3 -> 4\n" in capsys.readouterr().out
    assert log_of(out)[-1]["step"] == 4 and len(cfg.data) == 3001
    (tmp_path / "out").mkdir()
    Path(out).rename(tmp_path / "out/dpo.pt")    # goes on where it is now
    monkeypatch.chdir(tmp_path)
    assert m.parse_args(dpo.Config, ["--resume"]).out == "out/dpo.pt"
    cfg = config(pretrain, files, tmp_path / "c.pt", init=files["base"], depth=4, n_embd=None)
    for changes in (dict(n_head=None), dict(n_head=None, resume=True, depth=2, max_steps=4)):
        pretrain.main(replace(cfg, **changes))
    assert "at step 3; changed: max_steps 3 -> 4\n" in capsys.readouterr().out


@cases((pretrain, "data"), (sft, "data"), (reward, "init"), (dpo, "data"), (rlhf, "reward"))
def test_other_data_is_not_resumed_in_silence(short, stage, changes, tmp_path, capsys):
    """What lies under the old name but is not what it was is named, even if of the same length."""
    cfg = short(stage, max_steps=1)
    path, copy = getattr(cfg, changes), tmp_path / "copy"
    path = Path(path[0] if changes == "data" else path)
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    cfg = replace(cfg, **{changes: [str(copy)] if changes == "data" else str(copy)})
    stage.main(cfg)
    stage.main(replace(cfg, resume=True))
    assert "changed" not in capsys.readouterr().out
    file = copy / "train.bin" if path.is_dir() else copy
    old = file.read_bytes()
    file.write_bytes(old.replace(b"t\0h", b"w\0h").replace(b": 1+1?", b": 1+2?"))
    if changes != "data":
        save(copy, tiny(3) if changes == "init" else judge(3))
    assert len(file.read_bytes()) == len(old) and file.read_bytes() != old
    stage.main(replace(cfg, resume=True))
    assert f"changed: content of {copy} " in capsys.readouterr().out


@pytest.mark.parametrize("stage", [sft, reward, dpo, rlhf], ids=name_of)
def test_validation_takes_no_longer_than_training(short, stage, monkeypatch):
    """Of many rows held out it looks at some, from all over the data."""
    sizes, validate = [], stage.validate

    def watched(*args):
        sizes.append(len(next(x for x in args if isinstance(x, list))))
        return validate(*args)
    monkeypatch.setattr(stage, "validate", watched)
    monkeypatch.setattr(stage, "HELD_OUT", 3)
    stage.main(short(stage, val_fraction=0.5, max_steps=1))
    assert 1 < sizes[0] <= 3


@cases((pretrain, dict(optimizer="adamw")), (rlhf, dict(algo="grpo")), (sft, dict(lora_rank=2)))
def test_a_run_is_not_resumed_as_another(short, stage, changes):
    """Another optimizer or rank of adapters is refused, the file left as it was."""
    cfg = short(stage, max_steps=1)
    stage.main(cfg)
    before = Path(cfg.out).read_bytes()
    name = next(iter(changes))
    assert f"with another --{name}" in error(stage.main, replace(cfg, resume=True, **changes))
    assert Path(cfg.out).read_bytes() == before


@cases((rlhf, {}), (rlhf, dict(lora_rank=2)), (dpo, {}), (dpo, dict(lora_rank=2)),
       (dpo, dict(online=True)))
def test_reference_and_judge_are_frozen(short, stage, changes, files, monkeypatch):
    """The models that measure do not move; with LoRA only the adapted matrices do."""
    loaded, load_model = [], m.load_model
    monkeypatch.setattr(m, "load_model", lambda *a: loaded.append(load_model(*a)) or loaded[-1])
    cfg = short(stage, learning_rate=1e-2, **changes)
    stage.main(cfg)
    before, after = weights(files["policy"]), weights(cfg.out)
    frozen = sum(same_bits(model.state_dict(), start)
                 for model, _ in loaded for start in (before, weights(files["judge"])))
    assert frozen >= (stage is rlhf or "online" in changes) + ("lora_rank" not in changes)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved and ("lora_rank" not in changes or all("_proj.weight" in name for name in moved))
    if stage is rlhf:
        assert log_of(cfg.out, "k3")[-1]["k3"] > 1e-5    # also where LoRA's reference is itself
        critic = load_checkpoint(cfg.out, "")["state"]["critic"]
        assert not torch.equal(critic["score.weight"], weights(files["judge"])["score.weight"])


ERRORS = [
    *((stage, changes, word) for stage in STAGES for changes, word in (
        (dict(init="no.pt"), "make it with: python "), (dict(init="{pairs}"), "not a checkpoint"),
        (dict(init="{judge}"), "is a reward model"),
        (dict(out=""), "--out"), (dict(out="{folder}"), "--out"), (dict(out="new/"), "--out"),
        (dict(out="{folder}/file/a.pt"), "cannot write"), (dict(data=["no.jsonl"]), "no.jsonl"),
        (dict(out="{folder}/mine.pt"), "choose another --out"),
        (dict(data=["{folder}/useless.jsonl"]), "useless.jsonl"))),
    *((stage, dict(out=name), "which this run reads") for stage, name in (
        (sft, "{talks}"), (reward, "{base}"), (dpo, "{policy}"),
        (rlhf, "{judge}"))),
    (pretrain, dict(out="{tokens}/train.bin"), "not a checkpoint"),
    (sft, dict(out="{folder}/mine.pt", data=["{folder}/mine.jsonl"]), "which this run reads"),
    (reward, dict(out="{policy}", resume=True), "made by test, not by reward"),
    *((stage, dict(data=["{folder}/one.jsonl"]), "too few") for stage in (sft, reward, dpo, rlhf)),
    *((pretrain, dict(data=["{tokens}:" + weight]), "above 0") for weight in ("0", "-1")),
    (pretrain, dict(shard="fsdp"), "torchrun"), (sft, dict(lora_rank=33), "no more than rank 32"),
    (dpo, dict(loss="ipo", label_smoothing=0.1), "--label_smoothing"),
    (rlhf, dict(max_new_tokens=96), "no room for a prompt"),
    (pretrain, dict(block_size=40_000, total_batch_tokens=40_000), "fewer than one window"),
    (pretrain, dict(total_batch_tokens=100), "not a multiple"),
    (pretrain, dict(device_batch_size=3), "--device_batch_size 3"),
    (pretrain, dict(n_head=3), "n_head 3"), (pretrain, dict(n_embd=33, n_head=1), "33 channels"),
    (pretrain, dict(init="{policy}", data=["{folder}/other"]), "another tokenizer"),
    (pretrain, dict(data=["{tokens}:2", "{folder}/other"]), "tokenizer {tokens}, or leave"),
    (pretrain, dict(data=["{folder}/all"]), "no validation text"),
    *((pretrain, dict(data=["{folder}/" + name]), "run prepare.py again")
      for name in ("train.bin", "val.bin", "manifest.json", "encoding.json")),
    *((pretrain, dict(init="{policy}", n_embd=None, n_head=None) | {name: value}, f"--{name}")
      for name, value in (("depth", 3), ("n_embd", 64), ("tie_embeddings", True))),
    (sft, dict(replay_data="{folder}/other"), "another tokenizer"),
    (sft, dict(replay_data="{folder}/few"), "fewer than one window"),
    (sft, dict(replay_data="{folder}/nowhere"), "holds no tokens"),
    *((stage, dict(reward=path, **online), word)
      for stage, online in ((rlhf, {}), (dpo, dict(online=True)))
      for path, word in (
          ("no.pt", "make it with: python reward.py"), ("{policy}", "is not a reward model"),
          ("{folder}/other.pt", "another tokenizer"), ("{folder}/short.pt", "reads 32 tokens"))),
    (dpo, dict(online=True, prompts=["no.jsonl"]), "does not exist"),
    (rlhf, dict(algo="grpo", batch_size=6), "not a multiple"),
    (rlhf, dict(minibatches=3), "not a multiple"),
    (rlhf, dict(reward="{folder}/broken.py:rate"), "ZeroDivisionError"),
    (rlhf, dict(reward="{folder}/mine.py:rate"), "no function rate"),
    (rlhf, dict(reward="nowhere.py:score"), "does not exist"),
    (rlhf, dict(reward="evaluate.py"), "FILE.py:FUNCTION"),
    (rlhf, dict(gold="gold"), "does not exist"),
    (rlhf, dict(data=["{folder}/long.jsonl"]), "no row is usable")]


@pytest.fixture(scope="module")
def odd(files, tmp_path_factory):
    """Paths of `files` and of a folder with what no stage can use."""
    folder = tmp_path_factory.mktemp("odd")
    one = dict(prompt="Hi?", completion="Yo.", chosen="Yo.", rejected="Go.")
    for name, row in dict(mine=one, one=one, long=dict(prompt="a" * 200), useless={}).items():
        write(folder / f"{name}.jsonl", [row])
    for name, text in (("file", ""), ("broken.py", "1 / 0"), ("mine.py", "")):
        (folder / name).write_text(text)
    save(folder / "other.pt", judge(), byte_encoding(1))
    save(folder / "short.pt", judge(block_size=32))
    token_folder(folder / "other", "abc" * 999, byte_encoding(1))
    token_folder(folder / "all", "abc" * 999, n_val=0)
    token_folder(folder / "few", "x" * 90, n_val=40)
    for name, bad in dict(train=b"1", val=b"\xff" * 1000, manifest=b"{}", encoding=b"{}").items():
        file = f"{name}.bin" if name in ("train", "val") else f"{name}.json"
        Path(token_folder(folder / file, "abc" * 999), file).write_bytes(bad)
    return dict(files, folder=folder)


def filled(value, paths):
    if isinstance(value, list):
        return [filled(x, paths) for x in value]
    return value.format(**paths) if isinstance(value, str) else value


@pytest.mark.parametrize("stage, changes, word", ERRORS, ids=name_of)
def test_user_errors_are_one_line(stage, changes, word, odd, tmp_path):
    """What is wrong and where: nothing is written, nobody's file is touched."""
    times = lambda: {path: path.stat().st_mtime_ns for path in odd["folder"].rglob("*")}
    before, cfg = times(), config(stage, odd, tmp_path / "a.pt")
    changes = {name: filled(value, odd) for name, value in changes.items()}
    assert filled(word, odd) in error(stage.main, replace(cfg, **changes))
    assert not list(tmp_path.iterdir()) and times() == before


@pytest.mark.parametrize("stage", [sft, reward, dpo, rlhf], ids=name_of)
def test_losses_that_are_no_number_end_the_run(short, stage, files, tmp_path):
    """Weights that are none are refused; a model that gives NaN is named at the first step, and the
    file keeps what it was."""
    model = load(files["policy"])
    cfg = short(stage, init=str(tmp_path / "sick.pt"))
    for number, message in ((math.nan, "are damaged"), (3e38, "lower --learning_rate")):
        model.blocks[1].mlp.up_proj.weight.data.fill_(number)
        save(tmp_path / "sick.pt", model)
        assert message in error(stage.main, cfg)
    assert load_checkpoint(cfg.out, "")["step"] == 0
