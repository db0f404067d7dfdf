"""CogVideoX as a backbone."""
