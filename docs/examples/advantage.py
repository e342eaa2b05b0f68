"""An advantage of your own, token by token: z-scores of the rewards, less for a token that repeats the one
before.

algo:
  advantage: {type: own, function: docs/examples/advantage.py:without_repetition, args: {penalty: 0.5}}
"""

import torch

from vlm_sapo.algo.advantages import zscore


def without_repetition(batch, penalty=0.5):
    """[N, T] advantages of N responses of at most T tokens.

    `batch` is what the step sampled (vlm_sapo/training/batch.py): its groups with prompts, responses and
    rewards, and [N, T] tensors such as `mask`, `sampled`, `old` and, with a KL term, `reference`.
    """
    scores = torch.cat([zscore(rewards) for rewards in batch.rewards.split(batch.sizes)])
    advantages = scores[:, None].repeat(1, batch.mask.shape[1])
    responses = [response for group in batch.groups for response in group.responses]
    for row, response in enumerate(responses):
        repeated = 1 + (response.ids[1:] == response.ids[:-1]).nonzero()[:, 0]
        advantages[row, repeated] -= penalty
    return advantages
