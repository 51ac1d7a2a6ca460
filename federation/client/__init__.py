"""One round at a site."""
