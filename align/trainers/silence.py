"""Stops a run in which nobody judges: it would sample to its end and learn nothing."""

from __future__ import annotations

from align.core.errors import DataError
from align.feedback.accounts import Account

BATCHES = 3
"""Batches in a row that may go without a single judgement: what fails for a moment has time to come back."""


class Silence:
    """Hears the accounts of a run's batches of rollouts, one after the other."""

    def __init__(self) -> None:
        self.batches = 0

    def hear(self, account: Account) -> None:
        """Count a batch without any judgement; one judgement, and the count starts anew.

        Raises:
            DataError: it was the third in a row.
        """
        asked = any(count.asked for count in account.counts.values())
        self.batches = self.batches + 1 if asked and not any(c.judged for c in account.counts.values()) else 0
        if self.batches < BATCHES:
            return
        raise DataError(
            f"{BATCHES} batches of rollouts in a row were judged by nobody",
            why=str(account),
            mend="mend the feedback; the messages before this one say what it raised, and the same command goes on",
        )
