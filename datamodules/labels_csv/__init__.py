"""A folder of images described by one table."""
