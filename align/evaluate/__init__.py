"""What a policy has become: win rates, rewards and KL with intervals, against the model that it started from."""

from align.evaluate.held_out import HeldOut, read_held_out
from align.evaluate.intervals import Estimate, mean_interval, paired_difference, ratio_interval
from align.evaluate.kl import KL, kl_on_samples
from align.evaluate.policy import Settings, evaluate_policy, save_result
from align.evaluate.results import Evaluation
from align.evaluate.sides import Side, as_side, load_side, starting_model
from align.evaluate.wins import length_controlled_win_rate, win_rate, win_rate_of
from align.feedback.functions import Reward, load_reward

__all__ = [
    "KL",
    "Estimate",
    "Evaluation",
    "HeldOut",
    "Reward",
    "Settings",
    "Side",
    "as_side",
    "evaluate_policy",
    "kl_on_samples",
    "length_controlled_win_rate",
    "load_reward",
    "load_side",
    "mean_interval",
    "paired_difference",
    "ratio_interval",
    "read_held_out",
    "save_result",
    "starting_model",
    "win_rate",
    "win_rate_of",
]
