"""Engines that draw responses."""
