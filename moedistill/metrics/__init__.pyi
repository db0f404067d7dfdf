from .base import Metric as Metric
from .base import MetricConfig as MetricConfig
from .base import MetricInputs as MetricInputs
from .statistics import edge_energy as edge_energy
from .statistics import frechet_distance as frechet_distance
from .statistics import unrest as unrest
