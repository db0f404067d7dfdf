"""The plugin that a new backbone starts from."""
