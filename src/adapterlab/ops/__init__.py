"""Fused products and losses. Each has a plain torch form that defines what it computes."""
