"""Workloads, and one file per claim of the paper with run() and plot()."""
