"""The console script `residency`: one sub-command starts the service, the others talk to it over HTTP."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from api.client import DEFAULT_HOME, DEFAULT_URL, ClientError, Refused
from api.commands import (
    chat,
    data,
    deployments,
    files,
    jobs,
    keys,
    methods,
    models,
    nodes,
    pipelines,
    tensorboard,
    votes,
)
from api.commands.output import errors, plain


class Root(TyperGroup):
    """Turns what the client raises into a short red message and exit status 1."""

    def invoke(self, ctx: typer.Context) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().invoke(ctx)
        except ClientError as error:
            where = f" ({error.param})" if isinstance(error, Refused) and error.param else ""
            errors.print(plain(f"{error}{where}"), style="red")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune language models on your own machines, and chat with them.",
    epilog="The server's address is read from RESIDENCY_URL, the key from RESIDENCY_API_KEY "
    "or from the file admin.key in RESIDENCY_HOME (~/.residency).",
)
app.add_typer(models.app, name="models")
app.add_typer(files.app, name="files")
app.add_typer(data.app, name="data")
app.add_typer(jobs.app, name="jobs")
app.add_typer(pipelines.app, name="pipelines")
app.add_typer(deployments.app, name="deployments")
app.add_typer(votes.app, name="votes")
app.add_typer(keys.app, name="keys")
app.add_typer(nodes.app, name="nodes")
app.command()(chat.chat)
app.command()(methods.methods)
app.command()(pipelines.run)
app.command()(tensorboard.tensorboard)


@app.command()
def up(
    *,
    home: Annotated[
        Path, typer.Option(envvar="RESIDENCY_HOME", help="Where all data is kept.", file_okay=False)
    ] = Path(DEFAULT_HOME),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8700,
    workers: Annotated[int, typer.Option(min=1, help="Jobs that may train at the same time.")] = 1,
    import_dir: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that base models may be imported from; may be given several times. "
            "Without it: your home folder and the current one.",
            file_okay=False,
        ),
    ] = None,
    dashboard: Annotated[bool, typer.Option(help="Whether the dashboard is started, too.")] = True,
    dashboard_port: Annotated[int, typer.Option(min=1, max=65535)] = 8701,
) -> None:
    """Start the whole service on this machine; Ctrl-C stops it."""
    from api.up import run_up  # the only command that needs the server's packages

    import_dirs = [folder.expanduser().absolute() for folder in import_dir or [Path.home(), Path.cwd()]]
    home = home.expanduser().absolute()
    status = run_up(
        home=home,
        host=host,
        port=port,
        workers=workers,
        import_dirs=import_dirs,
        dashboard_port=dashboard_port if dashboard else None,
    )
    raise typer.Exit(status)


@app.command("dashboard")
def serve_dashboard(
    *,
    api_url: Annotated[
        str, typer.Option(envvar="RESIDENCY_URL", help="Where the API answers, without /v1.")
    ] = DEFAULT_URL,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8701,
    secure_cookie: Annotated[
        bool, typer.Option("--secure-cookie", help="For a dashboard behind TLS: send its cookie there only.")
    ] = False,
) -> None:
    """Serve the dashboard of a service; `up` does it by itself."""
    from api.dashboard.app import run_dashboard  # the only command that needs NiceGUI

    run_dashboard(api_url=api_url, host=host, port=port, secure_cookie=secure_cookie)


@app.command()
def migrate(
    *,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="Gets a new admin key unless the one in it works. Without it: admin.key in RESIDENCY_HOME."
        ),
    ] = None,
) -> None:
    """Ready the database of a service whose parts are started one by one; `up` does it by itself."""
    from api import migrate
    from db.settings import DatabaseSettings

    settings = DatabaseSettings()
    migrate.migrate(settings, key_file=key_file or settings.home_dir / "admin.key")


if __name__ == "__main__":
    app()
