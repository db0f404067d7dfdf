"""The stages of a recipe: training an expert, evaluating, exporting."""
