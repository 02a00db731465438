"""`edgecomp fit`: which budgets, methods and precisions meet limits on memory, time and accuracy.

limits: what was asked, from words such as 4GiB to numbers, and whether a plan meets it.
sweeps: what `edgecomp sweep` measured, read back.
plans: what can be chosen from, each with its prediction.
answer: what meets the limits, best first; or what comes closest, and what to relax.
"""
