"""report.html: what a run was, how it went and what it made, as one page that opens from the disk."""
