"""Reinforcement learning for vision-language models with Soft Adaptive Policy Optimization."""
