"""What a config allows of processes, one for each GPU: their number, and what they share."""

from __future__ import annotations

from vlm_sapo.config.schema import SftConfig, Train, TrainConfig


def check(config: TrainConfig | SftConfig, size: int) -> int:
    """How many of `size` processes share one copy of the model. Raises ValueError where the config does not
    fit so many."""
    train = config.train
    shard = size if train.shard == "all" else train.shard
    if isinstance(train, Train):
        minibatch, name = train.prompts_per_step // train.minibatches, "prompts_per_step / minibatches"
    else:
        minibatch, name = train.rows_per_step, "rows_per_step"
    if minibatch % size:
        field, factor = name.partition(" / ")[0], train.minibatches if isinstance(train, Train) else 1
        times = [minibatch // size * size, minibatch // size * size + size]
        options = " or ".join(f"train.{field}={number * factor}" for number in times if number)
        raise ValueError(
            f"train.{name} ({minibatch}) must be divisible by the number of processes ({size}, one for each "
            f"GPU), since a group stays in one; use {options}, or another number of processes"
        )
    if size % shard:
        divisors = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
        raise ValueError(
            f"train.shard ({shard}) must divide the number of processes ({size}, one for each GPU); use one "
            f"of {divisors}, or all"
        )
    _check_combinations(config, size, shard)
    return shard


def _check_combinations(config: TrainConfig | SftConfig, size: int, shard: int) -> None:
    train, engine = config.train, config.rollout.engine
    sharded = shard > 1 or train.offload
    four_bits = config.model.lora is not None and config.model.lora.bits
    for wrong, message in (
        (
            sharded and train.optimizer != "adamw",
            f"train.optimizer ({train.optimizer}) can't be sharded or offloaded; use adamw, or "
            "train.shard=1 without train.offload",
        ),
        (
            sharded and four_bits,
            "model.lora.bits (4) can't be sharded or offloaded; leave it out, or use train.shard=1 without "
            "train.offload",
        ),
        (
            size > 1 and engine.type == "vllm" and engine.tensor_parallel > 1,
            f"rollout.engine.tensor_parallel must be 1 where {size} processes train, each with an engine of "
            "its own; use vllm_server for engines on several GPUs",
        ),
        (
            sharded and engine.type == "vllm_server" and engine.weights == "nccl",
            "rollout.engine.weights (nccl) sends whole weights from a GPU, and with train.shard or "
            "train.offload it has parts; use folder",
        ),
    ):
        if wrong:
            raise ValueError(message)
