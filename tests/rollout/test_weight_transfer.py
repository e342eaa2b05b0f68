"""Weights on their way to servers: the sources of vLLM's versions, files, and a server that hangs.

tests/distributed/test_weights.py has several processes.
"""

import asyncio
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from tests.rollout.vllm_stand_in import SOURCES, ParamMeta, SourceOf033, modules, sources
from vlm_sapo.distributed import World
from vlm_sapo.rollout import weight_transfer
from vlm_sapo.rollout.vllm_client import Server, Unavailable
from vlm_sapo.rollout.weight_transfer import Folder, Nccl, SharedIterator, weight_source

BF16 = torch.bfloat16


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_for_each_version_of_vllm(kind):
    metadata = [ParamMeta("a", BF16, (2,)), ParamMeta("b", BF16, (3,))]
    source = weight_source(SOURCES[kind], metadata, lambda: iter([("a", 1), ("b", 2)]))
    for _ in range(2):  # every transfer reads it again
        announced, weights = source.read()
        assert announced == metadata and list(weights) == [("a", 1), ("b", 2)]


def test_the_newer_version_refuses_a_source_of_the_older():
    """So that the test above tests something."""
    with pytest.raises(TypeError, match="metadata must be a functools.cached_property"):
        type("Source", (SourceOf033,), {"metadata": lambda self: [], "__iter__": lambda self: iter(())})


@pytest.mark.vllm
def test_the_installed_vllm_takes_the_source(vlm):
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    metadata = [ParamMeta(item.name, item.dtype_in(BF16), item.shape) for item in vlm.stored_weights()]
    source = weight_source(WeightSource, metadata, lambda: vlm.stream_weights(BF16))
    newer = "iter_full" in vars(WeightSource)
    for _ in range(2):
        weights = source.iter_full() if newer else iter(source)
        for announced, (name, weight) in zip(
            source.metadata if newer else source.metadata(), weights, strict=True
        ):
            assert (announced.name, announced.dtype, announced.shape) == (name, weight.dtype, weight.shape)


def test_a_folder_has_files_of_limited_size(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_transfer, "SHARD_BYTES", 2**14)
    transfer = Folder(tmp_path / "weights", dtype=BF16, world=World())
    expected = dict(vlm.stream_weights(BF16))
    largest = max(weight.nbytes for weight in expected.values())
    for version in ("first", "second"):
        transfer.stage(vlm, version)
        [folder] = (tmp_path / "weights").iterdir()
        assert folder.name == version, "a version stays until the next one is complete"
        files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
        sizes = [sum(weight.nbytes for weight in file.values()) for file in files]
        assert len(files) > 5 and max(sizes) < 2**14 + largest
        written = {name: weight for file in files for name, weight in file.items()}
        assert written.keys() == expected.keys() and sum(map(len, files)) == len(written)
        assert all(torch.equal(written[name], weight) for name, weight in expected.items())
    transfer.close()
    assert not (tmp_path / "weights").exists()


def test_a_full_disk_leaves_no_process_waiting(vlm, tmp_path, monkeypatch):
    """The others gather all weights, so the one that fails to write must, too."""
    taken = []
    weights = (taken.append(name) or (name, weight) for name, weight in vlm.stream_weights(BF16))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(weight_transfer, "SHARD_BYTES", 1)
    monkeypatch.setattr(weight_transfer, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        weight_transfer.write_shards(weights, tmp_path)
    assert len(taken) == len(vlm.stored_weights())


def test_a_transfer_that_hangs_is_given_up(vlm, monkeypatch):
    """What is left of its weights is taken by this thread; the one that hung sends nothing when it wakes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    wakes, woken, taken = threading.Event(), threading.Event(), []
    for name, module in modules(sources("iter_full", taken, breaks={})).items():
        monkeypatch.setitem(sys.modules, name, module)
    transfer = Nccl("127.0.0.1", dtype=BF16, timeout=0.2, world=World())
    transfer.stage(vlm, "first")
    pulled = []

    class Hangs:
        def send_weights(self):
            weights = transfer._gather()
            pulled.append(next(weights))
            wakes.wait(30)
            pulled.extend(weights)
            with pytest.raises(RuntimeError, match="given up"):
                transfer._gather()
            woken.set()

        def shutdown(self): ...

    server = Server("http://first", timeout=1)

    async def answer(client, route):
        return {"world_size": 1}

    monkeypatch.setattr(server, "call", answer)
    transfer.senders[server.url] = Hangs()

    async def twice():
        with pytest.raises(Unavailable, match="could not be sent by NCCL"):
            await transfer.send(None, server, restarted=False)
        transfer.timeout = 60
        await transfer.send(None, server, restarted=False)

    transfer.deliver(lambda: asyncio.run(twice()))
    wakes.set()
    assert woken.wait(30) and len(pulled) == 1
    [(sent, metadata)] = taken
    assert [name for name, _ in sent] == [item.name for item in metadata]


def test_an_iterator_is_finished_by_another_thread():
    left = []
    items = SharedIterator(left.append(number) or number for number in range(5))
    assert next(items) == 0
    items.finish()
    assert left == [0, 1, 2, 3, 4] and next(items, None) is None
    untouched = SharedIterator(iter([1, 2]))
    untouched.finish()
    assert next(untouched, None) is None and not untouched.failed
