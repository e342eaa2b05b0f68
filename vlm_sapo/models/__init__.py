"""The only place that knows a model family: processors, vision tokens, positions, freezing, the training
pass."""
