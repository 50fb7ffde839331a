"""The report page of an annotate run: what came out, whether to trust it, where rewards come from.

    tables ─► gather (`gather.py`, Spark) ─► ReportData (`data.py`) ─► verdict, plots, page

Only aggregates and small samples come to the driver; the page is one HTML file that loads nothing.
"""
