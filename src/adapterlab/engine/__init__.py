"""How adapters work inside a model: authors of methods need not open it."""
