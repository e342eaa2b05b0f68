"""Responses that go on where they stopped: from every family's state, beside fresh ones and behind what an
environment wrote, embedded and on servers."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from tests.conftest import FAMILIES, example, response
from tests.rollout.model_server import ModelServer
from vlm_sapo.config.rollout import RolloutConfig
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.experts import ExpertRoutes
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain, SharedPrefix
from vlm_sapo.rollout.build import EngineNeeds, build_engine
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.rollout.vllm_requests import sampling_requests
from vlm_sapo.types import Context, Response, Sampling, Span

SAMPLING = Sampling(3, 12, 0.8, seed=5)
OLDER = 7
"""Version of the weights that sampled what was interrupted."""
ANSWER = [31, 47, 52]
"""Ids that an environment writes."""
EXACT = 1e-5


class Setting:
    """A model with a mixture of experts records them."""

    def __init__(self, path):
        self.vlm = load_vlm(str(path))
        self.vlm.version = OLDER + 1
        encode = Encoder(self.vlm)
        self.prompts = [encode(example(number, images=count)) for number, count in enumerate((1, 2, 0))]
        self.experts = bool(self.vlm.routers)
        self.whole = self.engine(3).generate(as_contexts(self.prompts), SAMPLING)

    def engine(self, prompts_per_batch: int) -> HfEngine:
        return HfEngine(self.vlm, prompts_per_batch=prompts_per_batch, experts=self.experts)

    def interrupted(self, number: int, branches: tuple[int, ...], lengths: tuple[int, ...]) -> Context:
        """A prompt whose responses of these branches were cut to these lengths."""
        prompt, group = self.prompts[number], self.whole[number]
        parts = (
            head(group[branch], prompt, length) for branch, length in zip(branches, lengths, strict=True)
        )
        return Context(prompt, tuple(parts), branches)

    @torch.no_grad()
    def logprobs(self, layout, prompt, responses) -> list[torch.Tensor]:
        """By the training pass, those of each response's tokens."""
        inputs = layout.inputs([GroupSlice(prompt, tuple(responses))])
        scores = Pass(self.vlm, SAMPLING.temperature)(inputs)
        return [row[: len(item.ids)] for row, item in zip(scores.logprobs, responses, strict=True)]


@pytest.fixture(params=FAMILIES)
def setting(request, model_folder) -> Setting:
    return Setting(model_folder(request.param))


def head(whole: Response, prompt, length: int) -> Response:
    """The first tokens of a response, as older weights left them."""
    assert length < len(whole.ids), "nothing is left to continue with"
    return Response.sampled(
        prompt.positions,
        whole.ids[:length],
        whole.logprobs[:length],
        text="",
        finish="length",
        version=OLDER,
    )


def answered(so_far: Response, prompt) -> Response:
    """A response behind which an environment wrote ANSWER."""
    later = Response.sampled(
        so_far.positions, torch.tensor(ANSWER), torch.zeros(len(ANSWER)), text="", finish="stop"
    )
    mask, spans = torch.zeros(len(ANSWER), dtype=torch.bool), (Span(0, len(ANSWER), "environment"),)
    return so_far.continued(replace(later, mask=mask, spans=spans))


def check_so_far(context: Context, responses: list[Response], version: int | None) -> None:
    """Each response begins with the one so far, and what follows is the policy's, behind it in all respects."""
    assert len(responses) == len(context.responses)
    for before, item in zip(context.responses, responses, strict=True):
        start, end = len(before.ids), len(item.ids)
        assert start < end <= SAMPLING.max_tokens
        for name in ("ids", "mask", "logprobs"):
            assert torch.equal(vars(item)[name][:start], vars(before)[name])
        assert item.mask[start:].all() and len(item.mask) == len(item.logprobs) == end
        positions = context.prompt.positions.max() + 1 + torch.arange(end)
        assert torch.equal(item.positions, positions.expand(3, -1))
        assert item.spans == (*before.spans, Span(start, end, weights_version=version))


@pytest.mark.parametrize("prompts_per_batch", [1, 3])
def test_an_interrupted_response_goes_on_as_if_nothing_had_been(setting, prompts_per_batch):
    """Other lengths for each branch, branches in any order and not all of them."""
    contexts = [
        setting.interrupted(0, (0, 1, 2), (1, 5, 3)),
        setting.interrupted(1, (2, 0), (4, 2)),
        setting.interrupted(2, (1,), (6,)),
    ]
    continued = setting.engine(prompts_per_batch).generate(contexts, SAMPLING)
    for number, (context, responses) in enumerate(zip(contexts, continued, strict=True)):
        check_so_far(context, responses, setting.vlm.version)
        for branch, item in zip(context.branches, responses, strict=True):
            expected = setting.whole[number][branch]
            assert item.ids.tolist() == expected.ids.tolist()
            assert (item.logprobs - expected.logprobs).abs().max() < EXACT
            assert (item.text, item.finish) == (expected.text, expected.finish)
            assert (item.experts is not None) == setting.experts
            if setting.experts:
                assert torch.equal(item.experts.sort(-1).values, expected.experts.sort(-1).values)


def test_fresh_and_continued_ones_go_together(setting):
    """Behind an environment's tokens, in a batch where every context has other branches."""
    contexts = [
        Context(setting.prompts[0]),
        setting.interrupted(1, (0, 2), (5, 2)),
        setting.interrupted(2, (1,), (3,)),
    ]
    contexts[1:] = [
        replace(item, responses=tuple(answered(before, item.prompt) for before in item.responses))
        for item in contexts[1:]
    ]
    groups = setting.engine(3).generate(contexts, SAMPLING)
    assert [len(group) for group in groups] == [3, 2, 1]
    assert [item.ids.tolist() for item in groups[0]] == [item.ids.tolist() for item in setting.whole[0]]
    for context, responses in zip(contexts[1:], groups[1:], strict=True):
        check_so_far(context, responses, setting.vlm.version)
        for item in responses:
            first, second = item.turns
            words = setting.vlm.tokenizer.batch_decode([first, second], skip_special_tokens=True)
            assert item.text == context.prompt.opening + "\n".join(words)
            assert int(item.mask.sum()) == len(first) + len(second) == len(item.ids) - len(ANSWER)
    for layout in (Plain(), SharedPrefix()):
        for context, responses in zip(contexts, groups, strict=True):
            rows_of_logprobs = setting.logprobs(layout, context.prompt, responses)
            for logprobs, item in zip(rows_of_logprobs, responses, strict=True):
                assert (logprobs - item.logprobs).abs().max() < EXACT
    if setting.experts:
        check_experts(setting.vlm, contexts, groups)


@torch.no_grad()
def check_experts(vlm, contexts, groups) -> None:
    """Those that are reported are those that the training pass chooses, of an environment's tokens as well."""
    pairs = zip(contexts, groups, strict=True)
    slices = [GroupSlice(context.prompt, tuple(responses)) for context, responses in pairs]
    rows = [(item.prompt, response) for item in slices for response in item.responses]
    inputs = Plain().inputs(slices)
    routed = vlm.routers.watch(inputs, None, gradient=False)
    Pass(vlm)(inputs, routed)
    own = routed.experts().view(len(rows), -1, *routed.experts().shape[1:])
    for experts, (prompt, item) in zip(own, rows, strict=True):
        assert len(item.experts) == len(prompt.ids) + len(item.ids) - 1
        assert torch.equal(item.experts.sort(-1).values, experts[: len(item.experts)].sort(-1).values)
    routes = ExpertRoutes.reported([(prompt, item.experts) for prompt, item in rows])
    assert float(routed.usage(routes).changed.sum()) == 0.0


def test_what_a_server_is_asked_for(vlm, encoder):
    """The prompt with the response so far, and no more than what may follow."""
    prompts = [encoder(example(images=2)), encoder(example(1, images=0))]
    rows = ([20, 21], [22, 23], [24, 25, 26])
    so_far = tuple(response(ids, prompts[0]) for ids in rows)
    contexts = [Context(prompts[0], so_far, (0, 2, 0)), Context(prompts[1])]
    *continued, fresh = sampling_requests(vlm, contexts, SAMPLING)
    assert [item.context for item in (*continued, fresh)] == [0, 0, 0, 1]
    for request, before, ids in zip(continued, so_far, rows, strict=True):
        assert request.so_far is before and request.count == request.parameters["n"] == 1
        assert request.ids == [*prompts[0].ids.tolist(), *ids]
        assert request.unexpanded == [*vlm.unexpanded(prompts[0]), *ids]
        assert request.parameters["max_tokens"] == SAMPLING.max_tokens - len(ids)
    assert fresh.so_far is None and fresh.ids == prompts[1].ids.tolist()
    assert (fresh.parameters["n"], fresh.parameters["max_tokens"]) == (3, 12)
    seeds = {item.parameters["seed"] for item in (*continued, fresh)}
    assert len(seeds) == 4 and all(0 <= seed < 2**62 for seed in seeds)
    again = sampling_requests(vlm, contexts, SAMPLING)
    assert [item.parameters for item in again] == [item.parameters for item in (*continued, fresh)]
    greedy = sampling_requests(vlm, contexts, replace(SAMPLING, temperature=0.0))
    assert all(item.parameters["n"] == 1 for item in greedy) and greedy[-1].count == 3


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_servers_continue_as_the_embedded_engine_does(model_folder, family):
    """The random numbers are others; all the rest of a response is as there."""
    path = model_folder(family)
    setting, server = Setting(path), ModelServer(path, experts=family.endswith("moe"))
    contexts = [
        setting.interrupted(0, (2, 0), (5, 1)),
        Context(setting.prompts[1]),
        setting.interrupted(2, (1,), (3,)),
    ]
    contexts[0] = replace(
        contexts[0], responses=tuple(answered(item, setting.prompts[0]) for item in contexts[0].responses)
    )
    section = {"type": "vllm_server", "servers": [server.url], "patience": 1.0}
    needs = EngineNeeds(
        setting.vlm,
        str(path),
        longest=512,
        dtype="float32",
        sequences_per_batch=16,
        warn=print,
        experts=setting.experts,
    )
    engine = build_engine(RolloutConfig.model_validate({"engine": section}).engine, needs)
    try:
        with closing(engine):
            served = engine.generate(contexts, SAMPLING)
    finally:
        server.close()
    embedded = setting.engine(3).generate(contexts, SAMPLING)
    assert [len(group) for group in served] == [len(group) for group in embedded] == [2, 3, 1]
    for context, responses, others in zip(contexts, served, embedded, strict=True):
        if context.responses:
            check_so_far(context, responses, None)
        for before, item, other in zip(context.responses, responses, others, strict=False):
            start = len(before.ids)
            assert torch.equal(item.ids[:start], other.ids[:start])
            shorter = min(len(item.mask), len(other.mask))
            assert torch.equal(item.mask[:shorter], other.mask[:shorter])
            texts = setting.vlm.tokenizer.batch_decode(item.turns, skip_special_tokens=True)
            assert item.text == context.prompt.opening + "\n".join(texts)
        rows_of_logprobs = setting.logprobs(Plain(), context.prompt, responses)
        for logprobs, item in zip(rows_of_logprobs, responses, strict=True):
            assert (logprobs - item.logprobs).abs().max() < EXACT
    if setting.experts:
        check_experts(setting.vlm, contexts, served)
