"""What a service counts, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class ServiceMetrics:
    """Counters of one service; each service has its own registry."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gdrt_requests", "Answers to POST /v1/recommend by status.", ["status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "gdrt_request_seconds",
            "Time from a complete request to its answer, of answers with status 200.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "gdrt_batch_size", "Histories scored at once.", buckets=SIZES, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "gdrt_batch_seconds", "Time of the model for a batch.", buckets=SECONDS, registry=self.registry
        )
        self.waiting = Gauge("gdrt_waiting", "Requests in the queue.", registry=self.registry)

    def add_batch(self, size: int, seconds: float) -> None:
        """Counts one batch of the model."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """The page /metrics."""
        return generate_latest(self.registry)


class CountedAnswers:
    """Wraps an ASGI application and counts its answers to POST /v1/recommend, refusals included.

    It stands outside of everything else that answers: a refused body never reaches a route.
    """

    def __init__(self, app, requests: Counter):
        self.app = app
        self.requests = requests

    async def __call__(self, scope, receive, send) -> None:
        counted = scope["type"] == "http" and (scope["method"], scope["path"]) == ("POST", "/v1/recommend")

        async def counting(message) -> None:
            if counted and message["type"] == "http.response.start":
                self.requests.labels(str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counting)
