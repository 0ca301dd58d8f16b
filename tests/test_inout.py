"""Tests of what goes in and out: public model folders, settings files, downloads (model.py's last sections).

Run: python -m pytest tests/test_inout.py -q (CPU, no network, seconds; those against transformers are
skipped where it is not installed). Each docstring says what would be wrong with the world if the test failed.
"""
import dataclasses
import http.server
import json
import struct
import sys
import threading
import types
from dataclasses import dataclass, field

import pytest
import torch
from common import CPU, error

import evaluate
import model as m
import prepare
import sft
from model import GPT, GPTConfig

SIZES = dict(block_size=128, vocab_size=320, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
TEXTS = ["Hello world", "  12 34567  x", "na\u00efve caf\u00e9 e\u0301 \u65e5\u672c\u8a9e \u0627\u0644\u0639 \u0939\u093f\u0928\u094d",
         "\U0001f600\U0001f44d\U0001f3fd \u2764\ufe0f", "def f(x):\n\treturn x  **2\n\n\n  # c\r\n", "\u00bd \u2167 \u00b2 1\u0664",
         "<|endoftext|> <|im_start|>user\n<|im_end|><|pad|><|x|>", " \n \n\n   a   \t b \u3000 c\u00a0d ",
         "I'LL we'd 'S don't", "\x01\x7f", "the thing in the ring", "", " ", "\n"]


@dataclass
class Config:
    data: list[str] = field(default_factory=lambda: ["a"])  # files
    out: str = "out/x.pt"                  # where to
    # optimization
    rate: float = 0.0                      # per step
    steps: int | None = None               # how many
    fast: bool = True                      # or slow
    resume: bool = False                   # go on
    tensorboard: bool = False              # also write event files


def small_encoding(pattern=m.GPT4_SPLIT, nfc=False):
    ranks = {bytes([i]): i for i in range(256)}
    for token in (b"th", b"in", b"the", b"ing", b" the", b"ring", b"  ", b"    ", b"\xc3\xa9"):
        ranks[token] = len(ranks)
    return m.make_encoding("small", pattern, ranks, nfc=nfc)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZES, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return model.eval()


def saved(folder, enc=None, stage="sft", **changes):
    """A checkpoint file; its model has as many ids as the tokenizer."""
    enc = enc or small_encoding()
    model = tiny(**{**changes, "vocab_size": enc.n_vocab})
    m.save_checkpoint(folder / "model.pt", model, stage, 3, enc, model.config)
    return folder / "model.pt"


FAMILIES = dict(
    llama=dict(qk_norm=False, rope_base=5e5, rope_scaling=LLAMA3), qwen2=dict(qk_norm=False, qkv_bias=True),
    qwen3=dict(head_size=16, tie_embeddings=True), smollm3=dict(qk_norm=False, nope_layers=[0, 2]))


@pytest.mark.parametrize("family", FAMILIES)
def test_export_then_import_changes_no_bit(tmp_path, family):
    """A model would come home from a visit to transformers' format as another model."""
    enc = small_encoding(nfc=family == "qwen2")
    path = saved(tmp_path, enc, **FAMILIES[family])
    m.export_model(path, tmp_path / "out")
    there, back = m.load_checkpoint(path, ""), m.load_checkpoint(tmp_path / "out", "")
    assert back["model_config"] == there["model_config"]
    assert m.encoding_hash(m.encoding_from_dict(back["encoding"])) == m.encoding_hash(enc)
    assert back["weights"].keys() == there["weights"].keys()
    assert all(torch.equal(t, back["weights"][name]) for name, t in there["weights"].items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family


def test_characters_survive_the_journey(tmp_path):
    """A tokenizer whose tokens no merge makes would not be expressible."""
    letters = sorted("abc \n\u00e9\u65e5")
    enc = m.make_encoding("chars", r"[\s\S]", {c.encode(): i for i, c in enumerate(letters)})
    m.export_model(saved(tmp_path, enc), tmp_path / "out")
    back = m.encoding_from_dict(m.load_checkpoint(tmp_path / "out", "")["encoding"])
    assert m.encoding_hash(back) == m.encoding_hash(enc)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights(tmp_path, dtype):
    """Weights in 16 bits, as most are published, would be read as noise."""
    path = saved(tmp_path)
    m.export_model(path, tmp_path / "out", dtype)
    there, (back, _) = m.load_checkpoint(path, ""), m.load_model(m.load_checkpoint(tmp_path / "out", ""), "cpu")
    for name, t in there["weights"].items():
        assert torch.equal(back.state_dict()[name], t.to(getattr(torch, dtype)).float())


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder, n):
    """Spread model.safetensors over n files with an index."""
    tensors = m.read_safetensors(folder / "model.safetensors")
    index = {name: f"model-{i % n + 1:05d}-of-{n:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        m.write_safetensors(folder / file, {k: t for k, t in tensors.items() if index[k] == file}, torch.float32)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))


def test_new_rows_are_the_mean_of_the_others(tmp_path):
    """Tokens that a public model lacks would start as noise; or the first answer would consist of them."""
    enc = small_encoding()
    m.export_model(saved(tmp_path, enc), tmp_path / "out")
    t = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    t["added_tokens"] = [a for a in t["added_tokens"] if a["content"] == m.ENDOFTEXT]
    t["model"]["vocab"] = {k: i for k, i in t["model"]["vocab"].items() if i <= enc._special_tokens[m.ENDOFTEXT]}
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(t))
    edit(tmp_path / "out" / "config.json", vocab_size=267)    # one spare row, two to be added
    tensors = m.read_safetensors(tmp_path / "out" / "model.safetensors")
    tensors = {k: t[:267].clone() if len(t) == enc.n_vocab else t.clone() for k, t in tensors.items()}
    m.write_safetensors(tmp_path / "out" / "model.safetensors", tensors, torch.float32)
    shard(tmp_path / "out", 3)
    checkpoint = m.load_checkpoint(tmp_path / "out", "")
    back = m.encoding_from_dict(checkpoint["encoding"])
    new = [back._special_tokens[t] for t in (m.IM_START, m.IM_END, m.PAD)]
    assert new == [266, 267, 268] and back.n_vocab == 269 == checkpoint["model_config"]["vocab_size"]
    for ours, theirs in (("embed.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight")):
        assert torch.equal(checkpoint["weights"][ours][:266], tensors[theirs][:266])
        for i in new:
            torch.testing.assert_close(checkpoint["weights"][ours][i], tensors[theirs].mean(0))
    model, _ = m.load_model(checkpoint, "cpu")
    assert not set(new) & set(model(torch.randint(0, 266, (4, 60))).argmax(-1).flatten().tolist())


def test_both_spellings_of_the_rotary_settings(tmp_path):
    """Folders from before or after transformers 5 would be read with the wrong positions."""
    path = saved(tmp_path, **FAMILIES["llama"])
    m.export_model(path, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    both = json.loads(config.read_text())
    for gone in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        config.write_text(json.dumps({k: v for k, v in both.items() if k not in gone}))
        assert m.import_config(config)[0] == GPTConfig(**m.load_checkpoint(path, "")["model_config"])


def test_a_sliding_window_shortens_the_context(tmp_path):
    """Long texts would be read with an attention the model was not trained for."""
    m.export_model(saved(tmp_path, qk_norm=False), tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    for changes, context in ((dict(model_type="mistral", use_sliding_window=True, sliding_window=64), 64),
                             (dict(model_type="qwen2", use_sliding_window=False, sliding_window=64), 128),
                             (dict(model_type="mistral", sliding_window=None), 128)):
        edit(config, **changes)
        assert m.import_config(config)[0].block_size == context


CONFIG_ERRORS = [
    (dict(model_type="gpt2"), "gpt2"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(attention_bias=True), "attention_bias"), (dict(rope_parameters=dict(rope_type="yarn")), "yarn"),
    (dict(quantization_config={"bits": 4}), "quantization_config"), (dict(num_hidden_layers="3"), "num_hidden_layers"),
    (dict(hidden_size=64), "has shape"), (dict(num_attention_heads=3), "n_head"), (dict(vocab_size=10 ** 12), "vocab_size"),
    (dict(rope_parameters=[3]), "TypeError"), (dict(head_dim="8"), "head_dim"), (dict(num_attention_heads=16), "has shape"),
    (dict(num_hidden_layers=2), "model.layers.2"), (dict(num_hidden_layers=4), "model.layers.3"),
    (dict(vocab_size=None), "vocab_size"), (dict(rope_parameters=dict(rope_type="llama3")), "factor"),
    (dict(tie_word_embeddings=True), "tie_word_embeddings")]


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    m.export_model(saved(folder), folder / "out")
    return folder / "out"


@pytest.fixture
def folder(public, tmp_path):
    for file in public.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("changes, names", CONFIG_ERRORS)
def test_what_is_not_supported_is_named(folder, changes, names):
    """A model of another kind would be loaded as if it were of ours, and be quietly wrong."""
    edit(folder / "config.json", **changes)
    assert names in error(m.load_checkpoint, folder, "")


def test_damaged_weights_are_named(folder):
    """Half a download would be loaded, or end in a traceback."""
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8:8 + size])

    def write(header, data=good[8 + size:]):
        text = json.dumps(header).encode()
        weights.write_bytes(struct.pack("<Q", len(text)) + text + data)

    for content, names in (
            (good[:-5], "is the file complete?"), (good[:100], "header"), (good[:5], "header"), (b"", "header"),
            (struct.pack("<Q", 2 ** 60) + good[8:], "header"), (good[:8] + b"x" + good[9:], "damaged header")):
        weights.write_bytes(content)
        message = error(m.load_checkpoint, folder, "")
        assert "model.safetensors" in message and names in message
    name = "model.norm.weight"
    for change, names in ((dict(dtype="I8"), "I8"), (dict(shape=[31]), "shape"), (dict(data_offsets=[0]), "damaged"),
                          (dict(data_offsets=[-8, 120]), "bytes"), (dict(data_offsets=None), "damaged")):
        write({**header, name: {**header[name], **change}})
        assert names in error(m.load_checkpoint, folder, "")
    write({k: v for k, v in header.items() if k != name})
    assert f"{name} is in no weight file" in error(m.load_checkpoint, folder, "")
    write({**header, "model.layers.0.mlp.experts": header[name]})
    assert "experts is a weight that" in error(m.load_checkpoint, folder, "")


def test_missing_and_refused_files_are_named(folder):
    """A missing shard would leave random weights; a pickle could run what its author likes."""
    shard(folder, 2)
    m.load_checkpoint(folder, "")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in error(m.load_checkpoint, folder, "")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in error(m.load_checkpoint, folder, "")
    (folder / "model.safetensors.index.json").unlink()
    assert "model.safetensors is missing" in error(m.load_checkpoint, folder, "")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "pickled" in error(m.load_checkpoint, folder, "")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in error(m.load_checkpoint, folder, "")
    (folder / "tokenizer.model").write_bytes(b"")
    assert "SentencePiece" in error(m.load_checkpoint, folder, "")
    (folder / "config.json").unlink()
    assert "config.json is missing" in error(m.load_checkpoint, folder, "")


def test_tokenizers_that_would_give_other_ids_are_refused(folder):
    """Text would be cut into other tokens than those the model was trained on."""
    path = folder / "tokenizer.json"
    good = json.loads(path.read_text())
    model, split = good["model"], good["pre_tokenizer"]["pretokenizers"]
    for change, names in (
            (dict(model={**model, "type": "WordPiece"}), "WordPiece"), (dict(model={**model, "byte_fallback": True}), "byte_fallback"),
            (dict(normalizer=dict(type="Lowercase")), "Lowercase"), (dict(pre_tokenizer=dict(type="Metaspace")), "Metaspace"),
            (dict(pre_tokenizer={**split[1], "add_prefix_space": True}), "add_prefix_space"),
            (dict(pre_tokenizer=dict(type="Sequence", pretokenizers=[split[0], *split])), "pre_tokenizer"),
            (dict(model={**model, "merges": model["merges"][::-1]}), "merging by id"),
            (dict(model={**model, "merges": model["merges"][:-1]}), "merging by id"),
            (dict(model={**model, "vocab": {**model["vocab"], "\u65e5": 999}}), "damaged"),
            (dict(added_tokens=[dict(content="x", id=10 ** 15)]), "id"), (dict(model=None), "damaged"),
            (dict(pre_tokenizer=dict(type="Sequence", pretokenizers=[
                {**split[0], "pattern": dict(Regex="[a-z]+")}, split[1]])), "loses text")):
        edit(path, **{**good, **change})
        assert "tokenizer.json" in (message := error(m.import_tokenizer, path)) and names in message


def test_export_refuses_what_it_cannot_say(tmp_path):
    """Somebody's files would be overwritten, or a reward model would pass for a language model."""
    path = saved(tmp_path)
    assert "exists already" in error(m.export_model, path, tmp_path)
    assert "qk_norm" in error(m.export_model, saved(tmp_path, qkv_bias=True), tmp_path / "out")
    m.save_checkpoint(path, m.ScalarHead(tiny()), "reward", 1, small_encoding(), GPTConfig(**SIZES))
    assert "reward model" in error(m.export_model, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_card_says_where_a_model_comes_from(tmp_path):
    """A stranger could not tell what a model was trained on, how, and how good it is."""
    enc, model = small_encoding(), tiny(vocab_size=small_encoding().n_vocab)
    facts = dict(sources=[dict(input="town.txt", documents=1234, epochs=2.0, licences={"CC0": 12})], tokens=dict(
        train=5678, val=9), knowledge_cutoff="2024-05", dropped=dict(spam=3))
    m.save_checkpoint(tmp_path / "base.pt", model, "pretrain", 11, enc, Config(rate=0.25), state=dict(data=[facts]))
    history = m.lineage(m.load_checkpoint(tmp_path / "base.pt", ""))
    m.save_checkpoint(tmp_path / "sft.pt", model, "sft", 22, enc, Config(data=["mine.jsonl"]), state=dict(history=history))
    row = dict(name="facts", unit="%", values=dict(sft=dict(value=0.625, low=0.5, high=0.75, n=80)))
    report = dict(checkpoints=dict(sft=dict(path=str(tmp_path / "sft.pt"))), metrics=[row])
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps(report))
    m.export_model(tmp_path / "sft.pt", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head = card.split("---\n")[1]
    assert card.startswith("---\n") and 'license: "cc0"' in head and "library_name: transformers" in head
    for fact in ("town.txt", "1,234 documents", "CC0 (12)", "5,678 tokens", "2024-05", "spam 3", "**pretrain**, 11 steps",
                 '"rate": 0.25', "**sft**, 22 steps", "mine.jsonl", "| facts (%) | 62.5 | 50 to 75 | 80 |", "Weaknesses"):
        assert fact in card, fact
    assert m.lineage(None) == [] and [step["stage"] for step in history] == ["pretrain"]


# against transformers

L3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def trained(kind):
    """A tokenizer of the kind that the named family has, trained by the tokenizers package."""
    tokenizers = pytest.importorskip("tokenizers")
    pre, letters = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel.alphabet()
    t = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "llama"))
    special = dict(llama=["<|begin_of_text|>", "<|end_of_text|>"], mistral=["<s>", "</s>"])
    special = special.get(kind, [m.ENDOFTEXT, m.IM_START, m.IM_END])
    if kind == "mistral":
        t.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    elif kind.startswith("smollm"):    # and not all bytes are in the vocabulary
        letters = [c for c in letters if m.BYTES[c] not in range(0xF1, 0x100)]
        t.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    else:
        split = L3_SPLIT.replace("{1,3}", "") if kind.startswith("qwen") else L3_SPLIT
        t.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(split), "isolated"),
                                        pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.normalizer = tokenizers.normalizers.NFC() if kind.startswith("qwen") else None
    t.decoder = tokenizers.decoders.ByteLevel()
    text = [*TEXTS, (m.Path(m.__file__).parent / "README.md").read_text("utf-8")]
    t.train_from_iterator(text, tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=letters, show_progress=False))
    return t


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "smollm2"])
def test_transformers_tokenizers_give_the_same_ids(tmp_path, kind):
    """A public model would read text in other tokens than it was trained on."""
    theirs = trained(kind)
    theirs.save(str(tmp_path / "tokenizer.json"))
    enc, new = m.import_tokenizer(tmp_path / "tokenizer.json", eos=1)
    added = [t for t in (m.ENDOFTEXT, m.IM_START, m.IM_END, m.PAD) if theirs.token_to_id(t) is None]
    for text in TEXTS:
        assert enc.decode(enc.encode_ordinary(text)) in (text, text.replace("e\u0301", "\u00e9"))
        ids = enc.encode(text, allowed_special=enc.special_tokens_set - set(added), disallowed_special=())
        assert [i for i in ids if i not in new] == theirs.encode(text, add_special_tokens=False).ids, text
    assert (enc._special_tokens[m.ENDOFTEXT] == 1) == (kind in ("llama", "mistral"))


def their_model(family, folder):
    """A random model of the family, saved as transformers saves it, with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(family)
    name = dict(llama="Llama", mistral="Mistral", qwen2="Qwen2", qwen3="Qwen3", smollm2="Llama", smollm3="SmolLM3")[family]
    rope = dict(rope_theta=5e5, **(LLAMA3 if family == "llama" else dict(rope_type="default")))
    config = getattr(transformers, f"{name}Config")(
        vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_parameters=rope, eos_token_id=1, bos_token_id=None,
        pad_token_id=None, tie_word_embeddings=family in ("qwen3", "smollm2"), attn_implementation="eager",
        **(dict(head_dim=16) if family in ("mistral", "qwen3") else {}),
        **(dict(no_rope_layer_interval=2) if family == "smollm3" else {}))
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    theirs.save_pretrained(folder, max_shard_size="60KB" if family == "qwen2" else "1GB")
    tokenizer.save(str(folder / "tokenizer.json"))
    return theirs


def greedy(theirs, prompt):
    return theirs.generate(torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False,
                           eos_token_id=None, pad_token_id=0)[0].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm2", "smollm3"])
def test_transformers_models_come_in_and_go_out(tmp_path, family):
    """A public model would speak differently here than there, or ours there than here."""
    transformers = pytest.importorskip("transformers")
    theirs = their_model(family, tmp_path)
    ours, enc = m.load_model(m.load_checkpoint(tmp_path, ""), "cpu")
    ours.eval()
    with torch.no_grad():    # what becomes of the rows of new tokens
        for rows in {theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight}:
            rows[m.import_tokenizer(tmp_path / "tokenizer.json", eos=1)[1]] = rows.mean(0)
    ids, prompt = torch.randint(0, 256, (2, 100)), [5, 6, 7]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    said = m.generate(ours, [prompt], 64, temperature=0)[0][0].tolist()
    assert said == greedy(theirs, prompt)

    m.save_checkpoint(tmp_path / "ours.pt", ours, "sft", 1, enc, ours.config)
    m.export_model(tmp_path / "ours.pt", tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(back(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)
    assert greedy(back, prompt) == said
    for text in TEXTS:
        special = {t for t in enc.special_tokens_set if tokenizer.convert_tokens_to_ids(t) == enc._special_tokens[t]}
        assert tokenizer.encode(text, add_special_tokens=False) == enc.encode(
            text, allowed_special=special, disallowed_special=()), text
    messages = [dict(role="system", content="be\nbrief"), dict(role="user", content="caf\u00e9 12  x?"),
                dict(role="assistant", content="Yes.\n\n"), dict(role="user", content="the end")]
    theirs_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert theirs_ids == m.render_chat(enc, messages, reply=True)[0]
    assert back.generation_config.eos_token_id == [enc._special_tokens[t] for t in (m.IM_END, m.ENDOFTEXT)]
    assert tokenizer.pad_token_id == enc._special_tokens[m.PAD]


def test_an_exported_model_answers_in_transformers_as_it_does_here(tmp_path):
    """Whoever runs a model elsewhere would get other answers than those that evaluate.py measured."""
    transformers = pytest.importorskip("transformers")
    enc = small_encoding()
    path, end = saved(tmp_path, enc), enc._special_tokens[m.IM_END]
    m.export_model(path, tmp_path / "out")
    cfg = evaluate.Config(max_new_tokens=24)
    lm = evaluate.open_model(path, cfg, CPU)
    prompts = [[dict(role="user", content=text)] for text in TEXTS[:6]]
    said = evaluate.replies(lm, [evaluate.chat_prompt(lm, p, cfg) for p in prompts], range(6), cfg, CPU)
    assert {stopped for _, _, stopped in said} == {False, True}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt, (_, ids, stopped) in zip(prompts, said, strict=True):
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = theirs.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1]:]
        assert tokenizer.decode(answer) == enc.decode(ids + [end] * stopped)


def test_peft_loads_an_exported_adapter(tmp_path):
    """What LoRA learned could leave only with a whole copy of the model, or scaled or placed otherwise."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    enc, ids = small_encoding(), torch.randint(0, 256, (2, 40))
    base = saved(tmp_path, enc, qk_norm=False, qkv_bias=True)
    ours = m.add_lora(m.load_model(m.load_checkpoint(base, ""), "cpu")[0].eval(), 4, 12, ["q_proj", "up_proj"])
    for p in filter(lambda p: p.requires_grad, ours.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    m.save_checkpoint(tmp_path / "lora.pt", ours, "sft", 1, enc, sft.Config(
        init=str(base), lora_rank=4, lora_alpha=12.0, lora_targets=["q_proj", "up_proj"]))
    m.export_model(base, tmp_path / "base")
    m.export_model(tmp_path / "lora.pt", tmp_path / "adapter", adapter=True)
    assert "has no adapter" in error(m.export_model, base, tmp_path / "none", adapter=True)
    assert not (tmp_path / "none").exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    plain = theirs(ids).logits
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, ours(ids), atol=0.1)


def test_transformers_read_the_tokenizers_made_here(tmp_path):
    """Models trained from scratch would meet other tokens once exported."""
    transformers = pytest.importorskip("transformers")
    for name, enc in dict(bpe=small_encoding(), chars=m.make_encoding("chars", r"[\s\S]", {
            c.encode(): i for i, c in enumerate(sorted(set("".join(TEXTS))))})).items():
        (tmp_path / name).mkdir()
        m.export_model(saved(tmp_path / name, enc), tmp_path / name / "out")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name / "out")
        for text in TEXTS:
            ids = enc.encode(text, allowed_special="all")
            assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == text


# settings


def test_a_run_can_be_repeated_from_its_settings(tmp_path):
    """The settings beside a checkpoint would make another run than the one that wrote them."""
    cfg = Config(data=["b c", "d"], out=str(tmp_path / "x.pt"), rate=1e-5, steps=3, fast=False, resume=True)
    m.Log(cfg.out, None, cfg)
    file = str(tmp_path / "x.json")
    assert m.parse_args(Config, ["--config", file]) == dataclasses.replace(cfg, resume=False)
    assert m.parse_args(Config, ["--steps", "4", "--config", file, "--fast"]).steps == 4
    (tmp_path / "m.json").write_text(json.dumps(dict(tokens=5, settings=dict(rate=2, steps=None))))
    assert m.parse_args(Config, ["--config", str(tmp_path / "m.json")]) == Config(rate=2.0)


@pytest.mark.parametrize("text, names", [('{"stepz": 3}', "stepz"), ('{"steps": "x"}', "steps"), ("[1]", "object"),
                                         ("{", "JSON"), (None, "missing")])
def test_wrong_settings_are_named(tmp_path, text, names):
    """A misspelt setting would be ignored, and the run be another than it seems."""
    if text:
        (tmp_path / "x.json").write_text(text)
    assert names in error(m.parse_args, Config, ["--config", str(tmp_path / "x.json")])


def test_help_reads_like_documentation(capsys):
    """--help would be a wall of brackets, or lie about a default."""
    with pytest.raises(SystemExit) as e:
        m.parse_args(Config, ["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and "Tests of what goes in and out" in text and "\noptimization:" in text
    for line in ("files [a]", "per step [0.0]", "how many [derived]", "or slow [yes]", "go on [no]"):
        assert line in text


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    """Curves would lack points; or the missing package would end in a traceback."""
    points = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    cfg = Config(out=str(tmp_path / "x.pt"), tensorboard=True)
    assert "pip install tensorboard" in error(m.Log, cfg.out, None, cfg)
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = lambda folder, purge_step: types.SimpleNamespace(add_scalar=lambda *point: points.append(point))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    m.Log(cfg.out, None, cfg)("", step=3, loss=0.5, note="x", tokens=7)
    assert points == [("loss", 0.5, 3), ("tokens", 7, 3)]


# data by name


@pytest.fixture
def server():
    """A loopback server of one file at /some/rows.jsonl; yields (its address, what was asked)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = b'{"question": "1 + 1?", "answer": "2"}\n'
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/some/rows.jsonl", asked
    server.shutdown()
    server.server_close()


def test_data_sets_have_short_names(tmp_path, monkeypatch, server, capsys):
    """--data gsm8k would look for a file, fetch the data every time, or hide whose they are."""
    address, asked = server
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(prepare.DATASETS, "sums", (address, "", "MIT, 4 MB"))
    for _ in range(2):
        assert m.read_rows(["sums"]) == [dict(question="1 + 1?", answer="2")]
    assert asked == ["/some/rows.jsonl"] and "MIT, 4 MB" in capsys.readouterr().out
    monkeypatch.setitem(prepare.DATASETS, "sums", ("http://127.0.0.1:9/gone/away.jsonl", "", "MIT"))
    message = error(m.read_rows, ["sums"])    # nobody listens there
    assert "http://127.0.0.1:9/gone/away.jsonl" in message and "out/downloads/gone-away.jsonl" in message
    assert "gsm8k" in error(m.read_rows, ["gsm9k"])
    assert all(len(row) == 3 and row[0].startswith("https://") and row[2] for name, row in prepare.DATASETS.items()
               if name != "sums")


def test_prepare_takes_a_public_tokenizer(folder):
    """Continued pretraining could not be given tokens of the model it starts from."""
    hashes = {m.encoding_hash(prepare.named_tokenizer(str(path))) for path in (folder, folder / "tokenizer.json")}
    assert hashes == {m.encoding_hash(m.encoding_from_dict(m.load_checkpoint(folder, "")["encoding"]))}
