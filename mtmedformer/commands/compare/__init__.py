"""``mtmedformer compare``: train the variants of a study with several seeds, and compare them.

``study.py`` reads a study, ``configuration.py`` resolves the configuration of each variant, ``trainings.py`` defines
the key and the folder of each training, ``runner.py`` runs those that are not finished, each as a process of
``worker.py``. ``panels.py``, ``statistics.py`` and ``measures.py`` compute values, intervals and costs, ``results.py``
joins them to a ``comparison.py``, and ``report.py`` and ``plots.py`` draw the page.
"""
