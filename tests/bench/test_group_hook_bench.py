"""The bench of the group hook measures what it says."""

import numpy as np
import pytest

group_hook = pytest.importorskip("tests.bench.group_hook", reason="verl is not installed")


def test_every_rollout_is_judged_and_its_trace_read_again_in_every_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_hook, "PROMPTS", 3)
    made = group_hook.batch(50, np.random.default_rng(0))
    assert len(made) == 3 * group_hook.ROLLOUTS
    workers = []
    hook = group_hook.HookWorker
    monkeypatch.setattr(
        group_hook, "HookWorker", lambda *a, **k: workers.append(hook(*a, **k)) or workers[-1]
    )
    for _ in range(2):
        assert group_hook.seconds(made, hook=True, logprobs=True) > 0.0
    assert group_hook.seconds(made, hook=False, logprobs=False) > 0.0
    for worker in workers:
        rewards = np.array(list(worker.became.values()))
        assert rewards.shape == (3, group_hook.ROLLOUTS) and 0.0 < rewards.mean() < 1.0
    # Nothing of a run is left in the batch.
    assert all("pivottrace" in answer.extra_fields for _, answer in made.values())
    assert all(output.reward_score is None for output, _ in made.values())
