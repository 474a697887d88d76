"""Where pages should lie: which go when a memory fills, and which come before they are
asked for. Pure: knows sessions, bytes and the queue; the store and the simulator share
it.
"""
