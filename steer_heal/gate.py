"""The coherence gate: whether what a round came to is still as whole as the base.

coherent      every vignette can be scored, pmass >= 0.99 of base's, and the median tail
              surprisal of the replies at most the 95th percentile of the base's own unsteered
              completions
"""

from __future__ import annotations

import numpy as np

from eval.statistics import mean_pmass
from steer_heal.artifacts import ConditionEval, Limits

PMASS_GATE = 0.99  # share of base's
TAIL_GATE = 0.95  # quantile of the base's own completions


def is_coherent(healed: ConditionEval, base: ConditionEval, limits: Limits) -> bool:
    """Whether a round passes."""
    tails = [reply.surprisal.tail_nll_nats for reply in healed.replies]
    return (
        not healed.unscorable
        and mean_pmass(healed.choices) / mean_pmass(base.choices) >= PMASS_GATE
        and bool(np.median(tails) <= np.quantile(limits.base_tail_nll_nats, TAIL_GATE))
    )
