"""PocketGLM: make a language model fit a phone, and prove what that cost."""

__version__ = "0.1.0"
