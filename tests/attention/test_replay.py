"""A replay takes scores as the model has them: soft caps, learnt sinks, sliding windows."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pivottrace_verl import hidden_states
from pivottrace_verl.attention import model_rows
from pivottrace_verl.attention.channel import Trace
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.keys import StridedKeys
from pivottrace_verl.attention.reference import (
    ScoreRule,
    dense_statistics,
    group_heads,
    plan_rows,
    row_statistics,
)
from pivottrace_verl.attention.replay import (
    Replayer,
    compare,
    full_attention_layers,
    replay,
    replay_all,
)
from pivottrace_verl.attention.selftest import make_tiny_model
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


ROLLOUTS = [(PROMPT, OUTPUT), ([5], [9]), ([*range(90, 97)], [*range(20, 70)]), (PROMPT, [4, 5])]


@pytest.mark.parametrize("name", MODELS)
def test_batches_and_small_steps_change_nothing_but_the_last_bits(name, monkeypatch):
    model, config = make_model(name), CaptureConfig(sink=1, window=8)
    together = replay_all(model, ROLLOUTS, config)
    monkeypatch.setattr(hidden_states, "TOKENS", 60)
    # One or two rows of attention, one word's distribution.
    monkeypatch.setattr(model_rows, "ELEMENTS", 512)
    monkeypatch.setattr("pivottrace_verl.attention.replay.ELEMENTS", 200)
    for rollout, trace in zip(ROLLOUTS, together, strict=True):
        assert len(trace.stats) == len(trace.token_entropy) == len(rollout[1])
        alone = replay(model, *rollout, config)
        errors = compare(trace, alone, config)
        assert max(errors.values()) < 5e-5, errors


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_a_replay_is_the_models_own_eager_attention(architecture, tmp_path):
    """Layers that are not traced go another way than eager; here all of them are eager."""
    make_tiny_model(tmp_path, architecture)
    config = CaptureConfig()
    replayer = Replayer(tmp_path, config)
    with replayer.on_device():
        (trace, nothing) = replayer([(PROMPT, OUTPUT), (PROMPT, [])])
    assert nothing is None
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        out = model(torch.tensor([PROMPT + OUTPUT[:-1]]), output_attentions=True)
    first = len(PROMPT) - 1
    positions = torch.arange(first, first + len(OUTPUT))
    layers = config.choose_layers(full_attention_layers(model))
    for place, layer in enumerate(layers):
        rows = out.attentions[layer][0, :, positions]
        dense = dense_statistics(rows, torch.zeros(rows.shape[:2]), positions, len(PROMPT), config)
        expected = group_heads(dense, config.choose_heads(len(rows)))
        found = torch.from_numpy(trace.stats[:, place]).double()
        lse = FEATURES.index("lse")  # which probabilities do not tell
        found[..., lse], expected[..., lse] = 0, 0
        assert float((found - expected).abs().max()) < 1e-4
    log_p = out.logits[0, first:].double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert float((torch.from_numpy(trace.token_entropy) - entropy).abs().max()) < 1e-4


def test_layers_and_heads_the_model_does_not_have_are_refused_before_anything_is_read(tmp_path):
    make_tiny_model(tmp_path)
    with pytest.raises(PivotTraceError, match="layer 9"):
        Replayer(tmp_path, CaptureConfig(layers=(9,)))
    with pytest.raises(PivotTraceError, match="head 7"):
        Replayer(tmp_path, CaptureConfig(layers=(1,), heads=((7,),)))
    with pytest.raises(PivotTraceError, match="at least one prompt token"):
        replay_all(make_model("soft_cap"), [(PROMPT, OUTPUT), ([], [1])], CaptureConfig())
