"""The report of a run as one HTML file, and the comparison of several runs."""

from disttrain.report.page import write_report

__all__ = ["write_report"]
