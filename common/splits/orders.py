"""Orders of images whose first images are labeled: stored orders published by memory bank, and random orders."""

import pickle
from pathlib import Path

import numpy as np

from common.config.sections import DataConfig
from common.errors import UserError
from common.splits.published import commands, entry_at

# Objects in a pickled array of integers; nothing else is looked up or executed.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


STORED = (0, 1, 2)  # ids of stored orders; larger ids are random orders


def order_of(data: DataConfig, count: int) -> np.ndarray:
    """Order int64 [N] of `count` images for `data.split_id`.

    Raises:
        UserError: the stored order is missing or has another number of images; see also `read_order`.
    """
    if data.split_id not in STORED:
        return random_order(data.split_seed, data.split_id, count)
    random = f"a data.split_id above {STORED[-1]} for a random order"
    if data.order_dir is None:
        raise UserError(
            f"data.split_id {data.split_id} is a stored order: set data.order_dir to the folder of "
            f"split_{data.split_id}.pkl, or give {random}"
        )
    path = Path(data.order_dir).expanduser() / f"split_{data.split_id}.pkl"
    if not path.is_file():
        entry = entry_at(path, data.labeled_samples)
        how = f"get the published ones with\n{commands(entry, data.root, path)}\n" if entry else ""
        raise UserError(
            f"no stored order {path}: {how}copy the released split_0.pkl, split_1.pkl and split_2.pkl there, set "
            f"data.order_dir to their folder, or give {random}"
        )
    order = read_order(path)
    if len(order) != count:
        raise UserError(
            f"{path} orders {len(order)} images, but {data.root} has {count} for training: "
            f"it belongs to another tree; give {random}"
        )
    return order


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise UserError(f"refused, since reading it would execute {module}.{name}")
        return ALLOWED[module, name]


def read_order(path: str | Path) -> np.ndarray:
    """Read the order of images, int64 [N], in a released `split_<id>.pkl`. No code in the file is executed.

    Raises:
        UserError: the file is missing, is damaged, contains anything but an array, or is not an order of 0 to N - 1.
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
        raise UserError(f"split {path}: damaged, or not a pickled array ({type(error).__name__})") from None
    is_order = isinstance(order, np.ndarray) and order.ndim == 1 and order.dtype.kind in "iu"
    if not is_order or not np.array_equal(np.sort(order), np.arange(len(order))):
        raise UserError(f"split {path}: it does not contain an order of the numbers from 0 up")
    return order.astype(np.int64)


def random_order(seed: int, split_id: int, count: int) -> np.ndarray:
    """Draw an order int64 [N] of `count` images for a split id above 2.

    For id 3 it is the order that the release draws from `seed` for all ids; other ids use seed and id.
    """
    order = np.arange(count)
    np.random.RandomState(seed if split_id == 3 else [seed, split_id]).shuffle(order)
    return order
