"""One process of several: runs configs one after the other. In one run, the disk is full for the last process.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.checkpoint_worker RUNS.json
"""

from __future__ import annotations

import os

from tests.distributed import worker
from vlm_sapo.training import checkpoint

STEP = 2


def main() -> None:
    write = checkpoint._list

    def full(folder, *known):
        if int(os.environ["RANK"]) and f"step_{STEP:06d}" in str(folder) and "full" in str(folder):
            raise OSError(28, "No space left on device")
        write(folder, *known)

    checkpoint._list = full
    worker.main()


if __name__ == "__main__":
    main()
