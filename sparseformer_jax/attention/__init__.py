"""Attention methods, a module each; base.py says what a method overrides."""
