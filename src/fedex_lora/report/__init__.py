"""What a run came to, for people: one self-contained HTML page, and the paper's figures."""

from fedex_lora.report._figures import draw, observed, write_figure
from fedex_lora.report._page import is_report, page, write_report
from fedex_lora.report._sections import Group

__all__ = ["Group", "draw", "is_report", "observed", "page", "write_figure", "write_report"]
