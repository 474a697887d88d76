"""A root: immutable objects and records in a folder or an object store.

Knows names and bytes, time-outs, faults, who may write. Does not know pages or tiers.
"""
