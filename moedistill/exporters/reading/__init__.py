"""Exported files as those read them who load them: by their rules, and not by undoing what the writers do."""
