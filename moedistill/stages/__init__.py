"""What a run does, in order: the contracts of stages, what a step may touch, and the core's own stages."""
