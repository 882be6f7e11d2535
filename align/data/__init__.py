"""Rows -> groups -> tokens: sources, readers, tokenisation, the order of an epoch, and what was left out."""

from align.data.groups import Completion, Group, Preference, RowId, Segment, TokenCompletion, TokenGroup
from align.data.partners import add_mismatched
from align.data.prepare import PreparedData, SourceSpec, prepare_data
from align.data.reader import Reader
from align.data.readers import reader_for
from align.data.rejected import RejectedLog
from align.data.rows import BadRow, RowError
from align.data.sources import Source, open_source
from align.data.stream import GlobalBatch, GlobalBatchSampler, GroupDataset, Hole, collate, epoch_order
from align.data.tokenise import Tokeniser

__all__ = [
    "BadRow",
    "Completion",
    "GlobalBatch",
    "GlobalBatchSampler",
    "Group",
    "GroupDataset",
    "Hole",
    "Preference",
    "PreparedData",
    "Reader",
    "RejectedLog",
    "RowError",
    "RowId",
    "Segment",
    "Source",
    "SourceSpec",
    "TokenCompletion",
    "TokenGroup",
    "Tokeniser",
    "add_mismatched",
    "collate",
    "epoch_order",
    "open_source",
    "prepare_data",
    "reader_for",
]
