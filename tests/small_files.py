"""A limit of the system on the size of files: what is written beyond it fails for real, with EFBIG."""

import resource
import signal
from contextlib import contextmanager


def limit(size):
    """From now on no file of this process may grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def files_of(size=None):
    """The limit, or one that the block sets itself, in the block alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if size is not None:
            limit(size)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
