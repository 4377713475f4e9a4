"""Which images are labeled: the first ones of a stored order, or of a random one."""

import pickle
from pathlib import Path

import numpy as np

from common.errors import UserError

# What a pickled array of integers is made of; nothing else is ever looked up, let alone run.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise UserError(f"refused, since reading it would execute {module}.{name}")
        return ALLOWED[module, name]


def read_order(path: str | Path) -> np.ndarray:
    """The order of the images, int64 [N], in a released `split_<id>.pkl`. No code in the file is ever executed.

    Raises:
        UserError: no such file, a damaged one, one that holds anything but an array, no order of 0 to N - 1.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            order = _ArrayUnpickler(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"split {path}: {error}") from None
    except OSError as error:
        raise UserError(f"split {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # damaged bytes raise nearly anything
        raise UserError(f"split {path}: damaged, or no pickled array ({type(error).__name__})") from None
    is_order = isinstance(order, np.ndarray) and order.ndim == 1 and order.dtype.kind in "iu"
    if not is_order or not np.array_equal(np.sort(order), np.arange(len(order))):
        raise UserError(f"split {path}: it holds no order of the numbers from 0 up")
    return order.astype(np.int64)


def random_order(seed: int, split_id: int, count: int) -> np.ndarray:
    """A random order of `count` images, int64 [N], for split ids above 2.

    That of id 3 is the one the release draws from `seed` for all of them; the others follow from seed and id.
    """
    order = np.arange(count)
    np.random.RandomState(seed if split_id == 3 else [seed, split_id]).shuffle(order)
    return order
