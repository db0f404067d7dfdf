"""What a run's processes sample together: each so many items, which the main one has all of in the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process's part of some work whose items do not depend on each other.

    Args:
        process: its number.
        processes: how many there are.
    """

    process: int = 0
    processes: int = 1

    @classmethod
    def of(cls, accelerator: "Accelerator") -> "Share":
        """That of a run's process."""
        return cls(accelerator.process_index, accelerator.num_processes)

    def items(self, count: int) -> list[int]:
        """Which of `count` items are this process's, in order: every so many one.

        Every process has as many, as networks that are sharded must be called alike: what is beyond the end is the last
        item once more.
        """
        rounds = -(-count // self.processes)
        return [min(number * self.processes + self.process, count - 1) for number in range(rounds)]

    def together(self, made: Mapping[int, T]) -> dict[int, T]:
        """What all processes have made, by item, in order, for the main one; nothing for the others.

        They must all come here. It goes through host memory: a GPU has no room for everybody's.
        """
        if self.processes == 1:
            return dict(sorted(made.items()))
        from torch import distributed

        gloo = distributed.get_backend() == "gloo"
        group = None if gloo else distributed.new_group(backend="gloo")
        everybody: list[Any] | None = [None] * self.processes if self.process == 0 else None
        distributed.gather_object(dict(made), everybody, dst=0, group=group)
        if group is not None:
            distributed.destroy_process_group(group)
        merged = {item: value for part in everybody or () for item, value in part.items()}
        return {item: merged[item] for item in sorted(merged)}
