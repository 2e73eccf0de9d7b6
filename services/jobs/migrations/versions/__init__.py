"""One module per revision of the schema. A released revision is never changed: add a new one."""
