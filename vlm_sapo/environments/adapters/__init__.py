"""Environments of other libraries, each a class for `rollout.environment.function`."""
