"""Generators of pages under docs/."""
