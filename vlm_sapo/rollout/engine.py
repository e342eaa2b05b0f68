"""What every rollout engine offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from vlm_sapo.types import Prompt, Response, Sampling

if TYPE_CHECKING:
    from vlm_sapo.models.vlm import VLM


class RolloutError(ValueError):
    """An engine that can't go on. The message says what happened and what to do."""


class RolloutEngine(Protocol):
    """Draws responses from the policy as it was at the last `sync`.

    No engine ever emits an id of `VLM.banned`. The log-probs it returns are those of the distribution it
    sampled from, after temperature and bans. The same prompts, sampling and weights give the same responses,
    up to rounding. Raises RolloutError where it can't go on, RowError where a prompt is at fault.
    """

    def sync(self, vlm: VLM) -> None:
        """Takes over the weights, unless it has this `VLM.version` of them."""

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Response]]:
        """`sampling.group` responses for each prompt, in the prompts' order. Of several processes all call
        it, those without a prompt as well."""

    def close(self) -> None:
        """Gives back what the engine holds."""
