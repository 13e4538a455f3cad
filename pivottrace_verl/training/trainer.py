"""verl's V1 trainer with the curriculum in place of its sampler and both rewards in one batch.

Three things change, each at the one place verl offers: the sampler of the train dataloader
(`_init_dataloader`), advantages scaled by route (`_compute_advantage`; scaling a group's reward
would cancel under GRPO's normalisation), and what each step reports (`step`). Checkpoints, logging
and validation are verl's.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.dataset.rl_dataset import collate_fn

from pivottrace_verl.curriculum import Curriculum, CurriculumConfig, Item
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.training import queue
from pivottrace_verl.training.metrics import step_metrics
from pivottrace_verl.training.sampler import CurriculumSampler

logger = logging.getLogger(__name__)


class PivotTrainerMixin(PPOTrainer):
    """Mix in front of one of verl's V1 trainers."""

    def _init_dataloader(self) -> None:
        if self.config.data.dataloader_num_workers != 0:
            raise PivotTraceError(
                "data.dataloader_num_workers must be 0 with the triage curriculum (it is "
                f"{self.config.data.dataloader_num_workers}): workers read prompts ahead, so the "
                "curriculum would neither see results in time nor resume where it was."
            )
        if self.config.data.shuffle:
            raise PivotTraceError(
                "data.shuffle must be false: shuffling would undo the triage curriculum's order "
                "(pivottrace.curriculum.order=random gives a shuffled one)."
            )
        super()._init_dataloader()
        settings = self.config.pivottrace.curriculum
        self.curriculum = Curriculum(
            dataset_items(self.train_dataset),
            CurriculumConfig(batch_size=self.config.data.train_batch_size, **settings),
        )
        self.train_dataloader = StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=self.config.data.get("gen_batch_size") or self.config.data.train_batch_size,
            num_workers=0,
            drop_last=True,
            collate_fn=collate_fn,
            sampler=CurriculumSampler(self.curriculum, len(self.train_dataset)),
        )

    def on_init_end(self) -> None:
        super().on_init_end()
        if self.config.pivottrace.poll_interval_s is not None:
            # verl looks every 2 seconds, which is most of a step where steps take seconds.
            self.replay_buffer.poll_interval = float(self.config.pivottrace.poll_interval_s)

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        extras = queue.extra_fields(batch)
        weights = [extra.get("pivottrace", {}).get("weight", 1.0) for extra in extras]
        if all(weight == 1.0 for weight in weights):
            return batch
        advantages = queue.column(batch, "advantages")
        scaled = torch.nested.as_nested_tensor(
            [row * weight for row, weight in zip(advantages.unbind(), weights, strict=True)],
            layout=torch.jagged,
        )
        return queue.put(batch, queue.columns(advantages=scaled))

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        batch = super().step(metrics, timing_raw)
        rows = queue.records(batch)
        # Before the checkpoint is written, so that a resumed run knows what this step taught.
        self.curriculum.observe([record for _, record in rows])
        metrics.update(step_metrics(rows))
        metrics.update(
            {f"pivottrace/{name}": value for name, value in self.curriculum.metrics().items()}
        )
        return batch


class PivotTrainerSync(PivotTrainerMixin, PPOTrainerSync):
    """The synchronous V1 trainer with PivotTrace switched on."""


def dataset_items(dataset: Any) -> list[Item]:
    """One curriculum item a row of verl's data set, in its order (after verl's own filters).

    Raises PivotTraceError if the rows carry no route: they were not written by `pivottrace`.
    """
    items = []
    for index, info in enumerate(dataset.dataframe["extra_info"]):
        if not info or "pt_id" not in info or info.get("route") not in ("annotate", "self_train"):
            raise PivotTraceError(
                f"row {index} of the training data has no extra_info.pt_id and route: "
                "make data.train_files with `pivottrace train` or `pivottrace export`."
            )
        items.append(Item(index, info["pt_id"], info["route"], float(info["uncertainty"])))
    return items
