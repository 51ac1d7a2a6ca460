"""Files written atomically, and hashes of states."""
