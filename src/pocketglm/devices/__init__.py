"""Phones and boards as data, what was published of them, and what that predicts."""
