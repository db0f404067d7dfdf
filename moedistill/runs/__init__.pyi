from .loop import RunResult as RunResult
from .loop import run as run
from .sample import SampleResult as SampleResult
from .sample import load_mixture as load_mixture
from .sample import sample_run as sample_run
from .tables import read_records as read_records
from .tables import tabulate as tabulate
