"""Compute and communication of a run on several ranks: what is predicted, and what is counted in a real run."""
