"""Feedback on answers: reward functions and models, preference models, judges, the policy's own implicit reward."""

from align.feedback.accounts import Account, Count, apply
from align.feedback.base import Comparer, Failed, Feedback, Item, Match, Scorer, Verdict
from align.feedback.spec import FeedbackContext, FeedbackSpec, open_feedback

__all__ = [
    "Account",
    "Comparer",
    "Count",
    "Failed",
    "Feedback",
    "FeedbackContext",
    "FeedbackSpec",
    "Item",
    "Match",
    "Scorer",
    "Verdict",
    "apply",
    "open_feedback",
]
