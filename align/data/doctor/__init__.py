"""The data doctor: what preference data hold, as plain numbers, and limits on them."""

from align.data.doctor.examination import SAMPLE, Examination, Plan, Watch, examine, guessed_view, unwatched
from align.data.doctor.limits import Limits, bad_share, crossed, judge

__all__ = [
    "SAMPLE",
    "Examination",
    "Limits",
    "Plan",
    "Watch",
    "bad_share",
    "crossed",
    "examine",
    "guessed_view",
    "judge",
    "unwatched",
]
