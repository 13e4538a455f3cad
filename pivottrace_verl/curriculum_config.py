"""Settings of the curriculum: order of the prompts, and the routes' shares of a batch."""

import math
from dataclasses import dataclass

from pivottrace_verl.errors import PivotTraceError

ORDERS = ("mixed", "easy_to_hard", "uncertainty_first", "random")


@dataclass(frozen=True)
class CurriculumConfig:
    """How a pass is laid out.

    mixed: every stretch of a pass holds the routes in proportion, shuffled within a route.
    easy_to_hard, uncertainty_first: by uncertainty, ascending or descending, the same every pass.
    random: shuffled anew each pass.
    """

    batch_size: int
    """Prompts a step."""
    order: str = "mixed"
    seed: int = 0
    annotate_share: float | None = None
    """Share of annotate prompts in the order `mixed`, in [0, 1]; None: their share of the prompts.
    When a route runs out, the other fills the pass."""
    annotate_share_end: float | None = None
    """Where that share goes, linearly over `share_steps` training steps, and then stays; it is the
    step at which a prompt is drawn that counts."""
    share_steps: int | None = None
    min_annotate_share: float = 0.0
    max_annotate_share: float = 1.0
    """Bounds on the share of annotate prompts in every batch, whatever the order, and so on that of
    self_train prompts. A route that runs out before the other begins again within the pass, with
    the prompts that came least. A batch is `batch_size` draws in a row, which where groups are
    filtered or replaced is not what a step trains on: the bounds hold for what is drawn. They give
    way only where no prompt of a route is awake."""
    revisit: int = 4
    """Passes in which a prompt at rest comes once."""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise PivotTraceError(
                f"The curriculum's order is '{self.order}', but must be one of {', '.join(ORDERS)}."
            )
        for name, least in (("batch_size", 1), ("revisit", 1)):
            if getattr(self, name) < least:
                raise PivotTraceError(
                    f"The curriculum's {name} is {getattr(self, name)}, but must be at least "
                    f"{least}."
                )
        for name in (
            "annotate_share",
            "annotate_share_end",
            "min_annotate_share",
            "max_annotate_share",
        ):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share <= 1.0:
                raise PivotTraceError(
                    f"The curriculum's {name} is {share}, but must lie in [0, 1]."
                )
        self._check_schedule()
        fewest, most = self.annotate_bounds()
        if fewest > most:
            raise PivotTraceError(
                f"No number of annotate prompts in a batch of {self.batch_size} is a share of at "
                f"least {self.min_annotate_share} (min_annotate_share) and at most "
                f"{self.max_annotate_share} (max_annotate_share)."
            )
        for route, never in (("annotate", most < 1), ("self_train", fewest >= self.batch_size)):
            if never:
                raise PivotTraceError(
                    f"With a share of annotate prompts from {self.min_annotate_share} to "
                    f"{self.max_annotate_share} a batch of {self.batch_size} has no place for "
                    f"{route} prompts, so they would never come."
                )

    def _check_schedule(self) -> None:
        given = [
            name
            for name in ("annotate_share", "annotate_share_end", "share_steps")
            if getattr(self, name) is not None
        ]
        if given and self.order != "mixed":
            raise PivotTraceError(
                f"The curriculum's {given[0]} belongs to the order mixed, not to {self.order}; "
                "min_annotate_share and max_annotate_share bound the share in every order."
            )
        if self.share_steps is None and self.annotate_share_end is None:
            return
        if len(given) < 3 or not self.share_steps or self.share_steps < 1:
            raise PivotTraceError(
                "A scheduled share of annotate prompts needs annotate_share, annotate_share_end "
                f"and share_steps of at least 1, but they are {self.annotate_share}, "
                f"{self.annotate_share_end} and {self.share_steps}."
            )

    def annotate_bounds(self) -> tuple[int, int]:
        """The fewest and the most annotate prompts in a batch."""
        return (
            math.ceil(self.min_annotate_share * self.batch_size - 1e-9),
            math.floor(self.max_annotate_share * self.batch_size + 1e-9),
        )

    def share_at(self, step: int) -> float | None:
        """The share asked for at a training step, counted from 1; None: the prompts' own."""
        if not self.share_steps or self.annotate_share is None or self.annotate_share_end is None:
            return self.annotate_share
        way = min(1.0, (step - 1) / self.share_steps)
        return self.annotate_share + way * (self.annotate_share_end - self.annotate_share)
