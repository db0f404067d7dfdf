"""Observers of a run: metrics.jsonl, curves, the progress display, trackers. They implement a plugin's hooks."""

from moedistill.runs.callbacks.curves import Curves
from moedistill.runs.callbacks.metrics_file import MetricsFile, drop_later_lines
from moedistill.runs.callbacks.progress import Progress
from moedistill.runs.callbacks.trackers import Trackers

__all__ = ["Curves", "MetricsFile", "Progress", "Trackers", "drop_later_lines"]
