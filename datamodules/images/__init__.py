"""Image files to pixels, and pixels to the network's input."""
