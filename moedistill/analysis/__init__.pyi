from .results import Analysis as Analysis
from .study import analyze as analyze
