"""Updates with a structure other than two thin factors: Kronecker and Hadamard products, random bases, spectra.

Most rebuild a dense ΔW `[out, in]` from few numbers (`_rebuilt_updates.py`); some apply the structure to x directly.
"""
