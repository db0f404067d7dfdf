"""The homes of other libraries: models, pipelines and schedulers of diffusers."""
