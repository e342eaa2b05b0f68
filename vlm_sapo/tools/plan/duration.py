"""How long a step of a config takes on given GPUs, as an estimate by the roofline of a card."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vlm_sapo.config.rollout import HfConfig, VllmConfig, VllmServerConfig
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.rollout.vllm_lora import NO_FOLDER, AdapterShape, served_beside
from vlm_sapo.tools.plan import roofline
from vlm_sapo.tools.plan.cards import Card
from vlm_sapo.tools.plan.memory import Gpus
from vlm_sapo.tools.plan.operations import GroupTokens, ModelWork, model_work
from vlm_sapo.tools.plan.passes import BatchSpec, parameters, simulated_model
from vlm_sapo.tools.plan.roofline import Shards, Training
from vlm_sapo.tools.plan.simulate import ModelSpec

PROMPT_SHARE, RESPONSE_SHARE = 0.65, 0.35
"""Mean lengths over data.max_prompt_tokens and rollout.max_tokens: about 1,300 of 2,048 and 350 of 1,024 on
Geometry3K."""
ZERO_VARIANCE_SHARE = 0.3
"""Groups whose rewards are all equal, which need no pass."""
IMBALANCE = 1.07
"""Tokens of the busiest process over the mean, with groups dealt by size and three in ten without a pass."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step's parts. `ahead` says that sampling and reward run while the policy trains."""

    data: float
    """Images that are not ready when the step before has ended."""
    sampling: float
    reward: float
    old_logprobs: float
    """And the reference's."""
    update: float
    sync: float
    rest: float
    ahead: bool = False

    @property
    def total(self) -> float:
        before, after = self.data + self.sampling + self.reward, self.old_logprobs + self.update
        both = max(before, after) if self.ahead else before + after
        return both + self.sync + self.rest


@dataclass(frozen=True)
class Setting:
    """What a step's duration depends on, per GPU."""

    work: ModelWork
    card: Card
    group: GroupTokens
    groups: float
    """Of a step, per GPU."""
    training: Training
    shards: Shards
    imbalance: float = IMBALANCE

    @property
    def trained_groups(self) -> float:
        """Groups of the busiest GPU that need passes."""
        return self.groups * (1 - ZERO_VARIANCE_SHARE) * self.imbalance


class StepEstimator:
    """Estimates a step of a config."""

    def __init__(self, config: TrainConfig, spec: ModelSpec, batch: BatchSpec, *, gpus: Gpus, card: Card):
        self.config, self.gpus, self.card = config, gpus, card
        self.trained = sum(item.numel for item in parameters(spec) if item.trained)
        self.longest = float(batch.response)
        self.spec = spec
        self.setting = self._setting(spec, batch)

    def _setting(self, spec: ModelSpec, batch: BatchSpec) -> Setting:
        config, train = self.config, self.config.train
        work, count = model_work(spec), self.gpus.count
        prompt = round(PROMPT_SHARE * batch.prompt)
        image = min(batch.image, round(PROMPT_SHARE * batch.image))
        group = GroupTokens(prompt, image, RESPONSE_SHARE * batch.response, batch.group)
        groups = train.prompts_per_step / count
        if train.layout == "plain":  # every response with its prompt
            group, groups = replace(group, group=1), groups * batch.group
        shards = count if train.shard == "all" else train.shard
        link = self.card.link if shards <= self.gpus.per_node else roofline.NETWORK
        training = Training(
            autocast=train.precision == "bf16" and config.model.dtype == "float32" and shards == 1,
            adapters=config.model.lora is not None,
            checkpointing=config.model.gradient_checkpointing,
            vision="vision" not in config.model.freeze and config.model.lora is None,
        )
        imbalance = 1.0 if count == 1 else IMBALANCE
        return Setting(work, self.card, group, groups, training, Shards(shards, link), imbalance)

    def estimate(self) -> StepTime:
        """The seconds of all parts."""
        config, train = self.config, self.config.train
        update, sampled = self.update(), train.prompts_per_step * config.rollout.group / self.gpus.nodes
        images = train.prompts_per_step / self.gpus.count * self.megapixels * roofline.IMAGE_SECONDS
        return StepTime(
            data=max(0.0, images - update),
            sampling=self.sampling(),
            reward=sampled * roofline.REWARD_SECONDS,
            old_logprobs=self.scoring(),
            update=update,
            sync=self.sync(),
            rest=roofline.REST_SECONDS,
            ahead=bool(config.rollout.ahead),
        )

    @property
    def megapixels(self) -> float:
        """Of a prompt's image."""
        pixels = self.config.model.max_pixels or 2**20
        return PROMPT_SHARE * pixels / 1e6

    def micro_batches(self) -> int:
        """Of a step, on the busiest GPU."""
        train, setting = self.config.train, self.setting
        tokens = setting.trained_groups * setting.group.row / train.minibatches
        return train.minibatches * math.ceil(tokens / train.tokens_per_microbatch)

    def update(self) -> float:
        """All passes of a step's updates, or what the GPUs exchange for them where that takes longer, and the
        optimizer's steps."""
        train, setting = self.config.train, self.setting
        passes = roofline.update_seconds(setting.work, setting.group, setting.training, self.card)
        exchanged = roofline.collective_seconds(setting.work, setting.shards)
        optimizer = roofline.optimizer_seconds(self.trained / setting.shards.count, self.card)
        busy = max(setting.trained_groups * passes, self.micro_batches() * exchanged)
        return busy + train.minibatches * optimizer

    def scoring(self) -> float:
        """Old log-probs by a pass of their own, which the first update needs none of, and the reference's."""
        config, setting = self.config, self.setting
        count = config.train.minibatches
        exact = config.train.precision != "bf16" and config.model.dtype == "float32"
        old = config.train.old_logprobs
        recomputed = old == "recompute" or (old == "auto" and not exact)
        passes = ((count - 1) / count if recomputed else 0.0) + (1.0 if config.algo.kl else 0.0)
        seconds = roofline.scoring_seconds(setting.work, setting.group, setting.training, self.card)
        return passes * setting.trained_groups * seconds

    def sampling(self) -> float:
        """Generation of a step's responses; that of a class of one's own is not known, and counts as 0."""
        config, setting = self.config, self.setting
        engine, group = config.rollout.engine, setting.group
        groups = config.train.prompts_per_step / self.gpus.count
        group = replace(group, group=config.rollout.group)
        if isinstance(engine, HfConfig):
            half = "autocast" if setting.training.autocast else "bfloat16"
            lora = config.model.lora  # merged while it samples, unless the base has 4 bits
            return roofline.hf_seconds(
                setting.work,
                group,
                self.card,
                groups=math.ceil(groups),
                per_batch=max(1, config.rollout.batch_sequences // group.group),
                longest=self.longest,
                kind="lora" if lora is not None and lora.bits else half,
            )
        if isinstance(engine, VllmServerConfig):
            groups = config.train.prompts_per_step / len(engine.servers)
        elif not isinstance(engine, VllmConfig):
            return 0.0
        return roofline.vllm_seconds(setting.work, group, self.card, groups=groups, longest=self.longest)

    def sync(self) -> float:
        """New weights, or adapters, for the engine: gathered in bfloat16 tensor by tensor, then put where it
        reads them; by `nccl` to one server after the other."""
        engine, setting = self.config.rollout.engine, self.setting
        if not isinstance(engine, VllmConfig | VllmServerConfig):
            return 0.0
        sent = self.trained if self._serves_adapters(engine) else setting.work.total
        gathered = roofline.gather_seconds(sent, setting.shards)
        if isinstance(engine, VllmConfig):
            return gathered + roofline.wake_seconds(setting.work)
        folder = engine.weights == "folder"
        rate = roofline.DISK / 2 if folder else roofline.LINK_SHARE * roofline.NETWORK
        return gathered + (1 if folder else len(engine.servers)) * roofline.send_seconds(sent, rate)

    def _serves_adapters(self, engine: VllmConfig | VllmServerConfig) -> bool:
        """Whether vLLM gets adapters alone, as `rollout.engine.adapter` chooses."""
        lora, (_, vlm) = self.config.model.lora, simulated_model(self.spec)
        shape = AdapterShape(frozenset(lora.parts), lora.rank, lora.bits) if lora else None
        nccl = isinstance(engine, VllmServerConfig) and engine.weights == "nccl"
        half = self.config.train.precision == "bf16"
        dtype = engine.weights_dtype("bfloat16" if half else self.config.model.dtype)
        return served_beside(engine.adapter, shape, vlm, dtype, obstacle=NO_FOLDER if nccl else "")
