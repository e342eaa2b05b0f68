"""Reads rows and images, and gives training its examples."""
