"""From a run folder's journal to one self-contained page. Reads journals and JSON only; decides nothing."""

from downslope.report.report import report

__all__ = ["report"]
