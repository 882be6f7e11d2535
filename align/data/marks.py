"""Which tokens of two answers differ: the segments that a method may count alone."""

from __future__ import annotations

from dataclasses import replace
from difflib import SequenceMatcher

import numpy as np

from align.data.groups import Preference, TokenGroup


def mark_differences(group: TokenGroup) -> TokenGroup:
    """The group with `marks` in each of its preferences.

    A token is marked where the longest matching blocks of the two answers (Ratcliff and Obershelp, by `difflib`) leave
    it out, so a replaced phrase is marked in both and an insertion in one.
    """
    return replace(group, preferences=tuple(_marked(group, pair) for pair in group.preferences))


def _marked(group: TokenGroup, pair: Preference) -> Preference:
    winner, loser = group.completions[pair.winner], group.completions[pair.loser]
    first, second = np.ones(len(winner), dtype=bool), np.ones(len(loser), dtype=bool)
    same = SequenceMatcher(None, winner.ids.tolist(), loser.ids.tolist(), autojunk=False)
    for block in same.get_matching_blocks():
        first[block.a : block.a + block.size] = False
        second[block.b : block.b + block.size] = False
    return replace(pair, marks=(first & winner.mask, second & loser.mask))
