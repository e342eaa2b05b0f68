"""An objective of your own: the plain policy gradient with a weight that falls like a bell around ratio 1.

algo:
  objective: {type: own, function: docs/examples/objective.py:bell, args: {width: 0.5}}
"""


def bell(log_ratio, advantage, width=0.5):
    """Losses of tokens whose gradient is the plain one times exp(-(log r / width)^2 / 2).

    An objective asks for what it needs by name: `log_ratio`, the log of new to old probability, `advantage`,
    `logprobs`, `old`, `mask`, `sequence_log_ratio`, ... (vlm_sapo/algo/objectives.py, TokenTensors), all
    [N, T].
    """
    weight = (-((log_ratio.detach() / width) ** 2) / 2).exp()
    return -weight * log_ratio.exp() * advantage
