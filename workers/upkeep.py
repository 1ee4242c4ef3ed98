"""The upkeep of the database, once a minute."""

from db import upkeep
from db.settings import DatabaseSettings
from workers.app import UPKEEP_TASK, app, database


@app.task(name=UPKEEP_TASK)
def run() -> None:
    """Do what time alone makes due."""
    upkeep.run(database(), DatabaseSettings())
