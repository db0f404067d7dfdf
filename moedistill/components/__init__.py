"""How to plug in: fields of configs, registries, hooks, and how plugins are found."""
