"""What a user did wrong, told in one or two lines instead of a traceback."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do."""


def told(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a script's `main`: a `UserError` is printed in plain words and ends the process with status 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapper
