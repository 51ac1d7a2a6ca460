"""One round at the server."""
