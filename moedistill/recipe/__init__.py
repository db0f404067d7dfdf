"""What a YAML file may say, and how it is read and checked."""
