"""Rows and pictures in, examples out."""
