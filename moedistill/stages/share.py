"""What a run's processes sample together: each so many items, which the main one has all of in the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

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
        """What all processes have made, by item, in order; they must all come here."""
        from accelerate.utils import gather_object

        everything = dict(gather_object(list(made.items()))) if self.processes > 1 else made
        return {item: everything[item] for item in sorted(everything)}
