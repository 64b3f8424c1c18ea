"""Learned sparsity of weights: n of every m along what products sum over."""
