"""Preference pairs to audit on: reading, tokenizing, batching."""
