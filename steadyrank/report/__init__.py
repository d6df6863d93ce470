"""Run folders to one self-contained HTML page, and to a table that compares them."""

from .compare import compare as compare
from .page import write_report as write_report
