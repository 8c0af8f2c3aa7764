"""Updates that are a product of two thin matrices: y = W x + s · B A x, A `[r, in]`, B `[out, r]`.

LoRA is the general form. Its variants choose how the factors start (`_starts.py` says what a start is), which of them
train and how fast, how they are dropped out, or what is multiplied by them.
"""
