"""The policy, the batch, the loop."""
