"""The memory that a config takes on given GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vlm_sapo.config.rollout import VllmConfig, VllmServerConfig
from vlm_sapo.config.schema import ModelConfig, TrainConfig
from vlm_sapo.hub import local_model
from vlm_sapo.models.families import check_family
from vlm_sapo.models.parallel import prefetched_layers
from vlm_sapo.plugins import locate
from vlm_sapo.tools.plan import memory, passes
from vlm_sapo.tools.plan.cards import visible_memory
from vlm_sapo.tools.plan.memory import GB, PHASES, UNSHARDED, Estimate, Gpus, MemoryRow, ParameterSpec
from vlm_sapo.tools.plan.operations import model_work
from vlm_sapo.tools.plan.passes import BatchSpec, GenerationMemory
from vlm_sapo.tools.plan.shapes import published_shape
from vlm_sapo.tools.plan.simulate import ModelSpec, read_config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIN_TEXT_TOKENS = 16
"""Tokens of a prompt that are text, at least."""


class Estimator:
    """Adds up the memory of a config: parameters and optimizer by formula, passes by simulation."""

    def __init__(self, config: TrainConfig, gpus: Gpus):
        self.config, self.gpus = config, gpus
        self.shards = gpus.count if config.train.shard == "all" else config.train.shard
        self.sharded = self.shards > 1 or config.train.offload
        self.autocast = config.train.precision == "bf16"
        self.model, self.batch = model_spec(config, sharded=self.sharded), batch_spec(config)
        self.parameters: tuple[ParameterSpec, ...] = passes.parameters(
            replace(self.model, dtype=config.model.dtype)
        )
        self.element_size = 2 if self.autocast else BYTES[config.model.dtype]
        """Bytes of an element that is gathered or computed with."""
        self.prompts = -(-config.train.prompts_per_step // gpus.count)
        """Prompts per step and GPU."""

    def estimate(self) -> Estimate:
        """All rows, for a GPU and for a node's host memory."""
        training = passes.training_memory(self.model, self.batch)
        features = training.features * self.prompts
        cached = min(features, training.feature_budget)
        per_step, sharding = f"{self.prompts} prompts per step", f"sharded over {self.shards} GPUs"
        budget = f"{self.batch.budget} tokens per micro-batch"
        flash = self._flash_backward()
        passes_bytes = training.activations + training.logits + flash
        rows = [
            *self._cuda_rows(),
            *self._model_rows(),
            MemoryRow("cached image features", cached, cached, 0, per_step),
            MemoryRow("FSDP all-gather buffer", training=self._gathered(), note=sharding),
            MemoryRow("activations", training=training.activations, note=budget),
            MemoryRow(memory.FLASH, training=flash, note="FlashAttention's own, one layer"),
            MemoryRow("logits", training=training.logits, note="computed in chunks"),
        ]
        engine, shortage = self._engine()
        rows.append(self._lost(passes_bytes, engine))
        rows = [row for row in (*rows, *engine) if any(vars(row)[phase] for phase in PHASES)]
        return Estimate(self.gpus, tuple(rows), tuple(self._host(features - cached)), shortage)

    @property
    def minimum(self) -> float:
        """What it takes at least, however small its batches are."""
        rows = [*self._cuda_rows(), *self._model_rows()]
        engine, beside = self.config.rollout.engine, 0.0
        if isinstance(engine, VllmConfig):
            beside = self.engine_minimum
        elif engine.type == "hf" and self.sharded:
            beside = memory.unsharded_bytes(self.parameters, self.element_size)
        return max(sum(row.training for row in rows), sum(row.generating for row in rows) + beside)

    def _cuda_rows(self) -> Iterator[MemoryRow]:
        yield MemoryRow.constant(memory.CONTEXT, memory.CUDA_CONTEXT, "assumed")
        yield MemoryRow.constant(memory.WORKSPACES, memory.LIBRARY_WORKSPACE, "cuBLAS, cuDNN")
        groups = self._communicators()
        if groups:
            size = len(groups) * memory.NCCL_COMMUNICATOR
            yield MemoryRow.constant(memory.COMMUNICATORS, size, ", ".join(groups))

    def _communicators(self) -> list[str]:
        """The groups of GPUs that exchange tensors."""
        count, engine = self.gpus.count, self.config.rollout.engine
        names = ["all GPUs"] if count > 1 else []
        if self.shards > 1:
            names.append("shards")
            names += ["replicas"] if count > self.shards else []
        if isinstance(engine, VllmConfig) and count > 1:
            names.append("engine")
        if isinstance(engine, VllmServerConfig) and engine.weights == "nccl":
            names.append("servers")
        return names

    def _flash_backward(self) -> float:
        """What a GPU's attention takes in half precision beside what the simulated pass counts."""
        half = self.autocast or self.config.model.dtype != "float32"
        work, batch = model_work(self.model), self.batch
        if not half or self.model.layout == "plain" or not work.attention_layers:
            return 0.0
        row = batch.prompt + batch.group * batch.response
        prompts = max(batch.budget, batch.prompt + batch.response) * batch.prompt / row
        responses = max(batch.budget, batch.prompt + batch.response) - prompts
        return memory.flash_backward_bytes(work.query_width, prompts=prompts, responses=responses)

    def _lost(self, training: float, engine: Sequence[MemoryRow]) -> MemoryRow:
        """What fragmentation takes; vLLM's share is its own affair."""
        hf = self.config.rollout.engine.type == "hf"
        generating = sum(row.generating for row in engine) if hf else 0.0
        share = memory.FRAGMENTATION
        return MemoryRow(memory.LOST, share * training, share * generating, note=f"{share:.0%} of passes")

    def _model_rows(self) -> Iterator[MemoryRow]:
        train, weights = self.config.train, memory.weight_bytes(self.parameters, self.shards)
        gradients = memory.gradient_bytes(self.parameters, self.shards)
        states = memory.optimizer_bytes(self.parameters, train.optimizer, self.shards)
        unsharded = memory.weight_bytes(item for item in self.parameters if item.unit == UNSHARDED)
        yield MemoryRow.constant("weights", unsharded if train.offload else weights)
        if not train.offload:
            yield MemoryRow("gradients", training=gradients)
            yield MemoryRow.constant("optimizer", 0 if train.optimizer.startswith("paged") else states)
        if self._has_reference:
            yield MemoryRow.constant("reference model", unsharded if train.offload else weights)

    @property
    def _has_reference(self) -> bool:
        return bool(self.config.algo.kl) and self.config.model.lora is None

    def _gathered(self) -> float:
        if not self.sharded:
            return 0.0
        prefetch = prefetched_layers(self.shards, self.gpus.per_node)
        return memory.all_gather_bytes(self.parameters, self.element_size, prefetch)

    def _engine(self) -> tuple[list[MemoryRow], str]:
        """The rollout engine's rows, and why it does not fit, if so."""
        engine = self.config.rollout.engine
        if isinstance(engine, VllmConfig):
            return self._vllm(engine)
        if engine.type != "hf":
            return [self._on_the_way()], ""
        (prompts, samples), generation = self._generation()
        unsharded = memory.unsharded_bytes(self.parameters, self.element_size) if self.sharded else 0.0
        return [
            MemoryRow("unsharded model", generating=unsharded),
            MemoryRow("merged LoRA weights", generating=self._merged_while_sampling()),
            MemoryRow("KV cache", generating=generation.kv_cache, note=f"{prompts} prompts x {samples}"),
            MemoryRow("generation activations", generating=generation.activations),
        ], ""

    def _generation(self) -> tuple[tuple[int, int], GenerationMemory]:
        """The larger generation batch of the `hf` engine: training's or an evaluation's. Its prompts and the
        responses to each, and its memory."""
        rollout, section = self.config.rollout, self.config.eval
        batches = [(min(max(1, rollout.batch_sequences // rollout.group), self.prompts), rollout.group)]
        if section.data or section.benchmarks or self.config.data.holdout:
            batches.append((max(1, rollout.batch_sequences // section.samples), section.samples))
        sizes = {
            (prompts, samples): passes.generation_memory(
                self.model, replace(self.batch, group=samples), prompts
            )
            for prompts, samples in batches
        }
        return max(sizes.items(), key=lambda item: item[1].activations + item[1].kv_cache)

    def _vllm(self, engine: VllmConfig) -> tuple[list[MemoryRow], str]:
        share, needed = engine.gpu_memory * visible_memory(self.gpus.memory), self.engine_minimum
        shortage = f"rollout.engine.gpu_memory ({engine.gpu_memory}) gives the engine {share / GB:.1f} GB, "
        shortage += f"and it needs {needed / GB:.1f} GB"
        note = f"gpu_memory {engine.gpu_memory}"
        return [
            self._on_the_way(),
            MemoryRow("engine", memory.SLEEPING_ENGINE, share, self._engine_weights(), note),
        ], "" if needed <= share else shortage

    @property
    def engine_minimum(self) -> float:
        """What a vLLM engine needs of a GPU: weights, one sequence, graphs and its largest pass."""
        resident = self._engine_weights() + self._longest_sequence()
        return resident + memory.ENGINE_GRAPHS + memory.ENGINE_PROFILE

    def _engine_weights(self) -> float:
        engine = self.config.rollout.engine
        dtype = engine.weights_dtype("bfloat16" if self.autocast else self.config.model.dtype)
        return self._base_parameters() * BYTES[dtype] / engine.tensor_parallel

    def _base_parameters(self) -> int:
        """Number of parameters without adapters."""
        return sum(item.numel for item in self.parameters if not (item.trained and self.config.model.lora))

    def _longest_sequence(self) -> float:
        """The engine's KV cache of the longest sequence."""
        text = read_config(where_config_is(self.config.model)).get_text_config()
        heads, size = text.num_attention_heads, text.to_dict().get("head_dim")
        size = size or text.hidden_size // heads
        tokens = self.batch.prompt + self.batch.response
        layers, kv_heads = text.num_hidden_layers, text.num_key_value_heads
        return 2 * layers * kv_heads * size * tokens * 2 / self.config.rollout.engine.tensor_parallel

    def _on_the_way(self) -> MemoryRow:
        """Weights on their way to an engine: one tensor, as it is stored and as it is sent, and what vLLM
        collects of a layer before it repacks it."""
        tensor, layer = memory.largest_tensor(self.parameters), memory.largest_layer(self.parameters)
        in_process = isinstance(self.config.rollout.engine, VllmConfig)
        size = self.element_size * (2 * tensor + (layer if in_process else 0))
        return MemoryRow("weights on their way", sync=size, note="one tensor, one layer")

    def _merged_while_sampling(self) -> float:
        """The copy of the adapted weights that the `hf` engine samples with; it makes one in float32 only."""
        lora = self.config.model.lora
        if lora is None or lora.bits or self.element_size < BYTES["float32"]:
            return 0.0
        return sum(item.numel for item in self.parameters if item.adapted) * self.element_size

    def _host(self, features: float) -> Iterator[tuple[str, float]]:
        """The host memory of a node, by name; `features` is what each GPU moves there of its cache."""
        train, per_node = self.config.train, self.gpus.per_node
        states = memory.optimizer_bytes(self.parameters, train.optimizer, self.shards) * per_node
        yield memory.PROCESSES, memory.HOST_PROCESS * per_node
        loading = memory.loading_bytes(self.parameters, self.shards, offload=train.offload)
        yield memory.LOADING, loading * per_node
        if train.offload:
            sharded = (item for item in self.parameters if item.unit != UNSHARDED)
            weights = memory.weight_bytes(sharded, self.shards)
            gradients = memory.gradient_bytes(self.parameters, self.shards)
            copies = 2 if self._has_reference else 1
            yield "weights, gradients and optimizer", (copies * weights + gradients) * per_node + states
        elif train.optimizer.startswith("paged"):
            yield "paged optimizer, at most", states
        engine = self.config.rollout.engine
        if isinstance(engine, VllmConfig):
            yield "weights of the sleeping engine", self._engine_weights() * per_node
        if isinstance(engine, VllmServerConfig) and engine.weights == "folder":
            yield "weights on their way", memory.largest_tensor(self.parameters) * self.element_size
        if self.config.checkpoint.every:
            yield "checkpoint", self._checkpoint()
        yield "image pixels", passes.pixel_bytes(self.model, self.batch) * self.prompts * per_node
        if features:
            yield "cached image features", features * per_node

    def _checkpoint(self) -> float:
        """What the processes of a node that share one copy of the model write: their part of the largest
        tensor, or with checkpoint.background a copy of all trained weights and moments."""
        trained = [item for item in self.parameters if item.trained]
        share = min(self.shards, self.gpus.per_node) / self.shards
        if not self.config.checkpoint.background:
            return share * max((item.numel * item.element_size for item in trained), default=0)
        states = memory.optimizer_bytes(trained, self.config.train.optimizer)
        return share * (memory.weight_bytes(trained) + states)


def model_spec(config: TrainConfig, *, sharded: bool) -> ModelSpec:
    """How the config's model computes: gathered in bfloat16 where it is sharded."""
    model, lora, bf16 = config.model, config.model.lora, config.train.precision == "bf16"
    return ModelSpec(
        path=where_config_is(model),
        dtype="bfloat16" if sharded and bf16 else model.dtype,
        autocast=bf16,
        gradient_checkpointing=model.gradient_checkpointing,
        freeze=tuple(sorted(model.freeze)),
        lora_rank=lora.rank if lora else None,
        lora_parts=tuple(sorted(lora.parts)) if lora else (),
        lora_bits=lora.bits if lora else None,
        layout=config.train.layout,
    )


def where_config_is(model: ModelConfig) -> str:
    """The folder with a model's config, or the hub id of a published model whose shape is known."""
    if not locate(model.path).exists() and published_shape(model.path) is not None:
        return model.path
    return local_model(model.path, model.revision, weights=False)


def batch_spec(config: TrainConfig) -> BatchSpec:
    """The largest batch that the config allows: prompts and responses at their limits, and as many image
    tokens as one image of the largest size has."""
    prompt = config.data.max_prompt_tokens
    model = read_config(where_config_is(config.model))
    family = check_family(model.model_type, "the model type of model.path")
    pixels = config.model.max_pixels or prompt * family.pixels_per_token(model)
    return BatchSpec(
        prompt=prompt,
        image=max(0, min(family.most_image_tokens(model, pixels), prompt - MIN_TEXT_TOKENS)),
        response=config.rollout.max_tokens,
        group=config.rollout.group,
        budget=config.train.tokens_per_microbatch,
    )
