"""Open-Sora 2.0 for moedistill."""
