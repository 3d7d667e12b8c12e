"""The exposition: from facts and buckets to Prometheus' text, by prometheus-client."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvstored.metrics_table import HISTOGRAMS, METRICS, Facts
from kvstored.metrics_timing import Buckets, Timings

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Exposition(Collector):
    """One thread's. `facts` is what the next `render` says."""

    def __init__(self, facts: Facts, timings: Timings) -> None:
        self.facts = facts
        self._timings = timings
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """Some milliseconds."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """`prometheus_client`'s."""
        for metric in METRICS:
            made = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = made(metric.name, metric.says, labels=metric.labels)
            for labels, value in metric.rows(self.facts):
                family.add_metric(list(labels), float(value))
            yield family
        for (name, says, label), rows in zip(HISTOGRAMS, self._histograms(), strict=True):
            histogram = HistogramMetricFamily(name, says, labels=[label] if label else [])
            for named, buckets in rows:
                ends = zip((*map(floatToGoString, buckets.bounds_s), "+Inf"), buckets.counts, strict=True)
                histogram.add_metric([named] if label else [], list(ends), buckets.sum_s)
            yield histogram

    def _histograms(self) -> Iterator[Iterable[tuple[str, Buckets]]]:
        timings = self._timings
        yield [(name, timing.buckets()) for name, timing in timings.verbs.items()]
        on_disk = [("read", timings.read.buckets()), ("write", timings.write.buckets())]
        yield on_disk if self.facts.disk else []
        yield [("", timings.lag.buckets())]
