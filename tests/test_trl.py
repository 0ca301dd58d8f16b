"""The losses and gradients are TRL's. Run: python -m pytest tests/test_trl.py -q."""
import os

import pytest
import torch

pytest.importorskip("trl")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers    # TRL brings these
import trl
from common import CPU, END, PAD, tiny
from datasets import Dataset
from tokenizers import Tokenizer, models

import dpo
import rlhf
from model import ScalarHead, public_name, score_texts
from reward import reward_loss

PAIRS = [dict(prompt=[5, 6, 7], chosen=[8, 9, 10, END], rejected=[11, END]),
         dict(prompt=[20, 21], chosen=[22, END], rejected=[23, 24, 25, 26, END])]
ROWS = dict(pairs=dict(prompt="t1", chosen="t2", rejected="t3"), prompts=dict(prompt="t1"))


def llama(model, kind="LlamaForCausalLM"):
    """The same weights as a model of transformers."""
    gpt = getattr(model, "gpt", model)
    c = gpt.config
    theirs = getattr(transformers, kind)(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_labels=1,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, head_dim=c.head_size,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size, pad_token_id=PAD,
        rms_norm_eps=c.norm_eps, attn_implementation="eager", tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_base)))
    weights = {public_name(name): w.clone() for name, w in gpt.state_dict().items()}
    if gpt is not model:
        weights["score.weight"] = model.score.weight.detach().clone()
    theirs.load_state_dict(weights, strict=True)
    return theirs.eval()


def trainer(name, model, rows, folder, ref=(), **settings):
    """TRL's trainer of this name, of which only the loss is used."""
    ids = {f"t{i}": i for i in range(258)} | {"<end>": END, "<pad>": PAD}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="t0")), eos_token="<end>",
        pad_token="<pad>", unk_token="t0")
    config = getattr(trl, f"{name}Config")(str(folder), report_to="none", use_cpu=True, bf16=False,
                                           gradient_checkpointing=False, **settings)
    extra = dict(reward_funcs=lambda completions, **_: [0.0] * len(completions))
    return getattr(trl, f"{name}Trainer")(
        model, *ref, args=config, train_dataset=Dataset.from_list([ROWS[rows]]),
        processing_class=tokenizer, **(extra if name == "GRPO" else {}))


def agree(ours, theirs, our_model, their_model):
    """Equal losses, and equal gradients of every weight."""
    ours.backward()
    theirs.backward()
    grads = {name: p.grad for name, p in their_model.named_parameters()}
    for name, p in getattr(our_model, "gpt", our_model).named_parameters():
        torch.testing.assert_close(p.grad, grads[public_name(name)], atol=1e-5, rtol=1e-4)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_reward(tmp_path):
    """The loss of a pair, the token that scores are read at, and centring."""
    torch.manual_seed(0)
    model = ScalarHead(tiny(qk_norm=False))
    there = trainer("Reward", llama(model, "LlamaForSequenceClassification"), "pairs", tmp_path,
                    center_rewards_coefficient=0.01)
    texts = [p["prompt"] + p[k] for k in ("chosen", "rejected") for p in PAIRS]
    batch = trl.trainer.reward_trainer.DataCollatorForPreference(PAD)(
        [dict(chosen_ids=texts[i], rejected_ids=texts[i + 2]) for i in range(2)])
    theirs = there.compute_loss(there.model, dict(batch))
    ours = reward_loss(*score_texts(model, texts, PAD, CPU).chunk(2), eta=0.01).mean()
    agree(ours, theirs, model, there.model)


def test_dpo(tmp_path):
    """Sums over the answer and its end, the reference, the sign."""
    policy, ref = tiny(0, qk_norm=False), tiny(1, qk_norm=False)
    there = trainer("DPO", llama(policy), "pairs", tmp_path, [llama(ref)], beta=0.1)
    batch = trl.trainer.dpo_trainer.DataCollatorForPreference(PAD)(
        [{f"{k}_ids": p[k] for k in ("prompt", "chosen", "rejected")} for p in PAIRS])
    theirs = there.compute_loss(there.model, batch)
    pairs = [dict(chosen=p["prompt"] + p["chosen"], rejected=p["prompt"] + p["rejected"],
                  n_prompt=len(p["prompt"])) for p in PAIRS]
    logprobs = dpo.answer_logprobs(policy, pairs, PAD, CPU)
    ref_logprobs = dpo.reference_logprobs(ref, pairs, PAD, CPU)
    losses, _ = dpo.losses_and_metrics(logprobs, ref_logprobs, pairs, dpo.Config(nll=0))
    agree(losses.mean(), theirs, policy, there.model)


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_grpo(tmp_path, reduction):
    """Clipping, the KL penalty, and which length divides."""
    policy = tiny(qk_norm=False)
    there = trainer("GRPO", llama(policy), "prompts", tmp_path, loss_type=reduction, beta=0.0,
                    epsilon=0.2, epsilon_high=0.28, num_generations=2, max_completion_length=6,
                    per_device_train_batch_size=4)
    there.beta = 0.04    # set late: TRL would look for a reference model on the hub
    there.args.use_bias_correction_kl = False    # k3 as in the paper, not times the ratio
    torch.manual_seed(0)
    P, ids, mask = 3, torch.randint(0, 256, (4, 9)), torch.zeros(4, 9)
    for i, length in enumerate((2, 6, 1, 4)):
        mask[i, P:P + length] = 1
        ids[i, P + length:] = PAD
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    logprobs, _ = rlhf.answer_logprobs(policy, dict(ids=ids, mask=mask), 1.0, CPU)
    # far enough from the old policy that some tokens are clipped
    old, ref = ((logprobs.detach() + torch.randn(4, 9) * 0.3) * mask for _ in range(2))
    theirs = there._compute_loss(there.model.eval(), dict(
        prompt_ids=ids[:, :P], prompt_mask=torch.ones(4, P, dtype=torch.long),
        completion_ids=ids[:, P:], completion_mask=mask[:, P:].long(), advantages=advantages,
        old_per_token_logps=old[:, P:], ref_per_token_logps=ref[:, P:],
        num_items_in_batch=mask.sum()))
    surrogate = rlhf.policy_loss(logprobs, old, advantages[:, None] * mask, 0.2, 0.28)
    weights = rlhf.token_weights(mask, reduction, 4, mask.sum(), 6)
    ours = (weights * (surrogate + 0.04 * rlhf.k3(logprobs, ref))).sum()
    agree(ours, theirs, policy, there.model)
