"""What is distilled: the contract of backbones, experts on shared networks, the mixture of them."""
