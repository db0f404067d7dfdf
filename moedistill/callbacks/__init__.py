"""Observers of a run: metrics.jsonl, the progress display, trackers. They implement the same hooks as a plugin may."""

from moedistill.callbacks.metrics_file import MetricsFile
from moedistill.callbacks.progress import Progress
from moedistill.callbacks.trackers import Trackers

__all__ = ["MetricsFile", "Progress", "Trackers"]
