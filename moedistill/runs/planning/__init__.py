"""What a recipe takes of memory and computes, before it is run: by counting, and by steps without numbers."""
