"""CoT-Kinetics (arXiv 2505.13408): the hidden state as a particle that the layers move.

The paper scores the soundness of a rollout by an energy of the movement of its hidden state
through the layers. Its full text was not available to this project: this is our reading of its
abstract and of a later summary (DE-Venus, arXiv 2609.03324: "semantic movement and curvature of
reasoning representations across layers"), not the authors' equation. With h_0 .. h_L the states
after the embedding and each layer, mean over the generated tokens, and steps
v_l = (h_{l+1} - h_l) / |h_L - h_0|:

    E = mean over l of |v_l|^2 / 2  -  GAMMA * mean over l of angle(v_{l+1}, v_l) / pi

Movement counts for soundness, turning against it. The score is -E, mean over the rollouts. All
generated tokens count as reasoning; their states are those of `coe`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivottrace_verl.estimators.coe import angles
from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "cot_kinetics"
GAMMA = 0.8
"""Weight of the curvature: the value with which the method was run as a baseline for CRV
(arXiv 2510.09312, `--cotk_gamma`)."""


def energy(states: NDArray[Any]) -> float | None:
    """[L + 1, D] with L >= 2 -> E; None where first and last state coincide."""
    h = states.astype(np.float64)
    whole = np.linalg.norm(h[-1] - h[0])
    if whole == 0.0:
        return None
    steps = np.diff(h, axis=0) / whole
    movement = float(np.mean((steps**2).sum(axis=1))) / 2
    return movement - GAMMA * float(np.mean(angles(steps[1:], steps[:-1]))) / np.pi


def score(group: GroupRecord) -> float:
    """NaN unless hidden states were asked for."""
    return -mean_known(energy(r.layer_states) for r in group.rollouts if r.layer_states is not None)
