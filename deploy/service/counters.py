"""Counters of the service, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Counters:
    """What `/metrics` gives.

    Args:
        live: [`LiveIndex`].
        waiting: Function that gives the number of images that wait.
    """

    def __init__(self, live, waiting):
        self.registry = CollectorRegistry()
        labels = ["method", "route", "status"]
        self._requests = Counter("vptsp_requests", "Requests", labels, registry=self.registry)
        self._seconds = Histogram(
            "vptsp_request_seconds", "Seconds", labels[:2], buckets=_SECONDS, registry=self.registry
        )
        self._batches = Histogram(
            "vptsp_batch_images", "Images of a forward pass", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        for name, text, value in (
            ("vptsp_waiting_images", "Images that wait for the model", waiting),
            ("vptsp_items", "Items of the index", lambda: len(live.index)),
            ("vptsp_journal_changes", "Changes since the index was saved as a whole", lambda: live.pending),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def observe(self, method, route, status, seconds):
        """Count a request."""
        self._requests.labels(method, route, status).inc()
        self._seconds.labels(method, route).observe(seconds)

    def observe_batch(self, images):
        """Count a forward pass."""
        self._batches.observe(images)

    def text(self):
        """All of them, bytes."""
        return generate_latest(self.registry)


__all__ = ["Counters"]
