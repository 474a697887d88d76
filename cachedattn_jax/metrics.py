"""An engine's counters as Prometheus metrics, with the names of other servers.

Knows names and labels. Does not know how the text is served; sessions and tenants are
no labels, since there may be any number of them.

    from cachedattn_jax import prometheus_text
    prometheus_text(engine)                       # what GET /metrics answers
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from cachedattn_jax.engine.totals import BOUNDS_S, Histogram

if TYPE_CHECKING:
    from cachedattn_jax.engine.engine import Engine

_PREFIX = "cachedattn_"
_TIMES = {
    "ttft": ("time_to_first_token_seconds", "from the submission to the first token"),
    "queue": ("request_queue_time_seconds", "from the submission to the prefill"),
    "latency": ("e2e_request_latency_seconds", "from the submission to the end"),
    "inter_token": ("inter_token_latency_seconds", "mean between tokens of a turn"),
    "exposed_stall": (
        "exposed_load_stall_seconds",
        "loads that were waited for",
    ),
}
_DIRECTIONS = {
    "device_to_host": "d2h",
    "host_to_device": "h2d",
    "disk_to_host": "read",
    "host_to_disk": "write",
}
_BREAKER_STATES = {"closed": 0, "trying": 1, "open": 2}


class EngineCollector(Collector):
    """Reads an engine whenever it is scraped.

    Args:
        model_name: a label of every metric.
    """

    def __init__(self, engine: "Engine", model_name: str = "model") -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        yield from self._turns()
        yield from self._requests()
        yield from self._tiers()
        yield from self._moves()
        yield from self._storage()

    def _turns(self) -> Iterator[Metric]:
        totals = self._engine.totals
        tokens = totals.prompt_tokens
        cached = {tier: tokens[tier] for tier in ("device", "host", "disk")}
        prompts = tokens.total()
        yield self._counter("prompt_tokens", "of all prompts", prompts)
        yield self._counter("generation_tokens", "of replies", totals.reply_tokens)
        yield self._counters("cached_tokens", "found", "cache_source", cached)
        # New tokens of a turn were never stored and are no query.
        queries = prompts - tokens["new"]
        yield self._counter("prefix_cache_queries", "tokens looked for", queries)
        yield self._counters("prefix_cache_hits", "tokens found", "tier", cached)
        yield self._counters("turns", "ended", "finish_reason", totals.turns)
        yield self._counters("decisions", "load or compute", "choice", totals.decisions)
        for name, (metric, text) in _TIMES.items():
            yield self._histogram(metric, text, totals.times[name])

    def _requests(self) -> Iterator[Metric]:
        scheduler = self._engine.scheduler
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        yield self._gauge("num_requests_running", "turns with a seat", running)
        yield self._gauge("num_requests_waiting", "turns in the queue", waiting)

    def _tiers(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        used, total = stats.used_bytes, stats.capacity_bytes
        share = used["device"] / max(1, total["device"])
        yield self._gauge("kv_cache_usage_perc", "share of slots in use, 0 to 1", share)
        for tier in ("host", "disk"):
            yield self._gauge(f"{tier}_used_bytes", "charged", used[tier])
            yield self._gauge(f"{tier}_total_bytes", "budget", total[tier])
        yield self._gauge("active_sessions", "known sessions", stats.sessions)
        yield self._gauge("active_holds", "pages held by turns", stats.held_pages)

    def _moves(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        misses = stats.misses
        yield self._counters("page_misses", "stored, not used", "reason", misses)
        evicted = CounterMetricFamily(
            _PREFIX + "evicted_pages",
            "pages that left a tier",
            labels=["model_name", "from", "reason"],
        )
        for (tier, reason), count in stats.evictions.items():
            evicted.add_metric([self._model_name, tier, reason], count)
        yield evicted
        moved = {_DIRECTIONS[d]: n for d, n in stats.bytes_moved.items()}
        seconds = {_DIRECTIONS[d]: s for d, s in stats.seconds_moving.items()}
        yield self._counters("transfer_bytes", "moved", "dir", moved)
        yield self._counters("transfer_seconds", "spent moving", "dir", seconds)

    def _storage(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield self._counters(
            "storage_operations", "on the root", "operation", stats.operations
        )
        failures = CounterMetricFamily(
            _PREFIX + "storage_failures",
            "operations that failed",
            labels=["model_name", "operation", "reason"],
        )
        for (operation, reason), count in stats.failures.items():
            failures.add_metric([self._model_name, operation, reason], count)
        yield failures
        corrupt = stats.corruptions
        yield self._counters("checksum_mismatch", "bad objects", "reason", corrupt)
        quarantined = stats.quarantined
        yield self._counter("quarantined_objects", "moved away", quarantined)
        states = {name: _BREAKER_STATES[s] for name, s in stats.breakers.items()}
        yield self._gauges("breaker_state", "0 closed, 1 trying, 2 open", states)
        unstored = stats.records_unstored
        yield self._gauge("records_unstored", "records not on disk yet", unstored)

    def _counter(self, name: str, text: str, value: int | float) -> Metric:
        metric = CounterMetricFamily(_PREFIX + name, text, labels=["model_name"])
        metric.add_metric([self._model_name], value)
        return metric

    def _counters(
        self, name: str, text: str, label: str, values: Mapping[str, int | float]
    ) -> Metric:
        labels = ["model_name", label]
        metric = CounterMetricFamily(_PREFIX + name, text, labels=labels)
        for key, value in values.items():
            metric.add_metric([self._model_name, key], value)
        return metric

    def _gauge(self, name: str, text: str, value: int | float) -> Metric:
        metric = GaugeMetricFamily(_PREFIX + name, text, labels=["model_name"])
        metric.add_metric([self._model_name], value)
        return metric

    def _gauges(
        self, name: str, text: str, values: Mapping[str, int | float]
    ) -> Metric:
        labels = ["model_name", "operation"]
        metric = GaugeMetricFamily(_PREFIX + name, text, labels=labels)
        for key, value in values.items():
            metric.add_metric([self._model_name, key], value)
        return metric

    def _histogram(self, name: str, text: str, times: Histogram) -> Metric:
        metric = HistogramMetricFamily(_PREFIX + name, text, labels=["model_name"])
        buckets, below = [], 0
        for bound, count in zip((*BOUNDS_S, "+Inf"), times.counts, strict=True):
            below += count
            buckets.append((str(bound), below))
        metric.add_metric([self._model_name], buckets, times.sum_s)
        return metric


def prometheus_text(engine: "Engine", model_name: str = "model") -> str:
    """All metrics of an engine in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, model_name))
    return generate_latest(registry).decode()
