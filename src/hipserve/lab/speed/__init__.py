"""Speed compared with dense attention; no number without a numeric check."""
