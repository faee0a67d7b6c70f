"""A server as a child process: command line, start, log, probes, stop.

Nothing here imports vLLM or torch: a command can print from its first moment.
"""
