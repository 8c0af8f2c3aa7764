"""Methods that act on training over time: which layers train, what gradients pass, what a step changes."""
