"""What one of a run's processes does for all of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from moedistill.errors import Interrupted, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def on_main(accelerator: "Accelerator", work: Callable[[], T]) -> T:
    """What `work` gives, which the main process alone does, on all processes; they must all come here.

    Raises:
        UserError: on the others, where `work` raised on the main process: nobody waits for what never comes.
        Interrupted: likewise, where a signal stopped it.
    """
    from accelerate.utils import broadcast_object_list

    if accelerator.num_processes == 1:
        return work()
    result: T | None = None
    failure: tuple[str, int] | None = None
    try:
        if accelerator.is_main_process:
            result = work()
    except BaseException as error:
        failure = str(error) or type(error).__name__, getattr(error, "signum", 0)
        raise
    finally:
        result, failure = broadcast_object_list([result, failure])
    if failure is not None:
        message, signum = failure
        raise Interrupted(signum, message) if signum else UserError(message)
    return result
