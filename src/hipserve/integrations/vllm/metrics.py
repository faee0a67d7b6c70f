"""Counters of HiP attention on `/metrics`, along with vLLM's own.

vLLM computes in worker processes and answers `/metrics` in another. Every worker keeps its numbers
in a small mapped file of a directory that belongs to the engine; the collector adds them up.
"""

from __future__ import annotations

import atexit
import functools
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from vllm.v1.metrics.loggers import StatLoggerBase

from hipserve.integrations.vllm import compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Reason = Literal["dense_layer", "model_window", "short"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a worker; `reason` is its label, if it has one."""

    name: str
    help: str
    reason: Reason | None = None
    gauge: bool = False


_DENSE = (
    "Query blocks, times layers, that read every key: in a dense layer, in a window of the model, "
    "or too short to prune."
)

METRICS = (
    Metric("hipserve_keys_read", "Keys that rows read, in the first pruned layer of a worker."),
    Metric("hipserve_keys_visible", "Keys that the same rows would read with dense attention."),
    Metric("hipserve_selection_seconds", "Time of selection, summed over layers and workers."),
    Metric("hipserve_attention_seconds", "Time of attention, summed over layers and workers."),
    Metric("hipserve_refreshes", "Decode rows, times layers, that selected keys."),
    Metric("hipserve_reuses", "Decode rows, times layers, that used their last selection again."),
    Metric("hipserve_query_blocks", "Query blocks, times layers."),
    Metric("hipserve_found_keys", "Keys that requests found computed, and whose index was built."),
    Metric("hipserve_dense_query_blocks", _DENSE, "dense_layer"),
    Metric("hipserve_dense_query_blocks", _DENSE, "model_window"),
    Metric("hipserve_dense_query_blocks", _DENSE, "short"),
    Metric("hipserve_page_bound_bytes", "Memory of the index inside the KV blocks.", gauge=True),
    Metric("hipserve_pool_bytes", "Keys and values apart from KV blocks.", gauge=True),
    Metric("hipserve_arena_bytes", "Tiles of them on the device, and tables.", gauge=True),
    Metric("hipserve_tiles_needed", "Tiles that steps read, summed over layers and heads."),
    Metric("hipserve_tiles_loaded", "Those of them that had to be loaded from host memory."),
    Metric(
        "hipserve_pool_read_bytes", "Bytes of a file with them that steps needed, of all layers."
    ),
    Metric("hipserve_pool_stalls", "Page faults of workers with such a file that read a disk."),
)
LAYER_METRICS = (
    Metric(
        "hipserve_unread_attention",
        "Estimated shares of attention that metered rows left unread, summed over query heads.",
    ),
    Metric("hipserve_metered", "Metered rows, times query heads."),
)
"""Numbers of every layer, which is their label. Only the meter counts them."""
LAYERS = 512
"""More than any model has."""
SIZE = len(METRICS) + LAYERS * len(LAYER_METRICS)
_PLACES = {(metric.name, metric.reason): place for place, metric in enumerate(METRICS)}


def directory(instance_id: str) -> Path:
    """Where the workers of an engine keep their numbers, on this host."""
    return Path(tempfile.gettempdir()) / f"hipserve-{os.getuid()}-{instance_id}"


class Tally:
    """The numbers of this process."""

    def __init__(self, folder: Path, worker: str = "") -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path = folder / f"worker-{worker or os.getpid()}"
        with self.path.open("w+b") as file:
            file.truncate(8 * SIZE)
            # Layers add several numbers each: to a view of doubles, which costs less than an array.
            self._values = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
        atexit.register(self.remove)

    def add(self, name: str, value: float, reason: Reason | None = None) -> None:
        self._values[_PLACES[name, reason]] += value

    def add_unread(self, layer: int, total: float, count: int) -> None:
        """Adds what was metered in a layer: shares in all, and how many."""
        place = len(METRICS) + layer * len(LAYER_METRICS)
        self._values[place] += total
        self._values[place + 1] += count

    def remove(self) -> None:
        """Removes the numbers, and the directory with the last of them."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.exists() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


@functools.cache
def tally(instance_id: str) -> Tally:
    """The numbers of this process for an engine."""
    return Tally(directory(instance_id))


def totals(folders: set[Path]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`[SIZE]` float64, summed over the workers of some engines: `METRICS`, then of every layer
    `LAYER_METRICS`."""
    sums = np.zeros(SIZE)
    for path in (path for folder in folders for path in folder.glob("worker-*")):
        values = np.fromfile(path)
        if len(values) == len(sums):  # else the worker is just starting or ending
            sums += values
    return sums


class HiPCollector(Collector):
    """What a scrape of `/metrics` reads."""

    def __init__(self) -> None:
        self.folders: set[Path] = set()

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        values = totals(self.folders)
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for metric, value in zip(METRICS, values[: len(METRICS)], strict=True):
            family = families.setdefault(metric.name, _family(metric))
            family.add_metric([metric.reason] if metric.reason else [], value)
        yield from families.values()
        layers = values[len(METRICS) :].reshape(LAYERS, -1)
        for i, metric in enumerate(LAYER_METRICS):
            family = CounterMetricFamily(metric.name, metric.help, labels=["layer"])
            for layer in layers[:, -1].nonzero()[0]:
                family.add_metric([str(layer)], layers[layer, i])
            yield family


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    kind = GaugeMetricFamily if metric.gauge else CounterMetricFamily
    return kind(metric.name, metric.help, labels=["reason"] if metric.reason else [])


_collector = HiPCollector()


def show(registry: CollectorRegistry) -> CollectorRegistry:
    """Adds the collector to a registry that `/metrics` is made of."""
    if _collector.folders and not getattr(registry, "shows_hipserve", False):
        registry.register(_collector)
        registry.shows_hipserve = True  # type: ignore[attr-defined]
    return registry


class HiPStatLogger(StatLoggerBase):
    """`vllm.stat_logger_plugins`: adds the collector in vLLM's API server."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:  # noqa: ARG002
        if compat.uses_hip(vllm_config):
            folder = directory(vllm_config.instance_id)
            _collector.folders.add(folder)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            compat.extend_registry(show)

    def record(self, *_: Any, **__: Any) -> None:
        """Does nothing: the workers count."""

    def log_engine_initialized(self) -> None:
        """Logs nothing."""
