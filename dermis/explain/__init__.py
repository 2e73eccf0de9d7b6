"""What a classifier looks at. Needs the packages of the extra `explain`; no training, no web."""
