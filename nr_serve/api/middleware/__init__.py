"""What a request passes before its route, a layer each; `app.py` puts them in their order."""
