"""LTX-Video for moedistill."""
