"""A server as a child process: command line, start, log, probes, stop.

Nothing here imports vLLM or torch, so that a command can speak from its first moment.
"""
