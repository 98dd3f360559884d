"""LongGen: turn a pretrained short-context LLM into a long-context hybrid (arXiv 2410.01485)."""

__version__ = "0.1.0"
