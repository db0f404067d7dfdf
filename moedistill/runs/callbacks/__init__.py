"""Observers of a run: metrics.jsonl, the progress display, trackers. They implement the same hooks as a plugin may."""

from moedistill.runs.callbacks.metrics_file import MetricsFile, drop_later_lines
from moedistill.runs.callbacks.progress import Progress
from moedistill.runs.callbacks.trackers import Trackers

__all__ = ["MetricsFile", "Progress", "Trackers", "drop_later_lines"]
