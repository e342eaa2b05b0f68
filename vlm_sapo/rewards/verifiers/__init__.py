"""Verifiers: functions that read a response and grade it against a gold answer; table.py lists them."""

from vlm_sapo.rewards.verifiers.answers import marked_answer

__all__ = ["marked_answer"]
