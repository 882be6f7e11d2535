"""One self-contained HTML page per run: verdict, curves, before and after, data report, resolved recipe."""

from align.report.page import MAX_BYTES, render, write_page
from align.report.run import data_page, run_page, run_sections
from align.report.sections import (
    Code,
    Curve,
    DataReport,
    Histogram,
    Page,
    Part,
    Samples,
    Section,
    Table,
    Text,
    Tokens,
    TokenValues,
    Verdict,
)

__all__ = [
    "MAX_BYTES",
    "Code",
    "Curve",
    "DataReport",
    "Histogram",
    "Page",
    "Part",
    "Samples",
    "Section",
    "Table",
    "Text",
    "TokenValues",
    "Tokens",
    "Verdict",
    "data_page",
    "render",
    "run_page",
    "run_sections",
    "write_page",
]
