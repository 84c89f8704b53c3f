"""The figures of a load: latencies, throughput, goodput under limits, and what was broken."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.latency import latency_figures
from benchmarks.load.clients import Run
from benchmarks.load.outcome import Outcome
from benchmarks.summary import Figure, rounded

LIMITS = ("ttft", "itl", "tpot", "e2e")
"""What can be limited: seconds to the first token, the p99 of the time between messages, the mean time of a token after
the first, and the whole."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a request must keep to be a good one."""

    seconds: dict[str, float]

    @staticmethod
    def parse(words: Sequence[str]) -> "Limits":
        """Reads `ttft=0.5`. Raises ValueError."""
        limits: dict[str, float] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in LIMITS:
                raise ValueError(f"{word!r}: must be one of {', '.join(LIMITS)}, = and seconds")
            limits[name] = float(value)
        return Limits(limits)

    def kept(self, outcome: Outcome) -> bool:
        """Whether a request ran to its end and kept every limit."""
        if outcome.ending != "completed" or outcome.broken or not outcome.arrivals:
            return False
        figures = {
            "ttft": outcome.first_token,
            "itl": float(np.percentile(outcome.gaps, 99)) if outcome.gaps else 0.0,
            "tpot": outcome.per_token or 0.0,
            "e2e": outcome.total,
        }
        return all(figures[name] <= limit for name, limit in self.seconds.items())


def figures_of(run: Run, limits: Limits, leaked: Sequence[str]) -> dict[str, Figure | list[str]]:
    """Everything that is reported of a run. Latencies are of requests that ran to their end and were to do so."""
    outcomes = run.outcomes
    whole = [one for one in outcomes if one.ending == "completed" and one.planned == "complete" and one.arrivals]
    seconds = max(one.ended for one in outcomes) - min(one.sent for one in outcomes) if outcomes else 0.0
    judged = [one for one in outcomes if one.planned == "complete"]
    good = sum(limits.kept(one) for one in judged)
    endings = Counter(one.ending for one in outcomes)
    broken = [text for one in outcomes for text in one.broken] + list(leaked)
    return {
        "requests": len(outcomes),
        "seconds": rounded(seconds),
        **{ending: endings[ending] for ending in ("completed", "cancelled", "deadline", "refused", "failed")},
        "requests_per_s": rounded(len(whole) / seconds) if seconds else None,
        "output_tokens_per_s": rounded(sum(one.tokens for one in outcomes) / seconds) if seconds else None,
        **latency_figures(whole),
        "good_share": rounded(good / len(judged)) if judged else None,
        "goodput_rps": rounded(good / seconds) if seconds else None,
        "client_cpu_share": rounded(run.cpu_share),
        "client_late_ms_p99": rounded(1e3 * run.late_p99),
        "client_bound": run.client_bound,
        "broken": len(broken),
        "broken_first": broken[:10],
    }
