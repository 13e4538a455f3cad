"""Weights reach the rollouts' process through a file, and leave nothing behind."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
weights = pytest.importorskip("pivottrace_verl.cpu.weights", reason="verl is not installed")

from verl.checkpoint_engine.base import CheckpointEngineRegistry  # noqa: E402


def engines() -> tuple[Any, Any, str]:
    """The trainer's and a rollout's, joined as verl joins them."""
    sender = CheckpointEngineRegistry.new("file", bucket_size=1, is_master=True)
    receiver = CheckpointEngineRegistry.new("file", bucket_size=1)
    topology = type(sender).build_topology(1, 1, [sender.prepare(), receiver.prepare()])
    for engine, kwargs in zip((sender, receiver), topology, strict=True):
        engine.init_process_group(**{name: values[0] for name, values in kwargs.items()})
    return sender, receiver, topology[0]["path"][0]


async def received(engine: Any) -> dict[str, Any]:
    return {name: tensor async for name, tensor in engine.receive_weights()}


def test_what_is_sent_is_received_whoever_comes_first() -> None:
    sent = {"a": torch.randn(3, 4), "b": torch.arange(6).reshape(2, 3).T.float()}

    async def update(delay: float) -> dict[str, Any]:
        sender, receiver, path = engines()

        async def send() -> None:
            await asyncio.sleep(delay)
            await sender.send_weights(iter(sent.items()))

        found, _ = await asyncio.gather(received(receiver), send())
        for engine in (receiver, sender):
            engine.finalize()
        assert not Path(path).parent.exists()
        return found

    for delay in (0.0, 0.2):
        found = asyncio.run(update(delay))
        assert found.keys() == sent.keys()
        assert all(torch.equal(found[name], sent[name]) for name in sent)


def test_a_rollout_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WAIT_S", 0.1)
    sender, receiver, _ = engines()
    with pytest.raises(weights.PivotTraceError, match="wrote no weights"):
        asyncio.run(received(receiver))
    sender.finalize()
