"""Losses and gradients against TRL's on the same weights and batch (skipped where TRL is not installed).

Run: pip install trl && python -m pytest tests/test_trl.py -q -s (CPU, no network, prints both numbers).
"""
import os

import pytest
import torch

pytest.importorskip("trl")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers    # noqa: E402  TRL brings these
import trl    # noqa: E402
from datasets import Dataset    # noqa: E402
from tokenizers import Tokenizer, models    # noqa: E402

import dpo    # noqa: E402
import rlhf    # noqa: E402
import sft    # noqa: E402
from common import CPU, END, PAD, tiny    # noqa: E402
from model import ScalarHead, token_logprobs    # noqa: E402
from reward import reward_loss, score    # noqa: E402

NAMES = (("blocks.", "model.layers."), ("attn.q", "self_attn.q"), ("attn.k", "self_attn.k"), ("attn.v", "self_attn.v"),
         ("attn.o", "self_attn.o"), ("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"),
         ("head.", "lm_head."))
PAIRS = [dict(prompt=[5, 6, 7], chosen=[8, 9, 10, END], rejected=[11, END]),
         dict(prompt=[20, 21], chosen=[22, END], rejected=[23, 24, 25, 26, END])]
SETTINGS = dict(report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)


def their_name(name):
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return "model." + name.replace("embed.", "embed_tokens.") if name.startswith(("embed", "norm")) else name


def llama(model, kind="LlamaForCausalLM"):
    """The same weights as a model of transformers."""
    gpt = getattr(model, "gpt", model)
    c = gpt.config
    theirs = getattr(transformers, kind)(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_size, num_labels=1,
        max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps, tie_word_embeddings=False, pad_token_id=PAD,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_base), attn_implementation="eager"))
    weights = {their_name(k): v for k, v in gpt.state_dict().items()}
    if gpt is not model:
        weights["score.weight"] = model.score.weight
    theirs.load_state_dict({k: v.clone() for k, v in weights.items()}, strict=True)
    return theirs.eval()


def tokenizer():
    ids = {f"t{i}": i for i in range(258)} | {"<end>": END, "<pad>": PAD}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="t0")),
                                                eos_token="<end>", pad_token="<pad>", unk_token="t0")


def agree(what, ours, theirs, ours_model, theirs_model):
    """Equal losses, and equal gradients of every weight."""
    ours.backward()
    theirs.backward()
    theirs_grads = {k: p.grad for k, p in theirs_model.named_parameters()}
    worst = 0.0
    for name, p in getattr(ours_model, "gpt", ours_model).named_parameters():
        other = theirs_grads[their_name(name)]
        torch.testing.assert_close(p.grad, other, atol=1e-5, rtol=1e-4)
        worst = max(worst, (p.grad - other).abs().max().item())
    print(f"\n{what}: ours {ours.item():.7f}, TRL {theirs.item():.7f}, largest gradient difference {worst:.1e}")
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5) and worst < 1e-5


def test_sft(tmp_path):
    """Our SFT loss would not be the one everybody means."""
    model = tiny(qk_norm=False)
    rows = [[(p["prompt"] + p["chosen"], [0] * len(p["prompt"]) + [1] * len(p["chosen"]))] for p in PAIRS]
    ids, mask, _ = sft.collate(rows, PAD, "cpu")
    trainer = trl.SFTTrainer(llama(model), args=trl.SFTConfig(str(tmp_path), **SETTINGS),
                             train_dataset=Dataset.from_list([dict(text="t1")]), processing_class=tokenizer())
    theirs = trainer.compute_loss(trainer.model, dict(
        input_ids=ids, attention_mask=(ids != PAD).long(), labels=torch.where(mask > 0, ids, -100)))
    agree("SFT", -(token_logprobs(model(ids), ids) * mask).sum() / mask.sum(), theirs, model, trainer.model)


@pytest.mark.parametrize("eta", [None, 0.01])
def test_reward(tmp_path, eta):
    """Our reward loss, or the token it is read at, would not be the one everybody means."""
    torch.manual_seed(0)
    model = ScalarHead(tiny(qk_norm=False))
    trainer = trl.RewardTrainer(llama(model, "LlamaForSequenceClassification"), processing_class=tokenizer(),
                                args=trl.RewardConfig(str(tmp_path), center_rewards_coefficient=eta, **SETTINGS),
                                train_dataset=Dataset.from_list([dict(prompt="t1", chosen="t2", rejected="t3")]))
    texts = [p["prompt"] + p[k] for k in ("chosen", "rejected") for p in PAIRS]
    batch = trl.trainer.reward_trainer.DataCollatorForPreference(PAD)(
        [dict(chosen_ids=texts[i], rejected_ids=texts[i + 2]) for i in range(2)])
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    ours = reward_loss(*score(model, texts, PAD, CPU).chunk(2), eta=eta or 0.0).mean()
    agree(f"reward, eta {eta}", ours, theirs, model, trainer.model)


def test_dpo(tmp_path):
    """Our DPO would not be the one everybody means: sums, end tokens, reference, sign."""
    policy, ref = tiny(0, qk_norm=False), tiny(1, qk_norm=False)
    trainer = trl.DPOTrainer(llama(policy), llama(ref), args=trl.DPOConfig(str(tmp_path), beta=0.1, **SETTINGS),
                             train_dataset=Dataset.from_list([dict(prompt="t1", chosen="t2", rejected="t3")]),
                             processing_class=tokenizer())
    batch = trl.trainer.dpo_trainer.DataCollatorForPreference(PAD)(
        [dict(prompt_ids=p["prompt"], chosen_ids=p["chosen"], rejected_ids=p["rejected"]) for p in PAIRS])
    theirs = trainer.compute_loss(trainer.model, batch)
    pairs = [dict(chosen=p["prompt"] + p["chosen"], rejected=p["prompt"] + p["rejected"], n_prompt=len(p["prompt"]))
             for p in PAIRS]
    dpo.reference_logprobs(rlhf.Reference(policy, ref), pairs, PAD, dpo.Config(), CPU)
    losses, _ = dpo.losses_and_metrics(dpo.answer_logprobs(policy, pairs, PAD, CPU), pairs, dpo.Config(nll=0.0))
    agree("DPO", losses.mean(), theirs, policy, trainer.model)


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_grpo(tmp_path, reduction):
    """Our GRPO would not be the one everybody means: clipping, KL, which length divides."""
    policy = tiny(qk_norm=False)
    args = trl.GRPOConfig(str(tmp_path), loss_type=reduction, beta=0.0, epsilon=0.2, epsilon_high=0.28,
                          num_generations=2, per_device_train_batch_size=4, max_completion_length=6, **SETTINGS)
    trainer = trl.GRPOTrainer(llama(policy), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
                              train_dataset=Dataset.from_list([dict(prompt="t1")]), processing_class=tokenizer())
    trainer.beta = 0.04    # set late: TRL would look for a reference model on the hub
    trainer.args.use_bias_correction_kl = False    # k3 as in the paper, not times the ratio
    torch.manual_seed(0)
    P, ids, mask = 3, torch.randint(0, 256, (4, 9)), torch.zeros(4, 9)
    for i, length in enumerate((2, 6, 1, 4)):
        mask[i, P:P + length] = 1
        ids[i, P + length:] = PAD
    cfg, advantages = rlhf.Config(clip_high=0.28, kl_coef=0.04), torch.tensor([1.0, -1.0, 0.5, -0.5])
    logprobs, _ = rlhf.answer_logprobs(policy, ids, mask, cfg, CPU)
    old, ref = ((logprobs.detach() + torch.randn(4, 9) * 0.3) * mask for _ in range(2))    # some are clipped
    theirs = trainer._compute_loss(trainer.model.eval(), dict(
        prompt_ids=ids[:, :P], prompt_mask=torch.ones(4, P, dtype=torch.long), completion_ids=ids[:, P:],
        completion_mask=mask[:, P:].long(), advantages=advantages, old_per_token_logps=old[:, P:],
        ref_per_token_logps=ref[:, P:], num_items_in_batch=mask.sum()))
    surrogate = rlhf.policy_loss(logprobs, old, advantages[:, None] * mask, cfg.clip_low, cfg.clip_high)
    weights = rlhf.token_weights(mask, reduction, 4, mask.sum(), 6)
    ours = (weights * (surrogate + cfg.kl_coef * rlhf.k3(logprobs, ref))).sum()
    agree(f"GRPO, {reduction}", ours, theirs, policy, trainer.model)
