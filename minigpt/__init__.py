"""MiniGPT: the whole road of a language model, from raw text to a model that chats and reasons."""

__version__ = "0.1.0"
