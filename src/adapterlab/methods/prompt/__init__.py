"""Virtual tokens: trained vectors in front of the input, or trained keys and values in front of the real ones."""
