"""Fetch a model or a data set from a hub: the only trainer process that may use the network.

`python -m trainers.hub model ORG/NAME --revision REV --to DIR --report R.json`
`python -m trainers.hub data ORG/NAME --revision REV --split S --limit-bytes N --to FILE --report R.json`

HF_ENDPOINT and HF_TOKEN are read by huggingface_hub itself. Exit 0 with the commit in the report, or 3 with
{"error": {"code", "message"}}. Messages are our own words: a server's could repeat the token.
"""

import argparse
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from trainers.folders.artifacts import Refused, report_outcome
from trainers.importing.checks import PICKLED_SUFFIXES, SETTINGS_NAMES, VOCABULARY_NAMES

DATA_FORMATS = ("parquet", "json", "csv")  # the readers of `datasets` that only read; json includes JSONL
T = TypeVar("T")


def fetch_model(repo: str, *, revision: str, to: Path) -> dict[str, Any]:
    """Download the files that an import copies, all of one commit, into the folder `to`. Raises Refused."""
    from huggingface_hub import HfApi, hf_hub_download

    info = ask_hub(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True), repo=repo)
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = choose_files(files)
    if 2 * sum(files[name] for name in names) > shutil.disk_usage(to.parent).free:  # the import copies them
        raise Refused("disk_full", f"There is no space left for the files of {repo}.")
    to.mkdir()
    for name in names:
        ask_hub(lambda name=name: hf_hub_download(repo, name, revision=info.sha, local_dir=to), repo=repo)
    shutil.rmtree(to / ".cache", ignore_errors=True)
    return {"revision": info.sha}


def choose_files(files: dict[str, int]) -> list[str]:
    """The names, of those in the repository's top folder, that an import would copy. Raises Refused."""
    top = [name for name in sorted(files) if "/" not in name]
    if not any(name.endswith(".safetensors") for name in top):
        if any(Path(name).suffix.lower() in PICKLED_SUFFIXES for name in files):
            raise Refused("unsafe_weights", "The repository has weights only in formats that can hold code.")
        raise Refused("no_safetensors", "The repository has no .safetensors weights.")
    wanted = SETTINGS_NAMES | VOCABULARY_NAMES
    return [name for name in top if name in wanted or name.endswith((".safetensors", ".model"))]


def fetch_data(
    repo: str, *, revision: str, config: str | None, split: str, to: Path, limit_bytes: int
) -> dict[str, Any]:
    """Write one split of a data set to `to` as JSONL. Raises Refused, also above `limit_bytes`."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi

    sha = ask_hub(lambda: HfApi().dataset_info(repo, revision=revision), repo=repo).sha
    builder = ask_hub(lambda: load_dataset_builder(repo, config, revision=sha), repo=repo)
    check_builder(builder, repo=repo, sha=str(sha))
    stream = ask_hub(lambda: builder.as_streaming_dataset(split=split), repo=repo)
    rows, n_rows, n_bytes = iter(stream), 0, 0
    with to.open("wb") as out:
        while row := ask_hub(lambda: next(rows, None), repo=repo):
            line = to_line(row)
            n_rows, n_bytes = n_rows + 1, n_bytes + len(line)
            if n_bytes > limit_bytes:
                raise Refused("file_too_large", f"The data is larger than {limit_bytes} bytes.")
            out.write(line)
    if not n_rows:
        raise Refused("empty_file", "The split holds no rows.")
    return {"revision": sha, "rows": n_rows}


def check_builder(builder: Any, *, repo: str, sha: str) -> None:
    """Refuse readers that could do more than read, and files that are not the repository's own."""
    reader = type(builder).__module__
    if not any(reader == f"datasets.packaged_modules.{name}.{name}" for name in DATA_FORMATS):
        raise Refused("unsupported_data", "Only parquet, JSON, JSONL and CSV files can be imported.")
    own = f"hf://datasets/{repo}@{sha}/"
    for file in walk_files(builder.config.data_files):
        # The repository's own description can list any address, and any path of this machine.
        if not file.startswith(own):
            raise Refused("unsafe_data", "The data set lists files outside its repository.")


def walk_files(data_files: Any) -> Iterator[str]:
    """Every file of a builder's `data_files`: {split: [file]}."""
    for files in (data_files or {}).values():
        yield from map(str, files)


def to_line(row: dict[str, Any]) -> bytes:
    """A row as a line of JSONL, without the nulls that stand for keys which a row does not have."""
    try:
        return json.dumps(_without_nulls(row), ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError):
        raise Refused("unsupported_data", "The data holds values that JSON cannot say.") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def ask_hub(ask: Callable[[], T], *, repo: str) -> T:
    """What `ask` returns; what a hub or its data can do wrong becomes Refused."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors
    from pyarrow import ArrowException

    try:
        return ask()
    except errors.GatedRepoError:
        raise Refused("hub_gated", f"Access to {repo} has to be asked for on the hub.") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, DatasetNotFoundError):
        raise Refused("hub_not_found", f"The hub has no {repo} at this revision, or hides it.") from None
    except errors.HfHubHTTPError as error:
        raise _describe_status(error.response.status_code, repo=repo) from None
    except (DataFilesNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # it looked at its cache as it had no answer
            raise Refused("hub_unreachable", "The hub does not answer.") from None
        raise Refused("hub_not_found", f"{repo} has no such files.") from None
    # The HTTPError of httpx or httpx2, whichever this version of the client is built on.
    except (errors.HTTPError, ConnectionError, TimeoutError):  # pyright: ignore[reportPrivateImportUsage]
        raise Refused("hub_unreachable", "The hub does not answer.") from None
    except (
        DatasetsError,
        ArrowException,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
    ) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise Refused("disk_full", f"There is no space left for {repo}.") from None
        kind = type(error).__name__
        raise Refused(
            "unsupported_data", f"{repo} cannot be read: no such part, or damaged ({kind})."
        ) from None


def _describe_status(status: int, *, repo: str) -> Refused:
    if status in (401, 403):
        return Refused("hub_gated", f"The hub does not let us read {repo}.")
    if status == 404:
        return Refused("hub_not_found", f"The hub has no {repo} at this revision, or hides it.")
    return Refused("hub_unreachable", f"The hub answered with status {status}.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.hub", description=__doc__)
    parser.add_argument("kind", choices=("model", "data"))
    parser.add_argument("repo")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--config")
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit-bytes", type=int, default=sys.maxsize)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args(argv)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # before huggingface_hub is imported
    repo, revision, to = arguments.repo, arguments.revision, arguments.to

    def work() -> dict[str, Any]:
        if arguments.kind == "model":
            return fetch_model(repo, revision=revision, to=to)
        return fetch_data(
            repo,
            revision=revision,
            config=arguments.config,
            split=arguments.split,
            to=to,
            limit_bytes=arguments.limit_bytes,
        )

    return report_outcome(work, to=arguments.report)


if __name__ == "__main__":
    sys.exit(main())
