"""The parts of the callback that turns epochs into rounds, and of what follows its last round."""
