"""What a run came to, for people: one self-contained HTML page, and the paper's figures."""

from fedex_lora.report._charts import PALETTE
from fedex_lora.report._figures import STYLE, Placing, Value, draw, observed, per_seed, write_figure
from fedex_lora.report._groups import Group
from fedex_lora.report._page import page, write_report

__all__ = ["PALETTE", "STYLE", "Group", "Placing", "Value", "draw", "observed", "page", "per_seed", "write_figure", "write_report"]
