"""What /metrics says, as numbers that can be asked for, and what became of them in a stretch of time.

What lives here: sums, means and quantiles over Prometheus' samples. What does not: their names (telemetry/), and what is shown.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "afd:"

Labels = tuple[tuple[str, str], ...]


class Samples:
    """Of one moment, or the difference of two. Names are without the prefix, as Prometheus shows them otherwise."""

    def __init__(self, values: Mapping[tuple[str, Labels], float]) -> None:
        self._values = dict(values)

    @classmethod
    def parse(cls, text: str) -> Samples:
        """Raises ValueError when it is no exposition."""
        return cls(
            {
                (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): float(sample.value)
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name.startswith(PREFIX)
            }
        )

    def since(self, before: Samples) -> Samples:
        """What was added. A counter that fell began anew: all of it was added then."""
        return Samples(
            {
                key: value - (earlier if (earlier := before._values.get(key, 0.0)) <= value else 0.0)
                for key, value in self._values.items()
            }
        )

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 when there is none."""
        return sum(value for _, value in self._of(name, labels))

    def mean(self, name: str, **labels: str) -> float | None:
        """Of a histogram; None when nothing was observed."""
        count = self.total(f"{name}_count", **labels)
        return self.total(f"{name}_sum", **labels) / count if count else None

    def quantile(self, name: str, share: float) -> float | None:
        """Of a histogram, as Prometheus' histogram_quantile estimates it; None when nothing was observed."""
        by_bound: dict[float, float] = {}
        for labels, value in self._of(f"{name}_bucket", {}):
            bound = float(dict(labels)["le"])
            by_bound[bound] = by_bound.get(bound, 0.0) + value
        bounds = sorted(by_bound)
        if not bounds or by_bound[bounds[-1]] == 0:
            return None
        wanted = share * by_bound[bounds[-1]]
        lower = below = 0.0
        for bound in bounds:
            if by_bound[bound] >= wanted and bound != float("inf"):
                inside = by_bound[bound] - below
                return lower + (bound - lower) * ((wanted - below) / inside if inside else 1.0)
            if bound != float("inf"):
                lower, below = bound, by_bound[bound]
        return lower  # beyond the last bound, nothing is known

    def label_values(self, name: str, label: str) -> set[str]:
        return {dict(labels)[label] for labels, _ in self._of(name, {}) if label in dict(labels)}

    def _of(self, name: str, labels: Mapping[str, str]) -> list[tuple[Labels, float]]:
        wanted = set(labels.items())
        return [
            (key[1], value) for key, value in self._values.items() if key[0] == name and wanted <= set(key[1])
        ]
