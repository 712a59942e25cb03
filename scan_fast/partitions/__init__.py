"""Partitions of frozen features: many ways to group them, and the choice among them without labels."""

from .choice import Candidate, Choice, choose, with_head
from .number import Suggestion, suggest_number
from .probe import LinearHead, fit_head
from .score import Score, label_free_score
from .space import FeatureSpace
from .ways import WAYS

__all__ = [
    "WAYS",
    "Candidate",
    "Choice",
    "FeatureSpace",
    "LinearHead",
    "Score",
    "Suggestion",
    "choose",
    "fit_head",
    "label_free_score",
    "suggest_number",
    "with_head",
]
