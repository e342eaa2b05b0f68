"""What every rollout engine offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from vlm_sapo.distributed import World
from vlm_sapo.types import Context, Prompt, Response, Sampling

if TYPE_CHECKING:
    from vlm_sapo.models.vlm import VLM

T = TypeVar("T")


class RolloutError(ValueError):
    """An engine can't continue. The message says what happened and what to do."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses from the policy as it was at the last `sync`.

    No engine ever emits an id of `VLM.banned`. The log-probs it returns are those of the distribution it
    sampled from, after temperature and bans. The same contexts, sampling and weights give the same responses,
    up to rounding. Raises RolloutError if it can't continue, RowError if a prompt is at fault.
    """

    in_background: bool
    """Whether it can sample while the policy trains, on devices of its own."""
    shares_weights: bool
    """Whether it computes with the policy's own modules, so that its log-probs need no comparison."""

    def sync(self, vlm: VLM) -> None:
        """Copies the weights, unless it has this `VLM.version` of them."""

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """Continues each response so far of each context, or samples `sampling.group` new ones; in the order
        of the contexts. All processes call it, also those without a context. May call `Context.report`."""

    def problems_at_once(self, samples: int) -> int:
        """Prompts that an evaluation with so many samples of each passes in one call."""

    def close(self) -> None:
        """Frees the engine's memory and processes."""


def call(work: Callable[[], T]) -> T:
    """Runs `work` as it is: each process has the full parameters anyway."""
    return work()


@dataclass(frozen=True)
class EngineNeeds:
    """What an engine is built for."""

    vlm: VLM
    path: str
    """The checkpoint that the model was loaded from."""
    longest: int
    """The most tokens of a prompt and its response."""
    dtype: str
    """Of the weights, if the engine's config says `auto`."""
    sequences_per_batch: int
    """Responses to sample together, for an engine in this process."""
    warn: Callable[[str], None]
    folder: Path | None = None
    """Where weights for servers are written unless the config names a folder; None for servers that keep the
    weights they have."""
    autocast: Callable = nullcontext
    with_full_params: Callable = call
    world: World | None = None
    experts: bool = False
    """Whether responses carry their tokens' experts."""
    max_pixels: int | None = None
    """The largest area of an image; None for what the checkpoint's processor allows."""
    returned_images: int = 0
    """The most images that an environment adds to a prompt."""


def continue_response(vlm: VLM, prompt: Prompt, so_far: Response | None, later: Response) -> Response:
    """Appends sampled tokens to a response so far; the text is that of all its turns."""
    if so_far is None:
        return later
    whole = so_far.continued(later)
    texts = vlm.tokenizer.batch_decode(whole.turns, skip_special_tokens=True)
    return replace(whole, text="\n".join(prompt.opening + text for text in texts))


def as_contexts(prompts: Sequence[Prompt]) -> list[Context]:
    """Contexts without responses so far."""
    return [Context(prompt) for prompt in prompts]


def server_in_turn(context: int, count: int, world: World) -> int:
    """The number, modulo how many there are, of the server that first gets a context of this process's
    `count`: the prompts of all processes go to the servers in turn."""
    return world.rank * count + context
