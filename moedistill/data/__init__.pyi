from .base import Dataset as Dataset
from .base import DatasetConfig as DatasetConfig
from .base import Sample as Sample
from .latents import write_latents as write_latents
from .loading import Batch as Batch
from .loading import collate as collate
