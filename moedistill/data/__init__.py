"""Datasets and the batches made of them."""

from moedistill.data.base import Dataset, DatasetConfig, Sample

__all__ = ["Dataset", "DatasetConfig", "Sample"]
