"""Admin (arXiv 2004.08249): how much a Post-LN sum weighs its stream, x <- LN(omega x + f(x)). Imports no torch.

    profiled   omega_i^2 = 1 + sum of v_j over the earlier branches j < i of the stack, v_j = Var f_j   (init/admin.py)
    constant   one omega for all, from their number n alone                                             (admin-torch)

Both make the share of each branch in its sum, beta_i^2 = v_i / (omega_i^2 + v_i), small: an update changes the output
by about the sum of beta_i^2, which is O(n) for plain Post-LN and O(log n) for profiled Admin and Pre-LN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from clearhead.errors import unknown

OUTPUT_CHANGES = ("log", "constant", "linear")


def constant_omega(branches: int, output_change: str = "log") -> float:
    """admin-torch's constant for a stack of n = `branches` residual branches, with unit branch variance in mind.

        log        sqrt((n + 1) / ln(n + 1) - 1)     its "O(logn)", the default there
        constant   sqrt(n)                           its "O(1)"
        linear     1                                 its "O(n)": plain Post-LN

    Not Admin: nothing is profiled, and omega does not grow over the depth.
    """
    if branches < 1:
        raise ValueError(f"branches: expected at least 1, got {branches}")
    if output_change == "log":
        return math.sqrt((branches + 1) / math.log(branches + 1) - 1.0)
    if output_change == "constant":
        return math.sqrt(branches)
    if output_change == "linear":
        return 1.0
    raise unknown("output_change", output_change, OUTPUT_CHANGES)


def omegas(branch_variances: Iterable[float], first_stream: float = 1.0) -> list[float]:
    """omega_1 = 1 and omega_{i+1}^2 = omega_i^2 s_i + v_i, with s_1 = `first_stream` and s_i = 1 afterwards.

    s_i is the variance of the stream before branch i: a norm's output has 1, the first stream has the embedding's. That
    is the authors' code; the paper's sum (recalled, not re-read) leaves out the 1.
    """
    answer: list[float] = []
    omega2, stream = 1.0, first_stream
    for variance in branch_variances:
        answer.append(math.sqrt(omega2))
        omega2, stream = omega2 * stream + variance, 1.0
    return answer
