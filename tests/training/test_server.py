"""The rollout server: what it refuses, and that no request leaves a trace nobody asks for."""

import asyncio
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import ENV_ENDPOINT, ENV_TOKEN, CaptureConfig
from pivottrace_verl.attention.sender import Sender
from pivottrace_verl.cpu import distribution
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import DetectorConfig

pytest.importorskip("verl")
pytest.importorskip("vllm")

ASKS = {"extra_args": {"pivottrace": {"key": "k"}}}


@pytest.fixture(scope="module")
def server():
    """The module, which verl lets be imported where a distribution is called vllm."""
    before = list(sys.meta_path)
    distribution.install()
    from pivottrace_verl.training import server

    yield server
    ours = distribution._AliasFinder
    sys.meta_path[:] = [f for f in sys.meta_path if f in before or not isinstance(f, ours)]


def make_server(server, receiver=None, **attributes):
    """A server without an engine."""
    made = object.__new__(server.PivotVLLMServer)
    made._pt_receiver, made._pt_timeout, made._pt_detector = receiver, 5.0, DetectorConfig()
    vars(made).update(attributes)
    return made


def test_a_replica_on_several_machines_is_refused_with_a_sentence(server):
    settings = {"capture": {"enable": True, "timeout_s": 5.0}, "detector": {}}
    config = SimpleNamespace(custom={"pivottrace": settings})
    with pytest.raises(PivotTraceError, match="spans 2 machines"):
        asyncio.run(make_server(server, config=config, nnodes=2).launch_server())
    assert ENV_ENDPOINT not in os.environ


def test_an_engine_that_died_is_told_at_once_with_what_it_means(server):
    def watched(errored):
        engine = SimpleNamespace(errored=errored)
        made = make_server(server, node_rank=0, replica_rank=3, engine=engine)
        asyncio.run(made.pivottrace_watch(1.0))

    watched(False)
    with pytest.raises(PivotTraceError, match=r"rollout replica 3 died\. Rollouts were lost"):
        watched(True)


class Engine:
    """Stands in for verl's own server: what its `generate` ends with."""

    def __init__(self, ending):
        self.ending = ending

    async def generate(self, *args, **kwargs):
        from verl.workers.rollout.replica import TokenOutput

        if isinstance(self.ending, list):
            return TokenOutput(token_ids=self.ending)
        raise self.ending


@pytest.mark.parametrize(
    "ending", [[], RuntimeError("the engine is dead"), asyncio.CancelledError()]
)
def test_a_request_that_ends_without_tokens_leaves_nothing_in_the_channel(
    server, monkeypatch, ending
):
    monkeypatch.setattr(server.vLLMHttpServer, "generate", Engine(ending).generate)
    with Receiver(CaptureConfig()) as receiver:
        sender = Sender(os.environ[ENV_ENDPOINT], os.environ[ENV_TOKEN])
        sender.hello({})
        made = make_server(server, receiver)
        if isinstance(ending, list):
            output = asyncio.run(made.generate([1], ASKS, "r"))
            assert "pivottrace" not in output.extra_fields
        else:
            with pytest.raises(type(ending)):
                asyncio.run(made.generate([1], ASKS, "r"))
        # The worker had a token computed when the request ended.
        rows = np.zeros((1, 2, 1, 25)), np.zeros((1, 2))
        sender.trace("k", *rows, 0)
        sender.trace("next", *rows, 0)
        assert receiver.get("next", n_tokens=1) is not None
        assert not receiver._held and not receiver._waiting
        assert receiver.counters["missing"] == receiver.counters["late"] == 0
        sender.close()


def test_what_was_lost_of_an_engines_traces_is_told(server):
    with Receiver(CaptureConfig()) as receiver:
        made = make_server(server, receiver)
        assert receiver.get("never", timeout=0.01) is None
        assert asyncio.run(made.pivottrace_trace_counts()) == {**receiver.counters, "missing": 1}
    assert asyncio.run(make_server(server).pivottrace_trace_counts()) == {}
