"""One process of several: runs configs one after the other, so that the start is paid once.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.worker RUNS.json
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Imports here: processes that grade import this module, too."""
    import torch
    from accelerate.state import AcceleratorState

    from vlm_sapo.config import load as configfile
    from vlm_sapo.config import schema as cfg
    from vlm_sapo.training.sft import sft
    from vlm_sapo.training.trainer import train

    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state()  # each run may choose its precision
        kind, verb = (cfg.SftConfig, sft) if run["verb"] == "sft" else (cfg.TrainConfig, train)
        config = configfile.load(kind, run["config"], run["overrides"])
        try:
            verb(config)
        except Exception:
            rank = torch.distributed.get_rank()
            (config.run.folder / f"failure_{rank}.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
