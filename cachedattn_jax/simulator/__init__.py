"""A serving system in virtual time, around the engine's own scheduler, placement and
cost model: what takes a cluster hours is played in seconds.
"""
