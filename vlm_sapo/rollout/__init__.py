"""Engines that sample responses, and where a step gets its groups."""
