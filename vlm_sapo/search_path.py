"""Where modules are looked for. Imports nothing that a user's file could stand in for."""

import os
import sys


def library_path() -> list[str]:
    """`sys.path` with the folder that Python adds by itself, the script's or with `-m` the current one, at
    its end: a user's `json.py` or `math_verify.py` there must not stand in for the module of this name."""
    main = vars(sys.modules["__main__"])
    script = main.get("__file__")
    if sys.flags.safe_path:
        return list(sys.path)
    by_name = main.get("__spec__") is not None or script is None
    first = os.getcwd() if by_name else os.path.dirname(os.path.realpath(script))
    path = [entry or os.getcwd() for entry in sys.path]
    if first in path:
        path.remove(first)
        path.append(first)
    return path
