"""The audit trail: who did what, on which object, with which outcome."""
