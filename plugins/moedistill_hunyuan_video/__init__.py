"""HunyuanVideo as a backbone."""
