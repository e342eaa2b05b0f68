"""`python -m vlm_sapo` is `vlm-sapo`."""

import sys

from vlm_sapo.search_path import library_path

if __name__ == "__main__":
    sys.path[:] = library_path()
    from vlm_sapo.cli import main

    main()
