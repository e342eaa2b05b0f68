"""Servers that fail: what the engine does then, and what it says."""

import threading
import time
from collections import Counter
from contextlib import closing

import pytest
import torch

from tests.conftest import example
from tests.rollout.model_server import HANG_UP, ModelServer
from vlm_sapo.config.rollout import RolloutConfig
from vlm_sapo.distributed import World
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.lora import layers
from vlm_sapo.rollout.build import EngineNeeds, build_engine
from vlm_sapo.rollout.engine import RolloutError, as_contexts, server_in_turn
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.rollout.vllm_requests import SEED_STRIDE
from vlm_sapo.types import Context, RowError, Sampling

SAMPLING = Sampling(3, 8, 1.0, seed=2)


@pytest.fixture
def servers(model_folder):
    started = [ModelServer(model_folder()) for _ in range(2)]
    yield started
    for server in started:
        server.close()


class Warnings:
    """The warnings that the user gets."""

    def __init__(self):
        self.lines = []

    def __call__(self, line):
        self.lines.append(line)


def build(vlm, servers, folder, *, patience=3.0, timeout=20.0, longest=512, warn=print, **section):
    section |= {"type": "vllm_server", "servers": [server.url for server in servers]}
    engine = RolloutConfig.model_validate(
        {"engine": section | {"patience": patience, "timeout": timeout}}
    ).engine
    needs = EngineNeeds(
        vlm,
        str(servers[0].path),
        longest=longest,
        dtype="float32",
        sequences_per_batch=16,
        warn=warn,
        folder=folder / "weights",
    )
    return build_engine(engine, needs)


def ids_of(groups):
    return [[item.ids.tolist() for item in responses] for responses in groups]


@pytest.fixture
def prompts(encoder):
    return [encoder(example(number, images=number % 3)) for number in range(6)]


def expected(vlm, prompts):
    """What a server samples: its seeds are those of single prompts."""
    return [
        HfEngine(vlm, prompts_per_batch=1).generate(as_contexts([prompt]), Sampling(3, 8, 1.0, seed))[0]
        for prompt, seed in zip(
            prompts, (SAMPLING.seed_of(n) * SEED_STRIDE % 2**62 for n in range(9)), strict=False
        )
    ]


def test_prompts_are_distributed_and_answers_keep_their_order(vlm, servers, prompts, tmp_path):
    with closing(build(vlm, servers, tmp_path)) as engine:
        engine.sync(vlm)
        assert ids_of(engine.generate(as_contexts(prompts), SAMPLING)) == ids_of(expected(vlm, prompts))
    for server in servers:
        bodies = [body for route, body in server.requests if route == "inference/v1/generate"]
        assert len(bodies) == 3
        assert all(len(body.get("content_parts", [])) <= 2 for body in bodies)
    assert not list(tmp_path.iterdir()), "weights were left behind"


@pytest.mark.parametrize(("processes", "contexts", "count"), [(1, 16, 8), (4, 16, 4), (24, 4, 8), (8, 1, 4)])
def test_the_processes_of_a_run_use_all_servers_equally(processes, contexts, count):
    first = Counter()
    for rank in range(processes):
        world = World()
        world.rank = rank
        first.update(server_in_turn(context, contexts, world) % count for context in range(contexts))
    assert [first[number] for number in range(count)] == [processes * contexts // count] * count


def test_each_process_begins_with_another_server(vlm, servers, prompts, tmp_path):
    with closing(build(vlm, servers, tmp_path)) as engine:
        engine.sync(vlm)
        engine.world.rank = 1
        engine.generate(as_contexts(prompts[:1]), SAMPLING)
    assert [[route for route, _ in server.requests].count("inference/v1/generate") for server in servers] == [
        0,
        1,
    ]


def test_groups_are_reported_as_they_arrive(vlm, servers, prompts, tmp_path):
    reports = []
    with closing(build(vlm, servers, tmp_path)) as engine:

        def context(index: int) -> Context:
            def report(responses):
                assert engine.running is not None
                reports.append((index, responses))

            return Context(prompts[index], report=report)

        engine.sync(vlm)
        groups = engine.generate(list(map(context, range(6))), SAMPLING)
    assert sorted(index for index, _ in reports) == list(range(6))
    assert all(responses is groups[index] or responses == groups[index] for index, responses in reports)


def test_weights_go_to_each_server_once_for_each_version(vlm, servers, prompts, tmp_path):
    with closing(build(vlm, servers, tmp_path)) as engine:
        for _ in range(2):
            with torch.no_grad():
                for parameter in vlm.parameters():
                    parameter += 0.05
            vlm.version += 1
            engine.sync(vlm)
            engine.sync(vlm)
            assert ids_of(engine.generate(as_contexts(prompts), SAMPLING)) == ids_of(expected(vlm, prompts))
    for server in servers:
        routes = [route for route, _ in server.requests]
        assert routes.count("collective_rpc") == 2
        assert [routes.count(name) for name in ("reset_prefix_cache", "reset_encoder_cache")] == [2, 2]


@pytest.mark.parametrize(
    "fault",
    [503, HANG_UP, "late", "fewer", "cut", "aborted", "no logprobs"],
    ids=lambda value: str(value)[:12],
)
def test_failed_requests_are_retried(vlm, servers, prompts, tmp_path, fault):
    """Once for each prompt that the first server gets."""
    warned, failed = Warnings(), set()

    def fail(route, body):
        key = str(body and body.get("token_ids"))
        if route != "inference/v1/generate" or key in failed:
            return None
        failed.add(key)
        if fault == "late":
            return time.sleep(3)
        if isinstance(fault, str):
            answer = servers[0].act(route, body)
            if fault == "fewer":
                answer["choices"].pop()
            if fault == "cut":
                answer["choices"][1]["token_ids"].pop()
            if fault == "aborted":
                answer["choices"][1]["finish_reason"] = "abort"
            if fault == "no logprobs":
                answer["choices"][1]["logprobs"] = None
            return answer
        return fault

    servers[0].fault = fail
    timeout = 1.0 if fault == "late" else 20.0
    with closing(build(vlm, servers, tmp_path, timeout=timeout, patience=10, warn=warned)) as engine:
        engine.sync(vlm)
        assert ids_of(engine.generate(as_contexts(prompts), SAMPLING)) == ids_of(expected(vlm, prompts))
    assert failed and servers[0].url in warned.lines[0]


def test_the_prompts_of_a_dead_server_go_to_the_others(vlm, servers, prompts, tmp_path):
    with closing(build(vlm, servers, tmp_path)) as engine:
        engine.sync(vlm)
        servers[0].close()
        assert ids_of(engine.generate(as_contexts(prompts), SAMPLING)) == ids_of(expected(vlm, prompts))
        vlm.version += 1
        engine.sync(vlm)
        assert ids_of(engine.generate(as_contexts(prompts), SAMPLING)) == ids_of(expected(vlm, prompts))
        servers[0].open(servers[0].port)


def test_a_restarted_server_gets_the_current_weights(vlm, servers, prompts, tmp_path):
    """Its answers with the checkpoint's weights are discarded."""
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter += 0.05
    with closing(build(vlm, servers, tmp_path)) as engine:
        engine.sync(vlm)
        before = ids_of(expected(vlm, prompts))
        assert ids_of(engine.generate(as_contexts(prompts), SAMPLING)) == before
        servers[1].restart()
        assert ids_of(engine.generate(as_contexts(prompts), SAMPLING)) == before


def test_two_runs_on_one_server_are_detected(vlm, servers, prompts, tmp_path):
    warned = Warnings()
    one = build(vlm, servers[:1], tmp_path / "one", patience=1.0, warn=warned)
    with closing(one):
        one.sync(vlm)

        def other_run(route, body):
            servers[0].version = "another-7"

        servers[0].fault = other_run
        with pytest.raises(RolloutError, match="another-7.*another run sends it weights"):
            one.generate(as_contexts(prompts[:1]), SAMPLING)


def test_an_answer_that_does_not_name_its_weights_is_not_used(vlm, servers, prompts, tmp_path):
    def nameless(route, body):
        if route != "inference/v1/generate":
            return None
        answer = servers[0].act(route, body)
        for choice in answer["choices"]:
            choice["weight_versions"] = None
        return answer

    servers[0].fault = nameless
    with closing(build(vlm, servers[:1], tmp_path, patience=0.5)) as engine:
        engine.sync(vlm)
        with pytest.raises(RolloutError, match="sampled with the weights None"):
            engine.generate(as_contexts(prompts[:1]), SAMPLING)


def test_responses_during_a_weight_load_are_marked(vlm, servers, prompts, tmp_path):
    seen = []

    def watch(route, body):
        if route == "collective_rpc":
            seen.append(servers[0].version)

    servers[0].fault = watch
    with closing(build(vlm, servers[:1], tmp_path)) as engine:
        engine.sync(vlm)
    assert seen and seen[0].startswith("loading-")


def test_an_evaluation_refuses_the_weights_of_a_training_run(vlm, servers, prompts, tmp_path):
    section = {"type": "vllm_server", "servers": [servers[0].url], "patience": 1.0}
    warned = Warnings()
    engine = build_engine(
        RolloutConfig.model_validate({"engine": section}).engine,
        EngineNeeds(
            vlm, "/models/another", longest=512, dtype="float32", sequences_per_batch=16, warn=warned
        ),
    )
    with closing(engine):
        assert "serves" in warned.lines[0] and "/models/another" in warned.lines[0]
        assert ids_of(engine.generate(as_contexts(prompts[:2]), SAMPLING)) == ids_of(
            expected(vlm, prompts[:2])
        )
        servers[0].version = "finished-run-40"
        with pytest.raises(RolloutError, match="finished-run-40, which a training run sent it.*restart it"):
            engine.generate(as_contexts(prompts[:2]), SAMPLING)


def test_the_error_without_any_server_says_what_to_do(vlm, servers, tmp_path):
    for server in servers:
        server.close()
    with pytest.raises(RolloutError, match=r"no server of http.* within 1 s.*vlm-sapo serve"):
        build(vlm, servers[:1], tmp_path, patience=1.0)
    for server in servers:
        server.open(server.port)


def test_servers_that_die_while_sampling_stop_the_run_with_the_row(vlm, servers, prompts, tmp_path):
    with closing(build(vlm, servers, tmp_path, patience=1.0)) as engine:
        engine.sync(vlm)
        for server in servers:
            server.fault = lambda route, body: HANG_UP
        with pytest.raises(RolloutError, match="no server of .* answered for row e"):
            engine.generate(as_contexts(prompts), SAMPLING)


def test_errors_that_a_retry_cannot_fix_stop_at_once(vlm, servers, prompts, tmp_path):
    with closing(build(vlm, servers[:1], tmp_path, patience=60.0)) as engine:
        engine.sync(vlm)
        for status, words in (
            (400, "row e1: .*made by the test"),
            (403, "lacks an option that training needs.*vlm-sapo serve"),
            (404, "without VLLM_SERVER_DEV_MODE=1.*vlm-sapo serve"),
            (401, "API key"),
        ):
            servers[0].fault = lambda route, body, status=status: status
            with pytest.raises(RolloutError, match=words):
                engine.generate(as_contexts(prompts[1:2]), SAMPLING)


def test_a_server_that_reads_other_prompts_is_detected(vlm, servers, prompts, tmp_path):
    """As with a server that resizes images itself."""

    def resized(route, body):
        if route != "inference/v1/generate":
            return None
        answer = servers[0].act(route, body)
        answer["prompt_token_ids"] += [vlm.model.config.image_token_id] * 5
        return answer

    servers[0].fault = resized
    with closing(build(vlm, servers[:1], tmp_path)) as engine:
        engine.sync(vlm)
        with pytest.raises(RolloutError, match="row e1: the engine read .* tokens.*do_resize"):
            engine.generate(as_contexts(prompts[1:2]), SAMPLING)


def test_a_banned_token_is_an_error_and_not_a_sample(vlm, servers, prompts, tmp_path):
    def unbanned(route, body):
        if route != "inference/v1/generate":
            return None
        answer = servers[0].act(route, body)
        answer["choices"][0]["token_ids"][0] = vlm.banned[0]
        return answer

    servers[0].fault = unbanned
    with closing(build(vlm, servers[:1], tmp_path)) as engine:
        engine.sync(vlm)
        with pytest.raises(RolloutError, match="which is banned"):
            engine.generate(as_contexts(prompts[:1]), SAMPLING)


def test_a_short_context_is_refused_at_the_start(vlm, model_folder, tmp_path):
    server = ModelServer(model_folder(), max_model_len=100)
    with pytest.raises(ValueError, match="takes 100 tokens .* 512.*--max-model-len 512"):
        build(vlm, [server], tmp_path)
    server.close()


def test_images_over_the_size_limit_name_the_row(vlm, servers, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sapo.rollout.vllm_client.MOST_BYTES", 100)
    with closing(build(vlm, servers, tmp_path)) as engine:
        engine.sync(vlm)
        with pytest.raises(RowError, match=r"row e1.*images \(48x48\).*lower model.max_pixels"):
            engine.generate(as_contexts(prompts[:2]), SAMPLING)


def test_closing_cancels_requests_under_way(vlm, servers, prompts, tmp_path):
    engine = build(vlm, servers, tmp_path, timeout=60.0)
    engine.sync(vlm)
    for server in servers:
        server.fault = lambda route, body: time.sleep(20)
    errors = []

    def generate():
        try:
            engine.generate(as_contexts(prompts), SAMPLING)
        except RolloutError as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(0.5)
    engine.close()
    thread.join(5)
    assert not thread.is_alive() and "closed" in str(errors[0])


def test_experts_of_the_tokens_are_reported(model_folder):
    """In vLLM's encoding; it also reports layers without experts. A server that doesn't is refused."""
    path = model_folder("qwen3_vl_moe")
    vlm = load_vlm(str(path))
    prompts = [Encoder(vlm)(example(number, images=number % 3)) for number in range(3)]
    server = ModelServer(path, experts=True)
    engine = build_engine(
        RolloutConfig.model_validate({"engine": {"type": "vllm_server", "servers": server.url}}).engine,
        EngineNeeds(
            vlm,
            str(path),
            longest=512,
            dtype="float32",
            sequences_per_batch=16,
            warn=print,
            experts=True,
        ),
    )
    with closing(engine):
        groups = engine.generate(as_contexts(prompts), SAMPLING)
        own = HfEngine(vlm, prompts_per_batch=1, experts=True)
        for number, (prompt, items) in enumerate(zip(prompts, groups, strict=True)):
            seed = SAMPLING.seed_of(number) * SEED_STRIDE % 2**62
            [expected] = own.generate(as_contexts([prompt]), Sampling(3, 8, 1.0, seed))
            for item, other in zip(items, expected, strict=True):
                assert len(item.experts) == len(prompt.ids) + len(item.ids) - 1
                assert torch.equal(item.experts, other.experts)
        vlm.routers.layers = [1]  # as if the first layer had none
        [[item, *_]] = engine.generate(as_contexts(prompts[:1]), SAMPLING)
        assert torch.equal(item.experts, groups[0][0].experts[:, 1:])
        server.experts = False
        with pytest.raises(RolloutError, match=r"returned no experts, .* algo.replay=r2"):
            engine.generate(as_contexts(prompts), SAMPLING)
    server.close()


def test_adapters_are_sent_beside_the_base(servers, encoder, model_folder, tmp_path):
    """Each version under its own name, the one before it dropped."""
    vlm = load_vlm(str(model_folder()), lora=Adapters("base", rank=4))
    prompts = [Encoder(vlm)(example(number, images=number % 3)) for number in range(4)]
    with closing(build(vlm, servers, tmp_path, adapter="native")) as engine:
        answers = []
        for number in range(3):
            with torch.no_grad():
                for layer in layers(vlm.model).values():
                    layer.lora_B["default"].weight.add_(0.5 * number)
            vlm.version += 1
            engine.sync(vlm)
            answers.append(ids_of(engine.generate(as_contexts(prompts), SAMPLING)))
            assert answers[-1] == ids_of(expected(vlm, prompts))
            assert all(list(server.adapters) == [engine.version] for server in servers)
        assert answers[0] != answers[1] != answers[2]
    assert not any(route == "collective_rpc" for server in servers for route, _ in server.requests)
    assert not (tmp_path / "weights").exists()


def test_a_server_that_lost_its_adapter_gets_it_again(servers, model_folder, tmp_path):
    vlm = load_vlm(str(model_folder()), lora=Adapters("base", rank=4))
    with torch.no_grad():
        for layer in layers(vlm.model).values():
            layer.lora_B["default"].weight.fill_(0.5)
    prompts = [Encoder(vlm)(example(number, images=number)) for number in range(2)]
    with closing(build(vlm, servers[:1], tmp_path, adapter="native")) as engine:
        engine.sync(vlm)
        for lose in (servers[0].restart, lambda: servers[0].adapters.clear()):
            lose()
            assert ids_of(engine.generate(as_contexts(prompts), SAMPLING)) == ids_of(expected(vlm, prompts))
            assert list(servers[0].adapters) == [engine.version]


def test_merged_adapters_in_half_precision_are_noted(servers, model_folder, tmp_path):
    warned = Warnings()
    vlm = load_vlm(str(model_folder()), lora=Adapters("base", rank=4, parts=("language", "vision")))
    with closing(build(vlm, servers, tmp_path, warn=warned, dtype="bfloat16")):
        [line] = warned.lines
        assert "round small changes away" in line and "these change vision" in line
    with pytest.raises(ValueError, match=r"rollout.engine.adapter \(native\) must be merged here"):
        build(vlm, servers, tmp_path, adapter="native")
