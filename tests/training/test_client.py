"""What a rollout's engine requests left of its trace comes together to what one would have left."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pivottrace_verl.pivots import DetectorConfig, pivots_of

client = pytest.importorskip("pivottrace_verl.training.client", reason="verl is not installed")

from verl.workers.rollout.replica import TokenOutput  # noqa: E402

T = 60
DETECTOR = DetectorConfig(tau=0.3, refractory=5)
SIGNAL = np.random.default_rng(0).random(T)


class Engine:
    """A rollout server that gives the next tokens of one long sequence, `sizes` of them a request,
    the trace's signal with them, and says that all requests but some were aborted."""

    def __init__(self, sizes: list[int], ends: tuple[int, ...], lost: int | None = None) -> None:
        self.sizes, self.ends, self.lost = sizes, ends, lost
        self.asked: list[tuple[list[int], dict[str, Any]]] = []
        self.given = 0
        self.generate = SimpleNamespace(remote=self._generate)

    async def _generate(self, *, prompt_ids, sampling_params, **_: Any) -> TokenOutput:
        number = len(self.asked)
        self.asked.append((list(prompt_ids), dict(sampling_params)))
        size, first = self.sizes[number], self.given
        self.given += size
        signal = SIGNAL[first : self.given]
        part = None if number == self.lost else {"signal": signal, "entropy_sum": float(size)}
        return TokenOutput(
            token_ids=list(range(first, self.given)),
            log_probs=[-0.5] * size,
            stop_reason="completed" if number in self.ends else "aborted",
            extra_fields={"pivottrace": part},
        )


def make(kind: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = kind(config=SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=None)))

    async def acquire(request_id: str, **_: Any) -> tuple[str, Engine]:
        return "a", engine

    monkeypatch.setattr(made, "_acquire_server", acquire)
    monkeypatch.setattr(made, "_release_server", lambda *_, **__: None)
    made.config.actor_rollout_ref.rollout = SimpleNamespace(name="vllm")
    # verl waits a second before it goes on with an aborted request.
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda _: sleep(0))
    return made


async def ask(made: Any, rollout: Any, prompts: list[list[int]]) -> list[TokenOutput]:
    with client.tracing(rollout):
        return [
            await made.generate(
                "id", prompt_ids=p, sampling_params={"temperature": 1.0, "extra_args": {"own": 1}}
            )
            for p in prompts
        ]


def summary(rollout: Any) -> dict[str, Any]:
    """The rollout's, with the pivots that its signals have."""
    signals = rollout.signals()
    counts = [len(pivots_of(row, DETECTOR)) for row in signals or ()]
    return dict(rollout.summary(None if signals is None else sum(counts)))


def whole() -> dict[str, Any]:
    pivots = len(pivots_of(SIGNAL, DETECTOR))
    assert pivots > 3
    return {"traced": True, "pivots": pivots, "pivot_density": pivots / T, "entropy": 1.0}


@pytest.mark.parametrize("sizes", [[T], [10, 50], [1, 0, 29, 30], [0, 60], [20, 20, 20]])
def test_an_aborted_and_resumed_rollout_has_the_pivots_of_one_request(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(sizes, ends=(len(sizes) - 1,))
    rollout = client.Rollout("k", capture=True, seed=2**31 - 1)
    made = make(client.PivotAsyncClient, engine, monkeypatch)
    (output,) = asyncio.run(ask(made, rollout, [[7, 8, 9]]))
    assert output.token_ids == list(range(T)) and "pivottrace" not in output.extra_fields
    assert summary(rollout) == pytest.approx(whole())
    assert not rollout.aborted
    asked = [params["extra_args"]["pivottrace"] for _, params in engine.asked]
    # A key is used once; the first prompt's length says where the response begins.
    assert [a["key"] for a in asked] == [f"k-{i}" for i in range(len(sizes))]
    assert {a["prompt_tokens"] for a in asked} == {3}
    assert all(params["extra_args"]["own"] == 1 for _, params in engine.asked)
    assert [len(prompt) for prompt, _ in engine.asked] == [
        3 + sum(sizes[:i]) for i in range(len(sizes))
    ]
    # Nor is a seed used twice: the same random numbers would choose other tokens.
    assert [params["seed"] for _, params in engine.asked] == [
        (2**31 - 1 + i) % 2**31 for i in range(len(sizes))
    ]


@pytest.mark.parametrize("kind", ["PivotClient", "PivotAsyncClient"])
def test_turns_are_traced_apart_and_counted_together(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine([25, 35], ends=(0, 1))
    rollout = client.Rollout("k", capture=True)
    made = make(getattr(client, kind), engine, monkeypatch)
    asyncio.run(ask(made, rollout, [[1, 2], [1, 2, *range(25), 5, 5]]))
    found = summary(rollout)
    apart = [len(pivots_of(row, DETECTOR)) for row in (SIGNAL[:25], SIGNAL[25:])]
    assert found["pivots"] == sum(apart) and found["pivot_density"] == sum(apart) / T
    asked = [params["extra_args"]["pivottrace"] for _, params in engine.asked]
    assert asked == [
        {"key": "k-0", "prompt_tokens": 2},
        {"key": "k-1", "prompt_tokens": 29},
    ]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rollout_with_a_part_missing_has_no_trace(
    lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine([30, 30], ends=(1,), lost=lost)
    rollout = client.Rollout("k", capture=True)
    asyncio.run(ask(make(client.PivotAsyncClient, engine, monkeypatch), rollout, [[1]]))
    assert summary(rollout) == {"traced": False}


def test_a_rollout_that_the_engine_gave_up_is_known_to_be_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollout = client.Rollout("k", capture=True)
    asyncio.run(ask(make(client.PivotClient, Engine([12], ends=()), monkeypatch), rollout, [[1]]))
    assert rollout.aborted


def test_requests_outside_of_a_rollout_pass_through_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind in (client.PivotClient, client.PivotAsyncClient):
        engine = Engine([5], ends=(0,))
        made = make(kind, engine, monkeypatch)
        asyncio.run(made.generate("id", prompt_ids=[1], sampling_params={"top_p": 1.0}))
        (asked,) = (params for _, params in engine.asked)
        assert "seed" not in asked and "extra_args" not in asked


def test_rollouts_that_run_at_once_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[Any]:
        rollouts = [client.Rollout(str(i), capture=True) for i in range(8)]
        clients = [
            make(client.PivotAsyncClient, Engine([i + 1, T - i - 1], ends=(1,)), monkeypatch)
            for i in range(8)
        ]
        await asyncio.gather(
            *(ask(made, r, [[1]]) for made, r in zip(clients, rollouts, strict=True))
        )
        return rollouts

    rollouts = asyncio.run(run())
    assert [r.requests for r in rollouts] == [2] * 8
    assert all(summary(r) == pytest.approx(whole()) for r in rollouts)
