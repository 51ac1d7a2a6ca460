"""``mtmedformer fingerprint``: describe a data set or a federation before training.

``image_sets.py`` measures every image, ``summary.py`` counts, ``suggestions.py`` derives settings, ``tables.py``
prints, ``picture.py`` draws.
"""
