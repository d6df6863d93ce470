"""Run folders to one self-contained HTML page, to PNGs of its figures, and to a table and a page that compare them."""

from .compare import compare as compare
from .compare import write_comparison as write_comparison
from .page import write_report as write_report
from .png import write_pngs as write_pngs
