"""Middleware that a request passes before its route, one layer per file; `app.py` sets their order."""
