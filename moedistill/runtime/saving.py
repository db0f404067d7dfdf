"""A checkpoint that all processes of a run write together while training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moedistill.errors import WriteError
from moedistill.runtime.checkpoint import Checkpoints, pack, save_form, write_sums
from moedistill.runtime.integrity import sum_of
from moedistill.runtime.shards import shard_name, write_shards
from moedistill.runtime.writing import disk_errors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Saving:
    """One checkpoint under way; every process has one, and all were made together.

    It gets its name when all its files are written and their sums are known: until then there is only what was there
    before, however this ends.

    Args:
        temporary: where `Checkpoints.begin` said, seen by all processes.
        trees: as `save_tree` takes them, with tensors that may be sharded; they are copied here.
        group: of all processes, for this alone: it is used while others speak.
        done: called with the checkpoint once it is there, from another thread.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        name: str,
        temporary: Path,
        trees: Mapping[str, Any],
        group: "ProcessGroup",
        done: Callable[[Path], None],
    ) -> None:
        self._checkpoints, self._name, self._temporary = checkpoints, name, temporary
        self._group, self._tell = group, done
        tensors: dict[str, Tensor] = {}
        self._forms = {}
        for tree, content in trees.items():
            own: dict[str, Tensor] = {}
            self._forms[tree] = pack(content, own, "")
            tensors |= {f"{tree}{path}": tensor for path, tensor in own.items()}
        written = write_shards(temporary, tensors, group)
        self._thread = ThreadPoolExecutor(1)
        self._done = self._thread.submit(self._complete, written)

    @property
    def path(self) -> Path:
        """Of the checkpoint, once it is done."""
        return self._checkpoints.folder / self._name

    def done(self) -> bool:
        """Whether it is there, or has failed."""
        return self._done.done()

    def wait(self) -> None:
        """Returns when the checkpoint is there.

        Raises:
            WriteError: there is no room for it, or the disk refuses otherwise, on any of the processes.
        """
        try:
            self._done.result()
        finally:
            self._thread.shutdown()

    def _complete(self, written: "Future[Any]") -> None:
        from torch import distributed
        from torch.distributed.checkpoint import CheckpointException

        sums: dict[str, str] = {}

        def sum_up() -> None:
            try:
                written.result()
            except CheckpointException as error:
                raise next((cause for cause, _ in error.failures.values()), error) from error
            own = self._temporary / shard_name(distributed.get_rank())
            if own.is_file():
                sums[own.name] = sum_of(own)

        def finish() -> None:
            for tree, form in self._forms.items():
                save_form(self._temporary, tree, form)
            write_sums(self._temporary, sums)
            self._checkpoints.finish(self._name)

        for each in self._on_all(sum_up, sums):
            sums |= each
        self._on_all(finish if distributed.get_rank() == 0 else lambda: None, None)
        self._tell(self.path)

    def _on_all(self, work: Callable[[], None], result: Any) -> list[Any]:
        """What all processes have as `result` when each has done its `work`; where one fails, all do."""
        from torch import distributed

        failure: BaseException | None = None
        try:
            with disk_errors(self.path):
                work()
        except Exception as error:
            failure = error
        outcomes: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(outcomes, (result, failure and str(failure)), group=self._group)
        if failure is not None:
            raise failure
        if told := next((message for _, message in outcomes if message is not None), None):
            raise WriteError(told)
        return [each for each, _ in outcomes]
