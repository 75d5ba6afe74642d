"""The benchmark report: run folders -> records -> tables and figures -> one page, Markdown, JSON and CSV."""
