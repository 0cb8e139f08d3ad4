"""The router: which attention replica serves a request, and what becomes of the request when that replica dies."""
