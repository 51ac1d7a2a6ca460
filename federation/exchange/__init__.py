"""What crosses the network, and how."""
