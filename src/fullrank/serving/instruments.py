"""What `/metrics` reports."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

SECONDS = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 5.0)


class Instruments:
    """Counters of one application; each has a registry of its own, so that several can live in one process.

    Args:
        shared: directory in which the processes of a server count, by `prometheus_client`'s multiprocess mode: what is
            read is the sum over all of them, those that have ended included.
    """

    def __init__(self, shared: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self._shared = shared
        self._model: tuple[str, float] | None = None
        self.requests = Counter(
            "fullrank_requests", "Requests by path and HTTP status.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "fullrank_request_seconds", "Whole request.", ("path",), registry=self.registry, buckets=SECONDS
        )
        self.stage_seconds = Histogram(
            "fullrank_stage_seconds",
            "Encoding of requests, and each stage of the funnel; of a pass, which may make several lists.",
            ("stage",),
            registry=self.registry,
            buckets=SECONDS,
        )
        self.degraded = Counter(
            "fullrank_stage_degraded",
            "Lists for which a stage was late or failed, and another order stood in.",
            ("stage",),
            registry=self.registry,
        )
        self.together = Histogram(
            "fullrank_lists_together",
            "Lists made in one pass of the funnel.",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32),
        )
        self.in_flight = Gauge(
            "fullrank_requests_in_flight", "Requests being served.", registry=self.registry, multiprocess_mode="livesum"
        )
        self.rows = Gauge(
            "fullrank_rows_admitted",
            "Rows to be scored that were let in.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.refused = Counter(
            "fullrank_requests_refused", "Requests answered with 429 because too much waited.", registry=self.registry
        )

        self.swaps = Counter(
            "fullrank_swaps",
            "Bundles that came while serving: swapped, refused, rolled_back.",
            ("outcome",),
            registry=self.registry,
        )
        self.items = Gauge("fullrank_items", "Items of the catalogue that is served.", registry=self.registry)

        self.impressions = Counter("fullrank_impressions", "Lists kept in the store.", registry=self.registry)
        self.impressions_dropped = Counter(
            "fullrank_impressions_dropped", "Lists that the store had no room or time for.", registry=self.registry
        )

        self.arm_requests = Counter("fullrank_arm_requests", "Lists by arm.", ("arm",), registry=self.registry)
        self.arm_degraded = Counter(
            "fullrank_arm_degraded",
            "Lists by arm with a stage late or failed.",
            ("arm",),
            registry=self.registry,
        )
        self.arm_rewarded = Counter(
            "fullrank_arm_rewarded", "Lists by arm for which a reward came.", ("arm",), registry=self.registry
        )
        self.arm_seconds = Histogram(
            "fullrank_arm_seconds", "Making of a list, by arm.", ("arm",), registry=self.registry, buckets=SECONDS
        )

    def observe_stage(self, stage: str, seconds: float) -> None:
        self.stage_seconds.labels(stage).observe(seconds)

    def observe_arm(self, arm: str, seconds: float, *, degraded: bool) -> None:
        self.arm_requests.labels(arm).inc()
        self.arm_seconds.labels(arm).observe(seconds)
        if degraded:
            self.arm_degraded.labels(arm).inc()

    def serve_model(self, version: str, until: float) -> None:
        """Say which version is served, and up to which second it has learnt."""
        self._model = version, until

    def collect(self) -> Iterator[Metric]:
        """All metrics; what processes count is added up, and what they serve is as this one has it."""
        summed: dict[str, Metric] = {}
        if self._shared is not None:
            kinds = ("counter", "histogram", "gauge_livesum")
            files = [file for kind in kinds for file in self._shared.glob(f"{kind}_*.db") if file.stat().st_size]
            summed = {metric.name: metric for metric in MultiProcessCollector.merge(map(str, files))}  # type: ignore[no-untyped-call]
        for metric in self.registry.collect():
            yield summed.pop(metric.name, metric)
        # Of the process that answers to none of these requests, which replaces others.
        yield from summed.values()
        model = GaugeMetricFamily("fullrank_model", "1 for the version that is served.", labels=["version"])
        age = GaugeMetricFamily("fullrank_model_age_seconds", "Since the last event that the model has learnt.")
        if self._model is not None:
            version, until = self._model
            model.add_metric([version], 1)
            age.add_metric([], time.time() - until)
        yield from (model, age)

    def totals(self, name: str) -> dict[tuple[str, ...], float]:
        """Samples of that name, by the values of their labels."""
        return {
            tuple(sample.labels.values()): sample.value
            for family in self.collect()
            for sample in family.samples
            if sample.name == name
        }

    def quantiles(self, name: str, shares: Sequence[float]) -> dict[str, tuple[int, list[float]]]:
        """Of a histogram by its one label: observations since the start, and quantiles, straight within a bucket."""
        buckets: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for (label, bound), count in self.totals(f"{name}_bucket").items():
            buckets[label].append((float(bound), count))
        return {
            label: (int(cumulative[-1][1]), [_quantile(cumulative, share) for share in shares])
            for label, cumulative in buckets.items()
            if cumulative[-1][1]
        }


def _quantile(cumulative: Sequence[tuple[float, float]], share: float) -> float:
    """The share's quantile of counts at or below each bound, the last of which is infinite."""
    wanted = share * cumulative[-1][1]
    low, below = 0.0, 0.0
    for bound, count in cumulative:
        if count >= wanted:
            return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / max(count - below, 1e-12)
        low, below = bound, count
    return low
