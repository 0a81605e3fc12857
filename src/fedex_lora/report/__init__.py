"""What a run came to, for people: one self-contained HTML page, and the paper's figures."""

from fedex_lora.report._charts import PALETTE
from fedex_lora.report._figures import STYLE, draw, observed, write_figure
from fedex_lora.report._page import page, write_report
from fedex_lora.report._sections import Group

__all__ = ["PALETTE", "STYLE", "Group", "draw", "observed", "page", "write_figure", "write_report"]
