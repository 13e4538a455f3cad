"""The curriculum in torchdata's loader, and what the trainer reads of verl's data set."""

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from pivottrace_verl.curriculum import ROUTES
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.training.steering import Steering, SteeringConfig

datasets = pytest.importorskip("datasets")
torch = pytest.importorskip("torch")
trainer = pytest.importorskip("pivottrace_verl.training.trainer", reason="verl is not installed")

from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402

from pivottrace_verl.training.sampler import CurriculumSampler  # noqa: E402

P = 20
BLOCK: dict[str, Any] = {
    "run": None,
    "curriculum": {"order": "mixed", "seed": 1},
    "vote": {},
    "weights": {},
    "guard": {},
    "retriage": {},
    "rollouts": {"annotate": 2, "self_train": 4},
}


class DataSet:
    """What the trainer uses of verl's RLHFDataset."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.dataframe = datasets.Dataset.from_list(rows)

    def __len__(self) -> int:
        return len(self.dataframe)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataframe[index], "dummy_tensor": torch.tensor([index])}


def rows() -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": str(i)}],
            "data_source": "sums",
            "reward_model": {"style": "rule", "ground_truth": "the truth"},
            "extra_info": {
                "index": i,
                "pt_id": f"{i:016x}",
                "labeled": i % 4 == 0,
                "route": ROUTES[i % 4 != 0],
                "uncertainty": i / P,
            },
        }
        for i in range(P)
    ]


def make(batch: int) -> tuple[Any, Any]:
    """A loader as the trainer builds it, and what steers it."""
    data = DataSet(rows())
    items, labelled = trainer.dataset_items(data)
    steering = Steering(items, labelled, SteeringConfig.of(BLOCK, 4, 4), lambda _: [])
    loader = StatefulDataLoader(
        dataset=data,
        batch_size=batch,
        num_workers=0,
        drop_last=True,
        collate_fn=lambda found: trainer.collate_fn([steering.dress(row) for row in found]),
        sampler=CurriculumSampler(steering, len(data)),
    )
    return loader, steering


def indices(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch["dummy_tensor"]]


def test_rows_are_read_by_column_after_verls_own_filters() -> None:
    data = DataSet(rows())
    data.dataframe = data.dataframe.filter(lambda row: row["extra_info"]["index"] >= 3)
    items, labelled = trainer.dataset_items(data)
    assert items.index.tolist() == list(range(P - 3))
    assert items.pt_id.tolist() == [f"{i:016x}" for i in range(3, P)]
    assert labelled == [f"{i:016x}" for i in range(4, P, 4)]
    assert [ROUTES[r] for r in items.route[:3]] == ["self_train", "annotate", "self_train"]


@pytest.mark.parametrize("info", [None, {"index": 0}, {"pt_id": "a", "route": "drop",
                                  "labeled": True, "uncertainty": 0.1}])  # fmt: skip
def test_rows_that_pivottrace_did_not_write_are_refused(info: Any) -> None:
    bad = DataSet([{"prompt": "?", "extra_info": info}])
    with pytest.raises(PivotTraceError, match=r"row 0 of the training data has no extra_info\.pt"):
        trainer.dataset_items(bad)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_loader_goes_on_after_a_checkpoint_whatever_the_generation_batch(batch: int) -> None:
    whole, _ = make(batch)
    # More than a pass: a loader without end never stops the trainer.
    expected = indices(islice(iter(whole), 48 // batch))
    first, _ = make(batch)
    before = indices(islice(iter(first), 20 // batch))
    second, _ = make(batch)
    second.load_state_dict(first.state_dict())
    assert before + indices(islice(iter(second), 28 // batch)) == expected


def test_a_checkpoint_is_taken_in_when_the_iterator_is_made_and_before_anything_is_drawn() -> None:
    first, saved = make(4)
    indices(islice(iter(first), 3))
    second, resumed = make(4)
    second.load_state_dict(first.state_dict())
    iter(second)
    assert resumed.curriculum.state_dict() == saved.curriculum.state_dict()


def test_a_batch_has_labels_only_where_they_were_bought_and_rollouts_by_route() -> None:
    loader, _ = make(4)
    for batch in islice(iter(loader), 5):
        for info, reward, n in zip(
            batch["extra_info"], batch["reward_model"], batch["__rollout_n__"], strict=True
        ):
            assert reward["ground_truth"] == ("the truth" if info["labeled"] else None)
            assert n == (2 if info["route"] == "annotate" else 4)


def test_the_scale_of_the_advantages_is_by_route_and_leaves_padding_out() -> None:
    tokens = [torch.tensor([0.5, -0.5]), torch.tensor([1.5]), torch.tensor([9.0])]
    scales = trainer.advantage_scales(
        [*tokens, tokens[0]], ["annotate", "annotate", None, "self_train"]
    )
    assert scales == {
        "pivottrace/annotate/advantage_scale": 1.0,
        "pivottrace/self_train/advantage_scale": 0.5,
    }


def test_failed_sessions_are_counted_once_a_group() -> None:
    records = [("a", {"failed": 2}), ("a", {"failed": 2}), ("b", {"failed": 0})]
    assert trainer.failed_rollouts(records) == 2.0


class Buffer:
    """What the trainer uses of verl's replay buffer: a batch of the prompts of which a rollout is
    left."""

    def __init__(self) -> None:
        self.poll_interval = 2.0
        self.partitions = {"train": {"a_0_0": {}, "a_1_0": {}, "c_0_0": {}}, "val": {}}
        self.finished_keys: dict[str, set[str]] = {"train": {"a", "c"}, "val": set()}
        self.failure_keys = {"train": {"b", "e"}, "val": {"v"}}

    def _wait_for_next_poll(self, partition: str, last_debug_time: float) -> float:
        return last_debug_time

    def _clear_groups(self, partition: str, uids: set[str]) -> None:
        self.failure_keys[partition] -= uids

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> Any:
        return SimpleNamespace(keys=list(self.partitions[partition_id])), {}


def test_prompts_that_failed_are_counted_whether_verl_replaces_them_or_not() -> None:
    one = object.__new__(trainer.PivotTrainerSync)
    one.replay_buffer = buffer = Buffer()
    settings = {"pivottrace": {"poll_interval_s": None, "stall_timeout_s": None}}
    one.config = OmegaConf.create(settings)
    one.checkpoint_manager = SimpleNamespace(update_weights=lambda _: None)
    one.global_steps, one._set_aside = 0, []
    one.on_init_end()
    # As the asynchronous trainers do with a group of which a session failed.
    buffer._clear_groups("train", {"b"})
    assert one._failed_prompts == 1
    # The synchronous one trains on what there is: of "a" and "c", of three prompts.
    buffer.sample(global_steps=1, partition_id="train", batch_size=3)
    assert one._failed_prompts == 2
    buffer._clear_groups("val", {"v"})
    buffer.sample(global_steps=1, partition_id="val", batch_size=3)
    assert one._failed_prompts == 2


def test_what_failed_in_a_step_is_one_sentence() -> None:
    assert trainer.failures(7, 3.0, 1.0) == (
        "In step 7 3 rollouts failed of prompts that were trained on, and 1 prompts failed; the "
        "log says of each why."
    )


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_every_trainer_of_verls_is_ours_first_and_then_its_own(mode: str) -> None:
    from verl.trainer.ppo.v1 import get_trainer_cls

    theirs, ours = get_trainer_cls(mode), trainer.TRAINERS[mode]
    assert issubclass(ours, theirs)
    # Both have a say in when training begins, ours first: prompts are drawn there.
    order = ours.__mro__
    assert order.index(trainer.PivotTrainerMixin) < order.index(theirs)


def test_lost_traces_are_counted_by_step_over_all_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [dict.fromkeys((*trainer.LOSSES, "received"), 0) for _ in range(3)]
    servers = [
        SimpleNamespace(pivottrace_trace_counts=SimpleNamespace(remote=lambda one=one: dict(one)))
        for one in counts
    ]
    replicas = [SimpleNamespace(servers=servers[:2]), SimpleNamespace(servers=servers[2:])]
    manager = SimpleNamespace(get_replicas=lambda: replicas)
    monkeypatch.setattr(trainer.ray, "get", list)
    made: Any = object.__new__(trainer.PivotTrainerSync)
    made._traces_lost, made._rollout_server_managers = {}, lambda: [manager]
    counts[0]["received"] = 9
    counts[0]["late"], counts[2]["late"] = 2, 1
    first = made._trace_losses()
    assert first.pop("pivottrace/capture/late") == 3.0
    assert set(first) == {f"pivottrace/capture/{n}" for n in trainer.LOSSES if n != "late"}
    assert not any(first.values())
    counts[1]["dropped"] = 4
    second = made._trace_losses()
    assert second["pivottrace/capture/dropped"] == 4.0
    assert sum(second.values()) == 4.0


def test_what_is_told_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    trainer.tell(["Routes moved."])
    assert capsys.readouterr().out == "pivottrace: Routes moved.\n"
