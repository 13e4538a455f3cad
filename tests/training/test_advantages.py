"""The scaling of advantages by route, on verl's own advantages of small batches: estimators that
compare a group and one that compares the batch, tokens that are not the policy's, rollouts in two
trajectories, and the rows that verl adds to fill a mini-batch."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from pivottrace_verl.curriculum import Items

torch = pytest.importorskip("torch")
trainer = pytest.importorskip("pivottrace_verl.training.trainer", reason="verl is not installed")

from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size  # noqa: E402
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer  # noqa: E402
from verl.trainer.ppo.v1.trainer_base import PPOTrainer  # noqa: E402
from verl.utils.tensordict_utils import list_of_dict_to_tensordict  # noqa: E402

from pivottrace_verl.training.steering import Steering, SteeringConfig  # noqa: E402
from tests.memory_store import MemoryStore  # noqa: E402
from tests.step_records import record  # noqa: E402

ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus")
MULTIPLE = 16
"""Rows of a mini-batch."""
GROUPS: dict[str, tuple[bool, tuple[float, ...], float]] = {
    "a0": (True, (1.0, 0.0, 0.0, 0.0), 1.0),
    "a1": (True, (1.0, 1.0, 0.0), 1.0),
    "s0": (False, (1.0, 0.0), 1.0),
    "s1": (False, (0.0, 1.0, 1.0, 1.0), 1.0),
    # Dropped: whatever its rewards are worth beside the others, it teaches nothing.
    "s2": (False, (0.0, 0.0), 0.0),
}
"""Prompt -> whether it has a label, its rewards, the weight of its verdict."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    made = MemoryStore()
    made.install(monkeypatch)
    return made


def a_trainer(estimator: str = "grpo", **weights: float) -> Any:
    """One that never started: what an advantage needs, and no more."""
    ids = [f"{route}{i}" for route in "as" for i in range(4)]
    items = Items.of(range(8), ids, ["annotate"] * 4 + ["self_train"] * 4, [0.5] * 8)
    block: dict[str, Any] = {
        "run": None,
        "curriculum": {},
        "vote": {},
        "weights": weights,
        "guard": {},
        "retriage": {},
        "rollouts": {},
    }
    made = object.__new__(trainer.PivotTrainerSync)
    made.config = OmegaConf.create(
        {
            "algorithm": {
                "adv_estimator": estimator,
                "gamma": 1.0,
                "lam": 1.0,
                "use_kl_in_reward": False,
                "norm_adv_by_std_in_grpo": True,
            },
            "data": {"train_batch_size": 4},
            "actor_rollout_ref": {"rollout": {"n": 4}},
            "pivottrace": {
                "poll_interval_s": 0.25,
                "stall_timeout_s": None,
                "capture": {"enable": False},
            },
        }
    )
    made.steering = Steering(items, ids[:4], SteeringConfig.of(block, 4, 4), lambda rows: [])
    made.global_steps = 1
    made._scaled, made._records, made._set_aside = [], [], []
    return made


def trajectory(pt_id: str, session: int, reward: float, last: bool = True) -> dict[str, Any]:
    """A row as the agent loop publishes it; a tool spoke in the middle of those that are long."""
    labeled, _, weight = GROUPS[pt_id]
    mask = torch.ones(3 + session, dtype=torch.int64)
    mask[2:-1] = 0
    score = torch.zeros(len(mask))
    score[-1] = reward if last else 0.0
    whole = record(pt_id, labeled, reward=reward, weight=weight, failed=2)
    return {
        "uid": pt_id,
        "prompts": torch.ones(2, dtype=torch.int64),
        "responses": torch.ones(len(mask), dtype=torch.int64),
        "response_mask": mask,
        "rm_scores": score,
        "rollout_log_probs": torch.zeros(len(mask)),
        "extra_fields": {
            "pivottrace": whole if last else {k: whole[k] for k in ("route", "weight")}
        },
    }


def a_batch(store: MemoryStore, turns: bool = False) -> Any:
    """All groups, padded by verl; with `turns` each first session left two trajectories."""
    rows = {}
    for pt_id, (_, rewards, _) in GROUPS.items():
        for session, reward in enumerate(rewards):
            if turns and session == 0:
                rows[f"{pt_id}_0_0"] = trajectory(pt_id, 2, reward, last=False)
                rows[f"{pt_id}_0_1"] = trajectory(pt_id, 0, reward)
            else:
                rows[f"{pt_id}_{session}_0"] = trajectory(pt_id, session, reward)
    tags = [{"seq_len": 2 + len(row["responses"])} for row in rows.values()]
    fields = list_of_dict_to_tensordict(list(rows.values()))
    batch = store.kv_batch_put(list(rows), "train", fields, tags)
    batch = upsample_batch_to_divisible_size(batch, MULTIPLE, eos_token_id=0)
    assert len(batch) % MULTIPLE == 0 and batch.tags[-1]["is_padding"]
    # Ranks share the rows: padding comes first and in between, too.
    batch.reorder([i for start in range(3) for i in reversed(range(start, len(batch), 3))])
    return batch


def advantages(store: MemoryStore, batch: Any) -> dict[str, Any]:
    """Key -> what the actor will read."""
    column = store.kv_batch_get(batch.keys, batch.partition_id, ["advantages"])["advantages"]
    return dict(zip(batch.keys, column.unbind(), strict=True))


def scaled(store: MemoryStore, made: Any, batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What verl computes, and what our trainer makes of it."""
    PPOTrainer._compute_advantage(made, batch, {})
    theirs = advantages(store, batch)
    after = made._compute_advantage(batch, {})
    assert after.keys == batch.keys and after.tags == batch.tags
    return theirs, advantages(store, after)


def by_hand(key: str, weights: dict[str, float]) -> float:
    """The factor of a trajectory."""
    pt_id = key.split("_", maxsplit=1)[0]
    if pt_id not in GROUPS:
        return 1.0
    labeled, _, weight = GROUPS[pt_id]
    return weight * weights["annotate" if labeled else "self_train"]


WEIGHTS = [
    {"annotate": 1.0, "self_train": 0.5},
    {"annotate": 0.5, "self_train": 1.0},
    {"annotate": 1.0, "self_train": 0.0},
    {"annotate": 0.25, "self_train": 0.5},
]


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_token_gets_verls_advantage_times_the_weight_of_its_route_once(
    store: MemoryStore, estimator: str, weights: dict[str, float], turns: bool
) -> None:
    made = a_trainer(estimator, **weights)
    theirs, ours = scaled(store, made, a_batch(store, turns))
    changed = 0
    for key, row in theirs.items():
        torch.testing.assert_close(ours[key], row * by_hand(key, weights), rtol=1e-6, atol=0.0)
        mask = store.fields["train"][key]["response_mask"]
        assert not ours[key][mask == 0].any()
        changed += bool((ours[key] != row).any())
    # The estimators have something to scale, so that a factor of 1 or its square would show.
    assert changed >= 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_is_worth_nothing_whatever_the_weights(store: MemoryStore, estimator: str) -> None:
    made = a_trainer(estimator, annotate=0.5, self_train=0.5)
    _, ours = scaled(store, made, a_batch(store))
    padding = [row for key, row in ours.items() if key.startswith("pad")]
    assert padding and not any(row.any() for row in padding)


def test_grpos_advantages_of_a_group_are_those_of_its_paper_times_the_weight(
    store: MemoryStore,
) -> None:
    made = a_trainer("grpo", self_train=0.5)
    _, ours = scaled(store, made, a_batch(store))
    # Of rewards 1 and 0 the mean is 1/2 and the standard deviation sqrt(1/2).
    expected = 0.5 * 0.5 / (0.5**0.5 + 1e-6)
    assert ours["s0_0_0"][0].item() == pytest.approx(expected)
    assert ours["s0_1_0"][0].item() == pytest.approx(-expected)
    assert ours["a0_0_0"][0].item() == pytest.approx(0.75 / (0.5 + 1e-6))


def test_with_every_weight_1_what_verl_stored_is_left_alone(store: MemoryStore) -> None:
    batch = a_batch(store)
    held = {key: row for key, row in GROUPS.items() if key == "s2"}
    batch = batch.select_keys([key for key in batch.keys if key.split("_")[0] not in held])
    before = len(store.puts)
    a_trainer("grpo")._compute_advantage(batch, {})
    assert store.puts[before:] == [["advantages", "returns"]]


@pytest.mark.parametrize("turns", [False, True])
def test_the_scale_that_is_reported_is_that_of_what_was_stored(
    store: MemoryStore, turns: bool
) -> None:
    made = a_trainer("grpo", self_train=0.5)
    _, ours = scaled(store, made, a_batch(store, turns))
    found = trainer.advantage_scales(*zip(*made._scaled, strict=True))
    for route, initial in (("annotate", "a"), ("self_train", "s")):
        sizes = [row.abs().mean().item() for key, row in ours.items() if key[0] == initial]
        mean = sum(sizes) / len(sizes)
        assert found[f"pivottrace/{route}/advantage_scale"] == pytest.approx(mean)


def test_a_step_reports_all_its_mini_batches_once_and_the_next_begins_afresh(
    store: MemoryStore,
) -> None:
    made = a_trainer("grpo", self_train=0.5)
    batch = a_batch(store)
    first = [key for key in batch.keys if key[:2] in ("a0", "s0", "s2")]
    parts = [batch.select_keys(keys) for keys in (first, [k for k in batch.keys if k not in first])]
    made.parameter_sync_step = len(parts)
    made.prepare_step = dict
    made._step_once = lambda metrics, *_: made._compute_advantage(parts.pop(), metrics)
    made._set_aside = [("x", record("a3"))]
    metrics: dict[str, float] = {}
    done = made.step(metrics, {})
    assert sorted(done.keys) == sorted(batch.keys)
    found = advantages(store, batch)
    for route, initial in (("annotate", "a"), ("self_train", "s")):
        sizes = [row.abs().mean().item() for key, row in found.items() if key[0] == initial]
        assert metrics[f"pivottrace/{route}/advantage_scale"] == pytest.approx(
            sum(sizes) / len(sizes)
        )
        assert metrics[f"pivottrace/{route}/rollouts"] == len(sizes)
    assert metrics["pivottrace/set_aside/annotate"] == 1.0
    assert metrics["pivottrace/rollouts/failed"] == 2.0 * len(GROUPS)
    assert made._scaled == [] and made._records == [] and made._set_aside == []
    # A rollout's record is read once; the first of two trajectories and padding have none.
    assert store.gets.count(["extra_fields"]) == 2


# What verl does not train on


class Uploads:
    """verl's manager of weights, which a start of training calls."""

    def update_weights(self, step: int) -> None:
        self.step = step


def started(store: MemoryStore, metric: str | None = None, **settings: Any) -> Any:
    """A trainer whose replay buffer, verl's own, is set up as a start of training does."""
    made = a_trainer()
    made.config.pivottrace.update(settings)
    made.checkpoint_manager = Uploads()
    made.replay_buffer = ReplayBuffer(
        trainer_mode="sync",
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create({}),
        refill_fn=lambda n: n,
        filter_groups_metric=metric,
        train_batch_size=2,
        gen_batch_size=1,
    )
    made.on_init_end()
    assert made.checkpoint_manager.step == 1
    return made


def finished(store: MemoryStore, partition: str, *pt_ids: str, status: str = "finished") -> None:
    """Prompts whose rollouts are all there."""
    for pt_id in pt_ids:
        tag = {"is_prompt": True, "status": status, "global_steps": 1}
        store.kv_batch_put([pt_id], partition, tags=[tag])
        rewards = GROUPS[pt_id][1]
        rows = [trajectory(pt_id, i, reward) for i, reward in enumerate(rewards)]
        keys = [f"{pt_id}_{i}_0" for i in range(len(rows))]
        store.kv_batch_put(keys, partition, list_of_dict_to_tensordict(rows))


def test_groups_that_are_filtered_out_or_left_over_are_kept_for_the_steps_end(
    store: MemoryStore,
) -> None:
    made = started(store, metric="reward")
    finished(store, "train", *GROUPS)
    batch, metrics = made.replay_buffer.sample(global_steps=1, partition_id="train", batch_size=3)
    assert metrics["training/filter_groups/evicted_samples"] == 1
    assert metrics["training/filter_groups/discarded_surplus_samples"] == 1
    trained_on = {key.split("_")[0] for key in batch.keys}
    aside = [(uid, row["pt_id"]) for uid, row in made._set_aside]
    assert {uid for uid, _ in aside} == set(GROUPS) - trained_on
    # All of the group's rollouts, and its own.
    assert len(aside) == sum(len(GROUPS[uid][1]) for uid in set(GROUPS) - trained_on)
    assert all(uid == pt_id for uid, pt_id in aside)
    assert set(store.tags["train"]) == set(batch.keys)


def test_groups_of_validation_and_failed_ones_are_not_kept(store: MemoryStore) -> None:
    made = started(store)
    finished(store, "val", "a0")
    finished(store, "train", "a1", status="failure")
    made.replay_buffer._sync_metadata_from_transfer_queue()
    made.replay_buffer._clear_groups("val", {"a0"})
    made.replay_buffer._clear_groups("train", {"a1"})
    assert made._set_aside == []
    assert not store.fields["val"] and not store.fields["train"]


def test_the_buffer_is_asked_as_often_as_set_and_is_not_waited_for_for_ever(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        assert len(naps) < 10

    monkeypatch.setattr("time.sleep", nap)
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    made = started(store, stall_timeout_s=100)
    store.kv_batch_put(["a0"], "train", tags=[{"is_prompt": True, "status": "running",
                                               "global_steps": 1}])  # fmt: skip
    with pytest.raises(trainer.PivotTraceError, match=r"No prompt's rollouts finished in 100 s"):
        made.replay_buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    assert naps == [0.25] * 3


def test_records_and_columns_are_read_in_the_batchs_order_without_padding(
    store: MemoryStore,
) -> None:
    batch = a_batch(store, turns=True)
    # The first of two trajectories has no record of its own, and padding has none.
    whole = [k for k in batch.keys if not k.startswith("pad") and k[2:] != "_0_0"]
    made = a_trainer()
    made._compute_advantage(batch, {})
    assert [uid for uid, _ in made._records] == [key.split("_")[0] for key in whole]
    assert all(uid == row["pt_id"] for uid, row in made._records)
    assert trainer.queue.records([], "train") == []
    lengths = [len(row) for row in trainer.queue.column(batch, "responses").unbind()]
    assert lengths == [len(store.fields["train"][key]["responses"]) for key in batch.keys]
