"""HunyuanVideo 1.5 as a backbone."""
