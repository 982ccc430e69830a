"""What a user configures: the groups of keys, how they are parsed, and what is said about mistakes."""

from lightning_idkd.config.groups import (
    IID,
    ClockConfig,
    Config,
    DataConfig,
    Dirichlet,
    GraphConfig,
    LoggerConfig,
    NodeConfig,
    QGMDirichlet,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "IID",
    "ClockConfig",
    "Config",
    "DataConfig",
    "Dirichlet",
    "GraphConfig",
    "LoggerConfig",
    "NodeConfig",
    "QGMDirichlet",
    "RunConfig",
    "TrainConfig",
]
