"""Verifiers, and how they are combined."""
