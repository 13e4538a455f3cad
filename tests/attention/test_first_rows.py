"""A capture that reads something else than its layers attend to stops the engine at once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pivottrace_verl.attention.config import EXTRA_ARGS_NAME, CaptureConfig
from pivottrace_verl.attention.cpu_capture import Capture
from pivottrace_verl.attention.parts import Place, divide
from pivottrace_verl.attention.support import TracedLayer
from pivottrace_verl.attention.task import Task

pytestmark = pytest.mark.vllm

KV_HEADS, BLOCK, SIZE, HEADS, VOCABULARY = 2, 32, 32, 4, 50
ALONE = Place()
GROUPS = ((0, 1, 2, 3),)


def write(module, keys, values, cache, slots):
    """Keys as the CPU backend lays them out: one column a token."""
    for key, slot in zip(keys, slots.tolist(), strict=True):
        columns = cache[slot // BLOCK].view(KV_HEADS, -1)[:, : SIZE * BLOCK]
        columns.view(KV_HEADS, SIZE, BLOCK)[:, :, slot % BLOCK] = key


def make_layer(index):
    module = SimpleNamespace(
        kv_cache=torch.zeros(9, KV_HEADS, BLOCK, 2 * SIZE),
        attn_backend=SimpleNamespace(get_name=lambda: "CPU_ATTN"),
    )
    module.impl = SimpleNamespace(
        num_heads=HEADS, isa="vec", scale=0.2, logits_soft_cap=0.0, sinks=None, sliding_window=-1,
        alibi_slopes=None, do_kv_cache_update=write,
        forward=lambda layer, query, key, value, cache, metadata: write(
            module, key, value, cache, metadata.slot_mapping
        ),
    )  # fmt: skip
    return TracedLayer(index, f"model.layers.{index}", module, 0, HEADS)


class Engine:
    """One request in a runner that has just what the capture reads of it."""

    def __init__(self, place=ALONE):
        self.sent = []
        logits = torch.randn(1, VOCABULARY)
        self.runner = SimpleNamespace(
            requests={},
            input_batch=SimpleNamespace(req_ids=["0"]),
            model=SimpleNamespace(compute_logits=lambda hidden: logits),
            execute_model=lambda scheduled: None,
        )
        self.layers = [make_layer(3), make_layer(5)]
        spec = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK))
        self.capture = Capture(
            Task(
                self.runner,
                SimpleNamespace(num_blocks=9, kv_cache_groups=[spec]),
                CaptureConfig(layers=(3, 5)),
                self.layers,
                [GROUPS, GROUPS],
                place,
                divide([0, 0], [GROUPS, GROUPS], HEADS, place)[place.tensor_rank],
            ),
            SimpleNamespace(trace=lambda *trace: self.sent.append(trace)),
        )
        self.capture.wrap()

    def prefill(self, length, blocks=(4, 2, 7), read_blocks=None, **asked):
        """A step that computes the whole prompt; keys lie in `blocks`, the table says
        `read_blocks`."""
        new = SimpleNamespace(
            req_id="0",
            prompt_token_ids=[1] * length,
            sampling_params=SimpleNamespace(extra_args={EXTRA_ARGS_NAME: {"key": "a", **asked}}),
        )
        self.runner.execute_model(
            SimpleNamespace(
                finished_req_ids=set(), preempted_req_ids=set(), scheduled_new_reqs=[new],
                total_num_scheduled_tokens=length, scheduled_spec_decode_tokens={},
            )
        )  # fmt: skip
        self.runner.requests["0"] = SimpleNamespace(block_ids=(list(blocks),), output_token_ids=[7])
        positions = torch.arange(length)
        metadata = SimpleNamespace(
            num_actual_tokens=length,
            max_query_len=length,
            query_start_loc=torch.tensor([0, length], dtype=torch.int32),
            seq_lens=torch.tensor([length], dtype=torch.int32),
            block_table=torch.tensor([read_blocks or blocks], dtype=torch.int32),
            slot_mapping=torch.tensor(blocks)[positions // BLOCK] * BLOCK + positions % BLOCK,
        )
        for layer in self.layers:
            query, key = torch.randn(length, HEADS, SIZE), torch.randn(length, KV_HEADS, SIZE)
            layer.module.impl.forward(
                layer.module, query, key, key, layer.module.kv_cache, metadata
            )
        self.runner.model.compute_logits(None)
        self.capture.tracker.flush(self.runner.requests)


def test_a_prompt_that_is_read_where_it_was_written_is_sent():
    engine = Engine()
    engine.prefill(70)
    ((key, stats, tokens, missing),) = engine.sent
    assert (key, stats.shape[:2], tokens.shape, missing) == ("a", (1, 2), (1, 2), 0)
    assert np.isfinite(stats).all()


def test_a_prompt_that_goes_on_with_a_rollout_passes_the_check():
    engine = Engine()
    engine.prefill(70, prompt_tokens=20)
    assert len(engine.sent) == 1


@pytest.mark.parametrize("compiled", [True, False])
def test_a_rank_without_heads_of_a_group_checks_the_others(compiled, monkeypatch):
    monkeypatch.setitem(globals(), "GROUPS", ((0, 1, 2, 3), (4, 5)))
    engine = Engine(Place(tensor_size=2))
    if not compiled:
        engine.capture._compiled = None
    engine.prefill(70)
    assert len(engine.sent) == 1
    with pytest.raises(RuntimeError, match="is not what"):
        engine.prefill(70, read_blocks=(2, 4, 7))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_prompt_that_is_read_elsewhere_stops_the_engine(compiled):
    engine = Engine()
    if not compiled:
        engine.capture._compiled = None
    with pytest.raises(RuntimeError, match=r"in layer 3 for a first prompt is not what"):
        engine.prefill(70, read_blocks=(2, 4, 7))
    assert not engine.sent


def test_a_first_request_without_all_its_rows_stops_the_engine():
    engine = Engine()
    engine.capture.store.own = lambda slots, owners: None
    with pytest.raises(RuntimeError, match="0 rows for the 1 tokens"):
        engine.prefill(70)


def test_later_requests_are_not_checked():
    engine = Engine()
    for _ in range(4):
        engine.prefill(70)
    engine.prefill(70, read_blocks=(2, 4, 7))
    assert len(engine.sent) == 5
