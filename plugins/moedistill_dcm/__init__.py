"""The losses of DCM, the dual-expert consistency model (arXiv 2506.03123), as a moedistill plugin."""
