"""A sharded model's weights on their way to engines: two processes, several families, one launch."""

import json

import pytest

from tests.distributed.launcher import launch

pytestmark = pytest.mark.distributed
STREAMS = ["qwen3_vl", "qwen3_vl-lora", "qwen3_vl_moe", "qwen3_5"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory, model_folder):
    """What each of the two processes saw."""
    folder = tmp_path_factory.mktemp("weights")
    for family in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5"):
        (folder / family).symlink_to(model_folder(family))
    done = launch("-m", "tests.distributed.weights_worker", str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:8000]
    return [json.loads((folder / f"facts_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", STREAMS)
def test_both_processes_get_the_same_weights_in_the_same_order(facts, name):
    """Gathered in bfloat16, they are what float32 ones become when they are cast."""
    for seen in facts:
        stream = seen[f"stream-{name}"]
        assert stream["names"] == stream["expected"] == facts[0][f"stream-{name}"]["names"]
        assert stream["equal"] and stream["as_saved"]


@pytest.mark.parametrize("name", STREAMS)
def test_matrices_are_gathered_in_the_dtype_of_the_engine(facts, name):
    """Float32 are vectors, which engines may compute in float32, and one factor of each adapter."""
    for seen in facts:
        stream = seen[f"stream-{name}"]
        assert set(stream["gathered"]) == {"float32", "bfloat16"}
        assert stream["gathered"]["float32"] <= stream["vectors"] + stream["factors"]
        assert stream["gathered"]["bfloat16"] > stream["gathered"]["float32"]
        assert stream["dropped"] == 0


@pytest.mark.parametrize("name", STREAMS)
def test_memory_holds_one_weight_at_a_time(facts, name):
    """What is gathered, its parts in the right order, and a transposed copy."""
    for seen in facts:
        assert seen[f"stream-{name}"]["most"] <= 4 * seen[f"stream-{name}"]["largest"]


def test_one_process_writes_and_the_other_copies_nothing(facts):
    main, other = (seen["folder"] for seen in facts)
    assert main["files"] > 5 and main["equal"] and other["equal"]
    assert main["copied"] > 0 == other["copied"] == other["dropped"]


def test_vllm_that_fails_in_one_process_leaves_no_other_waiting(facts):
    first, second = (seen["vllm"] for seen in facts)
    assert first["failure"] is None and "does not know this weight" in second["failure"]
    assert first["taken"] == [first["at_last"], 3] and second["at_last"] == first["at_last"]


@pytest.mark.parametrize("kind", ["iter", "iter_full"])
def test_one_process_sends_by_nccl_and_all_gather(facts, kind):
    """Also when a server breaks off in the middle or never begins: the next attempt sends all weights."""
    main, other = (seen[f"nccl-{kind}"] for seen in facts)
    assert main["outcomes"] == [["sent", "broken", "broken", "sent"], ["sent"] * 4]
    assert main["passes"] == [True] * 6
    assert other == {"outcomes": [], "passes": []}
