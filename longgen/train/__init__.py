"""Continued training of hybrids on the Hugging Face Trainer."""
