"""A replay takes scores as the model has them: soft caps, learnt sinks, sliding windows."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pivottrace_verl.attention.channel import Trace
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.keys import StridedKeys
from pivottrace_verl.attention.reference import ScoreRule, plan_rows, row_statistics
from pivottrace_verl.attention.replay import compare, full_attention_layers, replay
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import FEATURES

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "sliding_window": 8,
    "pad_token_id": 0,
}
MODELS = {
    "soft_cap": Gemma2Config(**SIZES, attn_logit_softcapping=5.0, query_pre_attn_scalar=32),
    "learnt_sinks": GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
}
PROMPT, OUTPUT = list(range(3, 43)), list(range(50, 70))


@contextmanager
def queries_and_keys(model):
    """While open, a forward pass notes each layer's module, queries, keys and arguments."""
    noted = {}

    def attention(module, query, key, value, mask, **kwargs):
        noted[module.layer_idx] = (module, query, key, kwargs)
        return torch.zeros_like(query).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("noted", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("noted", eager_mask)
    model.config._attn_implementation = "noted"
    yield noted


def make_model(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name])).float().eval()
        for module in model.modules():
            if getattr(module, "sinks", None) is not None:
                torch.nn.init.normal_(module.sinks, std=2.0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_replay_and_the_paged_reference_agree_on_every_kind_of_score(name):
    model = make_model(name)
    # The first layer: its queries do not depend on what attention returned.
    model.config.layer_types = ["full_attention"] * 4
    model.get_submodule("model.layers.0.self_attn").sliding_window = None
    config = CaptureConfig(layers=(0,), head_groups=((0,), (1,), (2,), (3,)), window=8, sink=1)
    replayed = replay(model, PROMPT, OUTPUT, config)
    ids = torch.tensor([PROMPT + OUTPUT[:-1]])
    with torch.no_grad(), queries_and_keys(model) as noted:
        model(ids, use_cache=False)
    module, query, key, kwargs = noted[0]
    first, n = len(PROMPT) - 1, len(OUTPUT)
    rule = ScoreRule(
        kwargs["scaling"],
        kwargs.get("softcap") or 0.0,
        getattr(module, "sinks", None),
    )
    view = StridedKeys(key.transpose(1, 2).detach())  # one block of all tokens
    plan = plan_rows(
        torch.zeros(n, 1, dtype=torch.int32),
        torch.arange(first, first + n),
        torch.full((n,), len(PROMPT)),
        view.view.shape[1],
        config,
    )
    with torch.no_grad():
        rows = row_statistics(query[0, :, first:].transpose(0, 1), view, plan, rule)
    found = Trace("", rows[:, None].numpy(), replayed.token_entropy, replayed.self_certainty)
    errors = compare(found, replayed, config)
    assert max(errors.values()) < 1e-4, errors
    # The rule matters: without it the two differ.
    with torch.no_grad():
        rows = row_statistics(
            query[0, :, first:].transpose(0, 1), view, plan, ScoreRule(rule.scale)
        )
    wrong = Trace("", rows[:, None].numpy(), replayed.token_entropy, replayed.self_certainty)
    assert compare(wrong, replayed, config)["entropy"] > 1e-2


def test_a_sliding_layer_is_replayed_if_it_is_named_and_sees_no_key_beyond_its_window():
    model = make_model("soft_cap")
    assert full_attention_layers(model) == [1, 3]
    assert replay(model, PROMPT, OUTPUT, CaptureConfig()).stats.shape[1] == 2
    stats = replay(model, PROMPT, OUTPUT, CaptureConfig(layers=(1, 2))).stats
    beyond = stats[..., FEATURES.index("bucket_4") :].sum(-1)  # 8 tokens away and more
    assert beyond[:, 0].min() > 0.1
    assert beyond[:, 1].max() == 0
    with pytest.raises(PivotTraceError, match="layer 4"):
        replay(model, PROMPT, OUTPUT, CaptureConfig(layers=(4,)))
