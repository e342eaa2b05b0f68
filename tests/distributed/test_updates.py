"""Updates on uneven groups: that moves between processes change who computes, not what is learnt."""

import json

import pytest
import torch

from tests.distributed.launcher import launch
from tests.distributed.test_processes import same
from tests.distributed.updates import GROUPS, MINIBATCHES, run
from vlm_sapo.distributed import World

pytestmark = pytest.mark.distributed
CASES = {
    "plain": {"plain": True},
    "shared": {"kl": True},
    "sharded": {"kl": True, "sharded": True},
    "moe": {"moe": True, "replay": True},
    "moe-sharded": {"moe": True, "replay": True, "sharded": True},
    "moe-scored-first": {"moe": True, "replay": True, "scored_first": True},
}
RUNS = [(name, 2) for name in CASES] + [("shared", 4), ("sharded", 4)]
"""Cases, and in how many processes."""

BOUND = 1e-4
"""Of a weight's difference after two updates of 1e-3: where a gradient is near 0, Adam turns rounding into up
to 2e-5. A response that is left out gives 4e-3."""


@pytest.fixture(scope="module")
def results(tmp_path_factory, model_folder):
    """Weights and tokens by case, number of processes and whether groups may move."""
    folder = tmp_path_factory.mktemp("updates")
    models = {False: str(model_folder()), True: str(model_folder("qwen3_vl_moe"))}
    alone = [(name, 1) for name, case in CASES.items() if not case.get("sharded")]
    results = {}
    for processes in (1, 2, 4):
        cases = [
            CASES[name]
            | {"name": f"{name}-{count}-{moves}", "moves": moves, "model": models["moe" in CASES[name]]}
            for name, count in alone + RUNS
            for moves in (True, False)
            if count == processes and (moves or count > 1)
        ]
        if processes == 1:
            for case in cases:
                run(case, World(), folder)
        else:
            (folder / "cases.json").write_text(json.dumps(cases))
            done = launch("-m", "tests.distributed.updates", str(folder), processes=processes)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for case in cases:
            weights = torch.load(folder / f"{case['name']}.pt")
            results[case["name"]] = weights, json.loads((folder / f"{case['name']}.json").read_text())
    return results


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_the_weights_are_those_of_one_process(results, name, processes):
    one = results[f"{name.removesuffix('-sharded').replace('sharded', 'shared')}-1-True"][0]
    for moves in (True, False):
        assert same(one, results[f"{name}-{processes}-{moves}"][0], BOUND)


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_each_process_has_about_as_many_tokens(results, name, processes):
    (_, moved), (_, stayed) = (results[f"{name}-{processes}-{moves}"] for moves in (True, False))
    for number in range(MINIBATCHES):
        tokens = [theirs[number] for theirs in moved["tokens"]]
        before = [theirs[number] for theirs in stayed["tokens"]]
        print(name, processes, before, "->", tokens)
        assert max(before) * processes / sum(before) > 1.3
        assert max(tokens) * processes / sum(tokens) < 1.1
    assert 1 <= moved["metrics"]["update/imbalance"] < 1.15 < 1.3 < stayed["metrics"]["update/imbalance"]


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_the_report_has_every_response_once(results, name, processes):
    """In its mini-batch, by slot of its group and index."""
    trained = [slot for slot in range(GROUPS) if slot % 4 != 3]
    for moves in (True, False):
        rows = results[f"{name}-{processes}-{moves}"][1]["rows"]
        for number in range(MINIBATCHES):
            half = GROUPS // MINIBATCHES
            slots = [slot for slot in trained if slot // half == number]
            origins = sorted(tuple(origin) for theirs in rows for origin in theirs[number])
            assert origins == [(slot, row) for slot in slots for row in range(6)]
