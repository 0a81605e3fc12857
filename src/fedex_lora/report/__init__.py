"""What a run came to, for people: one self-contained HTML page, and the paper's figures."""

from fedex_lora.report._figures import write_figure
from fedex_lora.report._page import page, write_report

__all__ = ["page", "write_figure", "write_report"]
