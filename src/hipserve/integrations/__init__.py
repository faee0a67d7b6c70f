"""Translators into the engines that people run; no mathematics here."""
