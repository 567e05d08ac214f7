"""The counts of the engine and of the HTTP interfaces, as Prometheus reads them."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmm_jax.serve.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
GAUGES = ("waiting", "running", "slots")  # Every other number of Engine.counts() only grows.


class EngineCollector:
    """Reads the engine's counts when Prometheus asks."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def describe(self) -> list[Metric]:
        """Names no metric in advance: the engine decides which there are."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields one metric per number that the engine counts."""
        yield GaugeMetricFamily("dmm_jax_ready", "Whether the engine's programs are compiled", float(self.engine.ready))
        for name, value in self.engine.counts().items():
            labels = f"dmm_jax_{name}", f"The engine's {name.replace('_', ' ')}"
            if not isinstance(value, dict):
                yield (GaugeMetricFamily if name in GAUGES else CounterMetricFamily)(*labels, value=float(value))
            elif "buckets" in value:
                buckets = [(floatToGoString(bound), number) for bound, number in value["buckets"].items()]
                yield HistogramMetricFamily(*labels, buckets=buckets, sum_value=value["sum"])
            else:
                sizes = GaugeMetricFamily(*labels, labels=["size"])
                for size, number in value.items():
                    sizes.add_metric([size], float(number))
                yield sizes


class Metrics:
    """One server's metrics."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        labels, registry = ("path", "status"), {"registry": self.registry}
        self.requests = Counter("dmm_jax_http_requests", "HTTP requests that were answered", labels, **registry)
        self.seconds = Histogram(
            "dmm_jax_http_seconds", "Seconds until an answer was complete", ("path",), buckets=SECONDS, **registry
        )

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class Measured:
    """An ASGI application that counts the requests to another and times them."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]):
        """Takes the known paths: any other counts as "other", so that clients cannot make labels."""
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), "none"

        async def watch(message: Message) -> None:
            nonlocal status
            status = str(message["status"]) if message["type"] == "http.response.start" else status
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
