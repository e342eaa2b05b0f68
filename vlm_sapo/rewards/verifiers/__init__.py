"""Verifiers: functions that read a response and grade it against a gold answer."""
