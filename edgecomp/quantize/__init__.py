"""Weights in fewer bits: which (`rule`), how (`blocks`), and the bundle written anew (`apply`)."""
