"""The report of a dataset: its content, the statistics of real images that it is compared with, and its page."""
