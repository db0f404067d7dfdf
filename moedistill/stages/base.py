"""The contracts of a stage: one that is done at once, and one that is trained step by step."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from moedistill.data.loading import Batch
from moedistill.recipe.keys import TrainingStageConfig
from moedistill.stages.run import Run

if TYPE_CHECKING:
    from moedistill.stages.monitor import Monitor
    from moedistill.stages.training import Training


class Stage(ABC):
    """A built stage."""

    def look_ahead(self, run: Run) -> None:  # noqa: B027  many need nothing
        """Tries what the stage will need of the loaded model; called before anything is trained, on the main process.

        Raises:
            ValueError: it would fail.
        """

    @abstractmethod
    def execute(self, run: Run) -> None:
        """Does the whole stage; results go to `run.metrics[name]` and the run's folder.

        All processes come here. What is for one alone, such as writing, is for `run.main`; what all do together, such
        as sampling (`Share`), none may leave out: the others would wait for it.
        """


class TrainingStage(ABC):
    """A stage whose work is one `step`, repeated. The loop around it is that of `moedistill.runs.loop`."""

    config: TrainingStageConfig

    @abstractmethod
    def setup(self, training: "Training") -> None:
        """Makes things trainable and reads what is fixed for the whole stage."""

    @abstractmethod
    def step(self, training: "Training", batch: Batch) -> None:
        """One micro-batch: noising, networks, losses and every update, in order."""

    def monitor(self, training: "Training") -> "Monitor | None":
        """What is measured on fixed draws while the stage goes on; by default nothing."""
        return None
