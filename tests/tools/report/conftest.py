"""Two copies of a short real run, with hostile text written into them afterwards."""

import json
import shutil

import pytest

from tests.training.conftest import short_run
from vlm_sapo.training.trainer import train

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\u202e&amp;\u2028"


@pytest.fixture(scope="session")
def runs(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = ("eval.every=2", "checkpoint.every=0", "rollout.temperature=1.5")
    train(short_run(folder, model_folder(), *options))
    first, second = folder / "run", folder / "other"
    shutil.copytree(first, second)
    for run in (first, second):
        rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
        rows[0] |= {"response": HOSTILE, "problem": HOSTILE}
        (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return first, second
