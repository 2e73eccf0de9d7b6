"""Programs that measure, one for each claim; each prints a table, or JSON with --json."""
