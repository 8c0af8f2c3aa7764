"""Several adapters at one module and a gate that weighs them, token by token."""
