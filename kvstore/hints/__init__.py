"""Hints of clients: what they say of programs, tools and workflows, and what follows from it. Pure."""
