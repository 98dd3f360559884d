"""The demo: a small model extended from 8K to 32K tokens, measured before and after."""
