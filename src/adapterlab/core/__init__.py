"""The contract: all that the author of a method has to know."""
