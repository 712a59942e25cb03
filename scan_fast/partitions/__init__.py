"""Partitions of frozen features: many candidates, and the choice among them without labels."""
