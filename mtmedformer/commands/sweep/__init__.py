"""``mtmedformer sweep``: run a W&B sweep file without W&B, with Optuna choosing the parameters of each trial."""

from mtmedformer.errors import ConfigError

try:
    import optuna  # noqa: F401  an optional package, which the modules below import
except ImportError as error:
    raise ConfigError("mtmedformer sweep needs Optuna; pip install 'mtmedformer[sweep]'") from error
