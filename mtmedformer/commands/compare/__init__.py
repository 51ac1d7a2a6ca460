"""``mtmedformer compare``: variants of a training, many seeds, one honest table.

``study.py`` reads what is to be compared, ``configuration.py`` asks the command line what that means, ``cells.py``
gives every training its key and folder, ``runner.py`` runs those that are not finished by way of ``work.py``, and
``results.py`` puts together what ``panels.py``, ``statistics.py`` and ``measures.py`` say, for ``report.py``.
"""
