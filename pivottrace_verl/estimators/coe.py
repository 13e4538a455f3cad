"""Chain-of-embedding (arXiv 2410.13640): how the hidden state travels through the layers.

With h_0 .. h_L the states after the embedding and each layer, mean over the generated tokens,
every step has a length M_l = |h_{l+1} - h_l| / |h_L - h_0| and an angle
A_l = angle(h_{l+1}, h_l) / angle(h_L, h_0). CoE-C is the length of the mean of the complex numbers
M_l exp(i A_l), higher for answers that are right; the score is its negative, mean over the
rollouts. Of the paper's two scores this is the one its authors argue is the more robust (the
other is mean M - mean A).

Our reading: the state of a generated token is that of the position whose logits chose it, as for
traces, and the last state is the one the model's final norm has passed, as Hugging Face returns it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "coe"


def coe_c(states: NDArray[Any]) -> float | None:
    """[L + 1, D] -> CoE-C, at least 0; None where first and last state coincide."""
    h = states.astype(np.float64)
    lengths, whole = np.linalg.norm(np.diff(h, axis=0), axis=1), np.linalg.norm(h[-1] - h[0])
    turn = angles(h[[0]], h[[-1]])[0]
    if whole == 0.0 or turn == 0.0:
        return None
    return float(np.abs(np.mean(lengths / whole * np.exp(1j * angles(h[1:], h[:-1]) / turn))))


def angles(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Angles between the rows of a and b [N, D], in [0, pi]; 0 where a row is 0."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = np.divide((a * b).sum(axis=1), norms, out=np.ones(len(a)), where=norms > 0)
    found: NDArray[np.float64] = np.arccos(np.clip(cosines, -1.0, 1.0))
    return found


def score(group: GroupRecord) -> float:
    """At most 0; NaN unless hidden states were asked for."""
    return -mean_known(coe_c(r.layer_states) for r in group.rollouts if r.layer_states is not None)
