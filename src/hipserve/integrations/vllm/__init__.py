"""HiP attention inside an unmodified vLLM: `--attention-backend CUSTOM`."""

OPTIONS_KEY = "hip"
"""Options travel by `--additional-config '{"hip": {...}}'`, with the keys of `HiPConfig`."""
