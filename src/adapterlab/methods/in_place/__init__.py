"""Methods that train the base's own parameters: all, some layers, biases, chosen entries or rows."""
