"""Tests of public models in and out. Run: python -m pytest tests/test_inout.py -q (no network)."""
import json
import random
import re
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from common import error, save, turn

import evaluate
import model as m
import prepare
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")
import huggingface_hub
import jinja2
import tokenizers
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZES = dict(block_size=128, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
TEXTS = ["Hello world", "  12 34567  x", "na\u00efve caf\u00e9 e\u0301 \u65e5\u672c\u8a9e",
         "\u0627\u0644\u0639 \u0939\u093f\u0928\u094d \U0001f600\U0001f44d\U0001f3fd \u2764\ufe0f",
         "def f(x):\n\treturn x  **2\n\n\n  # c\r\n", "\u00bd \u2167 \u00b2 1\u0664",
         "<|endoftext|> <|im_start|>user\n<|im_end|><|pad|><|x|>", "I'LL we'd 'S don't",
         " \n \n\n   a   \t b \u3000 c\u00a0d ", "\x01\x7f", "the thing in the ring", "", " ", "\n"]


def small_encoding():
    ranks = {bytes([i]): i for i in range(256)}
    for token in (b"th", b"in", b"the", b"ing", b" the", b"ring", b"  ", b"    ", b"\xc3\xa9"):
        ranks[token] = len(ranks)
    return m.make_encoding("small", m.SPLIT_PATTERN, ranks)


def char_encoding():
    letters = sorted(set("".join(TEXTS)))
    return m.make_encoding("chars", r"[\s\S]", {c.encode(): i for i, c in enumerate(letters)})


def randomise(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return model


def saved(folder, enc=None, **changes):
    """A checkpoint file of a small random model with as many ids as the tokenizer has."""
    enc = enc or small_encoding()
    sizes = dict(SIZES, qk_norm=False, vocab_size=enc.n_vocab)
    return save(folder / "model.pt", randomise(m.GPT(m.GPTConfig(**{**sizes, **changes}))), enc)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    """A small model's folder, for a test to damage."""
    m.export_model(saved(tmp_path), tmp_path / "public")
    return tmp_path / "public"


@pytest.mark.parametrize("enc, dtype, changes", [
    (small_encoding(), "float32", dict(rope_base=5e5, rope_scaling=LLAMA3)),
    (small_encoding(), "bfloat16", dict(qkv_bias=True)),
    (small_encoding(), "float16", dict(qk_norm=True, head_size=16, tie_embeddings=True)),
    (char_encoding(), "float32", {})], ids=["llama", "qwen2", "qwen3", "chars"])
def test_export_then_import_changes_no_bit(tmp_path, enc, dtype, changes):
    """A model exported and read again has the same sizes, weights and ids of any text.

    Transformers give any text the ids, and ids the text, that they have here.
    """
    path = saved(tmp_path, enc, **changes)
    m.export_model(path, tmp_path / "out", dtype)
    there, back = m.load_checkpoint(path, ""), m.load_checkpoint(tmp_path / "out", "")
    assert back["model_config"] == there["model_config"]
    assert back["weights"].keys() == there["weights"].keys()
    for name, t in there["weights"].items():
        assert torch.equal(t.to(getattr(torch, dtype)), back["weights"][name])
    again = m.encoding_from_dict(back["encoding"])
    assert again._special_tokens.items() >= enc._special_tokens.items()
    assert torch.equal(m.token_bytes(again), m.token_bytes(enc))
    draw, letters = random.Random(0), "".join(TEXTS)
    texts = [*TEXTS, *("".join(draw.choices(letters, k=40)) for _ in range(100))]
    assert [*map(again.encode_ordinary, texts)] == [*map(enc.encode_ordinary, texts)]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    if "qkv_bias" in changes:    # to a qwen2 it gives the tokenizer that Qwen2 has
        return
    for text in texts:
        ids = enc.encode_ordinary(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert theirs.decode(ids) == enc.decode(ids)
    assert_same_chat(theirs, enc, [turn("user", "the "), turn("assistant", " thing")])


def assert_same_chat(theirs, enc, messages):
    """The template of an exported tokenizer gives the ids and the mask of training."""
    there = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                       return_assistant_tokens_mask=True)
    ids, mask = m.render_chat(enc, m.to_turns(messages, "user"), reply=True)
    assert (there["input_ids"], there["assistant_masks"]) == (ids, mask) and sum(mask)


ForkConfig = make_dataclass("ForkConfig", [("window", int, 0)], bases=(GPTConfig,))


class TwoHeads(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.head2 = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)


class Capped(GPT):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).tanh()


@pytest.mark.parametrize("name, fork, names", [
    ("GPTConfig", ForkConfig, "window"), ("GPT", TwoHeads, "head2.weight"),
    ("GPT", Capped, "logits")])
def test_export_names_what_a_fork_added(tmp_path, monkeypatch, name, fork, names):
    """A fork's model would lose its window, second head or capped logits on export, silently; one
    that does not use the window loses nothing."""
    monkeypatch.setattr(m, name, fork)
    used = dict(window=7) if fork is ForkConfig else {}
    assert names in error(m.export_model, saved(tmp_path, **used), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    if used:
        m.export_model(saved(tmp_path), tmp_path / "out")


def test_export_refuses_what_it_cannot_say(tmp_path):
    """Somebody's files would be overwritten, or a reward model pass for a language model."""
    assert "exists already" in error(m.export_model, saved(tmp_path), tmp_path)
    both = saved(tmp_path, qk_norm=True, qkv_bias=True)
    assert "bias" in error(m.export_model, both, tmp_path / "out")
    head = m.ScalarHead(GPT(GPTConfig(**SIZES, vocab_size=small_encoding().n_vocab)))
    judge = save(tmp_path / "judge.pt", head, small_encoding())
    assert "is a reward model" in error(m.export_model, judge, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = subprocess.run([sys.executable, m.__file__, "export", "x" * 300, "out"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("error: .*name too long.*\n", done.stderr)


def test_files_and_names_on_the_hub_are_told_apart(folder, monkeypatch):
    """A missing out/sft.pt would be looked for on the network, or a hub's pickles be fetched."""
    assert "make it with: python sft.py" in error(m.load_checkpoint, "out/no.pt", "python sft.py")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert m.load_checkpoint("some/model", "")["stage_config"] == dict(folder=str(folder))
    assert asked == [("some/model", ["*.json", "model*.safetensors"])]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: open("/no/network"))
    assert "hf download some/model" in error(m.load_checkpoint, "some/model", "")
    for name in (folder / "base", "base"):    # a slip of the pen is not looked for on the network
        assert "make it with: python sft.py" in error(m.load_checkpoint, name, "python sft.py")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in error(m.load_checkpoint, folder, "")


@pytest.mark.parametrize("changes, names", [
    (dict(model_type="gpt2"), "gpt2"), (dict(hidden_act="gelu"), "gelu"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)), "yarn"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4)), "factor"),
    (dict(num_hidden_layers="3"), "num_hidden_layers"), (dict(num_hidden_layers=2), "layers.2"),
    (dict(num_hidden_layers=4), "blocks.3"), (dict(num_attention_heads=16), "size mismatch"),
    (dict(tie_word_embeddings=True), "lm_head.weight")])
def test_what_is_not_supported_is_named(folder, changes, names):
    """A model of another kind would be loaded as if it were of ours, and be quietly wrong."""
    edit(folder / "config.json", **changes)
    assert names in error(lambda: m.load_model(m.load_checkpoint(folder, ""), "cpu"))


@pytest.mark.parametrize("changes, context", [
    (dict(model_type="mistral", sliding_window=64), 64),
    (dict(model_type="mistral", sliding_window=None), 128),
    (dict(model_type="qwen2", use_sliding_window=False, sliding_window=64), 128)])
def test_a_sliding_window_shortens_the_context(folder, capsys, changes, context):
    """Long texts would be read with an attention that the model was not trained for."""
    edit(folder / "config.json", **changes)
    assert m.load_checkpoint(folder, "")["model_config"]["block_size"] == context
    assert ("context 64" in capsys.readouterr().out) == (context == 64)


def test_damaged_folders_are_named(folder):
    """Half a download would be loaded, or a pickle run what its author likes."""
    weights = folder / "model.safetensors"
    good, tensors = weights.read_bytes(), load_file(weights)
    save_file({**tensors, "model.layers.1.self_attn.o_proj.bias": torch.ones(32)}, weights)
    assert "o_proj.bias" in error(lambda: m.load_model(m.load_checkpoint(folder, ""), "cpu"))
    for content in (good[:-5], good[:100], b""):
        weights.write_bytes(content)
        error(m.load_checkpoint, folder, "")
    weights.rename(folder / "pytorch_model.bin")
    assert "model.safetensors" in error(m.load_checkpoint, folder, "")
    for name in ("tokenizer.json", "config.json"):    # SentencePiece has a tokenizer.model only
        (folder / name).unlink()
        assert name in error(m.load_checkpoint, folder, "")


def trained(family):
    """A tokenizer of the kind that the family has, trained by the tokenizers package."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=family == "llama"))
    special = dict(llama=["<|begin_of_text|>", "<|end_of_text|>"], mistral=["<s>", "</s>"])
    special, letters = special.get(family, [m.ENDOFTEXT, m.IM_START, m.IM_END]), bytes_to_unicode()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    if family.startswith("qwen"):
        split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        t.normalizer = tokenizers.normalizers.NFC()
        t.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if family == "llama":
        t.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    if family == "smollm2":    # not all bytes are in its vocabulary
        letters = {b: letter for b, letter in letters.items() if b < 0xF1}
    text = [*TEXTS, (Path(m.__file__).parent / "README.md").read_text("utf-8")]
    t.train_from_iterator(text, tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=[*letters.values()],
        show_progress=False))
    return t


def their_model(family, folder):
    """A random model of the family, saved as transformers saves it, with its tokenizer."""
    rope = LLAMA3 if family == "llama" else dict(rope_type="default")
    heads = dict(head_dim=16) if family in ("mistral", "qwen3") else {}
    config = transformers.AutoConfig.for_model(
        family.replace("smollm2", "llama"), vocab_size=602, hidden_size=32, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, eos_token_id=1,
        max_position_embeddings=128, rope_parameters=dict(rope_theta=5e5, **rope), **heads,
        tie_word_embeddings=family in ("qwen3", "smollm2"), bos_token_id=None, pad_token_id=None)
    theirs = randomise(transformers.AutoModelForCausalLM.from_config(config).eval())
    theirs.save_pretrained(folder, max_shard_size="60KB" if family == "qwen2" else "1GB")
    trained(family).save(str(folder / "tokenizer.json"))
    return theirs


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm2"])
def test_transformers_models_come_in_and_go_out(tmp_path, family):
    """A public model would speak differently here than there, or ours there than here."""
    theirs, tokenizer = their_model(family, tmp_path), trained(family)
    ours, enc = m.load_model(m.load_checkpoint(tmp_path, ""), "cpu")
    tokenizer.encode_special_tokens = True
    for text in TEXTS:
        assert enc.encode_ordinary(text) == tokenizer.encode(text, add_special_tokens=False).ids
        assert enc.decode(enc.encode_ordinary(text)) == tokenizer.decode(enc.encode_ordinary(text))
    text = "na\u00efve caf\u00e9, one"
    assert m.token_bytes(enc)[enc.encode_ordinary(text)].sum() == len(text.encode())
    assert (enc._special_tokens[m.ENDOFTEXT] == 1) == (family in ("llama", "mistral"))
    ids = torch.randint(0, 600, (2, 100))
    here, there = ours.eval()(ids), theirs(ids).logits    # their two spare rows have no token
    torch.testing.assert_close(here[..., :600], there[..., :600], atol=1e-4, rtol=1e-4)
    for rows in (ours.embed.weight, ours.head.weight):    # new tokens start as the mean
        mean = rows[:600].mean(0).expand(enc.n_vocab - 600, -1)
        torch.testing.assert_close(rows[600:], mean, atol=1e-6, rtol=1e-5)
    m.export_model(save(tmp_path / "ours.pt", ours, enc), tmp_path / "out")
    again = m.encoding_from_dict(m.load_checkpoint(tmp_path / "out", "")["encoding"])
    assert again._special_tokens == enc._special_tokens and again.n_vocab == enc.n_vocab
    assert [again.encode_ordinary(t) for t in TEXTS] == [enc.encode_ordinary(t) for t in TEXTS]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(back(ids).logits, here, atol=1e-4, rtol=1e-4)
    end, eot, pad = (enc._special_tokens[t] for t in (m.IM_END, m.ENDOFTEXT, m.PAD))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)
    assert set(back.generation_config.eos_token_id) == {end, eot}
    parts = [dict(type="text", text="\n caf\u00e9 12 "), dict(type="text", text=" x?")]
    assert_same_chat(tokenizer, enc, [
        turn("developer", "be\nbrief"), turn("user", parts), turn("assistant", " \u65e5 Yes.\n\n"),
        turn("user", "the end"), dict(turn("assistant", "No."), weight=0), turn("user", "")])
    template = tokenizer.apply_chat_template
    empty = template([turn("user", None)], return_dict=False)
    assert empty == m.render_chat(enc, [turn("user", "")])[0]
    for odd in (turn("user", [dict(type="image")]), dict(turn("assistant", None), tool_calls=[1])):
        with pytest.raises(jinja2.TemplateError):
            template([odd])
    # Llama 3 begins every text with a token: here, there and in training
    assert (enc.bos, again.bos) == 2 * ([0] * (family == "llama"),)
    ids = enc.encode_ordinary("Hi")
    assert tokenizer.encode("Hi") == [*enc.bos, *ids]
    assert prepare.encode(enc, "Hi", np.uint16).tolist() == [*enc.bos, *ids, eot]
    assert evaluate.encode_pair(enc, "", "Hi") == (enc.bos or [eot], ids)
    assert evaluate.encode_pair(enc, "Hi", "") == ([*enc.bos, *ids], [])
    assert m.token_bytes(enc)[enc.bos].sum() == 0


def test_what_a_tokenizer_file_may_hold(folder):
    """SentencePiece's pieces are no bytes: they could not be counted, nor cut as texts are here.

    A limit that a trainer left behind is none; a token that is text, as Qwen3's <think>, is one id,
    as in transformers, while text that spells a control token is text.
    """
    path = folder / "tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.add_tokens([tokenizers.AddedToken("<think>", normalized=False), "\u65e5\u672c"])
    public = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs)
    text = "a <think>b\u65e5\u672c\u8a9e</think>\n\n<think> c"
    expected = public.encode(text, add_special_tokens=False)
    theirs.enable_truncation(4)
    theirs.save(str(path))
    enc = m.encoding_from_dict(m.load_checkpoint(folder, "")["encoding"])
    assert len(enc.encode_ordinary("<think>")) == 1 < 4 < len(enc.encode_ordinary(m.IM_END))
    assert enc.encode_ordinary(text) == expected and enc.decode(expected) == public.decode(expected)
    assert m.token_bytes(enc)[expected].sum() == len(text.encode())
    ids, _ = m.render_chat(enc, [turn("user", m.IM_END)])
    assert ids.count(enc._special_tokens[m.IM_END]) == 1
    good = json.loads(path.read_text())
    blanks = dict(type="Metaspace", replacement="_", prepend_scheme="always")
    for change in (dict(pre_tokenizer=blanks, decoder=blanks), dict(model=None)):
        edit(path, **{**good, **change})
        error(m.load_checkpoint, folder, "")
