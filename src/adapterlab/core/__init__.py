"""How anything attaches to a model: methods, sites, adapters, state and the four verbs."""
