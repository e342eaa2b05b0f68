"""What a config takes on given GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vlm_sapo.config.rollout import VllmConfig
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.plugins import locate
from vlm_sapo.tools.plan import memory, passes
from vlm_sapo.tools.plan.memory import GB, PHASES, Estimate, Gpus, Held, Row
from vlm_sapo.tools.plan.passes import Load, Rows
from vlm_sapo.tools.plan.simulate import read_config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TEXT = 16
"""Tokens of a prompt that are text, at least."""


class Estimator:
    """Puts the estimate of a config together. `least` is what no smaller batch changes."""

    def __init__(self, config: TrainConfig, gpus: Gpus):
        self.config, self.gpus = config, gpus
        self.shards = gpus.count if config.train.shard == "all" else config.train.shard
        self.sharded = self.shards > 1 or config.train.offload
        self.autocast = config.train.precision == "bf16"
        self.load, self.rows = load_of(config, sharded=self.sharded), rows_of(config)
        self.held: tuple[Held, ...] = passes.held(replace(self.load, dtype=config.model.dtype))
        self.element = 2 if self.autocast else BYTES[config.model.dtype]
        """Bytes of an element that is gathered or computed with."""
        self.prompts = -(-config.train.prompts_per_step // gpus.count)

    def estimate(self) -> Estimate:
        """All of it."""
        training = passes.training(self.load, self.rows)
        features = training.features * self.prompts
        kept = min(features, training.room)
        rows = [
            Row.always("CUDA and libraries", memory.CONTEXT, "assumed"),
            *self.model(),
            Row("kept picture features", kept, kept, 0, f"{self.prompts} prompts a step"),
            Row("gathered layers", training=self._gathered(), note=f"{self.shards} GPUs share a copy"),
            Row("activations", training=training.activations, note=f"{self.rows.budget} tokens at once"),
            Row("logits", training=training.logits, note="one chunk"),
        ]
        engine, short = self._engine()
        rows = [row for row in (*rows, *engine) if any(vars(row)[phase] for phase in PHASES)]
        return Estimate(self.gpus, tuple(rows), tuple(self._host(features - kept)), short)

    @property
    def least(self) -> float:
        return memory.CONTEXT + sum(row.training for row in self.model())

    def model(self) -> Iterator[Row]:
        train, base = self.config.train, memory.weights(self.held, self.shards)
        gradients = memory.gradients(self.held, self.shards)
        states = memory.optimizer(self.held, train.optimizer, self.shards)
        unsharded = memory.weights(item for item in self.held if item.unit == "whole")
        yield Row.always("weights", unsharded if train.offload else base)
        if not train.offload:
            yield Row("gradients", training=gradients)
            yield Row.always("optimizer", 0 if train.optimizer.startswith("paged") else states)
        if self._has_reference:
            yield Row.always("reference model", unsharded if train.offload else base)

    @property
    def _has_reference(self) -> bool:
        return bool(self.config.algo.kl) and self.config.model.lora is None

    def _gathered(self) -> float:
        return memory.gathered(self.held, self.element) if self.sharded else 0.0

    def _engine(self) -> tuple[list[Row], str]:
        engine = self.config.rollout.engine
        if isinstance(engine, VllmConfig):
            return self._vllm(engine)
        merged = Row("merged weights", sync=self._merged())
        if engine.type != "hf":
            return [merged], ""
        at_once = min(self.config.rollout.prompts_per_batch, self.prompts)
        found = passes.generating(self.load, self.rows, at_once)
        return [
            Row("whole model", generating=memory.whole(self.held, self.element) if self.sharded else 0.0),
            Row("keys and values", generating=found.cache, note=f"{at_once} prompts at once"),
            Row("activations of the engine", generating=found.activations),
        ], ""

    def _vllm(self, engine: VllmConfig) -> tuple[list[Row], str]:
        share = engine.gpu_memory * self.gpus.memory
        needed = self._engine_weights() + self._longest_row() + memory.ENGINE_WORK
        short = f"rollout.engine.gpu_memory ({engine.gpu_memory}) gives the engine {share / GB:.1f} GB, "
        short += f"and it needs {needed / GB:.1f} GB"
        return [
            Row("merged weights", sync=self._merged()),
            Row("engine", memory.ASLEEP, share, self._engine_weights(), f"gpu_memory {engine.gpu_memory}"),
        ], "" if needed <= share else short

    def _engine_weights(self) -> float:
        engine = self.config.rollout.engine
        dtype = engine.weights_dtype("bfloat16" if self.autocast else self.config.model.dtype)
        return self._base() * BYTES[dtype] / engine.tensor_parallel

    def _base(self) -> int:
        """Parameters without adapters."""
        return sum(item.numel for item in self.held if not (item.trained and self.config.model.lora))

    def _longest_row(self) -> float:
        """Keys and values of the longest row, in the engine."""
        text = read_config(self.load.path).get_text_config()
        heads, size = text.num_attention_heads, text.to_dict().get("head_dim")
        size = size or text.hidden_size // heads
        tokens = self.rows.prompt + self.rows.response
        layers, kept = text.num_hidden_layers, text.num_key_value_heads
        return 2 * layers * kept * size * tokens * 2 / self.config.rollout.engine.tensor_parallel

    def _merged(self) -> float:
        """Adapted weights with their adapters added, all at the same time."""
        size = BYTES[self.config.model.dtype]
        return sum(item.numel for item in self.held if item.adapted) * size if self.shards == 1 else 0.0

    def _host(self, features: float) -> Iterator[tuple[str, float]]:
        """Of a node."""
        train, each = self.config.train, self.gpus.each
        states = memory.optimizer(self.held, train.optimizer, self.shards) * each
        if train.offload:
            moved = memory.weights((item for item in self.held if item.unit != "whole"), self.shards)
            gradients = memory.gradients(self.held, self.shards)
            copies = 2 if self._has_reference else 1
            yield "weights, gradients and optimizer", (copies * moved + gradients) * each + states
        elif train.optimizer.startswith("paged"):
            yield "optimizer, as far as it moves there", states
        if isinstance(self.config.rollout.engine, VllmConfig):
            yield "the sleeping engine's weights", self._engine_weights() * each
        if self.shards > 1 and self.config.rollout.engine.type != "hf":
            makers = each if isinstance(self.config.rollout.engine, VllmConfig) else 1
            yield "whole weights for the engine", self._base() * BYTES[self.config.model.dtype] * makers
        yield "pictures", passes.picture(self.load, self.rows) * self.prompts * each
        if features:
            yield "kept picture features", features * each


def load_of(config: TrainConfig, *, sharded: bool) -> Load:
    """How the config's model computes: gathered in bfloat16 where it is sharded."""
    model, lora, bf16 = config.model, config.model.lora, config.train.precision == "bf16"
    return Load(
        path=str(locate(model.path)),
        dtype="bfloat16" if sharded and bf16 else model.dtype,
        autocast=bf16,
        gradient_checkpointing=model.gradient_checkpointing,
        freeze=tuple(sorted(model.freeze)),
        rank=lora.rank if lora else None,
        parts=tuple(sorted(lora.parts)) if lora else (),
        bits=lora.bits if lora else None,
        layout=config.train.layout,
    )


def rows_of(config: TrainConfig) -> Rows:
    """The largest rows that the config allows: prompts at their limit with as many image tokens as one
    picture of the largest size has, and responses at theirs."""
    prompt = config.data.max_prompt_tokens
    vision = read_config(str(locate(config.model.path))).vision_config
    side = vision.patch_size * vision.spatial_merge_size
    pixels = config.model.max_pixels or prompt * side**2
    return Rows(
        prompt=prompt,
        image=max(0, min(pixels // side**2, prompt - TEXT)),
        response=config.rollout.max_tokens,
        group=config.rollout.group,
        budget=config.train.tokens_per_microbatch,
    )
