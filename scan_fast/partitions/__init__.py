"""Partitions of frozen features: many ways to group them, and the choice among them without labels."""

from .choice import Candidate, Choice, choose, refined, with_head
from .heads import REFINEMENTS, TrainedHeads, train_heads
from .number import Suggestion, suggest_number
from .probe import LinearHead, fit_head
from .score import Score, label_free_score
from .space import FeatureSpace
from .ways import WAYS

__all__ = [
    "REFINEMENTS",
    "WAYS",
    "Candidate",
    "Choice",
    "FeatureSpace",
    "LinearHead",
    "Score",
    "Suggestion",
    "TrainedHeads",
    "choose",
    "fit_head",
    "label_free_score",
    "refined",
    "suggest_number",
    "train_heads",
    "with_head",
]
