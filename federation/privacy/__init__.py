"""What a site does to its update before it leaves."""
