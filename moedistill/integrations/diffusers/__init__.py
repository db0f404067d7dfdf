"""diffusers models as backbones: loading, sampling through their own pipelines, and `apply`."""
