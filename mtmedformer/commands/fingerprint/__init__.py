"""``mtmedformer fingerprint``: describe a data set or a federation before training.

``summary.py`` measures and counts, ``suggestions.py`` derives settings, ``tables.py`` prints, ``picture.py`` draws.
"""
