"""Runs that stop, go on, or were asked for by mistake: what a user types wrong costs one line, never a model."""
import json
import sys

import pytest
import torch

import dpo
import model as m
import pretrain
import prepare
import reward
import rlhf
import sft
from common import (ENC, byte_encoding, demonstrations, error, judge, log_of, preferences, same_bits, save, tiny, turn,
                    weights, write)

FEW = dict(max_steps=4, eval_every=100, save_every=100, learning_rate=1e-3, precision="fp32")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    text = folder / "text.txt"
    text.write_text("The ferry is late again, and nobody minds. " * 200)
    for name in ("one", "two"):
        prepare.main(prepare.Config(input=[str(text)], out=str(folder / name), tokenizer="bytes", clean=False, eval="none",
                                    val_fraction=0.1, split="tail"))
    rows = [dict(prompt=f"{i}+1?", expect="answer", answer=str(i + 1)) for i in range(20)]
    return dict(base=save(folder / "base.pt", tiny()),
                judge=save(folder / "judge.pt", judge()), talks=demonstrations(folder / "talks.jsonl"),
                pairs=preferences(folder / "pairs.jsonl"), prompts=write(folder / "prompts.jsonl", rows),
                one=str(folder / "one"), two=str(folder / "two"))


def config(stage, files, out, **changes):
    own = {sft: dict(init=files["base"], data=[files["talks"]], replay=0.0, replay_data="none", batch_size=4,
                     sample_tokens=0),
           reward: dict(init=files["base"], data=[files["pairs"]], demonstrations=[files["talks"]], batch_size=4),
           dpo: dict(init=files["base"], data=[files["pairs"]], batch_size=4),
           rlhf: dict(init=files["base"], data=[files["prompts"]], reward=files["judge"], batch_size=8, minibatches=1,
                      max_new_tokens=4),
           pretrain: dict(data=[files["one"]], n_layer=1, n_embd=32, n_head=2, block_size=32, total_batch_tokens=64,
                          sample_tokens=0)}[stage]
    return stage.Config(**{**FEW, **own, "overwrite": True, "out": str(out), **changes})


def stop_at(monkeypatch, step):
    """Ctrl-C in the step after so many."""
    done, take = [], torch.optim.AdamW.step

    def stepped(self, *args, **kwargs):
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(1)
        return take(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)


STAGES = [pretrain, sft, reward, dpo, rlhf]
names = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)


@names
def test_a_run_stopped_before_its_first_save_is_not_taken_for_the_one_before(stage, files, tmp_path, monkeypatch, capsys):
    """--resume would return the weights of the run before, under the settings of this one."""
    out, whole = tmp_path / "a.pt", tmp_path / "whole.pt"
    stage.main(config(stage, files, out))
    stage.main(config(stage, files, whole, seed=5))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 2)
        stage.main(config(stage, files, out, seed=5))
    stage.main(config(stage, files, out, seed=5, resume=True))
    assert "resuming" in capsys.readouterr().out
    assert same_bits(weights(out), weights(whole))


@names
def test_a_finished_model_is_not_overwritten_by_a_forgotten_resume(stage, files, tmp_path):
    """The same command twice: the second would write its step 0 over the result of the first within seconds."""
    out = tmp_path / "a.pt"
    stage.main(config(stage, files, out))
    before = out.read_bytes(), out.with_suffix(".jsonl").read_bytes()
    assert "--resume" in error(stage.main, config(stage, files, out, seed=5, overwrite=False))
    assert (out.read_bytes(), out.with_suffix(".jsonl").read_bytes()) == before
    out.write_text("somebody's text")
    error(stage.main, config(stage, files, out, overwrite=False))
    assert out.read_text() == "somebody's text"


def test_resume_takes_the_settings_of_the_run(files, tmp_path, monkeypatch, capsys):
    """A SimPO run would silently go on as DPO, at the default learning rate."""
    out = str(tmp_path / "a.pt")
    dpo.main(config(dpo, files, out, loss="simpo", beta=2.0))
    monkeypatch.setattr(sys, "argv", ["dpo.py"])
    cfg = m.parse_args(dpo.Config, ["--resume", "--out", out, "--max_steps", "6"])
    assert (cfg.loss, cfg.beta, cfg.learning_rate, cfg.batch_size, cfg.max_steps) == ("simpo", 2.0, 1e-3, 4, 6)
    capsys.readouterr()
    dpo.main(cfg)
    assert "changed: max_steps 4 -> 6\n" in capsys.readouterr().out


def test_settings_that_were_derived_are_derived_again(files, tmp_path, monkeypatch):
    """--config of a run with --depth 1 could not be given another depth, nor --max_minutes."""
    run = pretrain.Config(data=[files["one"]], out=str(tmp_path / "a.pt"), depth=1, total_batch_tokens=64, max_steps=1,
                          sample_tokens=0, precision="fp32")
    pretrain.main(run)
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    cfg = m.parse_args(pretrain.Config, ["--config", str(tmp_path / "a.json"), "--depth", "2"])
    assert (cfg.depth, cfg.n_layer, cfg.learning_rate) == (2, None, None)
    assert m.load_checkpoint(run.out, "")["stage_config"]["n_layer"] == 1    # while the checkpoint says what was derived


@names
def test_more_steps_done_than_asked_for(stage, files, tmp_path):
    """A traceback, after the line that says "done"."""
    stage.main(config(stage, files, tmp_path / "a.pt", max_steps=3))
    before = (tmp_path / "a.pt").read_bytes()
    message = error(stage.main, config(stage, files, tmp_path / "a.pt", max_steps=2, resume=True))
    assert "has 3 steps already" in message and (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.parametrize("made, resumed", [(dpo, sft), (sft, dpo), (reward, sft), (sft, pretrain), (dpo, rlhf)])
def test_a_checkpoint_of_another_stage_is_not_resumed(made, resumed, files, tmp_path):
    """sft.py --resume --out out/dpo.pt would train the aligned model on demonstrations and write over it."""
    made.main(config(made, files, tmp_path / "a.pt"))
    message = error(resumed.main, config(resumed, files, tmp_path / "a.pt", max_steps=8, resume=True))
    assert f"was made by {made.__name__}, not by {resumed.__name__}" in message


def test_pretraining_is_not_resumed_with_another_optimizer_or_other_folders(files, tmp_path):
    """The second would read nothing from the new folder, whatever its weight."""
    out = tmp_path / "a.pt"
    pretrain.main(config(pretrain, files, out))
    assert "another --optimizer" in error(pretrain.main, config(pretrain, files, out, resume=True, optimizer="adamw"))
    message = error(pretrain.main, config(pretrain, files, out, resume=True, data=[files["one"], files["two"] + ":9"]))
    assert "has read 1 folders" in message


@pytest.mark.parametrize("stage", [dpo, rlhf], ids=lambda stage: stage.__name__)
def test_a_reference_is_never_written_over(stage, files, tmp_path):
    """A resumed run would measure the KL to its own half-trained weights."""
    start = save(tmp_path / "a.pt", tiny())
    assert "would overwrite" in error(stage.main, config(stage, files, start, init=start))


def test_another_kl_coef_counts_from_the_resumed_step_on(files, tmp_path):
    """It would be printed as changed and have no effect."""
    out = tmp_path / "a.pt"
    rlhf.main(config(rlhf, files, out, max_steps=2))
    rlhf.main(config(rlhf, files, out, max_steps=3, kl_coef=5.0, resume=True))
    assert [row["kl_coef"] for row in log_of(out, "kl_coef")] == [0.1, 0.1, 5.0]


@pytest.mark.parametrize("flag, value", [("depth", "2"), ("n_layer", "2"), ("n_embd", "64"), ("tie_embeddings", None)])
def test_sizes_that_the_model_does_not_have(flag, value, files, tmp_path):
    """The old model would be trained on as if nobody had asked for another."""
    pretrain.main(config(pretrain, files, tmp_path / "a.pt"))
    sizes = dict(n_layer=None, n_embd=None, n_head=None)
    cfg = config(pretrain, files, tmp_path / "b.pt", init=str(tmp_path / "a.pt"),
                 **{**sizes, flag: int(value) if value else True})
    assert f"--{flag}" in error(pretrain.main, cfg)


@pytest.mark.parametrize("argv", ["--grad_clip 0", "--grad_clip -1", "--max_steps 0", "--max_steps -1", "--n_layer 0",
                                  "--eval_every 0", "--log_every 0", "--device_batch_size 0", "--seed -1",
                                  "--learning_rate -1", "--learning_rate nan", "--max_minutes 0", "--max_skips 0"])
def test_numbers_that_no_run_can_use(argv, monkeypatch):
    """Some climb the gradient, some train nothing and say done, the rest are a traceback."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    assert argv.split()[0] in error(m.parse_args, pretrain.Config, argv.split())


def test_numbers_that_are_unusual_and_right(monkeypatch):
    """The check would forbid what the help offers."""
    monkeypatch.setattr(sys, "argv", ["rlhf.py"])
    cfg = m.parse_args(rlhf.Config, "--unfinished -2 --kl_limit 0 --kl_coef 0 --lora_rank 0 --seed 0".split())
    assert (cfg.unfinished, cfg.kl_coef, cfg.seed) == (-2.0, 0.0, 0)


def test_heads_that_cannot_be_rotated():
    """A traceback from the middle of attention."""
    with pytest.raises(ValueError, match="33 channels"):
        m.GPTConfig(n_embd=33, n_head=1, n_kv_head=1)


def test_a_misspelt_layer_is_not_ignored():
    """One of the two layers would stay frozen."""
    assert "foo_proj" in error(m.add_lora, tiny(), 2, 4.0, ["q_proj", "foo_proj"])


# ------------------------------------------------------------------------------------------------ files beside the model
def test_dots_in_the_name_of_a_checkpoint(files, tmp_path):
    """lr0.01.pt and lr0.02.pt would share a log, and the second run erase the first's."""
    for name in ("lr0.01", "lr0.02.pt"):
        sft.main(config(sft, files, tmp_path / name, max_steps=1))
    assert {p.name for p in tmp_path.iterdir()} == {"lr0.01", "lr0.01.jsonl", "lr0.01.json",
                                                    "lr0.02.pt", "lr0.02.jsonl", "lr0.02.json"}


def test_a_data_set_beside_the_model_is_kept(files, tmp_path):
    """SQuAD begins with {"data": as settings do: it would be written over."""
    mine = tmp_path / "squad.json"
    mine.write_text('{"data": [{"title": "Port Merrow"}]}')
    assert "choose another --out" in error(sft.main, config(sft, files, tmp_path / "squad.pt"))
    assert "Merrow" in mine.read_text()


@pytest.mark.parametrize("out", ["", "folder"])
def test_no_file_to_write_to(out, files, tmp_path, monkeypatch):
    """The run would train to its end and be lost there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert "--out" in error(sft.main, config(sft, files, out))


def test_what_cannot_be_written_shows_before_training(files, tmp_path, monkeypatch):
    """A disk too small for the checkpoint would be noticed hours later."""
    (tmp_path / "file").write_text("")
    stop_at(monkeypatch, 0)
    assert "cannot write" in error(sft.main, config(sft, files, tmp_path / "file" / "a.pt"))


def test_an_interrupted_save_leaves_nothing_behind(tmp_path):
    """Every Ctrl-C would leave a file of the size of the model."""
    def write(f):
        f.write(b"half")
        raise KeyboardInterrupt
    (tmp_path / "a.pt").write_bytes(b"whole")
    with pytest.raises(KeyboardInterrupt):
        m.write_atomic(tmp_path / "a.pt", write)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.pt", b"whole")]


@pytest.mark.parametrize("file", ["manifest.json", "encoding.json"])
def test_damaged_tokens(file, files, tmp_path):
    """A traceback."""
    for name in ("manifest.json", "encoding.json", "train.bin", "val.bin"):
        (tmp_path / name).write_bytes(open(f"{files['one']}/{name}", "rb").read() if name != file else b"{}")
    assert "run prepare.py again" in error(pretrain.main, config(pretrain, files, tmp_path / "a.pt", data=[str(tmp_path)]))


# ------------------------------------------------------------------------------------------------ data that means something else
def test_a_pair_keeps_its_system_turn_and_the_prompt_of_a_talk():
    """Reward and DPO would learn from other prompts than SFT and RLHF."""
    hi, a, b, c = turn("user", "Hi"), turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")
    pirate = turn("system", "Be a pirate.")
    assert m.to_pair(dict(system="Be a pirate.", prompt="Hi", chosen="Ahoy", rejected="No"))[0] == [pirate, hi]
    pair = dict(prompt=[hi], chosen=[a, b, c], rejected=[a, b, turn("assistant", "d")])
    assert m.to_pair(pair) == ([hi, a, b], "c", "d")
    full = dict(prompt="Hi", chosen=[hi, a], rejected=[hi, turn("assistant", "z")])    # UltraFeedback tells it twice
    assert m.to_pair(full) == ([hi], "a", "z")


def test_a_probability_under_one_half_prefers_the_other_answer(tmp_path):
    """DPO would push towards the answer that people reject, and the verdict punish a judge that learned better."""
    path = write(tmp_path / "p.jsonl", [dict(prompt="Hi", chosen="bad", rejected="good", probability=0.25, margin=-1.0)])
    pair, = reward.load_pairs([path], ENC, 96)
    assert ENC.decode(pair["chosen"]).endswith("good<|im_end|>")
    assert (pair["probability"], pair["margin"]) == (0.75, 1.0)


@pytest.mark.parametrize("content", [None, '{"foo": 1}\n'])
def test_demonstrations_are_looked_at_before_the_judge_is_trained(content, files, tmp_path, monkeypatch):
    """A misspelt name would skip the centring, a bad file lose the trained judge."""
    path = tmp_path / "shown.jsonl"
    if content:
        path.write_text(content)
    stop_at(monkeypatch, 0)
    assert "shown.jsonl" in error(reward.main, config(reward, files, tmp_path / "a.pt", demonstrations=[str(path)]))


def test_no_prompt_is_trained_on_and_held_out(files, tmp_path, monkeypatch):
    """The monitors would say how well answers were learned, not whether the policy is better."""
    seen = []

    def rollout(policy, prompts, *args, **kwargs):
        seen.append((kwargs["temperature"] if "temperature" in kwargs else args[-1], {p["prompt"] for p in prompts}))
        return original(policy, prompts, *args, **kwargs)
    original = rlhf.rollout
    monkeypatch.setattr(rlhf, "rollout", rollout)
    twice = write(tmp_path / "twice.jsonl", [dict(prompt=f"{i % 10}?", answer="1") for i in range(40)])
    rlhf.main(config(rlhf, files, tmp_path / "a.pt", data=[twice], val_fraction=0.3))
    held = set().union(*(prompts for temperature, prompts in seen if temperature == 0))
    trained = set().union(*(prompts for temperature, prompts in seen if temperature))
    assert len(held) == 3 and trained and not held & trained


@pytest.mark.parametrize("row", [dict(answer=4), dict(answer=None), dict(answer=["x", 4]), dict(answer="1", max_words="20"),
                                 dict(answer="1", distractors=None), dict(expect="Refuse")])
def test_prompts_whose_fields_mean_something_else(row, files, tmp_path):
    """A traceback after the first rollout, or "Refuse" graded as if an answer were wanted."""
    path = write(tmp_path / "p.jsonl", [dict(prompt=f"{i}?", answer="1") for i in range(8)] + [dict(prompt="odd?", **row)])
    message = error(rlhf.main, config(rlhf, files, tmp_path / "a.pt", data=[path], reward="verifier"))
    assert "1 rows" in message and "odd?" in message
    rlhf.main(config(rlhf, files, tmp_path / "a.pt", data=[path], max_steps=1))    # a judge needs no rules


def test_a_judge_that_reads_other_tokens(files, tmp_path):
    """Its scores would be noise."""
    other = save(tmp_path / "judge.pt", judge(), byte_encoding("other", shift=1))
    assert "another tokenizer" in error(rlhf.main, config(rlhf, files, tmp_path / "a.pt", reward=other))


def test_settings_are_valid_json(files, tmp_path):
    """--config and --resume could not read them."""
    sft.main(config(sft, files, tmp_path / "a.pt", max_steps=1))
    assert json.loads((tmp_path / "a.json").read_text())["resume"] is False
