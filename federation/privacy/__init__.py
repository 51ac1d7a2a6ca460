"""Privacy of updates: policies, DP-SGD, accounting, and the building blocks of secure summation."""
