"""An environment of your own: it asks the model to check its answer, and rewards a right second answer.

rollout:
  environment: {function: docs/examples/environment.py:CheckAgain, args: {bonus: 0.5}, max_turns: 2}
"""

from vlm_sapo.environments import Observation
from vlm_sapo.rewards.verifiers import marked_answer


class CheckAgain:
    """One object for each response. The run's own reward reads all turns; `bonus` is added to it."""

    def __init__(self, bonus=0.5):
        self.bonus = bonus

    def reset(self, example):
        """Begins with the row that the model will answer."""
        self.answer, self.turns = example.answer, 0

    def step(self, response):
        """Answers a turn: what the observation says is the model's next user message, and has no loss."""
        self.turns += 1
        if self.turns == 1:
            return Observation(f"You said {marked_answer(response)}. Look again: how many are there?")
        right = marked_answer(response) == self.answer
        return Observation(done=True, reward=self.bonus * right)
