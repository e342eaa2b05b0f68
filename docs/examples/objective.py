"""An objective of your own: the plain policy gradient with a weight that falls like a bell around ratio 1.

algo:
  objective: {type: own, function: docs/examples/objective.py:bell, args: {width: 0.5}}
"""


def bell(log_ratio, advantage, width=0.5):
    """Losses of tokens whose gradient is the plain one times exp(-(log r / width)^2 / 2).

    `log_ratio` holds the log of new to old probability, [N, T]; `advantage` is [N, 1].
    """
    weight = (-((log_ratio.detach() / width) ** 2) / 2).exp()
    return -weight * log_ratio.exp() * advantage
