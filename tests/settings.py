"""The defaults of a recipe as the settings of pools and training: tests say only what they change."""

from r1export.pipeline.context import pool_settings, train_settings
from r1export.recipe import Pool, Train

POOL = pool_settings(Pool())
TRAIN = train_settings(Train())
