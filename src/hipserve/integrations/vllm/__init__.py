"""HiP attention inside an unmodified vLLM: `--attention-backend CUSTOM`."""
