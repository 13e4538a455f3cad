"""verl's V1 trainer with the curriculum in place of its sampler and both rewards in one batch.

Few things change, each at the one place verl offers: the sampler of the train dataloader and what
its rows say (`_init_dataloader`), advantages scaled by route (`_compute_advantage`; scaling a
group's reward would cancel under GRPO's normalisation), labels that arrive (`prepare_step`), and
what each step teaches and reports (`step`). What is decided there, `steering` decides. Checkpoints,
logging and validation are verl's.

In the asynchronous trainers prompts are drawn ahead (`num_warmup_batches`), so what a step teaches
reaches the order after those. A prompt keeps the route and the label that it was drawn with. Drawn
and not yet trained at a checkpoint, it waits in verl's own store, which the checkpoint holds beside
the curriculum's place, and is generated anew.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from omegaconf import OmegaConf
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.dataset.rl_dataset import collate_fn

from pivottrace_verl.attention.channel import LOSSES
from pivottrace_verl.curriculum import ROUTES, Items
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.training import queue
from pivottrace_verl.training.client import PivotAsyncClient, PivotClient
from pivottrace_verl.training.sampler import CurriculumSampler
from pivottrace_verl.training.steering import Steering, SteeringConfig
from pivottrace_verl.training.watch import POLL_S, Patience, Watch


class PivotTrainerMixin(PPOTrainer):
    """Mix in front of one of verl's V1 trainers."""

    train_dataloader_it: Any
    _failed_prompts = 0
    """Since the latest step."""

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        items, labelled = dataset_items(self.train_dataset)
        block: Any = OmegaConf.to_container(self.config.pivottrace, resolve=True)
        batch_size, n = self.config.data.train_batch_size, self.config.actor_rollout_ref.rollout.n
        config = SteeringConfig.of(block, batch_size, n)
        self.steering = Steering(items, labelled, config, self._prompts)
        self._scaled: list[tuple[torch.Tensor, str | None]] = []
        self._records: list[tuple[str, dict[str, Any]]] = []
        self._traces_lost: dict[str, int] = {}
        self._set_aside: list[tuple[str, dict[str, Any]]] = []
        self.train_dataloader = StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=self.config.data.get("gen_batch_size") or self.config.data.train_batch_size,
            num_workers=0,
            drop_last=True,
            collate_fn=self._collate,
            sampler=CurriculumSampler(self.steering, len(self.train_dataset)),
        )

    def _collate(self, rows: list[dict[str, Any]]) -> Any:
        return collate_fn([self.steering.dress(row) for row in rows])

    def _prompts(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        found = [self.train_dataset.dataframe[row] for row in rows]
        return [
            {
                "pt_id": row["extra_info"]["pt_id"],
                "prompt": row[self.config.data.prompt_key],
                "data_source": row["data_source"],
            }
            for row in found
        ]

    def on_init_end(self) -> None:
        super().on_init_end()
        buffer, settings = self.replay_buffer, self.config.pivottrace
        if settings.poll_interval_s is not None:
            # verl looks every 2 seconds, which is most of a step where steps take seconds.
            buffer.poll_interval = float(settings.poll_interval_s)
        patience = Patience(settings.stall_timeout_s)
        wait = buffer._wait_for_next_poll

        def wait_and_look(partition: str, last_debug_time: float) -> Any:
            # Not the failures: asynchronous trainers put new prompts in their place, for ever.
            finished = frozenset(buffer.finished_keys[partition])
            patience.look((self.global_steps, partition, finished))
            return wait(partition, last_debug_time)

        buffer._wait_for_next_poll = wait_and_look
        clear = buffer._clear_groups

        def keep_and_clear(partition: str, uids: set[str]) -> None:
            if partition == "train":
                done = uids & buffer.finished_keys[partition]
                keys = [k for k in buffer.partitions[partition] if k.split("_", 1)[0] in done]
                self._set_aside += queue.whole(keys, queue.records(keys, partition))
                self._failed_prompts += len(uids & buffer.failure_keys[partition])
            clear(partition, uids)

        buffer._clear_groups = keep_and_clear
        sample = buffer.sample

        def sample_and_count(global_steps: int, partition_id: str, batch_size: int) -> Any:
            batch, metrics = sample(global_steps, partition_id, batch_size)
            if partition_id == "train":
                found = {key.split("_", 1)[0] for key in batch.keys}
                self._failed_prompts += batch_size - len(found)
            return batch, metrics

        buffer.sample = sample_and_count

    def fit(self, agent_loop_manager: Any) -> None:
        with Watch(self._signs_of_life(agent_loop_manager)):
            super().fit(agent_loop_manager)

    def _signs_of_life(self, agent_loop_manager: Any) -> dict[str, Callable[[], Any]]:
        """Every process that a rollout passes through."""
        signs: dict[str, Callable[[], Any]] = {}
        for i, worker in enumerate(agent_loop_manager.agent_loop_workers):
            signs[f"agent-loop worker {i}"] = partial(worker.pivottrace_watch.remote, POLL_S)
        for i, worker in enumerate(self.get_reward_handles() or ()):
            signs[f"reward worker {i}"] = worker.__ray_ready__.remote
        for manager in self._rollout_server_managers():
            for replica in manager.get_replicas():
                for i, server in enumerate(replica.servers):
                    name = f"vLLM server {i} of rollout replica {replica.replica_rank}"
                    signs[name] = partial(server.pivottrace_watch.remote, POLL_S)
        return signs

    def on_train_begin(self) -> None:
        # The asynchronous trainers draw their first prompts here.
        self._take_in()
        super().on_train_begin()

    def _take_in(self) -> None:
        """The checkpoint's state and the labels that arrived, before prompts are drawn."""
        if self.train_dataloader_it is None:
            # A checkpoint's state is only taken in when the loader's iterator is made.
            self.train_dataloader_it = iter(self.train_dataloader)
        tell(self.steering.begin(self.global_steps))

    def prepare_step(self) -> Any:
        self._take_in()
        return super().prepare_step()

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        start = time.perf_counter()
        found = queue.records(batch.keys, batch.partition_id)
        records = [
            {} if tag.get("is_padding") else record
            for tag, record in zip(batch.tags, found, strict=True)
        ]
        self._records += queue.whole(batch.keys, records)
        by_route = self.steering.weights(self.global_steps)
        weights = [r["weight"] * by_route[r["route"]] if r else 1.0 for r in records]
        advantages = list(queue.column(batch, "advantages").unbind())
        scaled = [row * weight for row, weight in zip(advantages, weights, strict=True)]
        self._scaled += zip(scaled, [record.get("route") for record in records], strict=True)
        if not all(weight == 1.0 for weight in weights):
            nested = torch.nested.as_nested_tensor(scaled, layout=torch.jagged)
            batch = queue.put(batch, queue.columns(advantages=nested))
        self.steering.seconds += time.perf_counter() - start
        return batch

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        batch = super().step(metrics, timing_raw)
        # Of all the step's mini-batches, which separate_async trains one by one.
        records, self._records = self._records, []
        # Before the checkpoint is written, so that a resumed run knows what this step taught.
        ours, sentences = self.steering.end(self.global_steps, records, self._set_aside)
        self._set_aside = []
        metrics.update(ours)
        failed, lost = failed_rollouts(records), float(self._failed_prompts)
        self._failed_prompts = 0
        metrics["pivottrace/rollouts/failed"] = failed
        metrics["pivottrace/prompts/failed"] = lost
        if failed or lost:
            sentences = [*sentences, failures(self.global_steps, failed, lost)]
        metrics.update(advantage_scales(*zip(*self._scaled, strict=True)))
        self._scaled = []
        if self.config.pivottrace.capture.enable:
            metrics.update(self._trace_losses())
        tell(sentences)
        return batch

    def _trace_losses(self) -> dict[str, float]:
        """`pivottrace/capture/<what>`: what went wrong with traces on their way since the last
        step; a rollout without one is `missed`, whatever the reason."""
        counts = ray.get(
            [
                server.pivottrace_trace_counts.remote()
                for manager in self._rollout_server_managers()
                for replica in manager.get_replicas()
                for server in replica.servers
            ]
        )
        before = self._traces_lost
        self._traces_lost = {name: sum(one[name] for one in counts) for name in LOSSES}
        return {
            f"pivottrace/capture/{name}": float(n - before.get(name, 0))
            for name, n in self._traces_lost.items()
        }


class PivotTrainerSync(PivotTrainerMixin, PPOTrainerSync):
    """The synchronous V1 trainer with PivotTrace switched on."""

    def get_llm_client(self) -> Any:
        return self.llm_server_manager.get_client(client_cls=PivotClient)


class PivotTrainerColocateAsync(PivotTrainerMixin, PPOTrainerColocateAsync):
    """The asynchronous V1 trainer that shares its devices with the rollouts, PivotTrace on."""

    def get_llm_client(self) -> Any:
        return self.llm_server_manager.get_client(client_cls=PivotAsyncClient)


class PivotTrainerSeparateAsync(PivotTrainerMixin, PPOTrainerSeparateAsync):
    """The asynchronous V1 trainer with rollouts on devices of their own, PivotTrace on."""

    def get_llm_client(self) -> Any:
        return self.standalone_server_manager.get_client(client_cls=PivotAsyncClient)


TRAINERS: dict[str, type[PPOTrainer]] = {
    "sync": PivotTrainerSync,
    "colocate_async": PivotTrainerColocateAsync,
    "separate_async": PivotTrainerSeparateAsync,
}
"""By verl's `trainer.v1.trainer_mode`."""


def tell(sentences: Sequence[str]) -> None:
    """Into the job's log, as verl prints its own: loggers are muted by what the job imports."""
    for sentence in sentences:
        print(f"pivottrace: {sentence}", flush=True)


def failures(step: int, rollouts: float, prompts: float) -> str:
    """What failed in a step: `rollouts` of the groups that it trained on, and `prompts` of which
    nothing was left to train on, or for which an asynchronous trainer took another."""
    return (
        f"In step {step} {rollouts:.0f} rollouts failed of prompts that were trained on, and "
        f"{prompts:.0f} prompts failed; the log says of each why."
    )


def failed_rollouts(records: Sequence[tuple[str, Mapping[str, Any]]]) -> float:
    """Of (group's key, record) pairs: sessions that gave no rollout to a group that has some."""
    return float(sum({key: record["failed"] for key, record in records}.values()))


def advantage_scales(rows: Sequence[Any], routes: Sequence[str | None]) -> dict[str, float]:
    """`pivottrace/<route>/advantage_scale`: mean size of a token's advantage, mean over the route's
    rollouts, after weighting. `rows` [N] are the tokens' advantages; without a route, padding."""
    sizes = defaultdict(list)
    for row, route in zip(rows, routes, strict=True):
        if route is not None and len(row):
            sizes[route].append(float(row.abs().mean()))
    return {f"pivottrace/{k}/advantage_scale": float(np.mean(v)) for k, v in sizes.items()}


def dataset_items(dataset: Any) -> tuple[Items, list[str]]:
    """One curriculum item a row of verl's data set, in its order (after verl's own filters), and
    the prompts that have a label.

    Raises PivotTraceError if the rows carry no route: they were not written by `pivottrace`.
    """
    table = dataset.dataframe.select_columns(["extra_info"]).with_format("arrow")[:]
    info = table["extra_info"].combine_chunks()
    wanted = ("pt_id", "route", "labeled", "uncertainty")
    kind = info.type
    there = pa.types.is_struct(kind) and all(kind.get_field_index(n) >= 0 for n in wanted)
    columns = {n: pc.struct_field(info, n) for n in wanted} if there else {}
    bad = np.zeros(len(info), dtype=bool) if there else np.ones(len(info), dtype=bool)
    for name in ("pt_id", "route") if there else ():
        bad |= np.asarray(pc.is_null(columns[name]))
    if there:
        bad |= ~np.asarray(pc.is_in(columns["route"], value_set=pa.array(ROUTES)))
    if bad.any() or not there:
        raise PivotTraceError(
            f"row {int(np.argmax(bad)) if len(bad) else 0} of the training data has no "
            "extra_info.pt_id and route: make data.train_files with `pivottrace train` or "
            "`pivottrace export`."
        )
    pt_ids = columns["pt_id"].to_pylist()
    items = Items.of(
        np.arange(len(pt_ids)),
        pt_ids,
        columns["route"].to_pylist(),
        np.asarray(columns["uncertainty"], dtype=np.float64),
    )
    labelled = columns["pt_id"].filter(pc.fill_null(columns["labeled"], False))
    return items, labelled.to_pylist()
