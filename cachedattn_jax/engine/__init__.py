"""How turns are served: queue, prefill, decode, and what a user holds."""
