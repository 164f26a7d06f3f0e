"""A comparison's files: its numbers, the page to look at, the document for papers."""

from __future__ import annotations

from pathlib import Path

from flexperts.files import write_json, write_text
from flexperts.reports.html import html_report
from flexperts.reports.markdown import markdown_report
from flexperts.reports.reading import Comparison


def write_reports(comparison: Comparison, out: Path) -> None:
    """Write comparison.json, report.html (opens from disk) and report.md.

    Raises:
        ArtifactError: The directory cannot be written.
    """
    write_json(out / "comparison.json", comparison, indent=None)
    write_text(out / "report.html", html_report(comparison))
    write_text(out / "report.md", markdown_report(comparison))
