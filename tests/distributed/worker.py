"""One process of several: runs configs one after the other, so that the start is paid once.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.worker RUNS.json
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from vlm_sapo import config as cfg
from vlm_sapo import configfile
from vlm_sapo.training.sft import sft
from vlm_sapo.training.trainer import train


def main() -> None:
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state()  # each run may choose its precision
        supervised = run["verb"] == "sft"
        config = configfile.load(
            cfg.SftConfig if supervised else cfg.TrainConfig, run["config"], run["overrides"]
        )
        try:
            (sft if supervised else train)(config)
        except Exception:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            (config.run.folder / f"failure_{rank}.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
