"""Where modules are looked for. Imports nothing that a user's file could stand in for."""

import os
import sys

_ORDERED: list[bool] = []
"""Not empty once `sys.path` itself is in this order."""


def library_path() -> list[str]:
    """`sys.path` with the folder that Python adds by itself, the script's or with `-m` the current one, at
    its end: a user's `json.py` or `math_verify.py` there must not stand in for the module of this name. Only
    where this package itself is found by that folder alone, it stays in front."""
    if sys.flags.safe_path or _ORDERED:
        return list(sys.path)
    main = vars(sys.modules["__main__"])
    script = main.get("__file__")
    by_name = main.get("__spec__") is not None or script is None
    first = os.getcwd() if by_name else os.path.dirname(os.path.realpath(script))
    path = [entry or os.getcwd() for entry in sys.path]
    own = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if first in path and (first != own or path.count(first) > 1):
        path.remove(first)
        path.append(first)
    return path


def use_library_path() -> None:
    """Puts `sys.path` in this order, for a process that is this package's own."""
    sys.path[:] = library_path()
    _ORDERED.append(True)
