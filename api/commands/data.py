"""`residency data`: what a training file holds, what is wrong with it, and what a model will see of it."""

import typer

from api.commands import data_check, data_preview

app = typer.Typer(no_args_is_help=True, help="Look at training data before it is trained on.")
app.command()(data_check.check)
app.command()(data_preview.preview)
