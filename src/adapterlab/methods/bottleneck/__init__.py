"""Small two-layer networks around a sublayer: x + W_up f(W_down x), or beside it; `_bottleneck.py` is their form."""
