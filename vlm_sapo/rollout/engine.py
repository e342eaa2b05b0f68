"""What every rollout engine offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vlm_sapo.types import Context, Prompt, Response, Sampling

if TYPE_CHECKING:
    from vlm_sapo.models.vlm import VLM


class RolloutError(ValueError):
    """An engine that can't go on. The message says what happened and what to do."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses from the policy as it was at the last `sync`.

    No engine ever emits an id of `VLM.banned`. The log-probs it returns are those of the distribution it
    sampled from, after temperature and bans. The same contexts, sampling and weights give the same responses,
    up to rounding. Raises RolloutError where it can't go on, RowError where a prompt is at fault.
    """

    in_background: bool
    """Whether it can sample while the policy trains, on devices of its own."""
    shares_weights: bool
    """Whether it computes with the policy's own modules, so that there is nothing to compare."""
    problems_at_once: int
    """How many prompts an evaluation hands over together."""

    def sync(self, vlm: VLM) -> None:
        """Takes over the weights, unless it has this `VLM.version` of them."""

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """A response for each one so far of each context, which begins with it, or `sampling.group` new ones,
        in the contexts' order. Of several processes all call it, those without a context as well."""

    def close(self) -> None:
        """Frees what the engine holds."""


def continue_response(vlm: VLM, prompt: Prompt, so_far: Response | None, later: Response) -> Response:
    """A response so far and what was sampled behind it, with the text of all its turns."""
    if so_far is None:
        return later
    whole = so_far.continued(later)
    texts = vlm.tokenizer.batch_decode(whole.turns, skip_special_tokens=True)
    return replace(whole, text="\n".join(prompt.opening + text for text in texts))


def as_contexts(prompts: Sequence[Prompt]) -> list[Context]:
    """Contexts in which nothing was sampled yet."""
    return [Context(prompt) for prompt in prompts]
